"""The shop's configuration: the allow-list, and values from the environment.

========================  ==============================================================
variable                  meaning
========================  ==============================================================
``SHOP_DATABASE_URL``     ``postgresql+psycopg://…`` or ``mysql+pymysql://…``; by default SQLite
                          in the instance folder
``SHOP_SECRET_KEY``       signs sessions; by default generated once and kept in the instance folder
``SHOP_ADMIN_PASSWORD``   for ``flask seed``; by default generated and kept in the same way
``SHOP_INSTANCE_PATH``    another instance folder
``SHOP_SMTP_HOST``        mail server; without it, mail is only shown on the outbox page
``SHOP_SMTP_PORT``        25 by default
``SHOP_SMTP_STARTTLS``    ``1`` to encrypt
``SHOP_SMTP_USER``        with ``SHOP_SMTP_PASSWORD``, if the server requires a login
``SHOP_MAIL_FROM``        ``shop@example.com`` by default
``SHOP_SHORT_LOG``        ``1`` to log jobs without tracebacks, as the demo does
========================  ==============================================================
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

ALLOWED_JOBS = [
    "example_app.jobs.SampleJob",
    "example_app.jobs.FlakyJob",
    "example_app.jobs.StockCount",
    "example_app.jobs.DeclinedPayment",
]
"""Jobs to run by name. Functions decorated with ``@bgjobs.job`` need not be listed."""

IMAGE_QUEUE, DANGER_QUEUE = "images", "danger"
QUEUE_POOLS = {IMAGE_QUEUE: "process", DANGER_QUEUE: "process"} if hasattr(os, "fork") else {}
"""Queues whose jobs run in child processes. Decoding a photo keeps a processor busy, and a
malicious file may do worse. In a child process it delays no other job and can be stopped. All other
queues use threads."""

MAX_UPLOAD_BYTES = 5 * 1024 * 1024


def instance_path() -> str | None:
    """The folder for the shop's own files, or ``None`` for Flask's default."""
    path = os.environ.get("SHOP_INSTANCE_PATH")
    return os.path.abspath(path) if path else None


def from_environment(instance: Path) -> dict[str, Any]:
    """The values for ``app.config``. Missing files with secrets are created in ``instance``."""
    instance.mkdir(parents=True, exist_ok=True)
    read = os.environ.get
    return {
        "SECRET_KEY": read("SHOP_SECRET_KEY") or kept_secret(instance / "secret_key", 32),
        "SESSION_COOKIE_SAMESITE": "Lax",
        "MAX_CONTENT_LENGTH": MAX_UPLOAD_BYTES,
        "SQLALCHEMY_DATABASE_URI": read("SHOP_DATABASE_URL") or "sqlite:///shop.sqlite",
        "BGJOBS_ALLOWED_JOBS": ALLOWED_JOBS,
        "BGJOBS_IMPORTS": ["example_app.jobs", "example_app.trouble"],
        "BGJOBS_APP": "example_app:create_app",
        "BGJOBS_QUEUE_POOLS": QUEUE_POOLS,
        "SHOP_ADMIN_PASSWORD": read("SHOP_ADMIN_PASSWORD"),
        "SHOP_SMTP_HOST": read("SHOP_SMTP_HOST"),
        "SHOP_SMTP_PORT": int(read("SHOP_SMTP_PORT") or 25),
        "SHOP_SMTP_STARTTLS": read("SHOP_SMTP_STARTTLS") == "1",
        "SHOP_SMTP_USER": read("SHOP_SMTP_USER"),
        "SHOP_SMTP_PASSWORD": read("SHOP_SMTP_PASSWORD"),
        "SHOP_MAIL_FROM": read("SHOP_MAIL_FROM") or "shop@example.com",
    }


def kept_secret(path: Path, size: int) -> str:
    """The random text in the file ``path``, which is created on first use.

    :param size: number of random bytes.
    """
    if not path.exists():
        _write_once(path, secrets.token_urlsafe(size))
    return path.read_text(encoding="ascii").strip()


def _write_once(path: Path, text: str) -> None:
    # Web server and worker may start at the same time. The first link wins, and an incomplete file
    # is never visible.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()
