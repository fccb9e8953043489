"""PostgreSQL: rows are locked one by one, and who claims passes over what others hold."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from ...job.records import UNREADABLE_TIME
from ...models import UtcTime
from ..base import Store
from ..connections import forward
from ..database import AUTOCOMMIT, JOBS, READ_ONLY
from ..links import is_readable, limited, prepare_limits, refuse_dead, shut_down
from ..sizes import StatementTooLarge
from ..statements.claim import ORDER_COLUMNS, pending_in
from ..statements.enqueue import NewJobs
from ..statements.settle import COMPLETION_TYPES

_CONNECT_SECONDS = 10.0
_LISTEN_SECONDS = 0.5
"""Between two looks whether to stop listening."""
_STILL_THERE_SECONDS = 30.0
"""After so long without a notification it is asked whether the link still lives."""
_GATHER_SECONDS = 0.005
"""After a notification, for those that follow it closely."""
_LOCK_NOT_AVAILABLE = "55P03"
_REDO = frozenset({"40001", "40P01", _LOCK_NOT_AVAILABLE})
"""Serialization failure, deadlock, and a lock that others keep."""
_LOCK_WAIT_SECONDS = 0.5
"""A worker's wait for a row; then the transaction is redone, or does without the row."""
_QUERY_CANCELED = "57014"
_TIMESTAMP_OID = 1114
_LINK_OPTIONS = frozenset({"keepalives_idle", "tcp_user_timeout"})
"""Options of libpq, each of which makes a dead link known in time."""
_LIMIT_EXCEEDED = "54000"
_READ_ONLY_TRANSACTION, _INSUFFICIENT_PRIVILEGE = "25006", "42501"
_LARGEST_MESSAGE = 2**30 - 2
"""Bytes that the server accepts at once."""
_MESSAGE_OVERHEAD = 2**20
"""More than all that stands beside the largest value of a statement."""


