"""Numbers of jobs by status, and of workers."""

from __future__ import annotations

import dataclasses
import datetime as dt

import sqlalchemy as sa

from ...job.statuses import FINAL, JobStatus
from ...models import Job
from ...state import AppState
from .queues import QueueStats, queues_of
from .service import service_now

_LIVE_CAP, _FINISHED_CAP = 100_000, 10_000
"""How far the dashboard counts the jobs of a status."""
_HOUR_SECONDS = 3_600.0

_job = Job.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """A number of jobs that is counted up to a limit."""

    number: int
    """At most ``limit + 1``, which means that there are more than ``limit``."""
    limit: int

    def __str__(self) -> str:
        if self.number > self.limit:
            return f"{self.limit // 1000}k+" if self.limit >= 1000 else f"{self.limit}+"
        return f"{self.number:,}"

    def __bool__(self) -> bool:
        return self.number > 0


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Exact numbers of jobs and workers."""

    now: dt.datetime
    """The database's clock."""
    jobs: dict[str, int]
    """By status."""
    queues: list[QueueStats]
    completed_last_hour: int
    failed_last_hour: int
    alive: int
    """Number of workers whose last heartbeat is not older than the lease."""
    silent: int
    """Number of workers whose last heartbeat is older than the lease."""


def count_by_status(state: AppState) -> dict[str, Count]:
    """Number of jobs by status, counted up to 10,000 for final statuses, else up to 100,000."""
    limits = {status.value: _FINISHED_CAP if status in FINAL else _LIVE_CAP for status in JobStatus}
    counts = [_capped_count(status, limit).label(status) for status, limit in limits.items()]
    with state.store.read() as connection:
        row = connection.execute(sa.select(*counts)).one()
    return {status: Count(row._mapping[status], limit) for status, limit in limits.items()}


def _capped_count(status: str, limit: int) -> sa.ScalarSelect[int]:
    some = sa.select(_job.c.id).where(_job.c.status == status).limit(limit + 1).subquery()
    return sa.select(sa.func.count()).select_from(some).scalar_subquery()


def stats_now(state: AppState) -> Stats:
    """Exact numbers, for the command line: counting all finished jobs may take long."""
    counts = [_exact_count(status.value).label(status.value) for status in JobStatus]
    completed = _finished_last_hour(state, JobStatus.COMPLETED.value).label("completed_last_hour")
    failed = _finished_last_hour(state, JobStatus.FAILED.value).label("failed_last_hour")
    with state.store.read() as connection:
        row = connection.execute(sa.select(*counts, completed, failed)).one()
    service = service_now(state)
    return Stats(
        now=service.now,
        jobs={status.value: row._mapping[status.value] for status in JobStatus},
        queues=queues_of(state, service),
        completed_last_hour=row.completed_last_hour,
        failed_last_hour=row.failed_last_hour,
        alive=service.alive,
        silent=service.silent,
    )


def _exact_count(status: str) -> sa.ScalarSelect[int]:
    return sa.select(sa.func.count()).where(_job.c.status == status).scalar_subquery()


def _finished_last_hour(state: AppState, status: str) -> sa.ScalarSelect[int]:
    since = state.store.after(sa.literal(-_HOUR_SECONDS))
    return (
        sa.select(sa.func.count())
        .where(_job.c.status == status, _job.c.finished_at >= since)
        .scalar_subquery()
    )
