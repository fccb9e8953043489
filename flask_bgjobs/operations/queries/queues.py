"""Queues: what each of them holds, and who serves it."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any, cast

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...models import Job, has_status
from ...state import AppState
from .service import Service, service_now

_job = cast(sa.Table, Job.__table__)
_WAITING = (JobStatus.PENDING, JobStatus.SCHEDULED, JobStatus.RETRYING)
COUNTED_IN_QUEUES = 10_000
"""How far the pages count what waits in a queue."""
_AT_ONCE = 50
"""Queues per statement."""
_OLDEST = "oldest"
_MOST_PRIORITIES = 1_000
"""Of all queues together, of each of which the oldest pending job is looked up."""


@dataclasses.dataclass(frozen=True, slots=True)
class QueueStats:
    """What a queue holds, and who serves it."""

    name: str
    pending: int
    scheduled: int
    retrying: int
    running: int
    oldest_pending_at: dt.datetime | None
    """When the pending job that has waited longest was due."""
    oldest_pending_seconds: float | None
    paused_at: dt.datetime | None
    workers: int
    """Live ones that serve it."""

    @property
    def waiting(self) -> int:
        """Jobs that nobody runs yet, due or not."""
        return self.pending + self.scheduled + self.retrying


def queue_stats(state: AppState, *, most: int | None = None) -> list[QueueStats]:
    """What each known queue holds, by name.

    :param most: how far the waiting jobs of one status are counted; a number above it means that
        there are more.
    """
    return queues_of(state, service_now(state), most=most)


def urgent_first(queues: Iterable[QueueStats], service: Service) -> list[QueueStats]:
    """Queues that nobody serves, then those in which a job waits longest."""

    def urgency(queue: QueueStats) -> tuple[bool, float, str]:
        return queue.name not in service.unserved, -(queue.oldest_pending_seconds or 0), queue.name

    return sorted(queues, key=urgency)


def queues_of(state: AppState, service: Service, *, most: int | None = None) -> list[QueueStats]:
    """The same as :func:`queue_stats`, for workers and queues that are read already."""
    names = service.queues
    live: dict[tuple[str, str], tuple[int, dt.datetime | None]] = {}
    with state.store.read() as connection:
        for begin in range(0, max(1, len(names)), _AT_ONCE):
            some = names[begin : begin + _AT_ONCE]
            counts = [_count(name, status, most) for name in some for status in _WAITING]
            if begin == 0:
                counts += [_running_by_queue(), _oldest_by_queue(state)]
            for name, status, number, oldest in connection.execute(sa.union_all(*counts)):
                live[name, status] = (number, oldest)
    known = sorted({*names, *(name for name, _ in live)})
    return [_one_queue(name, service, live) for name in known]


def _count(name: str, status: JobStatus, most: int | None) -> sa.Select[*tuple[Any, ...]]:
    """How many jobs of a queue have a status, and when the first of them was due."""
    some = (
        sa.select(_job.c.run_at)
        .where(has_status(status), _job.c.queue == name)
        # The order of the index: what is claimed next is counted first.
        .order_by(_job.c.claim_rank, _job.c.run_at)
        .limit(None if most is None else most + 1)
        .subquery()
    )
    return sa.select(
        sa.literal(name, sa.String),
        sa.literal(status.value, sa.String),
        sa.func.count(),
        sa.func.min(some.c.run_at),
    ).select_from(some)


def _running_by_queue() -> sa.Select[Any]:
    word = sa.literal(JobStatus.RUNNING.value, sa.String)
    never = sa.cast(sa.null(), _job.c.run_at.type)
    running = sa.select(_job.c.queue, word, sa.func.count(), never)
    return running.where(has_status(JobStatus.RUNNING)).group_by(_job.c.queue)


def _oldest_by_queue(state: AppState) -> sa.Select[Any]:
    """When the first pending job of each queue was due: jobs that others overtake are the oldest.

    Within one priority the index has the oldest first, so that one of each priority is read.
    """
    firsts = _walked_firsts() if state.store.seeks_ranges else _grouped_firsts()
    oldest = sa.func.min(firsts.c.run_at)
    row = sa.select(firsts.c.queue, sa.literal(_OLDEST, sa.String), sa.literal(0), oldest)
    return row.group_by(firsts.c.queue)


def _walked_firsts() -> sa.Subquery:
    """By one index seek for each, where grouping would read all pending jobs."""
    here = _job.alias()
    first = _first_pending().label("id")
    walk = sa.select(first, sa.literal(1).label("step")).cte("walk", recursive=True)
    following = sa.func.coalesce(
        _first_pending(_job.c.queue == here.c.queue, _job.c.claim_rank > here.c.claim_rank),
        _first_pending(_job.c.queue > here.c.queue),
    )
    step = sa.select(following, walk.c.step + 1).join_from(walk, here, here.c.id == walk.c.id)
    walk = walk.union_all(step.where(walk.c.step < _MOST_PRIORITIES))
    found = sa.select(_job.c.queue, _job.c.run_at).join_from(walk, _job, _job.c.id == walk.c.id)
    return found.subquery()


def _first_pending(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """The id of the first pending job by queue and claim, of those for which this is true."""
    found = sa.select(_job.c.id).where(has_status(JobStatus.PENDING), *conditions)
    order = _job.c.queue, _job.c.claim_rank, _job.c.run_at, _job.c.id
    return found.order_by(*order).limit(1).correlate_except(_job).scalar_subquery()


def _grouped_firsts() -> sa.Subquery:
    """The same where it is this that the database does by seeks, if the status is in the groups."""
    first = sa.func.min(_job.c.run_at).label("run_at")
    found = sa.select(_job.c.queue, first).where(has_status(JobStatus.PENDING))
    groups = _job.c.status, _job.c.queue, _job.c.claim_rank
    return found.group_by(*groups).limit(_MOST_PRIORITIES).subquery()


def _one_queue(
    name: str,
    service: Service,
    live: Mapping[tuple[str, str], tuple[int, dt.datetime | None]],
) -> QueueStats:
    counts = {status: live.get((name, status.value), (0, None)) for status in JobStatus}
    times = [counts[JobStatus.PENDING][1], live.get((name, _OLDEST), (0, None))[1]]
    oldest = min((when for when in times if when is not None), default=None)
    return QueueStats(
        name=name,
        pending=counts[JobStatus.PENDING][0],
        scheduled=counts[JobStatus.SCHEDULED][0],
        retrying=counts[JobStatus.RETRYING][0],
        running=counts[JobStatus.RUNNING][0],
        oldest_pending_at=oldest,
        oldest_pending_seconds=None
        if oldest is None
        else max(0.0, (service.now - oldest).total_seconds()),
        paused_at=service.paused.get(name),
        workers=sum(worker.serves(name) for worker in service.workers),
    )
