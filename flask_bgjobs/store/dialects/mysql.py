"""MySQL and MariaDB: row locks as on PostgreSQL, but UPDATE statements that return no rows."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError

from ...errors import DatabaseNotSupported, InvalidJob
from ...job.records import UNREADABLE_TIME, JobSpec
from ...job.statuses import JobStatus
from ...models import Job, SeatState, UtcTime, has_status
from .. import transitions
from ..base import Store
from ..connections import forward
from ..database import (
    AUTOCOMMIT,
    JOBS,
    LIMIT_KEYS,
    LIMITS,
    NOTICES,
    QUEUES,
    READ_ONLY,
    ROLLUPS,
    SCHEDULES,
    SEATS,
)
from ..links import connect_limits, discard_dead_connections, prepare_limits, shut_down
from ..statements.admit import Candidate
from ..statements.claim import SPEC_COLUMNS
from ..statements.enqueue import (
    NewJobs,
    by_column_name,
    column_values,
    inserted_job,
    split,
    with_key,
)
from ..statements.limit_keys import LIMIT_COLUMNS, Key
from ..statements.progress import by_key
from ..statements.promote import PROMOTED_COLUMNS, promotion
from ..watchdog import watch_new_connections

_DUPLICATE, _LOCK_TIMEOUT, _DEADLOCK = 1062, 1205, 1213
_NO_SUCH_NAME, _SHUTDOWN, _PACKET_TOO_LARGE = 1305, 1053, 1153
_QUERY_TIMEOUTS = frozenset({1969, 3024})
"""Error numbers of a query timeout, on MariaDB and on MySQL."""
_OPTION_PREVENTS = 1290
"""Error number of a statement that an option of the server forbids, such as ``read_only``."""
_READ_ONLY_ERRORS = frozenset({1792, 1836})
"""Error numbers of a read-only transaction, and of a server in read-only mode."""
_DENIED = frozenset({1044, 1142, 1143})
"""Error numbers of a missing privilege on a database, a table or a column."""
_CONNECT_SECONDS = 10.0
"""How long each step of connecting may take."""
_DATETIME_FIELD = 12
"""Type number of a DATETIME column in the protocol."""
_SERVER_STATUS_IN_TRANS = 1
"""Protocol flag: the session is in a transaction."""
_JSON_TYPES: dict[type[sa.types.TypeEngine[Any]], str] = {
    sa.BigInteger: "BIGINT",
    sa.Integer: "INT",
    sa.Double: "DOUBLE",
    sa.Text: "LONGTEXT",
}
"""The types of columns in ``JSON_TABLE``."""
_LOCK_WAIT_SECONDS = 1
"""How long the server waits for a row lock, in whole seconds. After that, the transaction is redone
or skips the row."""
_LEAST_VERSIONS = {"MySQL": (8, 0, 1), "MariaDB": (10, 6, 0)}
"""The oldest versions with SKIP LOCKED."""
_BATCH_CHARACTERS = 200_000
"""Limit of the text in one INSERT. Escaped and encoded, it takes at most four times as many bytes.
PyMySQL splits an INSERT of more than 1,024,000 bytes, and then most of the ids are unknown."""
_ROW_CHARACTERS = 1_000
"""Upper limit for the text of all numbers, times and hashes of a row in an INSERT."""


_WAITING_SEATS = (
    sa.select(SEATS.c.key_id, SEATS.c.job_id)
    .where(
        SEATS.c.state == SeatState.WAITS.value,
        SEATS.c.job_id.in_(sa.bindparam("ids", expanding=True, type_=sa.BigInteger)),
    )
    .with_hint(SEATS, "FORCE INDEX (ix_bgjobs_seat_job)")
)
"""The query for the seats at which some jobs wait."""


class MysqlStore(Store):
    """The statements on MySQL 8.0.1, MariaDB 10.6, or newer."""

    drivers = ("pymysql",)
    now = sa.literal_column("UTC_TIMESTAMP(6)", UtcTime)
    seeks_ranges = False
    insert_into = staticmethod(mysql.insert)
    # A locking read sees the newest rows, but the snapshot of the host's transaction may be older
    # than the holder. The lock is shared, like the one that the conflict has taken.
    _holders = Store._holders.with_for_update(read=True)

    def __init__(self, engine: sa.Engine, *args: Any, **kwargs: Any) -> None:
        super().__init__(engine, *args, **kwargs)
        prepare_limits(engine)

    def add_seconds(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        microseconds = sa.cast(seconds * 1_000_000, sa.BigInteger)
        unit = sa.literal_column("MICROSECOND", sa.String)
        return sa.func.timestampadd(unit, microseconds, time, type_=UtcTime)

    def seconds_parameter(self, name: str) -> sa.ColumnElement[float]:
        # Without a cast to DOUBLE, which MySQL has only since 8.0.17.
        return sa.bindparam(name, type_=sa.Double)

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        return candidates.with_for_update(of=JOBS, skip_locked=True)

    def insert_all(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        _check_packets(connection, jobs)
        if len(jobs.parameters) == 1 and connection.dialect.insert_returning:
            # MariaDB supports INSERT … RETURNING.
            return super().insert_all(connection, jobs)
        times, step = self._times_and_step(connection, jobs)
        common = {**column_values(jobs), **times}
        inserted: list[Job] = []
        for batch in _batches(jobs):
            each = batch.each or [{}] * len(batch.parameters)
            rows = [
                {**common, "parameters": text, **by_column_name(values)}
                for text, values in zip(batch.parameters, each, strict=True)
            ]
            ids = enumerate(_insert_rows(connection, rows, step))
            inserted += (inserted_job(batch, number, job_id, **times) for number, job_id in ids)
        return inserted

    def _times_and_step(
        self, connection: sa.Connection, jobs: NewJobs
    ) -> tuple[dict[str, dt.datetime], int]:
        """The times of new jobs, and the difference between the ids of two rows."""
        now, step = connection.execute(
            sa.select(self.now, sa.literal_column("@@auto_increment_increment", sa.Integer))
        ).one()
        return {"created_at": now, "run_at": _due(jobs, now)}, step

    def insert_free(self, connection: sa.Connection, jobs: NewJobs) -> list[Job | None]:
        _check_packets(connection, jobs)
        times, step = self._times_and_step(connection, jobs)
        inserted: list[Job | None] = []
        for batch in _batches(jobs):
            each = [with_key(batch, number) for number in range(len(batch.parameters))]
            hashes = [job.values["unique_hash"] for job in each]
            holders = sa.select(JOBS.c.unique_hash).where(JOBS.c.unique_hash.in_(hashes))
            taken = set(connection.scalars(holders))
            free = [job for job in each if job.values["unique_hash"] not in taken]
            ids: Sequence[int] = []
            # If a key was taken meanwhile, the server rolls back only this statement.
            with _ignoring_taken_keys():
                rows = [{**column_values(job), **times} for job in free]
                ids = _insert_rows(connection, rows, step) if rows else []
            id_by_hash = {job.values["unique_hash"]: n for job, n in zip(free, ids, strict=False)}
            for job, key_hash in zip(each, hashes, strict=True):
                job_id = id_by_hash.get(key_hash)
                inserted.append(None if job_id is None else inserted_job(job, 0, job_id, **times))
        return inserted

    def insert_unless_taken(self, connection: sa.Connection, jobs: NewJobs) -> Job | None:
        # The server rolls back only this statement. The transaction is still usable.
        inserted = None
        with _ignoring_taken_keys():
            (inserted,) = self.insert_all(connection, jobs)
        return inserted

    def json_rows(
        self, array: sa.BindParameter[str], types: Mapping[str, sa.types.TypeEngine[Any]]
    ) -> sa.FromClause:
        members = ", ".join(
            f"{name} {_JSON_TYPES[type(kind)]} PATH '$.{name}'" for name, kind in types.items()
        )
        rows = sa.func.json_table(array, sa.literal_column(f"'$[*]' COLUMNS ({members})"))
        columns = [sa.column(name, kind) for name, kind in types.items()]
        return rows.table_valued(*columns, name="given")

    def locked_rows(self, connection: sa.Connection, ids: Sequence[int]) -> list[Any]:
        # Two queries: MariaDB cannot lock only one of two tables.
        chosen = sa.select(LIMIT_KEYS, self.now.label("now")).where(LIMIT_KEYS.c.id.in_(ids))
        ordered = chosen.order_by(LIMIT_KEYS.c.id).with_for_update(skip_locked=True)
        keys = connection.execute(ordered).mappings().all() if ids else []
        if not keys:
            return []
        limit_ids = sorted({key["limit_id"] for key in keys})
        limits = sa.select(LIMITS.c.id, *LIMIT_COLUMNS).where(LIMITS.c.id.in_(limit_ids))
        found = {row.id: row._mapping for row in connection.execute(limits)}
        no_limit = dict.fromkeys(column.name for column in LIMIT_COLUMNS)
        return [SimpleNamespace(**{**found.get(key["limit_id"], no_limit), **key}) for key in keys]

    def first_waiting(self, connection: sa.Connection, keys: Sequence[Key]) -> list[Candidate]:
        """The first jobs that wait at each key. They are locked by id, or the seats would be locked
        as well."""
        found = super().first_waiting(connection, keys)
        locked = self.lock_jobs(connection, [each.id for each in found], JobStatus.WAITING)
        free = self.still_waiting(connection, [each for each in found if each.id in locked])
        known_free = {(each.key_id, each.id) for each in free}
        missing = collections.Counter(
            each.key_id for each in found if (each.key_id, each.id) not in known_free
        )
        for key in keys:
            if missing[key.id]:
                known = {each.id for each in found}
                free += self.next_free(connection, key, missing[key.id], known)
        return free

    def still_waiting(self, connection: sa.Connection, locked: list[Candidate]) -> list[Candidate]:
        if not locked:
            return locked
        ids = {"ids": [each.id for each in locked]}
        waiting = {(row.key_id, row.job_id) for row in connection.execute(_WAITING_SEATS, ids)}
        return [each for each in locked if (each.key_id, each.id) in waiting]

    def delete_seats(
        self, connection: sa.Connection, states: Sequence[SeatState], ids: Sequence[int]
    ) -> int:
        return sum(
            self._delete_by_ids(
                *(connection, SEATS, "job_id", "ix_bgjobs_seat_job", ids),
                f"AND found.state = {state.value}",
            )
            for state in states
        )

    def delete_notices_by_id(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        if ids:
            self._delete_by_ids(connection, NOTICES, "id", "PRIMARY", ids)

    def delete_notices(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]
    ) -> None:
        ids = connection.scalars(sa.select(NOTICES.c.id).where(*conditions)).all()
        self.delete_notices_by_id(connection, ids)

    def _delete_by_ids(
        self,
        connection: sa.Connection,
        table: sa.Table,
        column: str,
        index: str,
        ids: Sequence[int],
        condition: str = "",
    ) -> int:
        """Delete rows by one look-up in an index for each id, and return their number.

        For an IN list, the server may scan the table instead. It would then wait for rows that open
        transactions of the host have inserted.
        """
        named = sa.table(table.name, schema=self.schema)
        name = self.host_engine.dialect.identifier_preparer.format_table(named)
        delete = sa.text(
            f"DELETE found FROM JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS given "
            f"STRAIGHT_JOIN {name} AS found FORCE INDEX ({index}) "
            f"ON found.{column} = given.id {condition}"
        )
        return connection.execute(delete, {"ids": json.dumps(list(ids))}).rowcount

    def ignoring_duplicates(self, insert: Any, key: sa.Column[Any]) -> Any:
        return insert.prefix_with("IGNORE")

    @functools.cached_property
    def _registration(self) -> Any:
        row = mysql.insert(QUEUES).values(created_at=self.now)
        return row.on_duplicate_key_update(created_at=row.inserted.created_at)

    def queues_holding(self, status: JobStatus) -> sa.FromClause:
        # For this GROUP BY, the server uses one index seek for each queue.
        names = sa.select(JOBS.c.queue.label("name")).where(has_status(status))
        return names.group_by(JOBS.c.queue).subquery(f"{status.value}_queue")

    @property
    def _schedule_insertion(self) -> Any:
        row = mysql.insert(SCHEDULES).values(revision=0)
        return row.on_duplicate_key_update(name=row.inserted.name)

    @functools.cached_property
    def _addition(self) -> Any:
        insert = mysql.insert(ROLLUPS)
        return insert.on_duplicate_key_update(jobs=ROLLUPS.c.jobs + insert.inserted.jobs)

    def _claim_from(
        self, connection: sa.Connection, worker_id: int, candidates: sa.Select[Any], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of the ordered ``candidates``, and return them in order."""
        claimed = {
            "attempt": transitions.NEXT_ATTEMPT,
            "worker_id": sa.literal(worker_id),
            "claimed_at": self.now,
            "started_at": sa.null(),
        }
        columns = (claimed.get(column.name, column).label(column.name) for column in SPEC_COLUMNS)
        chosen = candidates.with_only_columns(*columns, maintain_column_froms=True)
        rows = connection.execute(self.locked(self.limit_ordered(chosen, limit)))
        specs = [JobSpec._make(row) for row in rows]
        if specs:
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id.in_([spec.id for spec in specs]))
                .values(transitions.claimed(worker_id, specs[0].claimed_at))
            )
        return specs

    def promote_due(self, connection: sa.Connection, *, newest: bool) -> Sequence[sa.Row[Any]]:
        rows = [
            row
            for candidates in self.due(newest=newest)
            for row in connection.execute(
                self.locked(candidates.with_only_columns(*PROMOTED_COLUMNS))
            )
        ]
        if rows:
            connection.execute(promotion([row.id for row in rows]))
        return rows

    def _held_by(
        self, connection: sa.Connection, worker_id: int, *, lock: bool = False
    ) -> list[JobSpec]:
        """The running jobs of a worker.

        They are selected without a lock first: a locking query would lock every row that it scans.
        """
        held = super()._held_by(connection, worker_id)
        if not (held and lock):
            return held
        keys = [spec.key for spec in held]
        locked = by_key(self._still_running(connection, worker_id, keys))
        return [spec for spec in super()._held_by(connection, worker_id) if spec.key in locked]

    def make_engine(self) -> sa.Engine:
        engine = sa.create_engine(
            self.host_engine.url,
            creator=self._connect,
            isolation_level="READ COMMITTED",
            max_overflow=-1,
            hide_parameters=True,
        )

        # Before the host's listeners, which would otherwise use a closed connection.
        discard_dead_connections(engine, _descriptor)
        forward(self.host_engine, engine, self.watched)

        def prepare(connection: Any, _record: object) -> None:
            require_skip_locked(engine.dialect)
            self._prepare_session(connection)

        sa.event.listen(engine, "connect", prepare)
        sa.event.listen(engine, "begin", _begin)
        sa.event.listen(engine, "handle_error", _mark_disconnect)
        watch_new_connections(engine)
        return engine

    def _connect(self, record: Any) -> Any:
        """Connect as :meth:`connect_as_host` does, with a timeout."""
        # By default, PyMySQL limits only the TCP connect, and waits forever for the server's
        # greeting.
        seconds = max(1.0, min(_CONNECT_SECONDS, self.seconds_left()))
        timeouts = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), seconds)
        with connect_limits(timeouts) as added_names:
            connection = self.connect_as_host(record)
        for name in added_names - {"connect_timeout"}:
            # Statements may take longer than the connect.
            setattr(connection, f"_{name}", None)
        return connection

    def _prepare_session(self, connection: Any) -> None:
        decode = connection.decoders[_DATETIME_FIELD]
        connection.decoders[_DATETIME_FIELD] = lambda text: _time_or_unreadable(decode(text))
        # The host's connections may have a smaller character set, but error texts may contain any
        # character.
        connection.set_character_set("utf8mb4")
        settings = {"innodb_lock_wait_timeout": _LOCK_WAIT_SECONDS}
        if self.deadline is not None:
            # The server ends the transaction of a worker that stalls within it. Until then its rows
            # stay locked, also for a rescue of its jobs.
            settings["wait_timeout"] = math.ceil(self.deadline)
        assignments = ", ".join(f"SESSION {name} = {value}" for name, value in settings.items())
        with connection.cursor() as cursor:
            cursor.execute(f"SET {assignments}")
            cursor.execute("SELECT @@max_allowed_packet")
            (largest,) = cursor.fetchone()
        connection.query = _query_within_packet(connection, largest)
        # Single statements then need no extra round trips. Transactions begin with BEGIN.
        connection.autocommit(True)
        for name in ("commit", "rollback"):
            setattr(connection, name, _only_in_transaction(connection, getattr(connection, name)))

    @property
    def _session_settings(self) -> sa.Select[Any]:
        return sa.select(sa.func.database().label("database"), sa.func.current_user().label("user"))

    def sever(self, driver_connection: Any) -> None:
        with contextlib.suppress(Exception):
            shut_down(_descriptor(driver_connection))

    @contextlib.contextmanager
    def query_timeout(self, connection: sa.Connection, seconds: float) -> Iterator[None]:
        is_mariadb = getattr(connection.dialect, "is_mariadb", False)
        name = "max_statement_time" if is_mariadb else "max_execution_time"
        value = seconds if is_mariadb else math.ceil(seconds * 1_000)
        connection.exec_driver_sql(f"SET SESSION {name} = {value}")
        try:
            yield
        finally:
            _reset_variable(connection, name)

    @contextlib.contextmanager
    def lock_limit(
        self, connection: sa.Connection, seconds: float, *, is_hosts: bool
    ) -> Iterator[None]:
        if not is_hosts:
            # Sessions of our own wait for a shorter time.
            yield
            return
        select = "SELECT @@SESSION.innodb_lock_wait_timeout"
        before: int = connection.exec_driver_sql(select).scalar_one()
        if before <= seconds:
            yield
            return
        _set_lock_wait(connection, math.ceil(seconds))
        try:
            yield
        finally:
            if not connection.invalidated:
                _set_lock_wait(connection, before)

    def is_timeout(self, error: DBAPIError) -> bool:
        return _code(error) in _QUERY_TIMEOUTS

    def is_read_only(self, error: DBAPIError) -> bool:
        return _is_read_only(error.orig)

    def is_denied(self, error: DBAPIError) -> bool:
        return _code(error) in _DENIED

    def is_lock_timeout(self, error: DBAPIError) -> bool:
        return _code(error) == _LOCK_TIMEOUT

    def is_too_large(self, error: DBAPIError) -> bool:
        return _code(error) == _PACKET_TOO_LARGE

    def is_redoable(self, error: DBAPIError) -> bool:
        code = _code(error)
        # A deadlock rolls back the whole transaction, so its savepoints no longer exist.
        no_savepoint = code == _NO_SUCH_NAME and "SAVEPOINT" in str(error.orig)
        return code in (_LOCK_TIMEOUT, _DEADLOCK) or no_savepoint


