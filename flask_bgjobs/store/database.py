"""One app's database: its clock, our own engine, and transactions that are redone on errors."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import datetime as dt
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import scoped_session

from ..errors import DatabaseUnusable
from ..models import (
    Attempt,
    FairKey,
    FairQueue,
    Job,
    LimitKey,
    LimitRow,
    Notice,
    Queue,
    Rollup,
    Schedule,
    ScheduleTick,
    Seat,
    Weight,
    Worker,
    by_index,
)
from ..system import forks
from ..system.threading_patches import Lock
from .watchdog import Watchdog

T = TypeVar("T")

JOBS = cast(sa.Table, Job.__table__)
WORKERS = cast(sa.Table, Worker.__table__)
ATTEMPTS = cast(sa.Table, Attempt.__table__)
QUEUES = cast(sa.Table, Queue.__table__)
ROLLUPS = cast(sa.Table, Rollup.__table__)
SCHEDULES = cast(sa.Table, Schedule.__table__)
TICKS = cast(sa.Table, ScheduleTick.__table__)
LIMITS = cast(sa.Table, LimitRow.__table__)
LIMIT_KEYS = cast(sa.Table, LimitKey.__table__)
SEATS = cast(sa.Table, Seat.__table__)
FAIR_QUEUES = cast(sa.Table, FairQueue.__table__)
FAIR_KEYS = cast(sa.Table, FairKey.__table__)
WEIGHTS = cast(sa.Table, Weight.__table__)
NOTICES = cast(sa.Table, Notice.__table__)

READ_ONLY = "bgjobs_read_only"
"""Execution option of connections that only read."""
AUTOCOMMIT = "bgjobs_autocommit"
"""Execution option of connections on which each statement is its own transaction."""
_SCHEMAS = "schema_translate_map"
"""SQLAlchemy's execution option for the schema of the tables."""
_REDO_SECONDS = 30.0
"""How long a transaction is redone after errors that pass."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.005, 0.5
"""The first and the longest pause before a transaction is redone. Each pause doubles."""


class Host(Protocol):
    """The parts of the host's Flask-SQLAlchemy that the store needs."""

    def session(self) -> scoped_session[Any]:
        """The host's session."""

    def outer_connection(self) -> sa.Connection | None:
        """The connection to which the host's sessions are bound; ``None`` if to an engine."""

    def holds_write_lock(self) -> bool:
        """Whether the host's session in this context may block other connections' writes."""


class CommitInDoubt(OperationalError):
    """The connection was lost in a commit, which may or may not have succeeded."""


class QueryTimeout(OperationalError):
    """The database ended a query that exceeded its time limit."""