class PostgresStore(Store):
    """The statements on PostgreSQL 12 or newer."""

    drivers = ("psycopg", "psycopg2")
    # In a query of its own it is read once, so that comparing with it can use an index.
    now = sa.literal_column("(SELECT clock_timestamp() AT TIME ZONE 'UTC')", UtcTime)
    insert_into = staticmethod(postgresql.insert)
    can_listen = True
    # The server closes the connection over a larger message.
    largest_text = _LARGEST_MESSAGE - _MESSAGE_OVERHEAD
    _listen_connection: Any = None
    """The driver's connection that listens."""

    def __init__(self, engine: sa.Engine, *args: Any, **kwargs: Any) -> None:
        super().__init__(engine, *args, **kwargs)
        prepare_limits(engine)

    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        return time + seconds * sa.literal_column("interval '1 second'", sa.Interval)

    def completions(self, array: sa.BindParameter[str]) -> sa.FromClause:
        columns = [sa.column(name, kind) for name, kind in COMPLETION_TYPES.items()]
        rows = sa.func.json_to_recordset(array.cast(postgresql.JSON))
        return rows.table_valued(*columns).render_derived(name="ended", with_types=True)

    def limit_ordered(
        self, ordered: sa.Select[Any], limit: int | sa.BindParameter[int]
    ) -> sa.Select[Any]:
        # By a query, whose value the planner does not know: it then reads in order. One that is
        # larger than the rows it believes in would let it read and sort them all.
        return ordered.limit(sa.select(sa.type_coerce(limit, sa.Integer)).scalar_subquery())

    def _first_jobs_of_each(
        self,
        connection: sa.Connection,
        ordered: sa.Select[Any],
        names: Sequence[str],
        depth: int,
    ) -> Sequence[sa.Row[Any]]:
        parameters = {"names": list(names), "depth": depth}
        statement = self._cached_statement(self._first_jobs_query_by_name, ordered)
        return connection.execute(statement, parameters).all()

    def _first_jobs_query_by_name(self, ordered: sa.Select[Any]) -> sa.Select[Any]:
        names = sa.func.unnest(sa.bindparam("names", type_=postgresql.ARRAY(sa.String)))
        named = names.table_valued("name").render_derived(name="named")
        pending = pending_in(named.c.name, ordered).add_columns(*ORDER_COLUMNS).correlate(named)
        first = self.limit_ordered(pending, sa.bindparam("depth", type_=sa.Integer)).lateral(
            "first"
        )
        return sa.select(first).join_from(named, first, sa.true())

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        free = candidates.with_for_update(of=JOBS, skip_locked=True).cte()
        # Materialized, or the planner might look for candidates more than once.
        return sa.select(free.prefix_with("MATERIALIZED").c.id)

    def make_engine(self) -> sa.Engine:
        engine = sa.create_engine(
            self.host_engine.url,
            creator=self._connect,
            isolation_level="READ COMMITTED",
            max_overflow=-1,
            hide_parameters=True,
        )
        # Before the host's listeners, which would use a connection that has ended.
        refuse_dead(engine, lambda connection: int(connection.fileno()))
        forward(self.host_engine, engine, self.watched)
        sa.event.listen(engine, "connect", _read_times_leniently)
        sa.event.listen(engine, "handle_error", _see_end)
        if self.deadline is not None:
            sa.event.listen(engine, "begin", self._on_begin)
        return engine

    def _connect(self, record: Any) -> Any:
        """The same as :meth:`connect_as_host`, with an end to the waiting."""
        # libpq takes whole seconds, and waits for two of them at least.
        seconds = math.ceil(max(2.0, min(_CONNECT_SECONDS, self.seconds_left())))
        with limited({"connect_timeout": seconds}):
            return self.connect_as_host(record)

    def link_advice(self) -> str | None:
        with self.host_engine.connect() as connection:
            info: Any = getattr(connection.connection.driver_connection, "info", None)
            if hasattr(info, "get_parameters"):
                given = info.get_parameters()
            else:
                given = getattr(info, "dsn_parameters", {})
        is_on_this_machine = given.get("host", "/").startswith(("/", "@"))
        if is_on_this_machine or _LINK_OPTIONS & given.keys():
            return None
        return (
            "the app's connections to PostgreSQL notice a dead link only after two hours, and a "
            "job that waits for one holds its thread for as long: set keepalives_idle and "
            "tcp_user_timeout in connect_args"
        )

    def stop_listening(self) -> None:
        if self._listen_connection is not None:
            self.sever(self._listen_connection)

    def listen(
        self,
        stopped: threading.Event,
        on_news: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Wait for the notification of a commit that enqueued jobs, on a connection of its own."""
        options = self.dialect_options({AUTOCOMMIT: True})
        with self.engine.connect().execution_options(**options) as connection:
            driver_connection: Any = connection.connection.driver_connection
            # Nobody else shall get a connection that listens.
            connection.detach()
            if hasattr(driver_connection, "add_notify_handler"):
                # Without one, psycopg 3 would keep them all.
                driver_connection.add_notify_handler(lambda _: None)
            self._listen_connection = driver_connection
            self._ask(connection, driver_connection, f"LISTEN {self._quoted_channel}")
            on_news()
            asked = time.monotonic()
            while not stopped.is_set():
                heard = is_readable(driver_connection.fileno(), _LISTEN_SECONDS)
                if not heard and time.monotonic() - asked < _STILL_THERE_SECONDS:
                    continue
                if stopped.is_set():
                    return
                # Takes in what was heard, whatever the driver, or shows that the link is dead.
                self._ask(connection, driver_connection, "SELECT 1")
                asked = time.monotonic()
                if heard:
                    on_news()
                    stopped.wait(_GATHER_SECONDS)

    def _ask(self, connection: sa.Connection, driver_connection: Any, statement: str) -> None:
        with self._watchdog.watching(driver_connection, self.deadline or _CONNECT_SECONDS):
            connection.exec_driver_sql(statement)

    def notify(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.pg_notify(self._channel, "")))

    @property
    def _channel(self) -> str:
        return "bgjobs" if self._schema is None else f"bgjobs_{self._schema}"

    @property
    def _quoted_channel(self) -> str:
        return self.host_engine.dialect.identifier_preparer.quote_identifier(self._channel)

    @functools.cached_property
    def returned(self) -> tuple[sa.ColumnElement[Any], ...]:
        # In a query of its own it is called once for all rows. No round trip is spent on it.
        notice = sa.select(sa.func.pg_notify(self._channel, "")).where(
            sa.bindparam("notify", type_=sa.Boolean)
        )
        return (*super().returned, notice.scalar_subquery())

    def insert_parameters(self, connection: sa.Connection, jobs: NewJobs) -> dict[str, Any]:
        # PostgreSQL prepares no transaction that notifies.
        is_two_phase = isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)
        return {**super().insert_parameters(connection, jobs), "notify": not is_two_phase}

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        elements = sa.func.json_array_elements_text(array.cast(postgresql.JSON))
        each = elements.table_valued("text", with_ordinality="position").render_derived()
        return each.c.position, each.c.text

    def typed(self, value: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(value, value.type)

    def dialect_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**options, "isolation_level": "AUTOCOMMIT"} if AUTOCOMMIT in options else options

    def _on_begin(self, connection: sa.Connection) -> None:
        """Set what holds for this transaction of a worker alone, in one round trip."""
        if {READ_ONLY, AUTOCOMMIT} & connection.get_execution_options().keys():
            return
        _set_for_transaction(
            connection,
            # The server ends it when the worker has fallen silent within it: the rows stay locked
            # for as long, also for those that would rescue its jobs.
            idle_in_transaction_session_timeout=f"{self.deadline:.3f}s",
            lock_timeout=f"{_LOCK_WAIT_SECONDS:.3f}s",
            # No statement needs the whole table of jobs, or is worth being compiled, whatever the
            # planner believes of how many rows there are.
            enable_seqscan="off",
            jit="off",
        )

    @property
    def _seen(self) -> sa.Select[Any]:
        table = self.host_engine.dialect.identifier_preparer.format_table(
            sa.table(JOBS.name, schema=self.schema)
        )
        path = sa.func.array_to_string(sa.func.current_schemas(sa.false()), ", ")
        return sa.select(
            sa.func.current_database().label("database"),
            sa.literal_column("current_user", sa.String).label("user"),
            path.label("search_path"),
            _full_name(table).label("table of jobs"),
        )

    @contextlib.contextmanager
    def ending_queries(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        # To compile a query would take much of its time.
        _set_for_transaction(connection, statement_timeout=f"{seconds:.3f}s", jit="off")
        yield

    def is_timeout(self, error: DBAPIError) -> bool:
        return _code(error) == _QUERY_CANCELED

    def sever(self, driver_connection: Any) -> None:
        with contextlib.suppress(Exception):
            shut_down(driver_connection.fileno())

    def is_read_only(self, error: DBAPIError) -> bool:
        return _code(error) == _READ_ONLY_TRANSACTION

    def is_denied(self, error: DBAPIError) -> bool:
        return _code(error) == _INSUFFICIENT_PRIVILEGE

    def is_lock_timeout(self, error: DBAPIError) -> bool:
        return _code(error) == _LOCK_NOT_AVAILABLE

    def is_too_large(self, error: DBAPIError) -> bool:
        return isinstance(error, StatementTooLarge) or _code(error) == _LIMIT_EXCEEDED

    def is_redoable(self, error: DBAPIError) -> bool:
        return _code(error) in _REDO


def _read_times_leniently(connection: Any, _record: object) -> None:
    """Read a time that Python has no name for, such as ``infinity``, as ``UNREADABLE_TIME``."""
    if hasattr(connection, "adapters"):
        loader = connection.adapters.get_loader(_TIMESTAMP_OID, 0)
        connection.adapters.register_loader(_TIMESTAMP_OID, _lenient_loader(loader))
    elif connection.__class__.__module__.startswith("psycopg2"):
        extensions: Any = importlib.import_module("psycopg2.extensions")
        read = extensions.string_types[_TIMESTAMP_OID]

        def read_leniently(text: str | None, cursor: Any) -> dt.datetime | None:
            if text is None:
                return None
            try:
                # It gives the first and the last moment of Python's calendar for infinity.
                time: dt.datetime = read(text, cursor)
            except (ValueError, OverflowError):
                return UNREADABLE_TIME
            return UNREADABLE_TIME if time in (dt.datetime.min, dt.datetime.max) else time

        lenient = extensions.new_type((_TIMESTAMP_OID,), "bgjobs_timestamp", read_leniently)
        extensions.register_type(lenient, connection)


@functools.cache
def _lenient_loader(loader: Any) -> Any:
    """A loader of psycopg's that calls another one, which may not be derived from."""
    base: Any = importlib.import_module("psycopg.adapt").Loader

    class LenientLoader(base):  # type: ignore[misc]  # psycopg need not be installed
        def __init__(self, oid: int, context: Any = None) -> None:
            super().__init__(oid, context)
            self._read = loader(oid, context).load

        def load(self, data: Any) -> dt.datetime:
            try:
                return self._read(data)  # type: ignore[no-any-return]  # psycopg's
            except Exception:
                return UNREADABLE_TIME

    return LenientLoader


def _full_name(table: str) -> sa.ScalarSelect[Any]:
    """The name, with its schema, of the table that a connection finds under ``table``."""
    found = sa.text(
        "SELECT n.nspname || '.' || c.relname AS name FROM pg_catalog.pg_class c "
        "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.oid = pg_catalog.to_regclass(:bgjobs_table)"
    )
    name = sa.column("name", sa.String)
    return found.bindparams(bgjobs_table=table).columns(name).scalar_subquery()


def _set_for_transaction(connection: sa.Connection, **settings: str) -> None:
    calls = (f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    connection.exec_driver_sql(f"SELECT {', '.join(calls)}")


def _see_end(context: sa.engine.ExceptionContext) -> None:
    """Let connections to a server that is no longer the primary count as ended."""
    if _code_of(context.original_exception) == _READ_ONLY_TRANSACTION:
        context.is_disconnect = True


def _code(error: DBAPIError) -> str | None:
    return _code_of(error.orig)


def _code_of(error: BaseException | None) -> str | None:
    # psycopg 3 and psycopg2 have their own words for it.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
