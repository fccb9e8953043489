"""One job, with all that is known of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Attempt, Job, JobLog, Worker, has_status
from ...states import WAITING, JobStatus
from .audit import AuditRow, audit_of
from .rows import JobRow, job_row
from .service import Service, service_now
from .shown import Shown

_MAX_LINES = 500
_MAX_AHEAD = 1_000
_MAX_ID = 2**63 - 1

_job = Job.__table__
_worker = Worker.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt that did not complete; its texts are masked."""

    attempt: int
    outcome: str
    worker_name: str | None
    started_at: dt.datetime | None
    finished_at: dt.datetime
    error: str | None
    traceback: str | None

    @property
    def run_seconds(self) -> float | None:
        """How long its code ran; ``None`` when it never started."""
        if self.started_at is None:
            return None
        return max(0.0, (self.finished_at - self.started_at).total_seconds())


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """A line that the job wrote; masked."""

    attempt: int
    created_at: dt.datetime
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class JobDetail:
    """All that is known of one job; its texts are masked."""

    row: JobRow
    parameters: str
    """JSON, indented."""
    result: str | None
    meta: str | None
    attempts: list[AttemptRow]
    """Newest first."""
    lines: list[LogLine]
    """Oldest first; the newest 500."""
    changes: list[AuditRow]
    """What people did to it, newest first; the newest 20."""
    worker_name: str | None
    """Of the newest attempt."""
    reasons: list[str]
    """Why it is not running, as sentences; empty when it runs or is finished."""
    now: dt.datetime
    """The database's clock."""


def job_detail(state: AppState, job: Job) -> JobDetail:
    """All that is known of ``job``, masked.

    :param job: freshly read, as by ``state.store.get``.
    """
    shown = Shown.of(state, job.target, job.method, job.parameters_json)
    with state.store.read() as connection:
        attempts = connection.execute(
            sa.select(Attempt.__table__)
            .where(Attempt.job_id == job.id)
            .order_by(Attempt.attempt.desc(), Attempt.id.desc())
            .limit(_MAX_LINES)
        ).all()
        lines = connection.execute(
            sa.select(JobLog.attempt, JobLog.created_at, JobLog.message)
            .where(JobLog.job_id == job.id)
            .order_by(JobLog.id.desc())
            .limit(_MAX_LINES)
        ).all()
        changes = audit_of(connection, job.id)
        worker_name, ahead = connection.execute(
            sa.select(
                sa.select(_worker.c.name).where(_worker.c.id == job.worker_id).scalar_subquery(),
                _count_ahead(job) if job.status == JobStatus.PENDING else sa.literal(0),
            )
        ).one()
    service = service_now(state)
    return JobDetail(
        row=job_row(job, shown),
        parameters=shown.parameters(indented=True) or "not readable",
        result=shown.value(job.result_json),
        meta=shown.value(job.meta_json),
        attempts=[_attempt_row(row, shown) for row in attempts],
        lines=[
            LogLine(row.attempt, row.created_at, shown.text(row.message) or "")
            for row in reversed(lines)
        ],
        changes=changes,
        worker_name=worker_name,
        reasons=_reasons(job, service, worker_name, ahead),
        now=service.now,
    )


def _attempt_row(row: sa.Row[Any], shown: Shown) -> AttemptRow:
    return AttemptRow(
        attempt=row.attempt,
        outcome=row.outcome,
        worker_name=row.worker_name,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=shown.text(row.error, instead=row.error_type),
        traceback=shown.text(row.traceback),
    )


def _reasons(job: Job, service: Service, worker_name: str | None, ahead: int) -> list[str]:
    if job.status == JobStatus.RUNNING:
        return list(_running_trouble(job, service, worker_name))
    if job.status not in WAITING:
        return []
    reasons = []
    if job.status == JobStatus.RETRYING and job.run_at > service.now:
        reasons.append("Its last attempt failed, and the time of its next retry has not come.")
    elif job.status != JobStatus.PENDING and job.run_at > service.now:
        reasons.append("It is not due yet.")
    if job.queue in service.paused:
        reasons.append(f"The queue {job.queue} is paused.")
    if not any(worker.serves(job.queue) for worker in service.workers):
        reasons.append(
            f"No live worker serves the queue {job.queue}. Start one with: flask bgjobs worker"
        )
    if ahead:
        more = "More than 1,000" if ahead > _MAX_AHEAD else f"{ahead:,}"
        jobs, stand = ("job", "stands") if ahead == 1 else ("jobs", "stand")
        reasons.append(f"{more} {jobs} of the queue {job.queue} {stand} before it.")
    return reasons or ["It is due; the next free worker takes it."]


def _count_ahead(job: Job) -> sa.ScalarSelect[int]:
    """How many jobs of its queue are claimed before ``job``, counted to a limit."""
    ahead = (
        sa.select(_job.c.id)
        .where(
            has_status(JobStatus.PENDING),
            _job.c.queue == job.queue,
            sa.or_(
                _job.c.claim_rank < job.claim_rank,
                sa.and_(
                    _job.c.claim_rank == job.claim_rank,
                    sa.or_(
                        _job.c.run_at < job.run_at,
                        sa.and_(_job.c.run_at == job.run_at, _job.c.id < job.id),
                    ),
                ),
            ),
        )
        .limit(_MAX_AHEAD + 1)
        .subquery()
    )
    return sa.select(sa.func.count()).select_from(ahead).scalar_subquery()


def _running_trouble(job: Job, service: Service, worker_name: str | None) -> Iterator[str]:
    holder = next((worker for worker in service.workers if worker.id == job.worker_id), None)
    if holder is not None and holder.is_silent:
        yield (
            f"Its worker {holder.name} is silent; another worker takes the job over once it "
            "finds the lease run out."
        )
    elif job.started_at is None:
        yield f"The worker {worker_name or job.worker_id} has claimed it and starts it next."


def is_possible_id(job_id: int) -> bool:
    """Whether the database can hold the id at all, so that it may be asked for."""
    return 0 < job_id <= _MAX_ID