def _time_or_unreadable(value: object) -> dt.datetime:
    """A time from PyMySQL, which returns an invalid one, such as ``0000-00-00``, as text."""
    return value if isinstance(value, dt.datetime) else UNREADABLE_TIME


def _begin(connection: sa.Connection) -> None:
    if not {READ_ONLY, AUTOCOMMIT} & connection.get_execution_options().keys():
        connection.exec_driver_sql("BEGIN")


def _set_lock_wait(connection: sa.Connection, seconds: int) -> None:
    connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {seconds}")


def _reset_variable(connection: sa.Connection, name: str) -> None:
    """Set a session variable back to the server's default. On an error, discard the connection."""
    if connection.invalidated:
        return
    driver_connection: Any = connection.connection.driver_connection
    try:
        # The query has succeeded, so an error here must not reach the caller.
        with driver_connection.cursor() as cursor:
            cursor.execute(f"SET SESSION {name} = DEFAULT")
    except (connection.dialect.loaded_dbapi.Error, OSError):
        connection.invalidate()


def _only_in_transaction(connection: Any, end: Callable[[], None]) -> Callable[[], None]:
    """Wrap ``commit`` or ``rollback`` so that it is skipped outside a transaction.

    The driver would send it to the server even then.
    """

    def end_transaction() -> None:
        if connection.server_status & _SERVER_STATUS_IN_TRANS:
            end()

    return end_transaction


