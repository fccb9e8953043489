"""Workers and queues: who serves what at the moment."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import Any

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Job, Queue, Worker, has_status
from ...states import JobStatus

HEALTH_SECONDS = 5.0
"""Within which the database must answer a health check."""

_job = Job.__table__
_worker = Worker.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker that holds a lease."""

    id: int
    name: str
    queues: tuple[str, ...] | None
    """``None`` serves all."""
    heartbeat_at: dt.datetime
    is_silent: bool
    """Not heard of for the lease: it is probably dead."""

    def serves(self, queue: str) -> bool:
        """Whether it is alive and takes jobs of ``queue``."""
        return not self.is_silent and (self.queues is None or queue in self.queues)


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """Who serves what at the moment."""

    now: dt.datetime
    """The database's clock."""
    workers: list[WorkerRow]
    queues: list[str]
    """Every queue known: of the configuration, of claimed jobs and of pending ones."""
    paused: frozenset[str]
    unserved: list[str]
    """Queues that hold pending jobs, are not paused, and have no live worker."""

    @property
    def alive(self) -> int:
        """How many workers are heard of."""
        return sum(not worker.is_silent for worker in self.workers)

    @property
    def silent(self) -> int:
        """How many workers are not heard of any more."""
        return len(self.workers) - self.alive


def service_now(state: AppState, *, within: float | None = None) -> Service:
    """Who serves what at the moment, by the database's clock.

    :param within: seconds that the database has to answer.
    """
    with state.store.read(within=within) as connection:
        now: dt.datetime = connection.execute(sa.select(state.store.now)).scalar_one()
        workers = [
            _worker_row(row, now, state.config.lease)
            for row in connection.execute(
                sa.select(_worker).where(_worker.c.status == "alive").order_by(_worker.c.id)
            )
        ]
        queues = connection.execute(sa.select(Queue.name, Queue.paused_at)).all()
        pending = list(connection.execute(_pending_queues()).scalars())
    paused = frozenset(row.name for row in queues if row.paused_at is not None)
    known = {row.name for row in queues} | set(pending) | set(state.config.queues or ())
    return Service(
        now=now,
        workers=workers,
        queues=sorted(known),
        paused=paused,
        unserved=[
            name
            for name in pending
            if name not in paused and not any(worker.serves(name) for worker in workers)
        ],
    )


def _worker_row(row: sa.Row[Any], now: dt.datetime, lease: float) -> WorkerRow:
    return WorkerRow(
        id=row.id,
        name=row.name,
        queues=None if row.queues is None else tuple(json.loads(row.queues)),
        heartbeat_at=row.heartbeat_at,
        is_silent=(now - row.heartbeat_at).total_seconds() > lease,
    )


def _pending_queues() -> sa.Select[Any]:
    """The queues that hold pending jobs: one index seek each, where DISTINCT reads them all."""
    pending = has_status(JobStatus.PENDING)
    walk = (
        sa.select(sa.func.min(_job.c.queue).label("name"))
        .where(pending)
        .cte("pending_queue", recursive=True)
    )
    following = (
        sa.select(sa.func.min(_job.c.queue))
        .where(pending, _job.c.queue > walk.c.name)
        .correlate(walk)
        .scalar_subquery()
    )
    walk = walk.union_all(sa.select(following).where(walk.c.name.is_not(None)))
    return sa.select(walk.c.name).where(walk.c.name.is_not(None)).order_by(walk.c.name)
