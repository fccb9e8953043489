"""Workers and queues: who serves what at the moment."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ...job.statuses import WAITING, JobStatus
from ...models import Job, Queue, Worker
from ...state import AppState

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
    is_draining: bool
    """It takes no more jobs."""
    concurrency: int
    """Jobs at once."""

    def serves(self, queue: str) -> bool:
        """Whether it is alive and takes jobs of ``queue``."""
        takes_jobs = not (self.is_silent or self.is_draining)
        return takes_jobs and (self.queues is None or queue in self.queues)


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """Who serves what at the moment."""

    now: dt.datetime
    """The database's clock."""
    workers: list[WorkerRow]
    queues: list[str]
    """Every queue known: of the configuration, of claimed jobs and of those that wait."""
    paused: Mapping[str, dt.datetime]
    """Since when, by queue."""
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
    living = _worker.c.status == "alive"
    nothing = sa.select(sa.literal(1)).subquery()
    # Joined, so that the clock is told also where no worker is alive.
    workers_and_clock = (
        sa.select(state.store.now.label("now"), _worker)
        .join_from(nothing, _worker, living, isouter=True)
        .order_by(_worker.c.id)
    )
    with state.store.read(within=within) as connection:
        rows = connection.execute(workers_and_clock).all()
        queues = connection.execute(_queues(state)).all()
    now: dt.datetime = rows[0].now
    lease = state.config.lease
    workers = [_worker_row(row, now, lease) for row in rows if row.id is not None]
    paused = {row.name: row.paused_at for row in queues if row.paused_at is not None}
    pending = [row.name for row in queues if row.source == JobStatus.PENDING]
    configured = {*(state.config.queues or ()), *state.config.queue_pools}
    return Service(
        now=now,
        workers=workers,
        queues=sorted({*configured, *(row.name for row in queues)}),
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
        is_draining=row.drain_requested_at is not None,
        concurrency=row.concurrency,
    )


def _queues(state: AppState) -> sa.CompoundSelect[*tuple[Any, ...]]:
    """The queues that have a row, and those that hold jobs of a status in which they wait."""
    known = sa.select(sa.literal("known", sa.String).label("source"), Queue.name, Queue.paused_at)
    never = sa.cast(sa.null(), Queue.__table__.c.paused_at.type)
    holding = []
    for status in sorted(WAITING):
        names = state.store.queues_holding(status)
        word = sa.literal(status.value, sa.String)
        holding.append(sa.select(word, names.c.name, never).where(names.c.name.is_not(None)))
    return sa.union_all(known, *holding).order_by("name")
