"""SQLite. It has one writer at a time, so our transactions take the write lock when they begin."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from ...models import UtcTime
from ...system.mounts import network_file_system
from ...system.safe_logging import logger as _logger
from ..base import Store
from ..connections import forward
from ..database import AUTOCOMMIT, READ_ONLY, WORKERS
from .sqlite_file import file_of
from .sqlite_types import LENIENT_TYPES

_BUSY_TIMEOUT_MS = 5_000
"""How long SQLite waits for the write lock. After that, the transaction is redone with jitter."""
_WATCH_SECONDS, _QUIET_WATCH_SECONDS = 0.005, 0.015
"""Intervals for checking whether another connection has committed. The second applies while there
is no work. One check costs microseconds."""
_LOCK_CHECKS, _LOCK_CHECK_SECONDS = 10, 0.02
"""Number and interval of attempts to get the write lock before the host is taken for its holder."""
_STEPS_PER_CHECK = 10_000
"""Steps of SQLite's virtual machine between two checks of a query's run time; less than 1 ms."""
_CLOCK = "%Y-%m-%d %H:%M:%f000"
"""Format of times. SQLite's clock has milliseconds. The zeros give all times the same length, so
that they can be compared as text."""
_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        "another connection holds the write lock: look for a transaction that was left open, or "
        "commit sooner"
    ),
    sqlite3.SQLITE_READONLY: (
        "this user must be allowed to write the file, and to create files in its folder"
    ),
    sqlite3.SQLITE_FULL: "free up space on the disk",
    sqlite3.SQLITE_TOOBIG: "it is larger than SQLITE_LIMIT_LENGTH, 1 GB by default",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database, or it is encrypted with another key",
    sqlite3.SQLITE_CANTOPEN: (
        "the folder must exist, and this user must be allowed to create files in it"
    ),
}
"""Advice on errors, by SQLite's result code."""


