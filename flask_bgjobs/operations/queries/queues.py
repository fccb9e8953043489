"""The jobs and workers of each queue."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any, cast

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...job.turns import MAX_TURN
from ...models import Job, has_status
from ...state import AppState
from .service import Service, service_now

_job = cast(sa.Table, Job.__table__)
_QUEUED = (JobStatus.PENDING, JobStatus.SCHEDULED, JobStatus.WAITING, JobStatus.RETRYING)
COUNTED_IN_QUEUES = 10_000
"""How far the pages count the jobs of a status in a queue."""
_QUEUES_PER_STATEMENT = 50
_OLDEST = "oldest"
"""Stands for a status in the result rows that hold the due time of the oldest pending job."""
_MAX_PRIORITIES = 1_000
"""How many priorities and turns, over all queues, are searched for their oldest pending job."""


@dataclasses.dataclass(frozen=True, slots=True)
class QueueStats:
    """The numbers of jobs and workers of a queue."""

    name: str
    pending: int
    scheduled: int
    waiting: int
    """Number of jobs that are not allowed to run yet, such as those that wait for code."""
    retrying: int
    running: int
    oldest_pending_at: dt.datetime | None
    """Due time of the pending job that has waited longest."""
    oldest_pending_seconds: float | None
    paused_at: dt.datetime | None
    workers: int
    """Number of live workers that serve the queue."""

    @property
    def queued(self) -> int:
        """Number of unfinished jobs that no worker holds, due or not."""
        return self.pending + self.scheduled + self.waiting + self.retrying


def queue_stats(state: AppState, *, most: int | None = None) -> list[QueueStats]:
    """The jobs and workers of all known queues, sorted by name.

    :param most: how far the jobs of a status are counted (default: all). The number
        ``most + 1`` means that there are more than ``most``.
    """
    return queues_of(state, service_now(state), most=most)


def urgent_first(queues: Iterable[QueueStats], service: Service) -> list[QueueStats]:
    """``queues``, unserved ones first, then those whose oldest pending job has waited longest."""

    def urgency(queue: QueueStats) -> tuple[bool, float, str]:
        return queue.name not in service.unserved, -(queue.oldest_pending_seconds or 0), queue.name

    return sorted(queues, key=urgency)


def queues_of(state: AppState, service: Service, *, most: int | None = None) -> list[QueueStats]:
    """Like :func:`queue_stats`, for a ``service`` that has already been read."""
    names = service.queues
    live: dict[tuple[str, str], tuple[int, dt.datetime | None]] = {}
    with state.store.read() as connection:
        for begin in range(0, max(1, len(names)), _QUEUES_PER_STATEMENT):
            batch = names[begin : begin + _QUEUES_PER_STATEMENT]
            counts = [_count(name, status, most) for name in batch for status in _QUEUED]
            if begin == 0:
                counts += [_running_by_queue(), _oldest_by_queue(state)]
            for name, status, number, oldest in connection.execute(sa.union_all(*counts)):
                live[name, status] = (number, oldest)
    known = sorted({*names, *(name for name, _ in live)})
    return [_one_queue(name, service, live) for name in known]


def _count(name: str, status: JobStatus, most: int | None) -> sa.Select[*tuple[Any, ...]]:
    """The number of jobs with a status in a queue, and the earliest due time of those counted."""
    counted = (
        sa.select(_job.c.run_at)
        .where(has_status(status), _job.c.queue == name)
        # The order of the index, so that the limit cuts off the jobs that are claimed last.
        .order_by(_job.c.claim_rank, _job.c.run_at)
        .limit(None if most is None else most + 1)
        .subquery()
    )
    return sa.select(
        sa.literal(name, sa.String),
        sa.literal(status.value, sa.String),
        sa.func.count(),
        sa.func.min(counted.c.run_at),
    ).select_from(counted)


def _running_by_queue() -> sa.Select[Any]:
    status = sa.literal(JobStatus.RUNNING.value, sa.String)
    never = sa.cast(sa.null(), _job.c.run_at.type)
    running = sa.select(_job.c.queue, status, sa.func.count(), never)
    return running.where(has_status(JobStatus.RUNNING)).group_by(_job.c.queue)


def _oldest_by_queue(state: AppState) -> sa.Select[Any]:
    """The due time of the oldest pending job of each queue.

    The oldest job is often one of low priority, which :func:`_count` may not reach. Within one
    priority the index has the oldest job first, so only one job per priority is read.
    """
    firsts = _firsts_by_seeks() if state.store.seeks_ranges else _firsts_by_group()
    oldest = sa.func.min(firsts.c.run_at)
    row = sa.select(firsts.c.queue, sa.literal(_OLDEST, sa.String), sa.literal(0), oldest)
    return row.group_by(firsts.c.queue)


def _firsts_by_seeks() -> sa.Subquery:
    """The oldest pending jobs of each queue and priority, by one index seek each: of those without
    turns, and of those in the current turn, in which each key has its oldest job.

    For databases where ``GROUP BY`` would read all pending jobs.
    """
    current = _job.alias()
    first = _first_pending().label("id")
    walk = sa.select(first, sa.literal(1).label("step")).cte("walk", recursive=True)
    rank, turns = current.c.claim_rank, sa.literal(MAX_TURN, sa.BigInteger)
    last = sa.case((rank.bitwise_and(turns) == 0, rank), else_=rank.bitwise_or(turns))
    following = sa.func.coalesce(
        _first_pending(_job.c.queue == current.c.queue, _job.c.claim_rank > last),
        _first_pending(_job.c.queue > current.c.queue),
    )
    step = sa.select(following, walk.c.step + 1).join_from(walk, current, current.c.id == walk.c.id)
    walk = walk.union_all(step.where(walk.c.step < _MAX_PRIORITIES))
    found = sa.select(_job.c.queue, _job.c.run_at).join_from(walk, _job, _job.c.id == walk.c.id)
    return found.subquery()


def _first_pending(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """The id of the first pending job, in the order of queue and claim, that matches."""
    found = sa.select(_job.c.id).where(has_status(JobStatus.PENDING), *conditions)
    order = _job.c.queue, _job.c.claim_rank, _job.c.run_at, _job.c.id
    return found.order_by(*order).limit(1).correlate_except(_job).scalar_subquery()


def _firsts_by_group() -> sa.Subquery:
    """The oldest pending job of each queue, priority and turn, by ``GROUP BY``.

    For databases that group by index seeks. They do so only if the status is among the groups.
    """
    first = sa.func.min(_job.c.run_at).label("run_at")
    found = sa.select(_job.c.queue, first).where(has_status(JobStatus.PENDING))
    groups = _job.c.status, _job.c.queue, _job.c.claim_rank
    return found.group_by(*groups).limit(_MAX_PRIORITIES).subquery()


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
        waiting=counts[JobStatus.WAITING][0],
        retrying=counts[JobStatus.RETRYING][0],
        running=counts[JobStatus.RUNNING][0],
        oldest_pending_at=oldest,
        oldest_pending_seconds=None
        if oldest is None
        else max(0.0, (service.now - oldest).total_seconds()),
        paused_at=service.paused.get(name),
        workers=sum(worker.serves(name) for worker in service.workers),
    )