def _is_read_only(error: BaseException | None) -> bool:
    # Other options of the server cause an error with the same number.
    prevented = _code_of(error) == _OPTION_PREVENTS and "read-only" in str(error)
    return prevented or _code_of(error) in _READ_ONLY_ERRORS


def _query_within_packet(connection: Any, largest: int) -> Callable[..., int]:
    """Wrap the connection's ``query`` to refuse statements larger than ``max_allowed_packet``.

    The server would close the connection because of such a statement.

    :param largest: ``max_allowed_packet``, in bytes.
    """
    query: Callable[..., int] = connection.query

    def send(sql: str | bytes, *args: Any, **kwargs: Any) -> int:
        # A character takes at most four bytes. The packet has one more byte, the command.
        size = len(sql) + 1
        if size * 4 >= largest:
            size = len(sql.encode() if isinstance(sql, str) else sql) + 1
            if size >= largest:
                raise connection.DataError(
                    _PACKET_TOO_LARGE,
                    f"a statement of {size:,} bytes is larger than max_allowed_packet, "
                    f"{largest:,} bytes",
                )
        return query(sql, *args, **kwargs)

    return send


def _descriptor(connection: Any) -> int:
    """The file descriptor of a PyMySQL connection, which has no public method for it."""
    return int(connection._sock.fileno())


