"""Queues: what each of them holds, and who serves it."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Job, Queue, has_status
from ...states import FINAL, JobStatus
from .service import Service, service_now

_job = Job.__table__
_NONE = (0, None)


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


def queue_stats(state: AppState) -> list[QueueStats]:
    """What each known queue holds, by name."""
    return queues_of(state, service_now(state))


def queues_of(state: AppState, service: Service) -> list[QueueStats]:
    """The same as :func:`queue_stats`, for workers and queues that are read already."""
    # One by one, as each has an index of its own.
    statement = sa.union_all(*(_by_queue(status) for status in JobStatus if status not in FINAL))
    with state.store.read() as connection:
        found = connection.execute(statement).all()
        queues = connection.execute(sa.select(Queue.name, Queue.paused_at)).all()
    live = {(queue, status): (number, oldest) for queue, status, number, oldest in found}
    paused = {row.name: row.paused_at for row in queues}
    names = {*service.queues, *paused, *(queue for queue, _ in live)}
    return [_one_queue(name, service, live, paused.get(name)) for name in sorted(names)]


def _by_queue(status: JobStatus) -> sa.Select[Any]:
    name = sa.literal_column(f"'{status.value}'", sa.String)
    return (
        sa.select(_job.c.queue, name, sa.func.count(), sa.func.min(_job.c.run_at))
        .where(has_status(status))
        .group_by(_job.c.queue)
    )


def _one_queue(
    name: str,
    service: Service,
    live: Mapping[tuple[str, str], tuple[int, dt.datetime | None]],
    paused_at: dt.datetime | None,
) -> QueueStats:
    pending, oldest = live.get((name, JobStatus.PENDING.value), _NONE)
    return QueueStats(
        name=name,
        pending=pending,
        scheduled=live.get((name, JobStatus.SCHEDULED.value), _NONE)[0],
        retrying=live.get((name, JobStatus.RETRYING.value), _NONE)[0],
        running=live.get((name, JobStatus.RUNNING.value), _NONE)[0],
        oldest_pending_at=oldest,
        oldest_pending_seconds=None
        if oldest is None
        else max(0.0, (service.now - oldest).total_seconds()),
        paused_at=paused_at,
        workers=sum(worker.serves(name) for worker in service.workers),
    )
