"""Seats: which jobs wait at a limit, and which may run. Every move of a job with limits updates
them.

The seats of a job are changed only by a transaction that holds the lock of the job's row, or that
settles its attempt. Each change leaves a notice, after which a worker looks at the key again: see
:mod:`.admit`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from ...job.limits import LimitUse, uses_from_json
from ...job.statuses import JobStatus
from ...models import Job, SeatState
from ..database import JOBS, NOTICES, SEATS, Database
from ..transitions import HAS_LIMITS

ALL_QUEUES = 0
"""Stands for the id of a key in the notice of a change of queues."""
_EPOCH = dt.datetime(1970, 1, 1)
_MICROSECOND = dt.timedelta(microseconds=1)

DELETE_SEATS = sa.delete(SEATS).where(
    SEATS.c.state.in_(sa.bindparam("states", expanding=True, type_=sa.SmallInteger)),
    SEATS.c.job_id.in_(sa.bindparam("ids", expanding=True, type_=sa.BigInteger)),
)
"""Deletes the seats of some jobs that have some states."""


class Leaving(NamedTuple):
    """A job that gives up its seats."""

    job_id: int
    uses: Sequence[LimitUse]
    has_started: bool = False
    """Whether its code has started, or may have started."""
    started_at: dt.datetime | None = None
    """When it did; ``None`` if that is not known."""


class Seats(Database):
    """The statements on seats and notices."""

    def line_up(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        """Give the jobs with limits among these a seat at their first limit, where they wait.

        Call this after their rows have got the values of :func:`.transitions.ready` or
        :func:`.transitions.promoted`. Those that have yet to get a turn are left out.
        """
        if not ids:
            return
        limited = sa.select(
            JOBS.c.id, JOBS.c.limit_key_id, JOBS.c.limits, JOBS.c.claim_rank, JOBS.c.run_at
        ).where(JOBS.c.id.in_(ids), HAS_LIMITS, JOBS.c.status == JobStatus.WAITING.value)
        rows = connection.execute(limited).all()
        self.insert_seats(
            connection,
            [
                first_seat(row.id, row.limit_key_id, row.limits, row.claim_rank, row.run_at)
                for row in rows
            ],
        )

    def line_up_new(self, connection: sa.Connection, jobs: Iterable[Job]) -> None:
        """Give new jobs with limits a seat at their first limit, unless they are not due yet."""
        self.insert_seats(
            connection,
            [
                first_seat(job.id, job.limit_key_id, job.limits_json, job.claim_rank, job.run_at)
                for job in jobs
                if job.limit_key_id is not None and job.waits_for is not None
            ],
        )

    def leave(self, connection: sa.Connection, leaving: Sequence[Leaving]) -> None:
        """Remove the seats of jobs that were running."""
        if not leaving:
            return
        ids = [each.job_id for each in leaving]
        self.delete_seats(connection, [SeatState.HOLDS], ids)
        self.notice_left(connection, leaving)

    def notice_left(
        self,
        connection: sa.Connection,
        leaving: Sequence[Leaving],
        without: Collection[int] = (),
    ) -> None:
        """Insert a notice for each key at which the jobs had a seat, but not for those in
        ``without``."""
        starts: dict[int, list[int | None]] = {}
        for each in leaving:
            for use in each.uses:
                known = starts.setdefault(use.key_id, [])
                if each.has_started:
                    time = each.started_at
                    known.append(None if time is None else microseconds(time))
        self.notice(connection, {key: starts[key] for key in starts.keys() - set(without)})

    def leave_all(self, connection: sa.Connection, ids: Sequence[int]) -> bool:
        """Remove the seats of jobs that are not running.

        :returns: whether they had any.
        """
        if not ids:
            return False
        mine = SEATS.c.state.in_([state.value for state in SeatState]), SEATS.c.job_id.in_(ids)
        keys = connection.scalars(sa.select(SEATS.c.key_id).where(*mine).distinct()).all()
        if keys:
            self.delete_seats(connection, list(SeatState), ids)
            self.notice(connection, dict.fromkeys(keys, ()))
        return bool(keys)

    def notice(self, connection: sa.Connection, starts: Mapping[int, Sequence[int | None]]) -> None:
        """Insert a notice for each key.

        :param starts: the starts of jobs that have left, by the id of the key.
        """
        rows = [
            {"key_id": key_id, "starts": json.dumps(starts[key_id]) if starts[key_id] else None}
            for key_id in sorted(starts)
        ]
        if rows:
            connection.execute(sa.insert(NOTICES), rows)

    def delete_seats(
        self, connection: sa.Connection, states: Sequence[SeatState], ids: Sequence[int]
    ) -> int:
        """Delete the seats of jobs that have one of the states, and return their number.

        Like the next two methods, it must not wait for rows that open transactions of the host have
        inserted.
        """
        values = [state.value for state in states]
        return connection.execute(DELETE_SEATS, {"states": values, "ids": ids}).rowcount

    def delete_notices_by_id(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        """Delete notices."""
        if ids:
            connection.execute(sa.delete(NOTICES).where(NOTICES.c.id.in_(ids)))

    def delete_notices(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]
    ) -> None:
        """Delete the committed notices that match."""
        connection.execute(sa.delete(NOTICES).where(*conditions))

    def notice_change(self, connection: sa.Connection, job: Job) -> None:
        """Insert a notice that the limits or the order of a job have changed.

        The transaction may be the host's, so it leaves the job's seats to a worker.
        """
        values = {"key_id": job.limit_key_id, "job_id": job.id}
        connection.execute(sa.insert(NOTICES).values(values))

    def notice_queues(self, connection: sa.Connection) -> None:
        """Insert a notice that a queue was paused or resumed."""
        connection.execute(sa.insert(NOTICES).values(key_id=ALL_QUEUES))

    def insert_seats(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert seats, and a notice for each of their keys."""
        if rows:
            connection.execute(sa.insert(SEATS), rows)
            self.notice(connection, {row["key_id"]: () for row in rows})


