"""The present state of workers and queues, and which workers serve which queues."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ...job.statuses import UNCLAIMED, JobStatus
from ...models import Job, Queue, Worker
from ...state import AppState
from ...store import CodeWait

HEALTH_SECONDS = 5.0
"""Time in which the database must respond to a health check."""

_job = Job.__table__
_worker = Worker.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker that holds a lease."""

    id: int
    name: str
    queues: tuple[str, ...] | None
    """``None`` for a worker that serves all queues."""
    heartbeat_at: dt.datetime
    is_silent: bool
    """Whether its last heartbeat is older than the lease, so that it is probably dead."""
    is_draining: bool
    """Whether it was asked to stop, and takes no more jobs."""
    concurrency: int
    """How many jobs it runs at the same time."""

    def serves(self, queue: str) -> bool:
        """Whether the worker is alive and takes jobs of ``queue``."""
        takes_jobs = not (self.is_silent or self.is_draining)
        return takes_jobs and (self.queues is None or queue in self.queues)


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """The workers that hold a lease, and the known queues."""

    now: dt.datetime
    """The database's clock."""
    workers: list[WorkerRow]
    queues: list[str]
    """All known queues: from the configuration, the queue table and waiting jobs."""
    paused: Mapping[str, dt.datetime]
    """The paused queues, and when each was paused."""
    unserved: list[str]
    """Queues with pending jobs that are not paused and that no live worker serves."""
    code_waits: list[CodeWait]
    """The jobs that wait for code, by queue and name."""

    @property
    def alive(self) -> int:
        """Number of workers whose last heartbeat is not older than the lease."""
        return sum(not worker.is_silent for worker in self.workers)

    @property
    def silent(self) -> int:
        """Number of workers whose last heartbeat is older than the lease."""
        return len(self.workers) - self.alive

    @property
    def waiting_for_code(self) -> list[str]:
        """The names of the jobs that wait for a worker whose code has them, sorted."""
        return sorted({wait.name for wait in self.code_waits})

    @property
    def successor(self) -> str:
        """The worker that takes over the jobs of a silent one, as the subject of a sentence."""
        return "Another worker" if self.alive else "The next worker that starts"


def service_now(state: AppState, *, within: float | None = None) -> Service:
    """The present state of workers and queues, by the database's clock.

    :param within: seconds in which the database must respond (default: no limit).
    """
    is_alive = _worker.c.status == "alive"
    one_row = sa.select(sa.literal(1)).subquery()
    # The outer join returns the clock even if no worker is alive.
    workers_and_clock = (
        sa.select(state.store.now.label("now"), _worker)
        .join_from(one_row, _worker, is_alive, isouter=True)
        .order_by(_worker.c.id)
    )
    with state.store.read(within=within) as connection:
        rows = connection.execute(workers_and_clock).all()
        queues = connection.execute(_queues(state)).all()
    now: dt.datetime = rows[0].now
    lease = state.config.lease
    workers = [_worker_row(row, now, lease) for row in rows if row.id is not None]
    paused = {row.name: row.paused_at for row in queues if row.paused_at is not None}
    has_waiting = any(row.source == JobStatus.WAITING for row in queues)
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
        code_waits=state.store.code_waits(within=within) if has_waiting else [],
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
    """The queues with a row in the queue table, and the queues that hold waiting jobs."""
    known = sa.select(sa.literal("known", sa.String).label("source"), Queue.name, Queue.paused_at)
    never = sa.cast(sa.null(), Queue.__table__.c.paused_at.type)
    holding = []
    for status in sorted(UNCLAIMED):
        names = state.store.queues_holding(status)
        source = sa.literal(status.value, sa.String)
        holding.append(sa.select(source, names.c.name, never).where(names.c.name.is_not(None)))
    return sa.union_all(known, *holding).order_by("name")
