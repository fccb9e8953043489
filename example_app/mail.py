"""Mail delivery: by SMTP if a server is configured, otherwise only to the outbox page."""

from __future__ import annotations

import smtplib
from email.message import EmailMessage

from flask import current_app

from .models import OutboxMail

TIMEOUT_SECONDS = 10


class MailDelayed(Exception):
    """The server does not accept the mail at the moment, but may accept it later."""


class MailRefused(Exception):
    """The server will never accept this mail."""


def deliver(mail: OutboxMail) -> str:
    """Send a mail.

    :returns: the transport: ``smtp`` or ``outbox``.
    :raises MailDelayed: when a later attempt may succeed.
    :raises MailRefused: when no later attempt can succeed.
    """
    if not current_app.config["SHOP_SMTP_HOST"]:
        return "outbox"
    try:
        _send(_message(mail))
    except (smtplib.SMTPRecipientsRefused, smtplib.SMTPResponseException) as error:
        raise _classified(error) from error
    except OSError as error:  # includes SMTPException
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
    # The same for each attempt, so that mail programs show a repeated mail only once.
    message["Message-ID"] = f"<receipt-{mail.order_id}@{sender.rpartition('@')[2]}>"
    message.set_content(mail.body)
    return message


def _classified(
    error: smtplib.SMTPRecipientsRefused | smtplib.SMTPResponseException,
) -> MailDelayed | MailRefused:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    else:
        codes = [error.smtp_code]
    # RFC 5321: 5xx is permanent, 4xx (and -1, a lost connection) is not.
    kind = MailRefused if all(code >= 500 for code in codes) else MailDelayed
    return kind(f"{type(error).__name__}: {error}")
