"""The database at hand: its clock, our own engine, and transactions that are redone."""

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
from ..models import Attempt, Job, Queue, Rollup, Worker, by_index
from ..system import forks
from ..system.threading_patches import Lock
from .watchdog import Watchdog

T = TypeVar("T")

JOBS = cast(sa.Table, Job.__table__)
WORKERS = cast(sa.Table, Worker.__table__)
ATTEMPTS = cast(sa.Table, Attempt.__table__)
QUEUES = cast(sa.Table, Queue.__table__)
ROLLUPS = cast(sa.Table, Rollup.__table__)

READ_ONLY = "bgjobs_read_only"
"""The execution option of connections that only read."""
AUTOCOMMIT = "bgjobs_autocommit"
"""The execution option of connections on which each statement is a transaction of its own."""
_SCHEMAS = "schema_translate_map"
"""SQLAlchemy's execution option by which statements name their schema."""
_REDO_SECONDS = 30.0
"""How long a transaction that the database turned away is tried again."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.005, 0.5


class Host(Protocol):
    """What the store asks of the host's Flask-SQLAlchemy."""

    def session(self) -> scoped_session[Any]:
        """Its session."""

    def outer_connection(self) -> sa.Connection | None:
        """The connection to which its sessions are bound, if they are bound to one."""

    def holds_write_lock(self) -> bool:
        """Whether its session of this context may keep other connections from writing."""


class CommitInDoubt(OperationalError):
    """The connection died in a commit: nobody can tell whether it was done."""


class QueryTimeout(OperationalError):
    """A query took longer than it may."""