def require_skip_locked(dialect: Any) -> None:
    """Refuse a server without ``SKIP LOCKED``.

    :param dialect: SQLAlchemy's dialect, after its first connection to the server.
    :raises DatabaseNotSupported: when the version is too old; names it and the oldest one needed.
    """
    name = "MariaDB" if dialect.is_mariadb else "MySQL"
    version = tuple(part for part in dialect.server_version_info if isinstance(part, int))
    needed = _LEAST_VERSIONS[name]
    if version < needed:
        raise DatabaseNotSupported(
            f"flask-bgjobs needs SELECT … FOR UPDATE SKIP LOCKED, which {name} has since "
            f"{_dotted(needed)}, but this server is {name} {_dotted(version)}"
        )


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def _mark_disconnect(context: sa.engine.ExceptionContext) -> None:
    """Mark errors after which SQLAlchemy has to discard the connections.

    After some errors, the server closes the connection. After a read-only error, a new connection
    may reach the new primary.
    """
    error = context.original_exception
    # If we raised the error ourselves, the statement was not sent.
    is_our_own = isinstance(error, context.dialect.loaded_dbapi.DataError)
    is_closed = _code_of(error) in (_SHUTDOWN, _PACKET_TOO_LARGE) and not is_our_own
    if is_closed or _is_read_only(error):
        context.is_disconnect = True


