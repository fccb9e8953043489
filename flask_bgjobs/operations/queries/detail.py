"""One job, with its attempts, log lines, changes, and the reasons why it is not running."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator

import sqlalchemy as sa

from ...job.records import MAX_ID
from ...job.statuses import UNCLAIMED, JobStatus, WaitsFor
from ...models import Job, Worker, has_status
from ...state import AppState
from ...store import CodeWait
from .attempts import AttemptRow, LogLine, Run, attempts_of, lines_of, runs_of
from .audit import AuditRow, audit_of
from .limits import limit_reasons
from .rows import JobRow, job_row
from .service import Service, WorkerRow, service_now
from .shown import Shown

_MAX_AHEAD = 1_000
"""How far the jobs that are ahead of a job are counted."""

_job = Job.__table__
_worker = Worker.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class JobDetail:
    """One job with masked values."""

    row: JobRow
    parameters: str
    """JSON, indented."""
    result: str | None
    meta: str | None
    attempts: list[AttemptRow]
    """The attempts that did not complete, newest first."""
    lines: list[LogLine]
    """The newest 500 log lines, oldest first."""
    runs: list[Run]
    """All attempts that have a record or log lines, newest first."""
    changes: list[AuditRow]
    """The newest 20 changes by people, newest first."""
    worker_name: str | None
    """Name of the worker of the newest attempt."""
    reasons: list[str]
    """Sentences that say why the job's code is not running, or that its worker is silent."""
    now: dt.datetime
    """The database's clock."""


def job_detail(state: AppState, job: Job, *, with_totals: bool = True) -> JobDetail:
    """The details of ``job``, masked.

    :param job: a job just read from the database, such as by ``state.store.get``.
    :param with_totals: whether the reasons may include the number of jobs ahead of it.
    """
    shown = Shown.of(state, job.target, job.method, job.parameters_json)
    service = service_now(state)
    with state.store.read() as connection:
        attempts = attempts_of(connection, job, shown)
        lines = lines_of(connection, job, shown)
        changes = audit_of(connection, job.id)
        worker_name, ahead, held = connection.execute(
            sa.select(
                sa.select(_worker.c.name).where(_worker.c.id == job.worker_id).scalar_subquery(),
                _count_ahead(job)
                if with_totals and job.status == JobStatus.PENDING
                else sa.literal(0),
                _count_held(job, service),
            )
        ).one()
    if with_totals and job.waits_for == WaitsFor.CODE and job.waiting_on is not None:
        wait = CodeWait(job.queue, job.waiting_on, seconds=0.0)
        ahead = state.store.count_waiting(wait, _MAX_AHEAD + 2) - 1
    return JobDetail(
        row=job_row(job, shown),
        parameters=shown.parameters(indented=True) or "not readable",
        result=shown.value(job.result_json),
        meta=shown.value(job.meta_json),
        attempts=attempts,
        lines=lines,
        runs=runs_of(job, worker_name, attempts, lines),
        changes=changes,
        worker_name=worker_name,
        reasons=_reasons(state, job, service, worker_name, ahead, held, with_totals=with_totals),
        now=service.now,
    )


def _candidate_workers(job: Job, service: Service) -> list[WorkerRow]:
    """The workers that could start the job next: those that serve its queue, or the worker that has
    claimed it."""
    if job.status == JobStatus.PENDING:
        return [worker for worker in service.workers if worker.serves(job.queue)]
    if job.status == JobStatus.RUNNING and job.started_at is None:
        return [worker for worker in service.workers if worker.id == job.worker_id]
    return []


def _count_held(job: Job, service: Service) -> sa.ColumnElement[int]:
    """The number of other jobs that the candidate workers hold."""
    worker_ids = [worker.id for worker in _candidate_workers(job, service)]
    if not worker_ids:
        return sa.literal(0)
    held = sa.and_(_job.c.worker_id.in_(worker_ids), _job.c.id != job.id)
    count = sa.select(sa.func.count()).where(has_status(JobStatus.RUNNING), held)
    return count.scalar_subquery()


