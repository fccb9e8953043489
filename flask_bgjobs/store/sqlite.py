"""SQLite: one writer at a time, so every transaction of ours takes the write lock first."""

from __future__ import annotations

import contextlib
import datetime as dt
import sqlite3
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError

from ..models import UtcTime
from ..spec import JobSpec
from ..states import JobStatus
from .base import Store
from .claims import SPEC_COLUMNS
from .database import JOBS

_BUSY_TIMEOUT_MS = 5_000
"""SQLite's own wait for the write lock; then the transaction is redone with jitter."""
_CLOCK = "%Y-%m-%d %H:%M:%f000"
"""SQLite's clock has milliseconds; the zeros keep all times the same length, so that they
compare as text."""
_READ_ONLY = "bgjobs_read_only"
_NO_BEGIN = "bgjobs_no_begin"


class SqliteStore(Store):
    """The statements on SQLite 3.35 or newer."""

    now = sa.func.strftime(_CLOCK, "now", type_=UtcTime)
    has_one_writer = True
    insert_into = staticmethod(sqlite.insert)

    def after(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[dt.datetime]:
        return sa.func.strftime(
            _CLOCK, "now", sa.func.printf("%.6f seconds", seconds), type_=UtcTime
        )

    @property
    def always_joins(self) -> bool:
        return is_in_memory(self.host_engine)

    def prepare(self, *, wal: bool) -> str | None:
        if not wal or self.always_joins:
            return None
        return self.redo(self._turn_wal_on)

    def _turn_wal_on(self) -> str | None:
        # Needs the database to itself for a moment, and SQLite does not wait for that.
        with self.engine.connect().execution_options(**{_NO_BEGIN: True}) as connection:
            before = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
            if before == "wal":
                return None
            after = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
        if after != "wal":
            return f"SQLite keeps journal_mode {after}; readers and writers wait for each other"
        return "SQLite's WAL mode is now on for this database (BGJOBS_SQLITE_WAL)"

    def make_engine(self) -> sa.Engine:
        if self.always_joins:
            return self.host_engine
        engine = sa.create_engine(
            self.host_engine.url,
            # The host's own way to connect, with its connect_args.
            creator=self.host_engine.pool._creator,
            max_overflow=-1,
        )
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
        return engine

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        if self.always_joins and self.host_session().in_transaction():
            # Closing a second connection would roll the one database connection back.
            yield self.host_session().connection(
                bind_arguments={"bind": self.host_engine},
                execution_options=self.execution_options,
            )
            return
        with self.engine.connect().execution_options(**{_READ_ONLY: True}) as connection:
            yield connection

    def is_redoable(self, error: DBAPIError) -> bool:
        code = getattr(error.orig, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

    def insert_tolerantly(self, statement: sa.Insert) -> sa.Insert:
        assert isinstance(statement, sqlite.Insert)
        return statement.on_conflict_do_nothing(index_elements=["unique_hash"])

    def claim_from(
        self, connection: sa.Connection, worker_id: int, candidates: sa.Select[Any], limit: int
    ) -> list[JobSpec]:
        rows = connection.execute(
            sa.update(JOBS)
            .where(JOBS.c.id.in_(candidates.limit(limit)))
            .values(
                status=JobStatus.RUNNING.value,
                attempt=JOBS.c.attempt + 1,
                worker_id=worker_id,
                claimed_at=self.now,
                started_at=None,
                finished_at=None,
                progress=None,
                progress_note=None,
            )
            .returning(*SPEC_COLUMNS, JOBS.c.run_at.label("due"))
        ).all()
        # RETURNING promises no order.
        ordered = sorted(rows, key=lambda row: (-row.priority, row.due, row.id))
        return [JobSpec(*row[:-1]) for row in ordered]


def is_in_memory(engine: sa.Engine) -> bool:
    """Whether the database lives in one connection only."""
    url = engine.url
    return (
        not url.database
        or url.database == ":memory:"
        or url.query.get("mode") == "memory"
        or "mode=memory" in url.database
    )


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    # sqlite3 would begin a deferred transaction by itself, and fail to upgrade it later.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    # So that deleting a job that a host's row refers to is refused here as well.
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _on_begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if not options.get(_NO_BEGIN):
        connection.exec_driver_sql("BEGIN" if options.get(_READ_ONLY) else "BEGIN IMMEDIATE")
