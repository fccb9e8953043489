"""Procrastinate on PostgreSQL.

For more throughput, its documentation recommends async jobs and a higher concurrency
(https://procrastinate.readthedocs.io, "Execute multiple jobs at the same time") without a number
for small jobs; ten is the default of flask-bgjobs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from ..contender import SqlContender, chunks
from ..processes import python

_AT_ONCE = 1_000
"""Jobs per call of ``batch_defer``, which is one statement."""


class Procrastinate(SqlContender):
    """Ten jobs at once on one event loop."""

    name = "procrastinate"
    title = "Procrastinate, concurrency 10"
    store = "postgresql"
    needs = ("procrastinate", "psycopg")
    has_bulk = True
    jobs = 1_500
    unsettled_query = "SELECT count(*) FROM procrastinate_jobs WHERE status <> 'succeeded'"

    def prepare(self) -> None:
        self._app.schema_manager.apply_schema()

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        record = self._app.tasks["benchmarks.apps.procrastinate.record"]
        for number in numbers:
            record.defer(number=number)

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        record = self._app.tasks["benchmarks.apps.procrastinate.record"]
        for chunk in chunks(numbers, _AT_ONCE):
            record.batch_defer(*({"number": number} for number in chunk))

    def worker_command(self) -> list[str]:
        app = "--app=benchmarks.apps.procrastinate.app"
        return python(
            "-m", "procrastinate", app, "--log-level=warning", "worker", "--concurrency=10"
        )

    @functools.cached_property
    def _app(self) -> Any:
        from ..apps.procrastinate import app

        app.open()
        return app


CONTENDERS = (Procrastinate,)
