"""Queues: what each of them holds, and who serves it."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any, cast

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Job, has_status
from ...states import JobStatus
from .service import Service, service_now

_job = cast(sa.Table, Job.__table__)
_WAITING = (JobStatus.PENDING, JobStatus.SCHEDULED, JobStatus.RETRYING)
COUNTED_IN_QUEUES = 10_000
"""How far the pages count what waits in a queue."""
_AT_ONCE = 50
"""Queues per statement."""


@dataclasses.dataclass(frozen=True, slots=True)
class QueueStats:
    """What a queue holds, and who serves it."""

    name: str
    pending: int
    scheduled: int
    retrying: int
    running: int
    oldest_pending_at: dt.datetime | None
    """When the pending job that has waited longest was due, of those that are counted."""
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


def queues_of(state: AppState, service: Service, *, most: int | None = None) -> list[QueueStats]:
    """The same as :func:`queue_stats`, for workers and queues that are read already."""
    names = service.queues
    live: dict[tuple[str, str], tuple[int, dt.datetime | None]] = {}
    with state.store.read() as connection:
        for begin in range(0, max(1, len(names)), _AT_ONCE):
            some = names[begin : begin + _AT_ONCE]
            counts = [_count(name, status, most) for name in some for status in _WAITING]
            if begin == 0:
                counts.append(_running_by_queue())
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


def _one_queue(
    name: str,
    service: Service,
    live: Mapping[tuple[str, str], tuple[int, dt.datetime | None]],
) -> QueueStats:
    counts = {status: live.get((name, status.value), (0, None)) for status in JobStatus}
    oldest = counts[JobStatus.PENDING][1]
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
