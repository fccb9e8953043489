"""The attempts of a job: how each of them went, and what its code wrote."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
from collections.abc import Sequence

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...models import Attempt, Job, JobLog
from . import tracebacks
from .shown import Shown

_MOST = 500
"""Attempts and lines: more make a page that nobody reads, and that takes long to load."""


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRow:
    """How an attempt went; its texts are masked."""

    attempt: int
    outcome: str
    worker_name: str | None
    due_at: dt.datetime | None
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    """``None`` while it runs."""
    error: str | None = None
    traceback: str | None = None

    @property
    def run_seconds(self) -> float | None:
        """How long its code ran; ``None`` when it never began, or still runs."""
        return _seconds_between(self.started_at, self.finished_at)


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """A line that the job wrote; masked."""

    attempt: int
    created_at: dt.datetime
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """An attempt with the lines of its code."""

    attempt: int
    record: AttemptRow | None
    """``None`` where nothing was recorded: it was given back, or put itself off."""
    lines: list[LogLine]
    wait_seconds: float | None
    """From when it was due, and the attempt before it over, to when its code began; ``None`` when
    it never did, or nobody knows."""
    application_traceback: str | None
    """The traceback without the frames of libraries; ``None`` where it has none."""


def attempts_of(connection: sa.Connection, job: Job, shown: Shown) -> list[AttemptRow]:
    """The attempts that did not complete, newest first."""
    recorded = (
        sa.select(Attempt.__table__)
        .where(Attempt.job_id == job.id)
        .order_by(Attempt.attempt.desc(), Attempt.id.desc())
        .limit(_MOST)
    )
    return [
        AttemptRow(
            attempt=row.attempt,
            outcome=row.outcome,
            worker_name=row.worker_name,
            due_at=row.due_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            error=shown.text(row.error, instead=row.error_type),
            traceback=shown.text(row.traceback),
        )
        for row in connection.execute(recorded)
    ]


def lines_of(connection: sa.Connection, job: Job, shown: Shown) -> list[LogLine]:
    """The newest lines that the job wrote, oldest first."""
    newest = (
        sa.select(JobLog.attempt, JobLog.created_at, JobLog.message)
        .where(JobLog.job_id == job.id)
        .order_by(JobLog.id.desc())
        .limit(_MOST + 1)
    )
    rows = connection.execute(newest).all()
    lines = [
        LogLine(row.attempt, row.created_at, shown.text(row.message) or "")
        for row in reversed(rows[:_MOST])
    ]
    if len(rows) > _MOST:
        lines.insert(0, dataclasses.replace(lines[0], message="(older lines are not shown)"))
    return lines


def runs_of(
    job: Job, worker_name: str | None, attempts: Sequence[AttemptRow], lines: Sequence[LogLine]
) -> list[Run]:
    """All attempts of which anything is known, newest first."""
    records = {attempt.attempt: attempt for attempt in attempts}
    if job.status in (JobStatus.RUNNING, JobStatus.COMPLETED):
        records[job.attempt] = AttemptRow(
            attempt=job.attempt,
            outcome=job.status,
            worker_name=worker_name,
            due_at=job.run_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
        )
    by_attempt = collections.defaultdict(list)
    for line in lines:
        by_attempt[line.attempt].append(line)
    package = job.target.partition(".")[0]
    return [
        Run(
            attempt=number,
            record=records.get(number),
            lines=by_attempt.get(number, []),
            wait_seconds=_wait_seconds(records.get(number), records.get(number - 1)),
            application_traceback=_of_application(records.get(number), package),
        )
        for number in sorted({*records, *by_attempt}, reverse=True)
    ]


def _wait_seconds(attempt: AttemptRow | None, before: AttemptRow | None) -> float | None:
    if attempt is None or attempt.due_at is None:
        return None
    if attempt.attempt == 1:
        return _seconds_between(attempt.due_at, attempt.started_at)
    if before is None or before.finished_at is None:
        return None
    # A job whose worker died, or gave it back, stays due since before that attempt.
    return _seconds_between(max(attempt.due_at, before.finished_at), attempt.started_at)


def _of_application(attempt: AttemptRow | None, package: str) -> str | None:
    if attempt is None or attempt.traceback is None:
        return None
    return tracebacks.of_application(attempt.traceback, package)


def _seconds_between(first: dt.datetime | None, second: dt.datetime | None) -> float | None:
    if first is None or second is None:
        return None
    return max(0.0, (second - first).total_seconds())
