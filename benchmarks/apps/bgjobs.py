"""A Flask app with flask-bgjobs."""

from __future__ import annotations

import logging
import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs

from .. import journal, tracing
from ..contender import URL_VARIABLE
from . import LOG_LEVEL_VARIABLE

tracing.install()
db = SQLAlchemy()
bgjobs = BgJobs()


FULL, FULL_LIMIT = "full", {"concurrency": 1}
"""Name and numbers of a limit that no job passes, because the measurement pauses it."""


@bgjobs.job
def record(number: int) -> None:
    """The measured job."""
    journal.record(number)


def create_app() -> Flask:
    """Build the app for the database named in the environment."""
    logging.getLogger("flask_bgjobs").setLevel(os.environ.get(LOG_LEVEL_VARIABLE, "WARNING"))
    app = Flask("benchmark")
    app.config.update(
        SECRET_KEY="benchmark",
        SQLALCHEMY_DATABASE_URI=os.environ[URL_VARIABLE],
        BGJOBS_DASHBOARD_PUBLIC=True,
        BGJOBS_LIMITS={FULL: FULL_LIMIT},
    )
    db.init_app(app)
    bgjobs.init_app(app)
    return app
