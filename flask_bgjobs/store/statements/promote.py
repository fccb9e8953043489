"""Due jobs: promote them to pending, and find out when the next jobs are due."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from ...job.statuses import NOT_STARTED, JobStatus
from ...models import by_index, has_status
from .. import transitions
from ..database import JOBS, LIMIT_KEYS, NOTICES, SCHEDULES, WORKERS
from .queue import any_job
from .turns import TURN_COLUMNS, Turns

_JOBS_PER_STATEMENT = 1_000
"""Jobs of each status that one transaction promotes. Enqueues must not wait for a long write."""
_NEWEST_PER_STATEMENT = 500
"""Scheduled jobs that became due last and are promoted beside a full batch."""
_DELAYED = (JobStatus.SCHEDULED, JobStatus.RETRYING)
_NEXT_DUE = (
    sa.select(JOBS.c.run_at)
    .where(
        JOBS.c.run_at > sa.bindparam("after", type_=JOBS.c.run_at.type),
        JOBS.c.run_at <= sa.bindparam("until", type_=JOBS.c.run_at.type),
    )
    .order_by(JOBS.c.run_at)
    .limit(1)
)
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
"""A configuration in which all keys have the default weight."""
PROMOTED_COLUMNS = (*TURN_COLUMNS, JOBS.c.limit_key_id)
"""The columns that a promotion needs of each job."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The result of :meth:`Due.look`."""

    pending: bool
    """Whether any job is pending."""
    due_in: float | None
    """Seconds until the next scheduled or retrying job is due, negative if overdue; ``None`` if
    there is none."""
    now: dt.datetime
    """The time of the database's clock."""
    tick_in: float | None
    """Seconds until the next tick of a schedule is due, negative if overdue; ``None`` if there is
    none, or if it was not asked for."""
    drain: bool
    """Whether the worker was asked to finish its running jobs and then to end."""
    notices: bool = False
    """Whether a key of a limit needs a look, because a job has arrived or has left."""
    limit_in: float | None = None
    """Seconds until a rate limit allows the next start, negative if overdue; ``None`` if no job
    waits for one."""


