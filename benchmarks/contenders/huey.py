"""Huey on an SQLite file.

Its documentation recommends processes for CPU-bound work, and threads when in doubt
(https://huey.readthedocs.io/en/latest/consumer.html, "Worker types") and names no number; here it
is two, one for each processor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from ..contender import SqlContender
from ..processes import python

_APP = "benchmarks.apps.huey.huey"
_COMMAND = ("-m", "huey.bin.huey_consumer", _APP, "--quiet", "--workers", "2", "--worker-type")


class Huey(SqlContender):
    """Two workers. Huey takes jobs one by one and deletes them before they run."""

    store = "sqlite"
    needs = ("huey",)
    jobs = 10_000
    unsettled_query = "SELECT count(*) FROM task"
    worker_type: ClassVar[str]

    def prepare(self) -> None:
        # Importing the module creates the tables.
        pass

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.huey import record

        for number in numbers:
            record(number)

    def worker_command(self) -> list[str]:
        return python(*_COMMAND, self.worker_type)


class HueyThreads(Huey):
    name = "huey-sqlite"
    title = "Huey, 2 threads"
    worker_type = "thread"


class HueyProcesses(Huey):
    name = "huey-sqlite-process"
    title = "Huey, 2 processes"
    worker_type = "process"


CONTENDERS = (HueyThreads, HueyProcesses)
