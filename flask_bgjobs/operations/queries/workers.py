"""Live workers, and workers that stopped or died."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...models import Job, Worker
from ...state import AppState
from .service import HEALTH_SECONDS

_job = Job.__table__
_worker = Worker.__table__
_ORDER = "silent", "alive", "stopped", "dead"
"""The order of the list: silent workers first, because they need attention."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerDetail:
    """A worker, with its status and running jobs."""

    id: int
    name: str
    host: str
    pid: int
    pool: str
    concurrency: int
    queues: tuple[str, ...] | None
    """``None`` for a worker that serves all queues."""
    status: str
    """``alive``, ``silent`` (last heartbeat older than the lease), ``stopped`` or ``dead``."""
    heartbeat_at: dt.datetime
    heartbeat_age_seconds: float
    running: int
    """Number of jobs that it has claimed, started or not."""
    version: str
    is_draining: bool
    """Whether it was asked to finish its running jobs and stop."""
    started_at: dt.datetime
    stopped_at: dt.datetime | None


def list_workers(state: AppState, *, ended: bool = False) -> list[WorkerDetail]:
    """The workers that hold a lease: silent ones first, then alive ones, each oldest first.

    :param ended: whether to add stopped and dead workers whose rows are still kept.
    """
    statement = sa.select(_worker, state.store.now.label("now")).order_by(_worker.c.id)
    if not ended:
        statement = statement.where(_worker.c.status == "alive")
    running = (
        sa.select(_job.c.worker_id, sa.func.count().label("running"))
        .where(_job.c.status == JobStatus.RUNNING.value)
        .group_by(_job.c.worker_id)
    )
    with state.store.read() as connection:
        rows = connection.execute(statement).all()
        held = {row.worker_id: row.running for row in connection.execute(running)}
    workers = [_detail(row, held.get(row.id, 0), state.config.lease) for row in rows]
    return sorted(workers, key=lambda worker: _ORDER.index(worker.status))


def last_worker(state: AppState) -> WorkerDetail | None:
    """The worker with the latest heartbeat, of any status; ``None`` if there was no worker."""
    statement = (
        sa.select(_worker, state.store.now.label("now"))
        .order_by(_worker.c.heartbeat_at.desc(), _worker.c.id.desc())
        .limit(1)
    )
    with state.store.read() as connection:
        row = connection.execute(statement).one_or_none()
    return None if row is None else _detail(row, 0, state.config.lease)


def count_live_workers(state: AppState) -> int:
    """Number of live workers whose heartbeat is not older than the lease.

    One statement, which ends after 5 s, so that health checks are quick.
    """
    oldest_heartbeat = state.store.after(sa.literal(-state.config.lease))
    statement = sa.select(sa.func.count()).where(
        _worker.c.status == "alive", _worker.c.heartbeat_at >= oldest_heartbeat
    )
    with state.store.read(within=HEALTH_SECONDS) as connection:
        return connection.scalar(statement) or 0


def _detail(row: sa.Row[tuple[object, ...]], running: int, lease: float) -> WorkerDetail:
    age = (row.now - row.heartbeat_at).total_seconds()
    return WorkerDetail(
        id=row.id,
        name=row.name,
        host=row.host,
        pid=row.pid,
        pool=row.pool,
        concurrency=row.concurrency,
        queues=None if row.queues is None else tuple(json.loads(row.queues)),
        status="silent" if row.status == "alive" and age > lease else row.status,
        heartbeat_at=row.heartbeat_at,
        heartbeat_age_seconds=max(0.0, age),
        running=running,
        version=row.version,
        is_draining=row.status == "alive" and row.drain_requested_at is not None,
        started_at=row.started_at,
        stopped_at=row.stopped_at,
    )
