"""Huey on an SQLite file."""

from __future__ import annotations

import os

import sqlalchemy as sa
from huey import SqliteHuey

from .. import journal, tracing
from ..contender import URL_VARIABLE

tracing.install()
huey = SqliteHuey(filename=sa.make_url(os.environ[URL_VARIABLE]).database)


@huey.task()
def record(number: int) -> None:
    """The measured job."""
    journal.record(number)