class SqliteStore(Store):
    """The statements on SQLite 3.35 or newer."""

    drivers = ("pysqlite", "pysqlcipher")
    now = sa.func.strftime(_CLOCK, "now", type_=UtcTime)
    has_one_writer = True
    can_listen = True
    insert_into = staticmethod(sqlite.insert)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = None if self.always_joins else file_of(self.host_engine)
        self._wal_wanted = False
        if self._file is not None:
            self._file.add_owner(self)

    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        return sa.func.strftime(
            _CLOCK, time, sa.func.printf("%.6f seconds", seconds), type_=UtcTime
        )

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        element = sa.func.json_each(array).table_valued("key", "value")
        return element.c.key, element.c.value

    def json_lists(self, array: sa.BindParameter[str], length: int) -> tuple[Any, list[Any]]:
        each = sa.func.json_each(array).table_valued("key", "value")
        strings = [sa.func.json_extract(each.c.value, f"$[{n}]") for n in range(length)]
        return each.c.key, strings

    def json_rows(
        self, array: sa.BindParameter[str], types: Mapping[str, sa.types.TypeEngine[Any]]
    ) -> sa.FromClause:
        each = sa.func.json_each(array).table_valued("value").c.value
        fields = (
            sa.func.json_extract(each, f"$.{name}", type_=kind).label(name)
            for name, kind in types.items()
        )
        return sa.select(*fields).subquery("given")

    @property
    def always_joins(self) -> bool:
        return is_in_memory(self.host_engine)

    def prepare(self, *, wal: bool) -> str | None:
        if self._file is None:
            return None
        if kind := network_file_system(self._file.path):
            # WAL needs shared memory, which machines do not have: it would corrupt the database.
            _logger.warning(
                "The SQLite file is on a network file system (%s), where locks are unreliable, so "
                "WAL mode is left unchanged: use a local disk, or PostgreSQL | File: %s",
                kind,
                self._file.path,
            )
            return None
        self._wal_wanted = wal
        return self.redo(self._turn_wal_on) if wal else None

    def _turn_wal_on(self) -> str | None:
        # The change needs exclusive access for a moment, and SQLite does not wait for it.
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            before = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
            if before == "wal":
                return None
            after = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
        if after != "wal":
            return f"SQLite keeps journal_mode {after}; readers and writers block each other"
        return "SQLite's WAL mode is now on for this database (BGJOBS_SQLITE_WAL)"

    @property
    def engine(self) -> sa.Engine:
        """Our own engine. Its connections are to the current database file."""
        if self._file is not None:
            try:
                self._file.check()
            except sqlite3.OperationalError as error:
                raise OperationalError("open", None, error) from None
        return super().engine

    def with_deadline(self, seconds: float) -> Self:
        """A store for the same database, with its own connections and without a deadline.

        A file needs no deadline: it has no network connection that could fail, and the wait for the
        write lock has its own limit.
        """
        return self._for_a_worker(None)

    def pool_advice(self) -> str | None:
        if self.always_joins or not isinstance(self.host_engine.pool, sa.SingletonThreadPool):
            return None
        return (
            "SQLAlchemy's pool SingletonThreadPool, the default of SQLCipher, closes connections "
            "that other threads use, which can crash the process: set SQLALCHEMY_ENGINE_OPTIONS = "
            '{"poolclass": sqlalchemy.QueuePool}'
        )

    def reconnect_if_replaced(self) -> None:
        if self._file is not None:
            # The next use of a connection raises the error about a missing file.
            with contextlib.suppress(sqlite3.OperationalError):
                self._file.check()

    def close_file_connections(self) -> None:
        """Close our connections and the host's, because the database file was replaced."""
        with self._own_engine_lock:
            if self._own_engine is not None:
                self._own_engine.dispose()
        self.host_engine.dispose()
        self._known_queues.clear()

    def register_worker(self, values: Mapping[str, Any]) -> int:
        """Register a worker. Its id is the time in milliseconds, or higher if that id is taken.

        If another file replaces the database, no worker has the same id in both. So an outcome that
        a worker still holds cannot be written to a job of the other file.
        """
        next_one = sa.select(sa.func.coalesce(sa.func.max(WORKERS.c.id), 0) + 1).scalar_subquery()
        now = time.time_ns() // 1_000_000
        worker_id = super().register_worker({**values, "id": sa.func.max(next_one, now)})
        if self._file is not None:
            self._file.add_worker(worker_id)
        return worker_id

    def beat(self, worker_id: int) -> bool:
        """Write the heartbeat of a worker.

        :returns: ``False``: the worker must register again, because its row or its file is gone.
            Also ``False`` if a backup with its row has replaced the file: the jobs that it ran at
            the time of the backup are rescued only if that row gets no more heartbeats.
        """
        alive = super().beat(worker_id)
        if self._file is None or self._file.has_worker(worker_id):
            return alive
        if self._wal_wanted and (notice := self.redo(self._turn_wal_on)):
            _logger.info(notice)
        return False

    def listen(
        self,
        stopped: threading.Event,
        wake: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Poll SQLite's ``data_version``, which changes when another connection commits."""
        assert self._file is not None, "a database in memory has no workers"
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            generation = self._file.generation
            driver_connection: Any = connection.connection.driver_connection
            last_version = None
            # If the file was replaced, this connection must be closed.
            while self._file.generation == generation:
                version = self._data_version(driver_connection)
                if version is not None and version != last_version:
                    last_version = version
                    wake()
                if stopped.wait(_QUIET_WATCH_SECONDS if is_quiet() else _WATCH_SECONDS):
                    return

    def would_wait_for_the_host(self) -> bool:
        if not self._host.holds_write_lock():
            return False
        # The session has run a statement other than SELECT, which may or may not have written.
        return self.always_joins or self._stays_locked()

    def _stays_locked(self) -> bool:
        """Whether the write lock stays held for longer than a short transaction needs."""
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            _set_busy_timeout(connection, 0)
            try:
                return not any(_can_write(connection) for _ in range(_LOCK_CHECKS))
            finally:
                _set_busy_timeout(connection, _BUSY_TIMEOUT_MS)

    def _data_version(self, connection: sqlite3.Connection) -> int | None:
        """SQLite's ``data_version``; ``None`` while another connection has an exclusive lock."""
        try:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
        except self.host_engine.dialect.loaded_dbapi.OperationalError:
            return None
        return int(version)

    def make_engine(self) -> sa.Engine:
        if self.always_joins:
            return self.host_engine
        engine = sa.create_engine(
            self.host_engine.url,
            creator=self.connect_as_host,
            # The default pool of SQLCipher closes connections that other threads use.
            poolclass=sa.QueuePool,
            max_overflow=-1,
            hide_parameters=True,
        )
        engine.dialect.colspecs = {**engine.dialect.colspecs, **LENIENT_TYPES}
        forward(self.host_engine, engine, self.watched)
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", self._on_begin)
        return engine

    def _on_begin(self, connection: sa.Connection) -> None:
        if math.isfinite(self.give_up_at):
            left_ms = max(0, round(self.seconds_left() * 1_000))
            _set_busy_timeout(connection, min(_BUSY_TIMEOUT_MS, left_ms))
        options = connection.get_execution_options()
        if not options.get(AUTOCOMMIT):
            connection.exec_driver_sql("BEGIN" if options.get(READ_ONLY) else "BEGIN IMMEDIATE")

    @contextlib.contextmanager
    def read(self, *, within: float | None = None) -> Iterator[sa.Connection]:
        is_shared = self.always_joins and self.outer_connection is None
        if is_shared and self.host_session().in_transaction():
            # Both would share one driver connection, and closing ours would roll back the host's.
            yield self.host_session().connection(
                bind_arguments={"bind": self.host_engine},
                execution_options=self.execution_options,
            )
            return
        with super().read(within=within) as connection:
            yield connection

    @property
    def _session_settings(self) -> sa.Select[Any]:
        files = sa.func.pragma_database_list().table_valued("name", "file")
        return sa.select(files.c.file.label("file")).where(files.c.name == (self.schema or "main"))

    @contextlib.contextmanager
    def query_timeout(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        driver_connection: Any = connection.connection.driver_connection
        deadline = 0.0

        def start_timer(*_: object) -> None:
            nonlocal deadline
            deadline = time.monotonic() + seconds

        sa.event.listen(connection, "before_cursor_execute", start_timer)
        driver_connection.set_progress_handler(
            lambda: time.monotonic() > deadline, _STEPS_PER_CHECK
        )
        try:
            yield
        finally:
            driver_connection.set_progress_handler(None, 0)

    def is_timeout(self, error: DBAPIError) -> bool:
        return _primary_code(error) == sqlite3.SQLITE_INTERRUPT

    def is_lock_timeout(self, error: DBAPIError) -> bool:
        # SQLite has no row locks.
        return False

    def is_too_large(self, error: DBAPIError) -> bool:
        return _primary_code(error) == sqlite3.SQLITE_TOOBIG

    def is_redoable(self, error: DBAPIError) -> bool:
        return _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _can_write(connection: sa.Connection) -> bool:
    """Whether the write lock is free. If it is not, return after a pause."""
    try:
        # Without WAL, a reader prevents commits, and only EXCLUSIVE detects a reader.
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
        connection.exec_driver_sql("ROLLBACK")
    except OperationalError as error:
        # SQLITE_LOCKED occurs if connections share a cache.
        if _primary_code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise
        time.sleep(_LOCK_CHECK_SECONDS)
        return False
    return True


def is_in_memory(engine: sa.Engine) -> bool:
    """Whether the engine's database is SQLite in memory, which only one connection can use."""
    url = engine.url
    if url.get_backend_name() != "sqlite":
        return False
    return (
        not url.database
        or url.database == ":memory:"
        or url.query.get("mode") == "memory"
        or "mode=memory" in url.database
    )


def advice(error: SQLAlchemyError) -> str | None:
    """Advice on an error of SQLite whose message has none. Such an error has changed nothing."""
    return _ADVICE.get(_primary_code(error))


def _primary_code(error: SQLAlchemyError) -> int:
    """SQLite's primary result code of an error; 0: the error has none."""
    code: int = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF


def _set_busy_timeout(connection: sa.Connection, milliseconds: int) -> None:
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {milliseconds}")


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    # By default, sqlite3 begins a deferred transaction, whose later write can fail at once.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    # A job to which a row of the host refers must not be deleted, as with other databases.
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
