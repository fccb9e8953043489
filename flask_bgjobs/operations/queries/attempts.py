"""The attempts of a job, with their outcomes and log lines."""

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

_MAX_ROWS = 500
"""Highest number of attempts, and of log lines: a longer page loads slowly and is not read."""


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt, with masked texts."""

    attempt: int
    outcome: str
    worker_name: str | None
    due_at: dt.datetime | None
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    """``None`` while the attempt is running."""
    error: str | None = None
    traceback: str | None = None

    @property
    def run_seconds(self) -> float | None:
        """How long the code ran; ``None`` when it did not start, or is running."""
        return _seconds_between(self.started_at, self.finished_at)


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """A log line of the job, masked."""

    attempt: int
    created_at: dt.datetime
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """An attempt with its log lines."""

    attempt: int
    record: AttemptRow | None
    """``None`` for an attempt without a row: it was given back or snoozed."""
    lines: list[LogLine]
    wait_seconds: float | None
    """Wait from the due time, or the end of the previous attempt if that is later, to the start of
    the code; ``None`` when the code did not start, or the times are not known."""
    application_traceback: str | None
    """The traceback without library frames; ``None`` when it has none to leave out."""


def attempts_of(connection: sa.Connection, job: Job, shown: Shown) -> list[AttemptRow]:
    """The recorded attempts, newest first, 500 at most. Completed attempts have no record."""
    recorded = (
        sa.select(Attempt.__table__)
        .where(Attempt.job_id == job.id)
        .order_by(Attempt.attempt.desc(), Attempt.id.desc())
        .limit(_MAX_ROWS)
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
    """The newest 500 log lines of the job, oldest first."""
    newest = (
        sa.select(JobLog.attempt, JobLog.created_at, JobLog.message)
        .where(JobLog.job_id == job.id)
        .order_by(JobLog.id.desc())
        .limit(_MAX_ROWS + 1)
    )
    rows = connection.execute(newest).all()
    lines = [
        LogLine(row.attempt, row.created_at, shown.text(row.message) or "")
        for row in reversed(rows[:_MAX_ROWS])
    ]
    if len(rows) > _MAX_ROWS:
        lines.insert(0, dataclasses.replace(lines[0], message="(older lines are not shown)"))
    return lines


def runs_of(
    job: Job, worker_name: str | None, attempts: Sequence[AttemptRow], lines: Sequence[LogLine]
) -> list[Run]:
    """All attempts that have a record or log lines, newest first.

    A running or completed attempt has no record, so it is taken from the job's own row.
    """
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


def _wait_seconds(attempt: AttemptRow | None, previous: AttemptRow | None) -> float | None:
    if attempt is None or attempt.due_at is None:
        return None
    if attempt.attempt == 1:
        return _seconds_between(attempt.due_at, attempt.started_at)
    if previous is None or previous.finished_at is None:
        return None
    # After a rescue or a give-back, the job's due time is earlier than the previous attempt.
    return _seconds_between(max(attempt.due_at, previous.finished_at), attempt.started_at)


def _of_application(attempt: AttemptRow | None, package: str) -> str | None:
    if attempt is None or attempt.traceback is None:
        return None
    return tracebacks.of_application(attempt.traceback, package)


def _seconds_between(start: dt.datetime | None, end: dt.datetime | None) -> float | None:
    if start is None or end is None:
        return None
    return max(0.0, (end - start).total_seconds())
