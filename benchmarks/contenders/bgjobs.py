"""flask-bgjobs with its defaults: ten threads, or the number of processes given here."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable, Sequence
from typing import ClassVar

from flask import Flask

from ..apps import LOG_LEVEL_VARIABLE
from ..contender import URL_VARIABLE, SqlContender, StoreKind, chunks
from ..processes import environment_with, python

_AT_ONCE = 1_000
"""Jobs per call of ``enqueue_many``, which is one transaction."""
_ANY_URL: dict[StoreKind, str] = {
    "sqlite": "sqlite:///never-opened.db",
    "postgresql": "postgresql+psycopg://nobody@127.0.0.1:1/none",
    "mariadb": "mariadb+pymysql://nobody@127.0.0.1:1/none",
}
"""URLs to check whether a database is supported. They are never connected to."""
COMMANDS = ("-m", "flask", "--app", "benchmarks.apps.bgjobs", "bgjobs")
"""Start of the command line of flask-bgjobs commands."""


class BgJobs(SqlContender):
    """The thread pool, with default options."""

    has_bulk = True
    unsettled_query = "SELECT count(*) FROM bgjobs_job WHERE status <> 'completed'"
    options: ClassVar[Sequence[str]] = ()
    """Options of ``flask bgjobs worker``."""

    @classmethod
    def unavailable(cls) -> str | None:
        if missing := super().unavailable():
            return missing
        answer = subprocess.run(
            python(*COMMANDS, "worker", *cls.options, "--help"),
            env=environment_with({URL_VARIABLE: _ANY_URL[cls.store]}),
            capture_output=True,
            text=True,
            check=False,
        )
        # If the app cannot be loaded, the command is unknown, and the reason is printed first.
        return None if answer.returncode == 0 else _error_in(answer.stderr)

    def prepare(self) -> None:
        # On SQLite this also turns on WAL mode.
        subprocess.run(python(*COMMANDS, "init-db"), stdout=subprocess.DEVNULL, check=True)

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.bgjobs import record

        with self._app.app_context():
            for number in numbers:
                record.enqueue(number)

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        from ..apps.bgjobs import bgjobs, record

        with self._app.app_context():
            for chunk in chunks(numbers, _AT_ONCE):
                bgjobs.enqueue_many(record, [(number,) for number in chunk])

    def worker_command(self) -> list[str]:
        return python(*COMMANDS, "worker", *self.options)

    @functools.cached_property
    def _app(self) -> Flask:
        from ..apps.bgjobs import create_app

        return create_app()


class OnSqlite(BgJobs):
    name = "bgjobs-sqlite"
    title = "flask-bgjobs, 10 threads"
    store = "sqlite"


class OnSqliteLogging(OnSqlite):
    """The thread pool with the two log lines per job that are written by default."""

    name = "bgjobs-sqlite-logs"
    title = "flask-bgjobs, 10 threads, with its log lines"

    def environment(self) -> dict[str, str]:
        return {**super().environment(), LOG_LEVEL_VARIABLE: "INFO"}


class OnSqliteProcesses(OnSqlite):
    name = "bgjobs-sqlite-process"
    title = "flask-bgjobs, process pool of 2"
    options = ("--pool", "process", "--concurrency", "2")


class OnPostgres(BgJobs):
    name = "bgjobs-postgresql"
    title = "flask-bgjobs, 10 threads"
    store = "postgresql"
    needs = ("psycopg",)


class OnPostgresProcesses(OnPostgres):
    name = "bgjobs-postgresql-process"
    title = "flask-bgjobs, process pool of 2"
    options = ("--pool", "process", "--concurrency", "2")


class OnPostgresTwice(OnPostgres):
    name = "bgjobs-postgresql-2"
    title = "flask-bgjobs, 2 processes of 10 threads"
    options = ("--processes", "2")


class OnMariadb(BgJobs):
    name = "bgjobs-mariadb"
    title = "flask-bgjobs, 10 threads"
    store = "mariadb"
    needs = ("pymysql",)


class OnMariadbProcesses(OnMariadb):
    name = "bgjobs-mariadb-process"
    title = "flask-bgjobs, process pool of 2"
    options = ("--pool", "process", "--concurrency", "2")


CONTENDERS = (
    OnSqlite,
    OnSqliteLogging,
    OnSqliteProcesses,
    OnPostgres,
    OnPostgresProcesses,
    OnPostgresTwice,
    OnMariadb,
    OnMariadbProcesses,
)


BY_STORE = (OnSqlite, OnPostgres, OnMariadb)
"""One contender on each database, for measurements of flask-bgjobs alone."""


def _error_in(output: str) -> str:
    """The line of a command's output that contains the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "NotSupported" in line]
    return (errors or lines or ["its command does not work"])[-1]
