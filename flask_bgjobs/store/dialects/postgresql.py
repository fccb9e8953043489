"""PostgreSQL: row locks, and claims that skip rows locked by other transactions."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import functools
import importlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from ...job.records import UNREADABLE_TIME
from ...models import SeatState, UtcTime
from .. import transitions
from ..base import Store
from ..connections import forward
from ..database import AUTOCOMMIT, JOBS, READ_ONLY, SCHEDULES, SEATS
from ..links import connect_limits, discard_dead_connections, is_readable, prepare_limits, shut_down
from ..sizes import StatementTooLarge
from ..statements.admit import CANDIDATE_COLUMNS, IS_WAITING_JOB, Candidate, is_waiting_job
from ..statements.claim import ORDER_COLUMNS, pending_in
from ..statements.enqueue import NewJobs
from ..statements.limit_keys import ORDER, Key
from ..statements.seats import DELETE_SEATS
from ..watchdog import watch_new_connections

_CONNECT_SECONDS = 10.0
_STOP_CHECK_SECONDS = 0.5
"""How often the listener checks whether to stop."""
_PING_SECONDS = 30.0
"""How long the listener waits for a notification before it checks that the link is alive."""
_GATHER_SECONDS = 0.005
"""How long the listener waits after a notification, to handle closely following ones together."""
_LOCK_NOT_AVAILABLE = "55P03"
_REDOABLE = frozenset({"40001", "40P01", _LOCK_NOT_AVAILABLE})
"""Serialization failure, deadlock, and a lock timeout."""
_LOCK_WAIT_SECONDS = 0.5
"""How long a worker's statement waits for a row lock. The transaction is then redone, or skips the
row."""
_LIMIT_LOCKS = (
    # Materialized, or the server could read the setting after it has been changed.
    "WITH setting AS MATERIALIZED (SELECT current_setting('lock_timeout') AS before) "
    "SELECT before, CASE WHEN before::interval NOT BETWEEN '1 ms' AND '{seconds} s' "
    "THEN set_config('lock_timeout', '{seconds}s', true) END FROM setting"
)
"""Sets a lock timeout for the transaction, unless a shorter one is set, and returns the value
before."""
_QUERY_CANCELED = "57014"
_TIMESTAMP_OID = 1114
_DEAD_LINK_OPTIONS = frozenset({"keepalives_idle", "tcp_user_timeout"})
"""Options of libpq. Each of them makes a dead link raise an error in time."""
_LIMIT_EXCEEDED = "54000"
_READ_ONLY_TRANSACTION, _INSUFFICIENT_PRIVILEGE = "25006", "42501"
_MAX_MESSAGE_BYTES = 2**30 - 2
"""The largest message that the server accepts."""
_MESSAGE_OVERHEAD_BYTES = 2**20
"""More than a message needs for everything but its largest value."""


class PostgresStore(Store):
    """The statements on PostgreSQL 12 or newer."""

    drivers = ("psycopg", "psycopg2")
    # A subquery, so that the clock is read once and comparisons with it can use an index.
    now = sa.literal_column("(SELECT clock_timestamp() AT TIME ZONE 'UTC')", UtcTime)
    schedule_order = sa.collate(SCHEDULES.c.name, "C")
    insert_into = staticmethod(postgresql.insert)
    can_listen = True
    # The server closes the connection when it gets a larger message.
    largest_text = _MAX_MESSAGE_BYTES - _MESSAGE_OVERHEAD_BYTES
    _listen_connection: Any = None
    """The driver connection of :meth:`listen`."""

    def __init__(self, engine: sa.Engine, *args: Any, **kwargs: Any) -> None:
        super().__init__(engine, *args, **kwargs)
        prepare_limits(engine)

    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        return time + seconds * sa.literal_column("interval '1 second'", sa.Interval)

    def json_rows(
        self, array: sa.BindParameter[str], types: Mapping[str, sa.types.TypeEngine[Any]]
    ) -> sa.FromClause:
        columns = [sa.column(name, kind) for name, kind in types.items()]
        rows = sa.func.json_to_recordset(array.cast(postgresql.JSON))
        return rows.table_valued(*columns).render_derived(name="given", with_types=True)

    def limit_ordered(
        self, ordered: sa.Select[Any], limit: int | sa.BindParameter[int]
    ) -> sa.Select[Any]:
        # A subquery hides the limit from the planner, which then reads in index order. With a limit
        # above its estimate of the rows, it could read and sort all of them.
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

    def first_waiting(self, connection: sa.Connection, keys: Sequence[Key]) -> list[Candidate]:
        rooms = {key.id: key.wanted for key in keys}
        parameters = {"keys": list(rooms), "rooms": list(rooms.values())}
        rows = connection.execute(self._first_waiting, parameters)
        found = [Candidate._make(row) for row in rows]
        taken = collections.Counter(each.key_id for each in found)
        if short := [key_id for key_id, room in rooms.items() if taken[key_id] < room]:
            ids = [each.job_id for each in found]
            parameters = {"keys": short, "found": ids}
            others = set(connection.scalars(self._others_waiting, parameters))
            for key in keys:
                if key.id in others:
                    free = self.next_free(connection, key, key.wanted - taken[key.id], ids)
                    found += free
        return found

    @functools.cached_property
    def _first_waiting(self) -> sa.Select[Any]:
        keys = sa.func.unnest(
            sa.bindparam("keys", type_=postgresql.ARRAY(sa.BigInteger)),
            sa.bindparam("rooms", type_=postgresql.ARRAY(sa.Integer)),
        )
        key = keys.table_valued("id", "room").render_derived(name="wanted")
        mine = SEATS.c.key_id == key.c.id, SEATS.c.state == SeatState.WAITS.value
        seats = sa.select(SEATS).where(*mine).order_by(*ORDER).limit(key.c.room).correlate(key)
        first = seats.lateral("first")
        # A subquery that locks is not merged into the outer query. The planner does not know how
        # small the room is, and could otherwise read all jobs instead of these.
        jobs = sa.select(JOBS).where(is_waiting_job(first.c.job_id)).correlate(first)
        job = jobs.with_for_update(skip_locked=True).lateral("job")
        tables = {SEATS: first, JOBS: job}
        columns = (tables[column.table].c[column.name] for column in CANDIDATE_COLUMNS)
        return sa.select(*columns).select_from(key.join(first, sa.true()).join(job, sa.true()))

    @functools.cached_property
    def _others_waiting(self) -> sa.Select[Any]:
        keys = sa.bindparam("keys", type_=postgresql.ARRAY(sa.BigInteger))
        found = sa.bindparam("found", type_=postgresql.ARRAY(sa.BigInteger))
        waiting = sa.select(SEATS.c.key_id).join_from(SEATS, JOBS, IS_WAITING_JOB).distinct()
        mine = SEATS.c.key_id == sa.any_(keys), SEATS.c.state == SeatState.WAITS.value
        return waiting.where(*mine, SEATS.c.job_id != sa.all_(found))

    def complete_and_leave(
        self, connection: sa.Connection, parameters: Mapping[str, Any], ids: Sequence[int]
    ) -> tuple[int, int]:
        if not ids:
            return super().complete_and_leave(connection, parameters, ids)
        seats = {"ids": ids, "states": [SeatState.HOLDS.value]}
        row = connection.execute(self._complete_and_leave, {**parameters, **seats}).one()
        return row.changed, row.left

    @functools.cached_property
    def _complete_and_leave(self) -> sa.Select[Any]:
        changed = self.complete_all.returning(JOBS.c.id).cte("changed")
        left = DELETE_SEATS.returning(SEATS.c.key_id).cte("left")
        return sa.select(
            *(
                sa.select(sa.func.count()).select_from(each).scalar_subquery().label(each.name)
                for each in (changed, left)
            )
        )

    def give(
        self, connection: sa.Connection, candidates: Sequence[Candidate], waiting: Collection[int]
    ) -> set[int]:
        seats = {
            "key_ids": [each.key_id for each in candidates],
            "job_ids": [each.id for each in candidates],
        }
        if not waiting:
            return set(connection.scalars(self._give_all, seats))
        given = set(connection.scalars(self._hold_seats, seats))
        self.make_pending(connection, sorted(given - set(waiting)))
        return given

    @functools.cached_property
    def _hold_seats(self) -> sa.Update:
        """The statement that makes jobs hold their seats, if they still wait at these keys."""
        pairs = sa.func.unnest(
            sa.bindparam("key_ids", type_=postgresql.ARRAY(sa.BigInteger)),
            sa.bindparam("job_ids", type_=postgresql.ARRAY(sa.BigInteger)),
        )
        pair = pairs.table_valued("key_id", "job_id").render_derived(name="given")
        still_waits = (
            SEATS.c.state == SeatState.WAITS.value,
            SEATS.c.job_id == pair.c.job_id,
            SEATS.c.key_id == pair.c.key_id,
        )
        update = sa.update(SEATS).where(*still_waits).values(state=SeatState.HOLDS.value)
        return update.returning(SEATS.c.job_id)

    @functools.cached_property
    def _give_all(self) -> sa.Update:
        """The statement that does the same, and makes these jobs pending."""
        held = self._hold_seats.cte("held")
        mine = JOBS.c.id.in_(sa.select(held.c.job_id))
        return sa.update(JOBS).where(mine).values(transitions.pending()).returning(JOBS.c.id)

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        free = candidates.with_for_update(of=JOBS, skip_locked=True).cte()
        # Materialized, or the planner could evaluate the query of the candidates more than once.
        return sa.select(free.prefix_with("MATERIALIZED").c.id)

    def make_engine(self) -> sa.Engine:
        engine = sa.create_engine(
            self.host_engine.url,
            creator=self._connect,
            isolation_level="READ COMMITTED",
            max_overflow=-1,
            hide_parameters=True,
        )
        # Before the host's listeners, which would otherwise use a closed connection.
        discard_dead_connections(engine, lambda connection: int(connection.fileno()))
        forward(self.host_engine, engine, self.watched)
        sa.event.listen(engine, "connect", _read_times_leniently)
        sa.event.listen(engine, "handle_error", _disconnect_if_read_only)
        if self.deadline is not None:
            sa.event.listen(engine, "begin", self._configure_transaction)
        watch_new_connections(engine)
        return engine

    def _connect(self, record: Any) -> Any:
        """Connect as :meth:`connect_as_host` does, with a timeout."""
        # libpq takes whole seconds, and waits for at least two.
        seconds = math.ceil(max(2.0, min(_CONNECT_SECONDS, self.seconds_left())))
        with connect_limits({"connect_timeout": seconds}):
            return self.connect_as_host(record)

    def link_advice(self) -> str | None:
        with self.host_engine.connect() as connection:
            info: Any = getattr(connection.connection.driver_connection, "info", None)
            if hasattr(info, "get_parameters"):
                given = info.get_parameters()
            else:
                given = getattr(info, "dsn_parameters", {})
        is_on_this_machine = given.get("host", "/").startswith(("/", "@"))
        if is_on_this_machine or _DEAD_LINK_OPTIONS & given.keys():
            return None
        return (
            "the app's connections to PostgreSQL notice a dead link only after two hours, and a "
            "job that waits for one blocks its thread until then: set keepalives_idle and "
            "tcp_user_timeout in connect_args"
        )

    def stop_listening(self) -> None:
        if self._listen_connection is not None:
            self.sever(self._listen_connection)

    def listen(
        self,
        stopped: threading.Event,
        wake: Callable[[], object],
        is_quiet: Callable[[], bool],
    ) -> None:
        """Listen for notifications of committed jobs, on a connection of its own."""
        options = self.dialect_options({AUTOCOMMIT: True})
        seconds = self.deadline or _CONNECT_SECONDS
        with self._watchdog.watching(seconds) as watch, watch.connecting():
            opened = self.engine.connect()
        with opened.execution_options(**options) as connection:
            driver_connection: Any = connection.connection.driver_connection
            # Keep a listening connection out of the pool.
            connection.detach()
            if hasattr(driver_connection, "add_notify_handler"):
                # Without a handler, psycopg 3 would collect all notifications in memory.
                driver_connection.add_notify_handler(lambda _: None)
            self._listen_connection = driver_connection
            self._execute_watched(connection, driver_connection, f"LISTEN {self._quoted_channel}")
            wake()
            pinged_at = time.monotonic()
            while not stopped.is_set():
                has_notification = is_readable(driver_connection.fileno(), _STOP_CHECK_SECONDS)
                if not has_notification and time.monotonic() - pinged_at < _PING_SECONDS:
                    continue
                if stopped.is_set():
                    return
                # With every driver, this reads the notifications, or fails if the link is dead.
                self._execute_watched(connection, driver_connection, "SELECT 1")
                pinged_at = time.monotonic()
                if has_notification:
                    wake()
                    stopped.wait(_GATHER_SECONDS)

    def _execute_watched(
        self, connection: sa.Connection, driver_connection: Any, statement: str
    ) -> None:
        with self._watchdog.watching(self.deadline or _CONNECT_SECONDS, driver_connection):
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
        # A subquery, so that it is called once for all rows. It costs no round trip of its own.
        notification = sa.select(sa.func.pg_notify(self._channel, "")).where(
            sa.bindparam("notify", type_=sa.Boolean)
        )
        return (*super().returned, notification.scalar_subquery())

    def insert_parameters(self, connection: sa.Connection, jobs: NewJobs) -> dict[str, Any]:
        # PostgreSQL cannot prepare a transaction that has sent a notification.
        is_two_phase = isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)
        return {**super().insert_parameters(connection, jobs), "notify": not is_two_phase}

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        elements = sa.func.json_array_elements_text(array.cast(postgresql.JSON))
        each = elements.table_valued("text", with_ordinality="position").render_derived()
        return each.c.position, each.c.text

    def json_lists(self, array: sa.BindParameter[str], length: int) -> tuple[Any, list[Any]]:
        elements = sa.func.json_array_elements(array.cast(postgresql.JSON))
        each = elements.table_valued("list", with_ordinality="position").render_derived()
        strings = [each.c.list.op("->>", return_type=sa.Text())(n) for n in range(length)]
        return each.c.position, strings

    def typed(self, value: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(value, value.type)

    def dialect_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**options, "isolation_level": "AUTOCOMMIT"} if AUTOCOMMIT in options else options

    def _configure_transaction(self, connection: sa.Connection) -> None:
        """Set the parameters of a worker's transaction, in one round trip."""
        if {READ_ONLY, AUTOCOMMIT} & connection.get_execution_options().keys():
            return
        _set_for_transaction(
            connection,
            # The server ends the transaction of a worker that stalls within it. Until then its rows
            # stay locked, also for a rescue of its jobs.
            idle_in_transaction_session_timeout=f"{self.deadline:.3f}s",
            lock_timeout=f"{_LOCK_WAIT_SECONDS:.3f}s",
            # Each statement finds a few rows by an index, and none is worth compiling. Where the
            # planner expects many, as in tables without statistics, it would read whole tables.
            enable_seqscan="off",
            enable_hashjoin="off",
            enable_mergejoin="off",
            enable_bitmapscan="off",
            jit="off",
        )

    @property
    def _session_settings(self) -> sa.Select[Any]:
        table = self.host_engine.dialect.identifier_preparer.format_table(
            sa.table(JOBS.name, schema=self.schema)
        )
        path = sa.func.array_to_string(sa.func.current_schemas(sa.false()), ", ")
        return sa.select(
            sa.func.current_database().label("database"),
            sa.literal_column("current_user", sa.String).label("user"),
            path.label("search_path"),
            _qualified_name(table).label("table of jobs"),
        )

    @contextlib.contextmanager
    def query_timeout(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        # Compiling a query would use up much of its time.
        _set_for_transaction(connection, statement_timeout=f"{seconds:.3f}s", jit="off")
        yield

    @contextlib.contextmanager
    def lock_limit(
        self, connection: sa.Connection, seconds: float, *, is_hosts: bool
    ) -> Iterator[None]:
        if not is_hosts:
            connection.exec_driver_sql(_LIMIT_LOCKS.format(seconds=seconds))
            yield
            return
        driver_connection: Any = connection.connection.driver_connection
        if getattr(driver_connection, "autocommit", False):
            # Without a transaction, nothing keeps a lock, and there are no savepoints.
            yield
            return
        savepoint = connection.begin_nested()
        try:
            limit = _LIMIT_LOCKS.format(seconds=seconds)
            before: str = connection.exec_driver_sql(limit).scalars().one()
            yield
            _set_for_transaction(connection, lock_timeout=before)
            savepoint.commit()
        except BaseException:
            # A lost connection has no savepoint, and its error must reach the caller.
            with contextlib.suppress(DBAPIError):
                savepoint.rollback()
            raise

    def is_timeout(self, error: DBAPIError) -> bool:
        return _sqlstate(error) == _QUERY_CANCELED

    def sever(self, driver_connection: Any) -> None:
        with contextlib.suppress(Exception):
            shut_down(driver_connection.fileno())

    def is_read_only(self, error: DBAPIError) -> bool:
        return _sqlstate(error) == _READ_ONLY_TRANSACTION

    def is_denied(self, error: DBAPIError) -> bool:
        return _sqlstate(error) == _INSUFFICIENT_PRIVILEGE

    def is_lock_timeout(self, error: DBAPIError) -> bool:
        return _sqlstate(error) == _LOCK_NOT_AVAILABLE

    def is_too_large(self, error: DBAPIError) -> bool:
        return isinstance(error, StatementTooLarge) or _sqlstate(error) == _LIMIT_EXCEEDED

    def is_redoable(self, error: DBAPIError) -> bool:
        return _sqlstate(error) in _REDOABLE


def _read_times_leniently(connection: Any, _record: object) -> None:
    """Read a time that Python cannot represent, such as ``infinity``, as ``UNREADABLE_TIME``."""
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
                # psycopg2 reads infinity as the first or last time that Python can represent.
                time: dt.datetime = read(text, cursor)
            except (ValueError, OverflowError):
                return UNREADABLE_TIME
            return UNREADABLE_TIME if time in (dt.datetime.min, dt.datetime.max) else time

        lenient = extensions.new_type((_TIMESTAMP_OID,), "bgjobs_timestamp", read_leniently)
        extensions.register_type(lenient, connection)


@functools.cache
def _lenient_loader(loader: Any) -> Any:
    """A psycopg loader that wraps ``loader``, because that class cannot be subclassed."""
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


def _qualified_name(table: str) -> sa.ScalarSelect[Any]:
    """The schema-qualified name of the table to which the name ``table`` resolves."""
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


def _disconnect_if_read_only(context: sa.engine.ExceptionContext) -> None:
    """Discard connections to a server that is no longer the primary."""
    if _sqlstate_of(context.original_exception) == _READ_ONLY_TRANSACTION:
        context.is_disconnect = True


def _sqlstate(error: DBAPIError) -> str | None:
    return _sqlstate_of(error.orig)


def _sqlstate_of(error: BaseException | None) -> str | None:
    # psycopg 3 and psycopg2 use different attributes.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