def seat(
    use: LimitUse,
    position: int,
    further: int,
    job_id: int,
    claim_rank: int,
    run_at: dt.datetime,
) -> dict[str, Any]:
    """The values of the seat of a job that waits at one of its limits."""
    return {
        "key_id": use.key_id,
        "state": SeatState.WAITS.value,
        "claim_rank": claim_rank,
        "run_at": run_at,
        "job_id": job_id,
        "position": position,
        "further": further,
    }


def by_primary_key(statement: sa.Select[Any], table: Any = SEATS) -> sa.Select[Any]:
    """Make a query for the seats of a key use the primary key on MySQL and MariaDB, which would
    otherwise read all seats with the same state.

    :param table: the table, or an alias of it.
    """
    for dialect in ("mysql", "mariadb"):
        statement = statement.with_hint(table, "FORCE INDEX (PRIMARY)", dialect)
    return statement


def by_state_and_job(update: sa.Update) -> sa.Update:
    """Make an UPDATE of seats use the index of these columns on MySQL and MariaDB, or it would wait
    for seats that open transactions of the host have inserted."""
    for dialect in ("mysql", "mariadb"):
        update = update.with_hint("FORCE INDEX (ix_bgjobs_seat_job)", dialect_name=dialect)
    return update


def microseconds(time: dt.datetime) -> int:
    """A time as microseconds since 1970."""
    return (time - _EPOCH) // _MICROSECOND


def time_of(microseconds_since_1970: int) -> dt.datetime:
    """The reverse of :func:`microseconds`."""
    return _EPOCH + microseconds_since_1970 * _MICROSECOND


def first_seat(
    job_id: int, first_key_id: int, limits: str | None, claim_rank: int, run_at: dt.datetime
) -> dict[str, Any]:
    """The values of the seat of a job that waits at its first limit."""
    # An edited row may hold other text. Its job then waits only at the key in its own column.
    further = max(0, len(uses_from_json(limits)) - 1)
    return {
        "key_id": first_key_id,
        "state": SeatState.WAITS.value,
        "claim_rank": claim_rank,
        "run_at": run_at,
        "job_id": job_id,
        "position": 0,
        "further": further,
    }
