"""Sending mail: by SMTP where a server is configured, else only into the outbox page."""

from __future__ import annotations

import smtplib
from email.message import EmailMessage

from flask import current_app

from .models import OutboxMail

TIMEOUT_SECONDS = 10


class MailDelayed(Exception):
    """The server cannot take the mail now, and may later."""


class MailRefused(Exception):
    """The server will never take this mail."""


def deliver(mail: OutboxMail) -> str:
    """Send ``mail``, and return by what: ``smtp`` or ``outbox``.

    :raises MailDelayed: when trying again later makes sense.
    :raises MailRefused: when it does not.
    """
    if not current_app.config["SHOP_SMTP_HOST"]:
        return "outbox"
    try:
        _send(_message(mail))
    except (smtplib.SMTPRecipientsRefused, smtplib.SMTPResponseException) as error:
        raise _judged(error) from error
    except OSError as error:  # of which SMTPException is one
        raise MailDelayed(f"{type(error).__name__}: {error}") from error
    return "smtp"


def _send(message: EmailMessage) -> None:
    config = current_app.config
    with smtplib.SMTP(
        config["SHOP_SMTP_HOST"], config["SHOP_SMTP_PORT"], timeout=TIMEOUT_SECONDS
    ) as server:
        if config["SHOP_SMTP_STARTTLS"]:
            server.starttls()
        if config["SHOP_SMTP_USER"]:
            server.login(config["SHOP_SMTP_USER"], config["SHOP_SMTP_PASSWORD"] or "")
        server.send_message(message)


def _message(mail: OutboxMail) -> EmailMessage:
    sender = current_app.config["SHOP_MAIL_FROM"]
    message = EmailMessage()
    message["From"] = sender
    message["To"] = mail.recipient
    message["Subject"] = mail.subject
    # The same each time it is sent, so that mail programs show a repeated mail once.
    message["Message-ID"] = f"<receipt-{mail.order_id}@{sender.rpartition('@')[2]}>"
    message.set_content(mail.body)
    return message


def _judged(
    error: smtplib.SMTPRecipientsRefused | smtplib.SMTPResponseException,
) -> MailDelayed | MailRefused:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    else:
        codes = [error.smtp_code]
    # RFC 5321: 5xx is permanent, 4xx (and -1, a lost connection) is not.
    kind = MailRefused if all(code >= 500 for code in codes) else MailDelayed
    return kind(f"{type(error).__name__}: {error}")
