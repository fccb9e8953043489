"""The host app: the harness enqueues through it, and the workers serve it."""

from __future__ import annotations

import random
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs, job_completed, job_rescued, job_retrying, job_started

from . import jobs
from .settings import Settings

HEARTBEAT_SECONDS = 0.3
LEASE_SECONDS = 3.0
_WRITING_SHARE = 0.1
"""The share of receiver calls that write a row."""
MAX_CRASHES = 5
"""Two more than the default, because a kill from outside is blamed on the suspect that it hits."""


def create_app() -> Flask:
    """The app in a worker."""
    return build_app(Settings.from_environment())


def build_app(settings: Settings) -> Flask:
    """The app, with the chaos jobs allowed and a short lease. Does not create the tables."""
    app = Flask("chaos")
    app.config.update(
        SECRET_KEY="chaos",
        SQLALCHEMY_DATABASE_URI=settings.url,
        BGJOBS_ALLOWED_JOBS=[f"tests.chaos.jobs.{job.__name__}" for job in jobs.ALL],
        BGJOBS_DASHBOARD=False,
        BGJOBS_HEARTBEAT_INTERVAL=HEARTBEAT_SECONDS,
        BGJOBS_LEASE=LEASE_SECONDS,
        BGJOBS_MAX_CRASHES=MAX_CRASHES,
        BGJOBS_POLL_INTERVAL=0.2,
    )
    db = SQLAlchemy(metadata=sa.MetaData(schema=settings.schema))
    # The host writes a row of this table in the transaction that a job joins.
    db.Table("chaos_order", sa.Column("token", sa.Integer, primary_key=True, autoincrement=False))
    db.Table(
        "chaos_history",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.BigInteger, nullable=False),
        sa.Column("old_attempt", sa.Integer),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("old_status", sa.String(16)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("retry_count", sa.Integer, nullable=False),
        sa.Column("worker_id", sa.BigInteger),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sqlite_autoincrement=True,
    )
    db.init_app(app)
    BgJobs(app)
    for signal in (job_started, job_completed, job_retrying, job_rescued):
        signal.connect(_use_session, app)
    return app


def _use_session(app: Flask, **_values: object) -> None:
    """A receiver that leaves a transaction open and sometimes writes in it."""
    session: Any = app.extensions["sqlalchemy"].session
    orders = table(app, "chaos_order")
    session.execute(sa.select(orders).limit(1)).all()
    if random.random() < _WRITING_SHARE:
        session.execute(sa.insert(orders).values(token=-random.randrange(1, 10**9)))


def table(app: Flask, name: str) -> sa.Table:
    """A table of the app, in whichever schema it is."""
    metadata: Any = app.extensions["sqlalchemy"].metadata
    found: sa.Table = metadata.tables[f"{metadata.schema}.{name}" if metadata.schema else name]
    return found