def _insert_rows(
    connection: sa.Connection, rows: Sequence[Mapping[str, Any]], step: int
) -> Sequence[int]:
    """Insert rows with one statement.

    :param step: the difference between the ids of two rows.
    :returns: their ids, in order.
    """
    result = connection.execute(sa.insert(JOBS), rows)
    # The ids of one statement are consecutive, and the driver returns the first.
    return range(result.lastrowid, result.lastrowid + len(rows) * step, step)


@contextlib.contextmanager
def _ignoring_taken_keys() -> Iterator[None]:
    """End the block if another job holds the unique key of a row to insert."""
    try:
        yield
    except IntegrityError as error:
        if _code(error) != _DUPLICATE or "unique_hash" not in str(error.orig):
            raise


def _batches(jobs: NewJobs) -> Iterator[NewJobs]:
    """The jobs in batches that fit into one INSERT each."""
    common = sum(len(value) for value in jobs.values.values() if isinstance(value, str))
    keys = () if jobs.unique is None else jobs.unique.keys
    fixed = _ROW_CHARACTERS + common + max(map(len, keys), default=0)
    fixed += max((len(values["limits_json"] or "") for values in jobs.each), default=0)
    return split(jobs, lambda text: fixed + len(text), limit=_BATCH_CHARACTERS)


def _check_packets(connection: sa.Connection, jobs: NewJobs) -> None:
    """Refuse parameters that are larger than ``max_allowed_packet``.

    The server would close the connection because of them, even if it is the host's.

    :raises InvalidJob: when they are too large; names their size and the limit.
    """
    large = [text for text in jobs.parameters if len(text) > _BATCH_CHARACTERS]
    if not large:
        return
    limit = connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one()
    driver_connection: Any = connection.connection.driver_connection
    for text in large:
        size = len(driver_connection.escape(text).encode()) + _ROW_CHARACTERS
        if size > limit:
            raise InvalidJob(
                f"the parameters take {size:,} bytes in a statement, but max_allowed_packet of "
                f"the server is {limit:,} bytes"
            )


def _due(jobs: NewJobs, now: dt.datetime) -> dt.datetime:
    if jobs.run_at is not None:
        return jobs.run_at
    return now + dt.timedelta(seconds=jobs.delay_seconds or 0)


def _code(error: DBAPIError) -> int:
    return _code_of(error.orig)


def _code_of(error: BaseException | None) -> int:
    """The number of an error of the server or the driver; 0: the error has none."""
    number = error.args[0] if error is not None and error.args else 0
    return number if isinstance(number, int) else 0
