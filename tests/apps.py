"""The app of the tests and of the programs that they start; it does not need pytest."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs
from flask_bgjobs.models import add_tables
from tests import hosts, jobs, process_jobs

_TABLES = sa.MetaData()
add_tables(_TABLES)


def build_app(database_url: str, **config: Any) -> Flask:
    """An app that allows the test jobs. Does not create the tables.

    :param config: ``TEST_SET_UP`` names a function of ``tests.hosts`` that is called with the app.
    """
    app = Flask("shop")
    app.config.update(
        SECRET_KEY="test",
        SQLALCHEMY_DATABASE_URI=database_url,
        BGJOBS_ALLOWED_JOBS=[*jobs.NAMES, *process_jobs.NAMES],
        BGJOBS_POLL_INTERVAL=0.1,
        BGJOBS_RETRY_DELAY=0.05,
        BGJOBS_HEARTBEAT_INTERVAL=0.2,
        BGJOBS_LEASE=2,
        # Creating its routes takes longer than everything else.
        BGJOBS_DASHBOARD=False,
    )
    app.config.update(config)
    new_database(app)
    BgJobs(app)
    if set_up := app.config.get("TEST_SET_UP"):
        getattr(hosts, set_up)(app)
    return app


def new_database(app: Flask) -> SQLAlchemy:
    """Set up Flask-SQLAlchemy for an app that has no other tables than ours.

    All apps share the metadata: copying our tables takes longer than the rest of setting up an app.
    With a bind key, our tables belong to the metadata of that bind, which is new.
    """
    return SQLAlchemy(app, metadata=None if app.config.get("BGJOBS_BIND_KEY") else _TABLES)


def create_tables(app: Flask) -> None:
    """Create the app's tables unless the database has them."""
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        if not sa.inspect(db.engine).has_table("bgjobs_job"):
            db.create_all()
