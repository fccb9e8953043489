"""PgQueuer on PostgreSQL. Run as a module, it is the worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import asyncpg
from pgqueuer import Job, PgQueuer, run

from .. import journal
from ..contender import URL_VARIABLE, libpq_url
from . import PGQUEUER_BATCH

ENTRYPOINT = "record"


@contextlib.asynccontextmanager
async def create_pgqueuer() -> AsyncIterator[PgQueuer]:
    """The worker with its own connection, as the documentation recommends."""
    connection = await asyncpg.connect(libpq_url(os.environ[URL_VARIABLE]))
    pgqueuer = PgQueuer.from_asyncpg_connection(connection)

    @pgqueuer.entrypoint(ENTRYPOINT)
    async def record(job: Job) -> None:
        journal.record(int(job.payload or b""))

    try:
        yield pgqueuer
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(run(create_pgqueuer, batch_size=PGQUEUER_BATCH))
