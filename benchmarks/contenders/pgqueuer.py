"""PgQueuer on PostgreSQL.

Its guide to performance (https://pgqueuer.readthedocs.io, "Performance Tuning") recommends
batches larger than ten for short jobs (without a number), one asyncpg connection for the worker,
and ``pgq autovac`` after the installation. Its durability setting is the default, so that jobs are
as durable as those of the other queues. A web process without an event loop enqueues with its
synchronous driver. It logs no line per job. Its ``pgq run`` does not start with current versions of
typer, so the documented function ``pgqueuer.run`` is called.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from ..apps import PGQUEUER_BATCH
from ..contender import SqlContender, chunks, libpq_url
from ..processes import python

_AT_ONCE = 1_000
"""Jobs per call of ``enqueue`` with lists, which is one statement."""


class PgQueuer(SqlContender):
    """Batches of 200 on one event loop. PgQueuer deletes finished jobs."""

    name = "pgqueuer"
    title = f"PgQueuer, batches of {PGQUEUER_BATCH}"
    store = "postgresql"
    needs = ("pgqueuer", "asyncpg", "psycopg")
    has_bulk = True
    unsettled_query = "SELECT count(*) FROM pgqueuer"

    def prepare(self) -> None:
        for act in ("install", "autovac"):
            command = python("-m", "pgqueuer", "--pg-dsn", libpq_url(self.url), act)
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.pgqueuer import ENTRYPOINT

        for number in numbers:
            self._queries.enqueue(ENTRYPOINT, str(number).encode())

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        from ..apps.pgqueuer import ENTRYPOINT

        for chunk in chunks(numbers, _AT_ONCE):
            payloads = [str(number).encode() for number in chunk]
            self._queries.enqueue([ENTRYPOINT] * len(chunk), payloads, [0] * len(chunk))

    def worker_command(self) -> list[str]:
        return python("-m", "benchmarks.apps.pgqueuer")

    @functools.cached_property
    def _queries(self) -> Any:
        import psycopg
        from pgqueuer.db import SyncPsycopgDriver
        from pgqueuer.queries import SyncQueries

        connection = psycopg.connect(libpq_url(self.url), autocommit=True)
        return SyncQueries(SyncPsycopgDriver(connection))


CONTENDERS = (PgQueuer,)