def _reasons(
    state: AppState,
    job: Job,
    service: Service,
    worker_name: str | None,
    ahead: int,
    held: int,
    *,
    with_totals: bool,
) -> list[str]:
    """Why the job's code is not running.

    :param ahead: the number of jobs ahead of a pending job, or of the other jobs that wait for the
        same code.
    """
    if job.status == JobStatus.RUNNING:
        return list(_running_reasons(job, service, worker_name, held))
    if job.status not in UNCLAIMED:
        return []
    reasons: list[str] = []
    if job.status == JobStatus.WAITING:
        reasons += _waiting_reasons(state, job, ahead, with_totals=with_totals)
    elif job.status == JobStatus.RETRYING and job.run_at > service.now:
        reasons.append("Its last attempt failed, and its next retry is not due yet.")
    elif job.status != JobStatus.PENDING and job.run_at > service.now:
        reasons.append("It is not due yet.")
    if job.queue in service.paused:
        reasons.append(f"The queue {job.queue} is paused.")
    workers = _candidate_workers(job, service)
    slots = sum(worker.concurrency for worker in workers)
    if slots and held >= slots:
        serving = "worker that serves" if len(workers) == 1 else "workers that serve"
        reasons.append(
            f"The only slot of the {serving} the queue is busy."
            if slots == 1
            else f"All {slots:,} slots of the {serving} the queue are busy."
        )
    if not any(worker.serves(job.queue) for worker in service.workers):
        reasons.append(
            f"No live worker serves the queue {job.queue}. Start one with: flask bgjobs worker"
        )
    if ahead and job.status == JobStatus.PENDING:
        jobs, are = ("job", "is") if ahead == 1 else ("jobs", "are")
        reasons.append(f"{_capped(ahead)} {jobs} of the queue {job.queue} {are} ahead of it.")
    return reasons or ["It is due; the next free worker takes it."]


def _waiting_reasons(state: AppState, job: Job, others: int, *, with_totals: bool) -> Iterator[str]:
    if job.waits_for == WaitsFor.LIMIT:
        yield from limit_reasons(state, job, with_totals=with_totals)
        return
    if job.waits_for == WaitsFor.QUEUE:
        yield "Meanwhile it holds no seat at its limits, so that other jobs can run."
        return
    if job.waits_for != WaitsFor.CODE:
        yield (
            f"Its row was edited: it waits for {job.waits_for or 'nothing'}, which no worker "
            "handles. Cancel it or delete it."
        )
        return
    yield (
        f"It waits for code: the worker that claimed it does not have {job.name}. A worker of a "
        "release that has it will run the job."
    )
    if state.config.unknown_jobs == "fail":
        yield "The next worker without this code refuses it, because BGJOBS_UNKNOWN_JOBS is 'fail'."
    elif job.waiting_since is not None:
        fails_at = job.waiting_since + dt.timedelta(seconds=state.config.unknown_timeout)
        yield (
            f"If no such worker serves the queue {job.queue} by {fails_at:%Y-%m-%d %H:%M:%S} "
            "UTC, it fails (BGJOBS_UNKNOWN_TIMEOUT)."
        )
    if others > 0:
        jobs, wait = ("job", "waits") if others == 1 else ("jobs", "wait")
        yield f"{_capped(others)} other {jobs} of the queue {job.queue} {wait} for the same code."


def _capped(number: int) -> str:
    return f"More than {_MAX_AHEAD:,}" if number > _MAX_AHEAD else f"{number:,}"


def _count_ahead(job: Job) -> sa.ScalarSelect[int]:
    """The number of pending jobs that are claimed before ``job``, counted up to 1,001."""
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


def _running_reasons(
    job: Job, service: Service, worker_name: str | None, held: int
) -> Iterator[str]:
    """Why the code of a claimed job has not started, or that the job's worker is silent."""
    holder = next((worker for worker in service.workers if worker.id == job.worker_id), None)
    if holder is not None and holder.is_silent:
        yield (
            f"Its worker {holder.name} is silent. {service.successor} takes over the job after the "
            "lease has expired."
        )
    elif job.started_at is None and job.suspect:
        yield (
            f"A worker died while it held this job. The worker {worker_name or job.worker_id} runs "
            "such jobs one at a time, and has not started this one yet."
        )
    elif job.started_at is None and holder is not None and held >= holder.concurrency:
        slot = "its slot" if holder.concurrency == 1 else f"one of its {holder.concurrency:,} slots"
        yield f"The worker {holder.name} has claimed it, and starts it as soon as {slot} is free."
    elif job.started_at is None:
        yield f"The worker {worker_name or job.worker_id} has claimed it and starts it next."


def is_possible_id(job_id: int) -> bool:
    """Whether ``job_id`` is in the range of ids. Databases raise an error for larger numbers."""
    return 0 < job_id <= MAX_ID