class Due(Turns):
    """The statements about due times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._look_statements: dict[tuple[tuple[str, ...] | None, bool], sa.Select[Any]] = {}
        """Built statements of :meth:`look`, by their queues, with and without schedules."""

    def look(
        self, queues: Sequence[str] | None, worker_id: int, *, schedules: bool = False
    ) -> Work:
        """Read in one small statement whether there is work for a worker.

        :param queues: the queues to look for pending jobs in; ``None``: all.
        :param schedules: whether to look for ticks of schedules as well.
        """
        key = None if queues is None else tuple(queues), schedules
        if key not in self._look_statements:
            # Building the statement takes longer than running it, up to fifty times a second.
            self._look_statements[key] = self._build_look(*key)
        parameters = {"looking": worker_id}
        row = self.autocommit(lambda c: c.execute(self._look_statements[key], parameters).one())
        dues = [due for due in (row.scheduled, row.retrying) if due is not None]
        return Work(
            pending=bool(row.pending),
            due_in=(min(dues) - row.now).total_seconds() if dues else None,
            now=row.now,
            tick_in=None if row.tick_at is None else (row.tick_at - row.now).total_seconds(),
            drain=row.drain_requested_at is not None,
            notices=bool(row.notices),
            limit_in=None if row.limit_at is None else (row.limit_at - row.now).total_seconds(),
        )

    def promote(
        self, weights: Mapping[str, float] = NO_WEIGHTS, *, seconds: float = math.inf
    ) -> int:
        """Make due jobs pending, or waiting if they have limits. Those that take turns get theirs.

        :param weights: the weights of keys in the configuration.
        :param seconds: when to stop even if more jobs are due.
        :returns: the number of promoted jobs.
        """
        count = 0
        deadline = time.monotonic() + seconds
        while True:
            batch, takes_turns = self.transaction(lambda c: self._promote_some(c, weights))
            count += batch
            if batch < _JOBS_PER_STATEMENT:
                return count
            if takes_turns:
                # A key must not wait until all jobs of another have got their turns.
                batch, _ = self.transaction(lambda c: self._promote_some(c, weights, newest=True))
                count += batch
            if time.monotonic() >= deadline:
                return count

    def promote_one(self, job_id: int) -> None:
        """Let a scheduled job with limits wait for them now, even if it is not due yet."""
        scheduled = sa.select(JOBS.c.id).where(
            JOBS.c.id == job_id,
            JOBS.c.status == JobStatus.SCHEDULED.value,
            transitions.HAS_LIMITS,
        )

        def work(connection: sa.Connection) -> None:
            ids = connection.scalars(self.locked(scheduled)).all()
            if ids:
                connection.execute(promotion(ids))
                self.line_up(connection, ids)

        self.transaction(work)

    def expire(self, limit: int) -> list[int]:
        """Cancel up to ``limit`` jobs that have not started by their deadline.

        :returns: their ids.
        """

        def work(connection: sa.Connection) -> list[int]:
            ids = list(connection.scalars(self.locked(self._expired(limit))))
            if ids:
                values = transitions.expired(self.now, self.deleted_at(self.now))
                connection.execute(sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(values))
                self.leave_all(connection, ids)
            return ids

        return self.transaction(work)

    def _expired(self, limit: int) -> sa.Select[Any]:
        """The query for the ids of jobs that have not started by their deadline."""
        overdue = sa.select(JOBS.c.id).where(
            JOBS.c.deadline_at <= self.now,
            JOBS.c.status.in_([status.value for status in NOT_STARTED]),
        )
        ordered = by_index(overdue, "ix_bgjobs_job_deadline")
        return ordered.order_by(JOBS.c.deadline_at, JOBS.c.id).limit(limit)

    def upcoming(self, horizon_seconds: float, step_seconds: float) -> list[float]:
        """The times at which jobs become due, as seconds from now in ascending order.

        Among jobs with the same status, times within ``step_seconds`` after a listed one are left
        out. An overdue time is negative.

        :param horizon_seconds: how far ahead to look.
        """
        with self.read() as connection:
            dues = {
                due
                for status in _DELAYED
                for due in self._upcoming(connection, status, horizon_seconds, step_seconds)
            }
        return sorted(dues)

    def _upcoming(
        self, connection: sa.Connection, status: JobStatus, horizon: float, step: float
    ) -> Iterator[float]:
        now = self.time_on(connection)
        end = now + dt.timedelta(seconds=horizon)
        last = now - dt.timedelta(days=1)
        next_due = _NEXT_DUE.where(has_status(status))
        while True:
            due = connection.scalar(next_due, {"after": last, "until": end})
            if due is None:
                return
            yield (due - now).total_seconds()
            last = max(due, now) + dt.timedelta(seconds=step)

    def _promote_some(
        self, connection: sa.Connection, weights: Mapping[str, float], *, newest: bool = False
    ) -> tuple[int, bool]:
        """Promote up to 1,000 jobs of each status that have been due longest.

        :param newest: instead, promote scheduled jobs that have become due last.
        :returns: their number, and whether some of them take turns.
        """
        promoted = self.promote_due(connection, newest=newest)
        fair = [row for row in promoted if row.fair_key is not None]
        self.give_turns(connection, fair, weights)
        limited = [row.id for row in promoted if row.limit_key_id is not None]
        # One that has waited before, with other options, may have left a seat.
        self.leave_all(connection, limited)
        self.line_up(connection, limited)
        return len(promoted), bool(fair)

    def promote_due(self, connection: sa.Connection, *, newest: bool) -> Sequence[sa.Row[Any]]:
        """Make due jobs pending or waiting, and return :data:`PROMOTED_COLUMNS` of each."""
        return connection.execute(self._promotions[newest]).all()

    def _build_look(self, queues: Sequence[str] | None, schedules: bool) -> sa.Select[Any]:
        first_due = (
            sa.select(sa.func.min(JOBS.c.run_at))
            .where(has_status(status))
            .scalar_subquery()
            .label(status.value)
            for status in _DELAYED
        )
        pending = any_job(JobStatus.PENDING, queues).label("pending")
        drain = (
            sa.select(WORKERS.c.drain_requested_at)
            .where(WORKERS.c.id == sa.bindparam("looking"))
            .scalar_subquery()
            .label("drain_requested_at")
        )
        next_tick: Any = sa.null()
        if schedules:
            next_tick = sa.select(sa.func.min(SCHEDULES.c.due_at)).scalar_subquery()
        tick_at = next_tick.label("tick_at")
        notices = sa.exists().where(NOTICES.c.id.is_not(None)).label("notices")
        limit_at = sa.select(sa.func.min(LIMIT_KEYS.c.due_at)).scalar_subquery().label("limit_at")
        return sa.select(
            self.now.label("now"), pending, *first_due, tick_at, drain, notices, limit_at
        )

    @functools.cached_property
    def _promotions(self) -> list[sa.Update]:
        return [
            promotion(sa.union_all(*map(self.locked, self.due(newest=newest)))).returning(
                *PROMOTED_COLUMNS
            )
            for newest in (False, True)
        ]

    def due(self, *, newest: bool) -> Iterator[sa.Select[Any]]:
        """The queries for the ids of the jobs that have been due longest, one for each status.

        :param newest: instead, the query for the scheduled jobs that have become due last.
        """
        if newest:
            order = JOBS.c.run_at.desc(), JOBS.c.id.desc()
            last = self._due(JobStatus.SCHEDULED).order_by(*order)
            yield self.limit_ordered(last, _NEWEST_PER_STATEMENT)
            return
        for status in _DELAYED:
            first = self._due(status).order_by(JOBS.c.run_at, JOBS.c.id)
            yield self.limit_ordered(first, _JOBS_PER_STATEMENT)

    def _due(self, status: JobStatus) -> sa.Select[Any]:
        due = sa.select(JOBS.c.id).where(has_status(status), JOBS.c.run_at <= self.now)
        return by_index(due, "ix_bgjobs_job_due")


def promotion(ids: Any) -> sa.Update:
    """The statement that promotes due jobs.

    :param ids: a list of ids, or a query for them.
    """
    return sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(transitions.promoted())
