"""The app that tests use, and the programs that they start: it needs nothing of pytest."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs
from tests import jobs


def build_app(database_url: str, **config: Any) -> Flask:
    """An app with the test jobs allowed; the tables are not made."""
    app = Flask("shop")
    app.config.update(
        SECRET_KEY="test",
        SQLALCHEMY_DATABASE_URI=database_url,
        BGJOBS_ALLOWED_JOBS=jobs.NAMES,
        BGJOBS_POLL_INTERVAL=0.1,
        BGJOBS_RETRY_DELAY=0.05,
        BGJOBS_HEARTBEAT_INTERVAL=0.2,
        BGJOBS_LEASE=2,
    )
    app.config.update(config)
    db = SQLAlchemy()
    db.init_app(app)
    BgJobs(app)
    return app
