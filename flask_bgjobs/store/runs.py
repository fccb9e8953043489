"""Start and run: what is written while jobs run, and what is read about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from ..models import Job, JobLog
from ..spec import JobSpec, Report
from ..states import JobStatus
from .database import JOBS, Database

RUNNING_OF = sa.select(JOBS.c.id, JOBS.c.attempt, JOBS.c.cancel_requested_at).where(
    JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id == sa.bindparam("worker")
)


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseView:
    """What the database says of the jobs that a worker runs."""

    attempts: Mapping[int, int]
    """Job id to attempt, of every job that is still this worker's."""
    cancelling: frozenset[int]
    """Those of them that were asked to stop."""


class Runs(Database):
    """The statements that follow running jobs."""

    def mark_started(self, worker_id: int, specs: Iterable[JobSpec]) -> set[int]:
        """Commit the start of jobs before their code runs; the ids that are still ours."""

        def work(connection: sa.Connection) -> set[int]:
            started = set()
            for spec in sorted(specs, key=lambda spec: spec.id):
                changed = connection.execute(
                    sa.update(Job)
                    .where(*_fence(spec.id, spec.attempt, worker_id))
                    .values(started_at=self.now)
                )
                if changed.rowcount:
                    started.add(spec.id)
            return started

        return self.transaction(work)

    def observe(self, worker_id: int, reports: Mapping[tuple[int, int], Report]) -> LeaseView:
        """Record what running jobs reported, and see which are still ours or cancelled.

        :param reports: by job id and attempt.
        """
        if reports:
            self.transaction(lambda c: self._write_reports(c, worker_id, reports))
        rows = self.alone(lambda c: c.execute(RUNNING_OF, {"worker": worker_id}).all())
        return LeaseView(
            attempts={row.id: row.attempt for row in rows},
            cancelling=frozenset(row.id for row in rows if row.cancel_requested_at is not None),
        )

    def _write_reports(
        self,
        connection: sa.Connection,
        worker_id: int,
        reports: Mapping[tuple[int, int], Report],
    ) -> None:
        for (job_id, attempt), report in sorted(reports.items(), key=_job_id):
            values = _report_values(report)
            changed = connection.execute(
                sa.update(Job)
                .where(*_fence(job_id, attempt, worker_id))
                .values(**values or {"attempt": attempt})
            )
            if changed.rowcount:
                self.write_lines(connection, job_id, attempt, report)

    def write_lines(
        self, connection: sa.Connection, job_id: int, attempt: int, report: Report
    ) -> None:
        """Keep the lines that a job logged."""
        if report.lines:
            connection.execute(
                sa.insert(JobLog).values(job_id=job_id, attempt=attempt, created_at=self.now),
                [{"message": line} for line in report.lines],
            )


def _fence(job_id: int, attempt: int, worker_id: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        Job.id == job_id,
        Job.status == JobStatus.RUNNING.value,
        Job.attempt == attempt,
        Job.worker_id == worker_id,
    )


def _job_id(entry: tuple[tuple[int, int], Report]) -> int:
    """What rows are locked in the order of: two transactions then never wait for each other."""
    return entry[0][0]


def _report_values(report: Report) -> dict[str, Any]:
    values = {
        "progress": report.progress,
        "progress_note": report.progress_note,
        "meta_json": report.meta_json,
    }
    return {key: value for key, value in values.items() if value is not None}
