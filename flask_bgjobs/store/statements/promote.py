"""Due work: promoting it to pending, and looking ahead for the clock."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...models import by_index, has_status
from .. import transitions
from ..database import JOBS, WORKERS, Database
from .queue import any_job

_PROMOTE_AT_ONCE = 1_000
"""Rows of a status per transaction: enqueues must not wait behind a long write."""
_WITH_A_TIME = (JobStatus.SCHEDULED, JobStatus.RETRYING)
_NEXT_DUE = (
    sa.select(JOBS.c.run_at)
    .where(
        JOBS.c.run_at > sa.bindparam("after", type_=JOBS.c.run_at.type),
        JOBS.c.run_at <= sa.bindparam("until", type_=JOBS.c.run_at.type),
    )
    .order_by(JOBS.c.run_at)
    .limit(1)
)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What there is to do."""

    pending: bool
    """Whether a job waits to be claimed."""
    due_in: float | None
    """Seconds until the next job with a time of its own is due; ``None``: there is none."""
    drain: bool
    """Whether the worker was asked to finish what it runs and to end."""


class Due(Database):
    """The statements about time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._looks: dict[tuple[str, ...] | None, sa.Select[Any]] = {}
        """By the queues looked into."""

    def look(self, queues: Sequence[str] | None, worker_id: int) -> Work:
        """What there is to do for a worker, in ``queues`` or in all: one small statement."""
        key = None if queues is None else tuple(queues)
        if key not in self._looks:
            # To build it takes longer than to run it, and a worker may look fifty times a second.
            self._looks[key] = self._look_in(key)
        parameters = {"looking": worker_id}
        row = self.autocommit(lambda c: c.execute(self._looks[key], parameters).one())
        dues = [due for due in (row.scheduled, row.retrying) if due is not None]
        due_in = (min(dues) - row.now).total_seconds() if dues else None
        return Work(bool(row.pending), due_in, row.drain_requested_at is not None)

    def promote(self) -> int:
        """Move jobs that are due to ``pending``; how many were moved."""
        moved = 0
        while True:
            batch = self.transaction(self._promote_some)
            moved += batch
            if batch < _PROMOTE_AT_ONCE:
                return moved

    def upcoming(self, horizon_seconds: float, step_seconds: float) -> list[float]:
        """Seconds until jobs are due, ascending; none of two within ``step_seconds``.

        :param horizon_seconds: how far to look ahead.
        """
        with self.read() as connection:
            dues = {
                due
                for status in _WITH_A_TIME
                for due in self._upcoming(connection, status, horizon_seconds, step_seconds)
            }
        return sorted(dues)

    def _upcoming(
        self, connection: sa.Connection, status: JobStatus, horizon: float, step: float
    ) -> Iterator[float]:
        now: dt.datetime = connection.execute(sa.select(self.now)).scalar_one()
        end = now + dt.timedelta(seconds=horizon)
        last = now - dt.timedelta(days=1)
        next_due = _NEXT_DUE.where(has_status(status))
        while True:
            due = connection.scalar(next_due, {"after": last, "until": end})
            if due is None:
                return
            yield (due - now).total_seconds()
            last = max(due, now) + dt.timedelta(seconds=step)

    def _promote_some(self, connection: sa.Connection) -> int:
        return connection.execute(self._promotion).rowcount

    def _look_in(self, queues: Sequence[str] | None) -> sa.Select[Any]:
        first_due = (
            sa.select(sa.func.min(JOBS.c.run_at))
            .where(has_status(status))
            .scalar_subquery()
            .label(status.value)
            for status in _WITH_A_TIME
        )
        pending = any_job(JobStatus.PENDING, queues).label("pending")
        drain = (
            sa.select(WORKERS.c.drain_requested_at)
            .where(WORKERS.c.id == sa.bindparam("looking"))
            .scalar_subquery()
            .label("drain_requested_at")
        )
        return sa.select(self.now.label("now"), pending, *first_due, drain)

    @functools.cached_property
    def _promotion(self) -> sa.Update:
        due = (self.locked(candidates) for candidates in self._due())
        return promotion(sa.union_all(*due))

    def _due(self) -> Iterator[sa.Select[Any]]:
        """The ids of jobs that are due, one statement for each status."""
        for status in _WITH_A_TIME:
            due = sa.select(JOBS.c.id).where(has_status(status), JOBS.c.run_at <= self.now)
            due = by_index(due, "ix_bgjobs_job_due")
            yield self.limit_ordered(due.order_by(JOBS.c.run_at, JOBS.c.id), _PROMOTE_AT_ONCE)


def promotion(ids: Any) -> sa.Update:
    """The statement that makes jobs pending.

    :param ids: a list or a query.
    """
    return sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(transitions.promoted())
