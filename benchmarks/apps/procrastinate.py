"""Procrastinate on PostgreSQL."""

from __future__ import annotations

import os

from procrastinate import App, PsycopgConnector

from .. import journal
from ..contender import URL_VARIABLE, libpq_url

app = App(connector=PsycopgConnector(conninfo=libpq_url(os.environ[URL_VARIABLE])))


@app.task
async def record(number: int) -> None:
    """Note that the job runs; on the event loop, because a plain function costs a thread."""
    journal.record(number)