class Database(abc.ABC):
    """One app's database, as far as the statements need it.

    :param engine: the host's engine for the tables.
    :param host: finds the host's session and the connection that it may be bound to.
    :param schema: the schema of the host's metadata, if it has one.
    :param max_crashes: proved crashes at which a job is failed.
    :param deadline: seconds after which a connection in use is given up; ``None``: never.
    """

    drivers: tuple[str, ...]
    """SQLAlchemy's names of the drivers that it works with, the recommended one first."""

    now: sa.ColumnElement[dt.datetime]
    """The database's clock, read when the statement runs."""

    seeks_ranges = True
    """Whether rows behind a value are sought by an index where only the running statement knows
    the value."""

    has_one_writer = False
    """Whether an open transaction that wrote keeps all others from writing."""

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
        """Where the tables are, when that is not the connection's default schema."""
        self.deadline = deadline
        self._is_workers = False
        """Whether a worker uses it, which does not start where the sessions share a connection."""
        self.give_up_at = math.inf
        """By ``time.monotonic()``: afterwards the database is not asked any more, and who waits
        for it then gets an error."""
        self.on_attempt: Callable[[], object] = _nothing
        """Called, in the thread that asks the database, before each attempt of a transaction."""
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
        """``time`` plus ``seconds``."""

    def after(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[dt.datetime]:
        """The database's clock plus ``seconds``."""
        return self.add_seconds(self.now, seconds)

    insert_into: Callable[[sa.Table], Any]
    """The dialect's own ``insert()``, which can ignore conflicts."""

    def limit_ordered(
        self, ordered: sa.Select[Any], limit: int | sa.BindParameter[int]
    ) -> sa.Select[Any]:
        """The first ``limit`` rows of a query whose order is that of an index."""
        return ordered.limit(limit)

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        """The ids of ``candidates``, kept from others until the transaction ends.

        Those that another transaction keeps are left out.
        """
        return sa.select(candidates.subquery().c.id)

    def seconds_parameter(self, name: str) -> sa.ColumnElement[float]:
        """A parameter of seconds that may be ``None``."""
        # Cast, because PostgreSQL must know the type also where nothing but NULL is tested.
        return sa.cast(sa.bindparam(name, type_=sa.Double), sa.Double)

    @abc.abstractmethod
    def make_engine(self) -> sa.Engine:
        """A small engine of our own on the host's database.

        Its errors hide the parameters of statements: these hold what jobs were given.
        """

    def connect_as_host(self, record: Any) -> Any:
        """A driver's connection, made in the host's own way, with its connect_args.

        :param record: of our own pool.

        :raises OperationalError: also where code of the host's is in the way and fails.
        """
        dialect = self.host_engine.dialect
        try:
            return self.host_engine.pool._invoke_creator(record)
        except (SQLAlchemyError, dialect.loaded_dbapi.Error):
            raise
        except Exception as error:
            raise OperationalError("connect", None, error) from error

    def dialect_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The execution options of a connection, with what the driver must be told for them."""
        return options

    def seen_by(self, connection: sa.Connection) -> dict[str, str | None]:
        """What decides which tables a connection sees, and as whom, by its name for people."""
        return dict(connection.execute(self._seen).mappings().one())

    @property
    @abc.abstractmethod
    def _seen(self) -> sa.Select[Any]:
        """The query of :meth:`seen_by`."""

    @abc.abstractmethod
    def is_redoable(self, error: DBAPIError) -> bool:
        """Whether the same transaction may succeed when it is simply done again."""

    def is_read_only(self, error: DBAPIError) -> bool:
        """Whether the server takes no writes, as one does that is no longer the primary.

        Nothing was done then, and the connections of our engine are not used any more: the next
        one may lead to the new primary.
        """
        return False

    def is_denied(self, error: DBAPIError) -> bool:
        """Whether the database user lacks a right."""
        return False

    @abc.abstractmethod
    def is_lock_timeout(self, error: DBAPIError) -> bool:
        """Whether a row stayed locked by another transaction for too long."""

    @abc.abstractmethod
    def ending_queries(
        self, connection: sa.Connection, seconds: float
    ) -> AbstractContextManager[None]:
        """Let the database end each query of this block that takes longer."""

    @abc.abstractmethod
    def is_timeout(self, error: DBAPIError) -> bool:
        """Whether the database has ended a query for that."""

    def link_advice(self) -> str | None:
        """What the host should set so that its own connections notice a dead link, in a sentence.

        ``None``: nothing is known to be missing.
        """
        return None

    def pool_advice(self) -> str | None:
        """What the host should set so that its threads can use its pool, in a sentence.

        ``None``: nothing is known to be wrong with it.
        """
        return None

    can_listen = False
    """Whether :meth:`listen` is there."""

    def listen(
        self,
        stopped: threading.Event,
        on_news: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Call ``on_news`` at once, and whenever somebody may have enqueued jobs, until stopped.

        :param is_quiet: whether there has been nothing to do for a while.

        It also returns when it has to be called again, to go on with a new connection.

        :raises DBAPIError: when the connection is lost.
        """
        raise NotImplementedError

    def stop_listening(self) -> None:  # noqa: B027  # others return by themselves
        """Let :meth:`listen` return at once, after its ``stopped`` was set."""

    def notify(self, connection: sa.Connection) -> None:  # noqa: B027  # not all databases tell
        """Tell those that listen of jobs, as soon as the transaction commits."""

    @property
    def host_session(self) -> scoped_session[Any]:
        """The host's session, for databases that have only one connection."""
        return self._host.session()

    @property
    def outer_connection(self) -> sa.Connection | None:
        """The connection to which the host's sessions are bound, as in a test that rolls back.

        All our statements then run on it: another connection would not see the host's rows.
        """
        return None if self._is_workers else self._host.outer_connection()

    @property
    def _shares_a_connection(self) -> bool:
        return self.always_joins or self.outer_connection is not None

    @property
    def always_joins(self) -> bool:
        """Whether there is only one connection, so that a commit of ours would be the host's."""
        return False

    def prepare(self, *, wal: bool) -> str | None:
        """Make the database ready for workers; what was changed, for the log.

        :param wal: whether SQLite's write-ahead log may be turned on.
        """
        return None

    @property
    def engine(self) -> sa.Engine:
        """Our own engine, made on first use in each process: a fork must not share connections."""
        with self._own_engine_lock:
            if self._own_engine is None or self._own_engine_pid != os.getpid():
                engine = self.make_engine()
                # An engine with options, also with none, costs each connect 50 µs.
                options = self.execution_options
                self._own_engine = engine.execution_options(**options) if options else engine
                self._own_engine_pid = os.getpid()
            return self._own_engine

    @contextlib.contextmanager
    def in_our_schema(self, connection: sa.Connection) -> Iterator[None]:
        """Let statements on the host's ``connection`` find our tables; afterwards its own again."""
        theirs = connection.get_execution_options().get(_SCHEMAS)
        ours = self.execution_options.get(_SCHEMAS)
        if theirs == ours:
            yield
            return
        connection.execution_options(**{_SCHEMAS: ours})
        try:
            yield
        finally:
            connection.execution_options(**{_SCHEMAS: theirs})

    def with_deadline(self, seconds: float) -> Self:
        """A store of the same database with connections of its own and a deadline.

        Whatever takes longer than ``seconds`` ends with an error, also where the link to the
        database is dead and says nothing.
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
        """The threads that must live while connections are in use."""
        return self._watchdog.threads

    def seconds_left(self) -> float:
        """Until the database is not asked any more."""
        return self.give_up_at - time.monotonic()

    def watched(self, driver_connection: Any) -> AbstractContextManager[None]:
        """Sever a connection that a block uses for longer than this store's deadline."""
        if self.deadline is None or driver_connection is None:
            return contextlib.nullcontext()
        return self._watchdog.watching(driver_connection, self.deadline)

    def reconnect_if_replaced(self) -> None:  # noqa: B027  # only a file can be replaced
        """Close connections, the host's as well, that lead to a database no longer in use."""

    def sever(self, driver_connection: Any) -> None:  # noqa: B027  # a file has no link to break
        """Break a driver's connection while another thread waits for it."""

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
        """Take a new lock: another thread of the parent may have held the old one."""
        self._own_engine_lock = Lock()

    def transaction(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns, done in a transaction of our own.

        ``work`` runs again, from its start, when the database turns the transaction away for
        a passing reason, for up to 30 s, and once when the connection dies before the commit.

        :raises CommitInDoubt: when the connection dies in the commit.
        :raises DatabaseUnusable: when it would wait for the host's own session.
        """
        self._refuse_to_wait_for_the_host()

        def attempt() -> T:
            with self._connected() as connection:
                is_within = connection.in_transaction()
                transaction = connection.begin_nested() if is_within else connection.begin()
                try:
                    result = work(connection)
                    _commit(transaction)
                except BaseException:
                    # After a failed commit too: the pool would keep the transaction open.
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
        """What ``attempt`` returns; called again while the database is busy, for up to 30 s."""
        deadline = time.monotonic() + _REDO_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        was_cut_off = False
        while True:
            self.on_attempt()
            try:
                return attempt()
            except CommitInDoubt:
                raise
            except DBAPIError as error:
                cut_off = error.connection_invalidated and not was_cut_off
                is_late = time.monotonic() > min(deadline, self.give_up_at)
                if is_late or not (cut_off or self.is_redoable(error)):
                    raise
                was_cut_off = was_cut_off or cut_off
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    @contextlib.contextmanager
    def read(self, *, within: float | None = None) -> Iterator[sa.Connection]:
        """A connection to read with: it takes no write lock and commits nothing.

        :param within: seconds after which it is given up, where the store has no deadline.
        :raises QueryTimeout: within :meth:`reading`.
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
            # Its transaction may have failed with it.
            shared.close()
            if not self.is_timeout(error):
                raise
            raise QueryTimeout(error.statement, error.params, error.orig or error) from error

    @contextlib.contextmanager
    def reading(self, seconds: float) -> Iterator[None]:
        """Let all that this block reads come from one connection, and no query take too long.

        It is for somebody who waits. One connection needs the fewest round trips.

        :param seconds: after which the database ends a query; the reader gets ``QueryTimeout``.
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
        """What ``work`` returns; each of its statements is a transaction of its own.

        That spares the round trips that begin and end one. Redone like :meth:`transaction`, so a
        statement that changes something must bear being done twice.
        """
        if self._shares_a_connection:
            return self.transaction(work)

        def attempt() -> T:
            with self._connected(**{AUTOCOMMIT: True}) as connection:
                return work(connection)

        return self.redo(attempt)

    def autocommit_once(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns, of which one statement alone changes something.

        That is a transaction by itself. It is redone where the database turned it away.

        :raises CommitInDoubt: when the connection dies.
        :raises DatabaseUnusable: when it would wait for the host's own session.
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
        """A connection whose queries the database ends after so many seconds each."""
        with (
            self._connected(**{READ_ONLY: True}) as connection,
            self.ending_queries(connection, seconds),
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
            raise OperationalError("connect", None, TimeoutError("the time for it is over"))
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(self.engine.connect())
            if options:
                connection = connection.execution_options(**self.dialect_options(options))
            if deadline is not None:
                driver_connection = connection.connection.driver_connection
                stack.enter_context(self._watchdog.watching(driver_connection, deadline))
            yield connection

    @contextlib.contextmanager
    def _on_outer(self, outer: sa.Connection) -> Iterator[None]:
        """Use the host's connection, and leave it in a transaction only if it was in one."""
        is_within = outer.in_transaction()
        with self.in_our_schema(outer):
            try:
                yield
            finally:
                if not is_within:
                    outer.rollback()


class _SharedConnection:
    """What a block of reads shares, opened by the first of them."""

    def __init__(self, database: Database, seconds: float) -> None:
        self.database = database
        self._seconds = seconds
        self._stack = contextlib.ExitStack()
        self._connection: sa.Connection | None = None
        self._readers = 0

    @contextlib.contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """The connection, for one of the reads."""
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
                # Between two reads the host may write, and without WAL a reader keeps it from that.
                connection.rollback()

    def close(self) -> None:
        """Give the connection back; the next read opens another."""
        self._connection = None
        self._stack.close()


_shared = contextvars.ContextVar[_SharedConnection | None]("bgjobs_shared", default=None)


def by_id(jobs: sa.Select[Any]) -> sa.Select[Any]:
    """The same jobs, looked for by their ids alone, so that no other row is locked.

    MySQL and MariaDB lock what they pass on the way, in the order of the index that they choose.
    """
    return by_index(jobs, "PRIMARY")


def _nothing() -> None:
    """Do nothing."""


def _translated(engine: sa.Engine, schema: str | None) -> str | None:
    """The schema that ``schema`` stands for in the execution options of the host's engine."""
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
