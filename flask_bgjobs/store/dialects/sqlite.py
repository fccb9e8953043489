"""SQLite: one writer at a time, so every transaction of ours takes the write lock first."""

from __future__ import annotations

import contextlib
import datetime as dt
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
from ..statements.settle import COMPLETION_TYPES
from .sqlite_file import file_of
from .sqlite_types import LENIENT_TYPES

_BUSY_TIMEOUT_MS = 5_000
"""SQLite's own wait for the write lock; then the transaction is redone with jitter."""
_WATCH_SECONDS, _QUIET_WATCH_SECONDS = 0.005, 0.015
"""How often it is looked whether somebody has committed: one look costs microseconds."""
_LOCK_LOOKS, _LOCK_LOOK_SECONDS = 10, 0.02
"""Looks at a lock that the host may hold, before it is said that it does."""
_STEPS_PER_LOOK = 10_000
"""Of SQLite's machine, between two looks at the time that a query takes; less than 1 ms."""
_CLOCK = "%Y-%m-%d %H:%M:%f000"
"""SQLite's clock has milliseconds; the zeros keep all times the same length, so that they
compare as text."""
_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        "another connection holds the write lock: look for a transaction that is left open, and "
        "commit sooner"
    ),
    sqlite3.SQLITE_READONLY: (
        "this user must be allowed to write the file, and to make files in its folder"
    ),
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_TOOBIG: "it is larger than SQLITE_LIMIT_LENGTH, 1 GB by default",
    sqlite3.SQLITE_NOTADB: "it is not a SQLite database, or it is encrypted with another key",
    sqlite3.SQLITE_CANTOPEN: (
        "the folder must be there, and this user must be allowed to make files in it"
    ),
}
"""What to do about an error, by SQLite's code."""


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
        self._turns_wal_on = False
        if self._file is not None:
            self._file.add_user(self)

    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        return sa.func.strftime(
            _CLOCK, time, sa.func.printf("%.6f seconds", seconds), type_=UtcTime
        )

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        each = sa.func.json_each(array).table_valued("key", "value")
        return each.c.key, each.c.value

    def completions(self, array: sa.BindParameter[str]) -> sa.FromClause:
        completion = sa.func.json_each(array).table_valued("value").c.value
        fields = (
            sa.func.json_extract(completion, f"$.{name}", type_=kind).label(name)
            for name, kind in COMPLETION_TYPES.items()
        )
        return sa.select(*fields).subquery("ended")

    @property
    def always_joins(self) -> bool:
        return is_in_memory(self.host_engine)

    def prepare(self, *, wal: bool) -> str | None:
        if self._file is None:
            return None
        if kind := network_file_system(self._file.path):
            # There WAL would need memory that machines share, and spoil the database.
            _logger.warning(
                "The SQLite file lies on a network file system (%s), where locks cannot be relied "
                "on and WAL mode is left alone: use a local disk, or PostgreSQL | File: %s",
                kind,
                self._file.path,
            )
            return None
        self._turns_wal_on = wal
        return self.redo(self._turn_wal_on) if wal else None

    def _turn_wal_on(self) -> str | None:
        # Needs the database to itself for a moment, and SQLite does not wait for that.
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            before = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
            if before == "wal":
                return None
            after = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
        if after != "wal":
            return f"SQLite keeps journal_mode {after}; readers and writers wait for each other"
        return "SQLite's WAL mode is now on for this database (BGJOBS_SQLITE_WAL)"

    @property
    def engine(self) -> sa.Engine:
        """Our own engine, with connections to the file that is there now."""
        if self._file is not None:
            try:
                self._file.look()
            except sqlite3.OperationalError as error:
                raise OperationalError("open", None, error) from None
        return super().engine

    def with_deadline(self, seconds: float) -> Self:
        """A store of the same database with connections of its own.

        It needs no deadline: a file has no link that could fall silent, and who waits for the lock
        has waited long enough after a while in any case.
        """
        return self._for_a_worker(None)

    def pool_advice(self) -> str | None:
        if self.always_joins or not isinstance(self.host_engine.pool, sa.SingletonThreadPool):
            return None
        return (
            "SQLAlchemy's pool SingletonThreadPool, the default of SQLCipher, closes connections "
            "that other threads use, and that can end the process: set SQLALCHEMY_ENGINE_OPTIONS = "
            '{"poolclass": sqlalchemy.QueuePool}'
        )

    def reconnect_if_replaced(self) -> None:
        if self._file is not None:
            # That there is no file is for those to say who need it.
            with contextlib.suppress(sqlite3.OperationalError):
                self._file.look()

    def leave_file(self) -> None:
        """Close the connections to a file that is no longer the database, the host's as well."""
        with self._own_engine_lock:
            if self._own_engine is not None:
                self._own_engine.dispose()
        self.host_engine.dispose()
        self._known_queues.clear()

    def register_worker(self, values: Mapping[str, Any]) -> int:
        """The id of a new, living worker: the time in milliseconds, or the next higher one.

        So the ids of one file are not those of another by which it is replaced, and an outcome
        that a worker still holds cannot hit a job of the other file.
        """
        next_one = sa.select(sa.func.coalesce(sa.func.max(WORKERS.c.id), 0) + 1).scalar_subquery()
        now = time.time_ns() // 1_000_000
        worker_id = super().register_worker({**values, "id": sa.func.max(next_one, now)})
        if self._file is not None:
            self._file.add_worker(worker_id)
        return worker_id

    def beat(self, worker_id: int) -> bool:
        """Show that a worker lives. ``False``: it must start over, as its row or its file is gone.

        Also in a copy of its file that has its row: that may be from a time when it ran other
        jobs, and they are rescued only when their worker falls silent.
        """
        alive = super().beat(worker_id)
        if self._file is None or self._file.has_worker(worker_id):
            return alive
        if self._turns_wal_on and (notice := self.redo(self._turn_wal_on)):
            _logger.info(notice)
        return False

    def listen(
        self,
        stopped: threading.Event,
        on_news: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Watch the number that SQLite gives to the newest commit of other connections."""
        assert self._file is not None, "no worker shares a database in memory"
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            number = self._file.number
            driver_connection: Any = connection.connection.driver_connection
            seen = None
            # A connection to a file that was replaced must be closed.
            while self._file.number == number:
                newest = self._data_version(driver_connection)
                if newest is not None and newest != seen:
                    seen = newest
                    on_news()
                if stopped.wait(_QUIET_WATCH_SECONDS if is_quiet() else _WATCH_SECONDS):
                    return

    def would_wait_for_the_host(self) -> bool:
        if not self._host.holds_write_lock():
            return False
        # The session has run something else than a plain SELECT; whether it wrote is not known.
        return self.always_joins or self._stays_locked()

    def _stays_locked(self) -> bool:
        """Whether nobody can write, and not only for the moment that others need."""
        with self.engine.connect().execution_options(**{AUTOCOMMIT: True}) as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                return not any(_can_write(connection) for _ in range(_LOCK_LOOKS))
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")

    def _data_version(self, connection: sqlite3.Connection) -> int | None:
        """A number that each commit of another connection changes; ``None`` while one has locked
        the file exclusively."""
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
            # That of SQLCipher would close connections that other threads use.
            poolclass=sa.QueuePool,
            max_overflow=-1,
            hide_parameters=True,
        )
        engine.dialect.colspecs = {**engine.dialect.colspecs, **LENIENT_TYPES}
        forward(self.host_engine, engine, self.watched)
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
        return engine

    @contextlib.contextmanager
    def read(self, *, within: float | None = None) -> Iterator[sa.Connection]:
        is_shared = self.always_joins and self.outer_connection is None
        if is_shared and self.host_session().in_transaction():
            # Closing a second connection would roll the one database connection back.
            yield self.host_session().connection(
                bind_arguments={"bind": self.host_engine},
                execution_options=self.execution_options,
            )
            return
        with super().read(within=within) as connection:
            yield connection

    @property
    def _seen(self) -> sa.Select[Any]:
        files = sa.func.pragma_database_list().table_valued("name", "file")
        return sa.select(files.c.file.label("file")).where(files.c.name == (self.schema or "main"))

    @contextlib.contextmanager
    def ending_queries(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        driver_connection: Any = connection.connection.driver_connection
        ends_at = 0.0

        def begin(*_: object) -> None:
            nonlocal ends_at
            ends_at = time.monotonic() + seconds

        sa.event.listen(connection, "before_cursor_execute", begin)
        driver_connection.set_progress_handler(lambda: time.monotonic() > ends_at, _STEPS_PER_LOOK)
        try:
            yield
        finally:
            driver_connection.set_progress_handler(None, 0)

    def is_timeout(self, error: DBAPIError) -> bool:
        return _primary_code(error) == sqlite3.SQLITE_INTERRUPT

    def is_lock_timeout(self, error: DBAPIError) -> bool:
        # There are no locks of rows.
        return False

    def is_too_large(self, error: DBAPIError) -> bool:
        return _primary_code(error) == sqlite3.SQLITE_TOOBIG

    def is_redoable(self, error: DBAPIError) -> bool:
        return _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _can_write(connection: sa.Connection) -> bool:
    """Whether the write lock is free; a while later, where it is not."""
    try:
        # Without WAL, a reader keeps others from committing: only EXCLUSIVE notices it.
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
        connection.exec_driver_sql("ROLLBACK")
    except OperationalError as error:
        # The second one is that of a cache that connections share.
        if _primary_code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise
        time.sleep(_LOCK_LOOK_SECONDS)
        return False
    return True


def is_in_memory(engine: sa.Engine) -> bool:
    """Whether the database lives in one connection only."""
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
    """What to do about an error of SQLite, for those that say too little; nothing was changed."""
    return _ADVICE.get(_primary_code(error))


def _primary_code(error: SQLAlchemyError) -> int:
    """SQLite's own code without its refinements; 0 for errors that have none."""
    code: int = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF


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
    if not options.get(AUTOCOMMIT):
        connection.exec_driver_sql("BEGIN" if options.get(READ_ONLY) else "BEGIN IMMEDIATE")