class Database(abc.ABC):
    """Access to one app's database for the statements.

    :param engine: the host's engine for the tables.
    :param host: gives access to the host's session, and to the connection that it may be bound to.
    :param schema: the schema of the host's metadata, if it has one.
    :param max_crashes: number of proved crashes at which a job fails.
    :param deadline: seconds after which a connection in use is severed; ``None``: never.
    """

    drivers: tuple[str, ...]
    """SQLAlchemy's names of the supported drivers, the recommended one first."""

    now: sa.ColumnElement[dt.datetime]
    """SQL expression for the time of the database's clock when the statement runs."""

    seeks_ranges = True
    """Whether an index finds the rows after a value that is known only when the statement runs."""

    has_one_writer = False
    """Whether an open transaction that has written blocks all writes of other transactions."""

    def __init__(
        self,
        engine: sa.Engine,
        host: Host,
        *,
        schema: str | None,
        max_crashes: int,
        deadline: float | None = None,
    ) -> None:
        self.host_engine = engine
        self._host = host
        self._schema = schema
        self.schema = _translated(engine, schema)
        """The schema of the tables; ``None`` for the connection's default schema."""
        self.deadline = deadline
        self._is_workers = False
        """Whether a worker uses this store. No worker starts if the host's sessions are bound to a
        connection."""
        self.give_up_at = math.inf
        """The time, by ``time.monotonic()``, after which the database is not used any more. Threads
        that wait for it then get an error."""
        self.on_attempt: Callable[[], object] = _nothing
        """Called before each attempt of a transaction, in the thread that runs it."""
        self._watchdog = Watchdog(self.sever, lambda: self.give_up_at)
        self.execution_options: dict[str, Any] = (
            {} if self.schema is None else {_SCHEMAS: {None: self.schema}}
        )
        self._max_crashes = max_crashes
        self._own_engine: sa.Engine | None = None
        self._own_engine_pid = 0
        self._own_engine_lock = Lock()
        forks.watch(self)

    @abc.abstractmethod
    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        """SQL expression for ``time`` plus ``seconds``."""

    def time_on(self, connection: sa.Connection) -> dt.datetime:
        """The time of the database's clock, in UTC, without ``tzinfo``."""
        time: dt.datetime = connection.execute(sa.select(self.now)).scalar_one()
        return time

    def after(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[dt.datetime]:
        """SQL expression for the time of the database's clock plus ``seconds``."""
        return self.add_seconds(self.now, seconds)

    def deleted_at(self, finished_at: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """SQL expression for the time at which a job with its own retention is deleted after its
        end; ``NULL`` for others."""
        kept = JOBS.c.retention_seconds
        return sa.case((kept.is_not(None), self.add_seconds(finished_at, kept)))

    insert_into: Callable[[sa.Table], Any]
    """The dialect's ``insert()``, which can handle conflicts."""

    @abc.abstractmethod
    def json_rows(
        self, array: sa.BindParameter[str], types: Mapping[str, sa.types.TypeEngine[Any]]
    ) -> sa.FromClause:
        """The objects of a JSON array, as rows to select from.

        :param types: the types of their fields, by name.
        """

    def ignoring_duplicates(self, insert: Any, key: sa.Column[Any]) -> Any:
        """An INSERT that leaves rows as they are that exist already."""
        return insert.on_conflict_do_nothing(index_elements=[key])

    def limit_ordered(
        self, ordered: sa.Select[Any], limit: int | sa.BindParameter[int]
    ) -> sa.Select[Any]:
        """Limit a query that is ordered by an index, so that only ``limit`` rows are read."""
        return ordered.limit(limit)

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        """The query for the ids of ``candidates`` that locks their rows until the transaction ends.

        Rows that another transaction has locked are skipped.
        """
        return sa.select(candidates.subquery().c.id)

    def seconds_parameter(self, name: str) -> sa.ColumnElement[float]:
        """A statement parameter for seconds, which may be ``NULL``."""
        # Cast, because PostgreSQL needs the type even in a test for NULL.
        return sa.cast(sa.bindparam(name, type_=sa.Double), sa.Double)

    @abc.abstractmethod
    def make_engine(self) -> sa.Engine:
        """Create a small engine of our own on the host's database.

        Its errors hide the parameters of statements, which contain the parameters of jobs.
        """

    def connect_as_host(self, record: Any) -> Any:
        """Open a driver connection as the host's engine does, with its ``connect_args``.

        :param record: the connection record of our own pool.
        :raises OperationalError: when connecting fails, also in code of the host.
        """
        dialect = self.host_engine.dialect
        try:
            return self.host_engine.pool._invoke_creator(record)
        except (SQLAlchemyError, dialect.loaded_dbapi.Error):
            raise
        except Exception as error:
            raise OperationalError("connect", None, error) from error

    def dialect_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The execution options of a connection, with those that the driver needs for them."""
        return options

    def session_settings(self, connection: sa.Connection) -> dict[str, str | None]:
        """The settings that decide which tables a connection sees, and its user, by name."""
        return dict(connection.execute(self._session_settings).mappings().one())

    @property
    @abc.abstractmethod
    def _session_settings(self) -> sa.Select[Any]:
        """The query for :meth:`session_settings`."""

    @abc.abstractmethod
    def is_redoable(self, error: DBAPIError) -> bool:
        """Whether the same transaction may succeed if it is run again."""

    def is_read_only(self, error: DBAPIError) -> bool:
        """Whether the server is read-only, as after it stopped being the primary.

        The statement had no effect, and the connections of our engine are discarded, because a new
        one may reach the new primary.
        """
        return False

    def is_denied(self, error: DBAPIError) -> bool:
        """Whether the database user lacks a privilege."""
        return False

    @abc.abstractmethod
    def is_lock_timeout(self, error: DBAPIError) -> bool:
        """Whether the error is a lock timeout: another transaction held a row lock for too long."""

    @contextlib.contextmanager
    def lock_limit(
        self, connection: sa.Connection, seconds: float, *, is_hosts: bool
    ) -> Iterator[None]:
        """A block in which no statement waits for a row lock longer than ``seconds``.

        :param is_hosts: whether it is the host's transaction. A lock timeout does not abort it.
        """
        # SQLite has no row locks.
        yield

    @abc.abstractmethod
    def query_timeout(
        self, connection: sa.Connection, seconds: float
    ) -> AbstractContextManager[None]:
        """A block in which the database ends each query that takes longer than ``seconds``."""

    @abc.abstractmethod
    def is_timeout(self, error: DBAPIError) -> bool:
        """Whether the database ended a query because of :meth:`query_timeout`."""

    def link_advice(self) -> str | None:
        """Advice, in a sentence, on settings with which the host's connections detect a dead link.

        :returns: ``None`` if no setting is known to be missing.
        """
        return None

    def pool_advice(self) -> str | None:
        """Advice, in a sentence, on settings with which the host's threads can use its pool.

        :returns: ``None`` if no problem is known.
        """
        return None

    can_listen = False
    """Whether :meth:`listen` is implemented."""

    def listen(
        self,
        stopped: threading.Event,
        wake: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Call ``wake`` at once, and again whenever new jobs may have been enqueued.

        Blocks until ``stopped`` is set, or returns early to be called again, with a new connection.

        :param is_quiet: returns whether there has been nothing to do for a while.
        :raises DBAPIError: when the connection is lost.
        """
        raise NotImplementedError

    def stop_listening(self) -> None:  # noqa: B027  # other listeners return by themselves
        """Make :meth:`listen` return at once. Call this after its ``stopped`` is set."""

    def notify(self, connection: sa.Connection) -> None:  # noqa: B027  # only for some databases
        """Notify listeners of new jobs when the transaction commits."""

    @property
    def host_session(self) -> scoped_session[Any]:
        """The host's session, for databases that have only one connection."""
        return self._host.session()

    @property
    def outer_connection(self) -> sa.Connection | None:
        """The connection to which the host's sessions are bound, as in a test that rolls back.

        All our statements then run on it, because another connection would not see the host's rows.
        ``None`` if the sessions are bound to an engine, and always in a worker.
        """
        return None if self._is_workers else self._host.outer_connection()

    @property
    def _shares_a_connection(self) -> bool:
        return self.always_joins or self.outer_connection is not None

    @property
    def always_joins(self) -> bool:
        """Whether there is only one connection, so that our commit would also commit the host's."""
        return False

    def prepare(self, *, wal: bool) -> str | None:
        """Prepare the database for workers.

        :param wal: whether SQLite's write-ahead log may be turned on.
        :returns: a message for the log about the change; ``None`` if nothing was changed.
        """
        return None

    @property
    def engine(self) -> sa.Engine:
        """Our own engine, created on first use in each process, because processes must not share
        connections after a fork."""
        with self._own_engine_lock:
            if self._own_engine is None or self._own_engine_pid != os.getpid():
                engine = self.make_engine()
                # Execution options, even empty ones, would add 50 µs to each connect().
                options = self.execution_options
                self._own_engine = engine.execution_options(**options) if options else engine
                self._own_engine_pid = os.getpid()
            return self._own_engine

    @contextlib.contextmanager
    def in_our_schema(self, connection: sa.Connection) -> Iterator[None]:
        """Set our schema on the host's ``connection`` for this block, then restore the host's."""
        host_schemas = connection.get_execution_options().get(_SCHEMAS)
        our_schemas = self.execution_options.get(_SCHEMAS)
        if host_schemas == our_schemas:
            yield
            return
        connection.execution_options(**{_SCHEMAS: our_schemas})
        try:
            yield
        finally:
            connection.execution_options(**{_SCHEMAS: host_schemas})

    def with_deadline(self, seconds: float) -> Self:
        """A store on the same database with its own connections and a deadline.

        Using a connection for longer than ``seconds`` raises an error, also if the link to the
        database is dead and gives no reply.
        """
        return self._for_a_worker(seconds)

    def _for_a_worker(self, deadline: float | None) -> Self:
        store = type(self)(
            self.host_engine,
            self._host,
            schema=self._schema,
            max_crashes=self._max_crashes,
            deadline=deadline,
        )
        store._is_workers = True
        return store

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must keep running while connections are in use."""
        return self._watchdog.threads

    def seconds_left(self) -> float:
        """Seconds until :attr:`give_up_at`."""
        return self.give_up_at - time.monotonic()

    def watched(self, driver_connection: Any) -> AbstractContextManager[object]:
        """Sever the connection if this block uses it for longer than the store's deadline."""
        if self.deadline is None or driver_connection is None:
            return contextlib.nullcontext()
        return self._watchdog.watching(self.deadline, driver_connection)

    def reconnect_if_replaced(self) -> None:  # noqa: B027  # only a file can be replaced
        """Close all connections, also the host's, if the database file has been replaced."""

    def sever(self, driver_connection: Any) -> None:  # noqa: B027  # a file has no link to break
        """Break a driver connection, also while another thread waits for it."""

    def dispose(self) -> None:
        """Close the connections of our own engine; the next use opens new ones."""
        with self._own_engine_lock:
            if self._own_engine is not None:
                self._own_engine.dispose()
            self._watchdog.end()

    def before_fork(self) -> None:
        """Close our idle connections, so that a child process inherits none of them."""
        if not self.always_joins:
            self.dispose()

    def after_fork_in_child(self) -> None:
        """Create a new lock: a thread of the parent process may have held the old one."""
        self._own_engine_lock = Lock()

    def transaction(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` in a transaction of our own.

        ``work`` runs again from its start for up to 30 s after errors that pass, and once if the
        connection is lost before the commit.

        :returns: what ``work`` returns.
        :raises CommitInDoubt: when the connection is lost in the commit.
        :raises DatabaseUnusable: when the transaction would wait for the host's own session.
        """
        self._refuse_to_wait_for_the_host()

        def attempt() -> T:
            with self._connected() as connection:
                was_in_transaction = connection.in_transaction()
                transaction = (
                    connection.begin_nested() if was_in_transaction else connection.begin()
                )
                try:
                    result = work(connection)
                    _commit(transaction)
                except BaseException:
                    # Also after a failed commit, or the transaction would stay open in the pool.
                    transaction.rollback()
                    raise
                return result

        return self.redo(attempt)

    def would_wait_for_the_host(self) -> bool:
        """Whether our changes would wait forever for the host's session of this context."""
        return False

    def _refuse_to_wait_for_the_host(self) -> None:
        if self._is_workers or self.outer_connection is not None:
            return
        if self.would_wait_for_the_host():
            raise DatabaseUnusable(
                "SQLite has one writer at a time, and the database is locked, probably by the open "
                "transaction of db.session: commit or roll back first"
            )

    def redo(self, attempt: Callable[[], T]) -> T:
        """Call ``attempt`` until it succeeds, with pauses in between.

        It is called again for up to 30 s, but not after :attr:`give_up_at`, if :meth:`is_redoable`
        says so, and once if the connection was lost.

        :returns: what ``attempt`` returns.
        :raises CommitInDoubt: without a further call.
        """
        deadline = time.monotonic() + _REDO_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        was_disconnected = False
        while True:
            self.on_attempt()
            try:
                return attempt()
            except CommitInDoubt:
                raise
            except DBAPIError as error:
                is_first_disconnect = error.connection_invalidated and not was_disconnected
                is_late = time.monotonic() > min(deadline, self.give_up_at)
                if is_late or not (is_first_disconnect or self.is_redoable(error)):
                    raise
                was_disconnected = was_disconnected or is_first_disconnect
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    @contextlib.contextmanager
    def read(self, *, within: float | None = None) -> Iterator[sa.Connection]:
        """A connection for reading. It takes no write lock and commits nothing.

        :param within: seconds after which the connection is severed if the store has no deadline.
        :raises QueryTimeout: within :meth:`reading`, when the database ends a query.
        """
        shared = _shared.get()
        if shared is None or shared.database is not self:
            with self._connected(within=within, **{READ_ONLY: True}) as connection:
                yield connection
            return
        try:
            with shared.connection() as connection:
                yield connection
        except DBAPIError as error:
            # The error may have aborted the transaction of the shared connection.
            shared.close()
            if not self.is_timeout(error):
                raise
            raise QueryTimeout(error.statement, error.params, error.orig or error) from error

    @contextlib.contextmanager
    def reading(self, seconds: float) -> Iterator[None]:
        """Share one connection between all reads in this block, and limit the time of each query.

        For requests of people who wait for the page. One connection needs the fewest round trips.

        :param seconds: time after which the database ends a query with :class:`QueryTimeout`.
        """
        if self._shares_a_connection:
            yield
            return
        shared = _SharedConnection(self, seconds)
        token = _shared.set(shared)
        try:
            yield
        finally:
            _shared.reset(token)
            shared.close()

    def autocommit(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work`` with each of its statements as its own transaction.

        This saves the round trips of ``BEGIN`` and ``COMMIT``. ``work`` is redone as in
        :meth:`transaction`, so statements that change something must be idempotent.

        :returns: what ``work`` returns.
        """
        if self._shares_a_connection:
            return self.transaction(work)

        def attempt() -> T:
            with self._connected(**{AUTOCOMMIT: True}) as connection:
                return work(connection)

        return self.redo(attempt)

    def autocommit_once(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work``, of which only one statement changes something, without a transaction.

        That statement is its own transaction. ``work`` is redone after errors that pass, but not
        after a lost connection, unless the server was read-only.

        :returns: what ``work`` returns.
        :raises CommitInDoubt: when the connection is lost.
        :raises DatabaseUnusable: when the statement would wait for the host's own session.
        """
        if self._shares_a_connection:
            return self.transaction(work)
        self._refuse_to_wait_for_the_host()

        def attempt() -> T:
            with self._connected(**{AUTOCOMMIT: True}) as connection:
                try:
                    return work(connection)
                except DBAPIError as error:
                    if not error.connection_invalidated or self.is_read_only(error):
                        raise
                    raise _in_doubt(error) from error

        return self.redo(attempt)

    @contextlib.contextmanager
    def connected_for_reading(self, seconds: float) -> Iterator[sa.Connection]:
        """A connection for reading on which the database ends each query after ``seconds``."""
        with (
            self._connected(**{READ_ONLY: True}) as connection,
            self.query_timeout(connection, seconds),
        ):
            yield connection

    @contextlib.contextmanager
    def _connected(self, *, within: float | None = None, **options: Any) -> Iterator[sa.Connection]:
        if (outer := self.outer_connection) is not None:
            with self._on_outer(outer):
                yield outer
            return
        deadline = self.deadline or within
        if self.seconds_left() <= 0:
            raise OperationalError("connect", None, TimeoutError("the deadline has passed"))
        with contextlib.ExitStack() as stack:
            if deadline is None:
                connection = stack.enter_context(self.engine.connect())
            else:
                # It ends after the connection has returned to its pool, which rolls back.
                watch = stack.enter_context(self._watchdog.watching(deadline))
                with watch.connecting():
                    connection = stack.enter_context(self.engine.connect())
                watch.begin(connection.connection.driver_connection)
            if options:
                connection = connection.execution_options(**self.dialect_options(options))
            yield connection

    @contextlib.contextmanager
    def _on_outer(self, outer: sa.Connection) -> Iterator[None]:
        """Use the host's connection. Roll back afterwards unless it was in a transaction before."""
        was_in_transaction = outer.in_transaction()
        with self.in_our_schema(outer):
            try:
                yield
            finally:
                if not was_in_transaction:
                    outer.rollback()


class _SharedConnection:
    """The connection shared by a block of reads, opened by the first read."""

    def __init__(self, database: Database, seconds: float) -> None:
        self.database = database
        self._seconds = seconds
        self._stack = contextlib.ExitStack()
        self._connection: sa.Connection | None = None
        self._readers = 0

    @contextlib.contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """The shared connection, for one read."""
        connection = self._connection
        if connection is None:
            opened = self.database.connected_for_reading(self._seconds)
            connection = self._connection = self._stack.enter_context(opened)
        self._readers += 1
        try:
            yield connection
        finally:
            self._readers -= 1
            if self.database.has_one_writer and not self._readers and not connection.closed:
                # End the transaction: without WAL it would block writes of the host between reads.
                connection.rollback()

    def close(self) -> None:
        """Return the connection to the pool; the next read opens a new one."""
        self._connection = None
        self._stack.close()


_shared = contextvars.ContextVar[_SharedConnection | None]("bgjobs_shared", default=None)


def by_id(jobs: sa.Select[Any]) -> sa.Select[Any]:
    """Make a query for jobs use the primary key, so that it locks no other rows.

    MySQL and MariaDB lock every row that they read, in the order of the index that they choose.
    """
    return by_index(jobs, "PRIMARY")


def _nothing() -> None:
    """Do nothing."""


def _translated(engine: sa.Engine, schema: str | None) -> str | None:
    """The schema to which the execution options of the host's engine translate ``schema``."""
    schemas = engine.get_execution_options().get(_SCHEMAS) or {}
    return cast("str | None", schemas.get(schema, schema))


def _commit(transaction: sa.Transaction) -> None:
    try:
        transaction.commit()
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise _in_doubt(error) from error


def _in_doubt(error: DBAPIError) -> CommitInDoubt:
    return CommitInDoubt(
        error.statement, error.params, error.orig or error, connection_invalidated=True
    )
