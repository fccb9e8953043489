"""Procrastinate on PostgreSQL."""

from __future__ import annotations

import os

from procrastinate import App, PsycopgConnector

from .. import journal
from ..contender import URL_VARIABLE, libpq_url

app = App(connector=PsycopgConnector(conninfo=libpq_url(os.environ[URL_VARIABLE])))


@app.task
async def record(number: int) -> None:
    """The measured job. It is async, because a plain function would need a thread."""
    journal.record(number)
