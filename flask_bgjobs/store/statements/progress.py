"""Running jobs: record starts and progress, and read which jobs are cancelled or lost."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from ...job.records import JobSpec, Key, Report
from ...job.statuses import JobStatus
from ...models import Job, JobLog
from ...system.safe_logging import logger as _logger
from .. import transitions
from ..database import JOBS, Database, by_id
from ..sizes import BATCH_BYTES, StatementTooLarge, batches, statement_bytes

_REFUSALS = (DataError, IntegrityError, ProgrammingError)
"""Errors about the values of a statement, which would be raised again on each retry."""

RUNNING_OF = sa.select(JOBS.c.id, JOBS.c.attempt, JOBS.c.cancel_requested_at).where(
    JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id == sa.bindparam("worker")
)


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseView:
    """The state of a worker's running jobs in the database."""

    attempts: Mapping[int, int]
    """The attempt of each job that the worker still holds, by job id."""
    cancelling: frozenset[int]
    """Ids of the jobs among them that were asked to stop."""


class Started(NamedTuple):
    """The result of :meth:`Runs.mark_started`."""

    ours: frozenset[int]
    """Ids of the jobs that the worker still holds, and whose start was committed."""
    locked: frozenset[int]
    """Ids of jobs whose rows another transaction has locked: their state is unknown."""


class Runs(Database):
    """The statements about running jobs.

    None of them waits for a locked row, because a job may keep its own row locked. Locked rows are
    skipped and reported to the caller.
    """

    largest_text: int | None = None
    """Size in bytes of the largest text to send; ``None`` if the database itself refuses larger
    texts with an error."""

    def refuses(self, error: DBAPIError) -> bool:
        """Whether the error is about the values, not an outage: the same values fail each time."""
        return isinstance(error, _REFUSALS) or self.is_too_large(error)

    @abc.abstractmethod
    def is_too_large(self, error: DBAPIError) -> bool:
        """Whether the database refused a statement or a value because of its size."""

    def sendable(self, text: str) -> str:
        """Return ``text`` if it is not too large for the database.

        :raises StatementTooLarge: if it is; the message has its size and the limit.
        """
        # Encode only long texts to measure them: encoding takes time, and few texts are long.
        if self.largest_text is not None and len(text) > BATCH_BYTES:
            size = len(text.encode())
            if size > self.largest_text:
                raise StatementTooLarge(
                    None,
                    None,
                    ValueError(
                        f"a text of {size:,} bytes is larger than the limit of "
                        f"{self.host_engine.dialect.name}, {self.largest_text:,} bytes"
                    ),
                )
        return text

    def lock_running(
        self,
        connection: sa.Connection,
        worker_id: int,
        keys: Collection[Key],
        *,
        beside_references: bool = False,
    ) -> tuple[dict[Key, bool], set[Key]]:
        """Lock the rows of those attempts that the worker still holds.

        :param beside_references: whether PostgreSQL may lock a row to which an uncommitted row of
            the host refers by a foreign key. Allowed only if no unique column is changed.
        :returns: the locked attempts, each with whether a cancel was requested; and the attempts
            whose rows another transaction has locked.
        """
        rows = by_key(self._still_running(connection, worker_id, keys, beside_references))
        ours = {key: is_cancelling for key, is_cancelling in rows.items() if key in keys}
        missing = {key for key in keys if key not in ours}
        if not missing:
            return ours, set()
        held = connection.execute(_running(missing), {"worker": worker_id})
        return ours, missing & by_key(held).keys()

    def _still_running(
        self,
        connection: sa.Connection,
        worker_id: int,
        keys: Collection[Key],
        beside_references: bool = False,
    ) -> sa.CursorResult[Any]:
        unlocked = _running(keys).with_for_update(skip_locked=True, key_share=beside_references)
        return connection.execute(unlocked, {"worker": worker_id})

    def mark_started(self, worker_id: int, specs: Iterable[JobSpec]) -> Started:
        """Commit the start of jobs, to be called before their code runs."""
        keys = {spec.key for spec in specs}

        def work(connection: sa.Connection) -> Started:
            ours, locked = self.lock_running(connection, worker_id, keys, beside_references=True)
            ids = frozenset(job_id for job_id, _ in ours)
            if ids:
                connection.execute(
                    sa.update(JOBS)
                    .where(JOBS.c.id.in_(sorted(ids)))
                    .values(transitions.started(self.now))
                )
            return Started(ids, frozenset(job_id for job_id, _ in locked))

        return self.transaction(work)

    def observe(self, worker_id: int, reports: MutableMapping[Key, Report]) -> LeaseView:
        """Record the reports of running jobs, then read which jobs the worker still holds and
        which are to be cancelled.

        :param reports: reports by job id and attempt. Each report is removed once it is recorded,
            refused by the database or without a valid lease. Only reports of jobs whose rows
            another transaction has locked remain.
        """
        # All transactions lock rows in the order of ids, so that they cannot deadlock.
        for batch in batches(sorted(reports, key=_job_id), lambda key: _bytes_of(reports[key])):
            self._write_reports(worker_id, batch, reports)
        rows = self.autocommit(lambda c: c.execute(RUNNING_OF, {"worker": worker_id}).all())
        return LeaseView(
            attempts={row.id: row.attempt for row in rows},
            cancelling=frozenset(row.id for row in rows if row.cancel_requested_at is not None),
        )

    def _write_reports(
        self, worker_id: int, keys: Sequence[Key], reports: MutableMapping[Key, Report]
    ) -> None:
        """Write reports in one transaction, or each in its own if the database refuses one."""
        chosen = {key: reports[key] for key in keys}
        try:
            locked = self.transaction(lambda c: self._write_unlocked(c, worker_id, chosen))
        except DBAPIError as error:
            if not self.refuses(error):
                raise
            if len(keys) == 1:
                _logger.exception("The database refused the report of job %s", keys[0][0])
                locked = set()
            else:
                for key in keys:
                    self._write_reports(worker_id, [key], reports)
                return
        for key in keys:
            if key not in locked:
                del reports[key]

    def _write_unlocked(
        self, connection: sa.Connection, worker_id: int, reports: Mapping[Key, Report]
    ) -> set[Key]:
        """Write the reports of jobs whose rows are not locked.

        :returns: the attempts whose rows another transaction has locked.
        """
        ours, locked = self.lock_running(connection, worker_id, reports, beside_references=True)
        for key, report in reports.items():
            if key not in ours:
                continue
            job_id, attempt = key
            if values := _report_values(report):
                connection.execute(sa.update(Job).where(Job.id == job_id).values(**values))
            self.write_lines(connection, job_id, attempt, report)
        return locked

    def write_lines(
        self, connection: sa.Connection, job_id: int, attempt: int, report: Report
    ) -> None:
        """Insert the log lines of a report."""
        if report.lines:
            connection.execute(
                sa.insert(JobLog).values(job_id=job_id, attempt=attempt, created_at=self.now),
                [{"message": line} for line in report.lines],
            )


def by_key(rows: Iterable[Any]) -> dict[Key, bool]:
    """Whether a cancel was requested, by job id and attempt."""
    return {(row.id, row.attempt): row.cancel_requested_at is not None for row in rows}


def _running(keys: Collection[Key]) -> sa.Select[Any]:
    ids = [job_id for job_id, _ in keys]
    return by_id(RUNNING_OF).where(JOBS.c.id.in_(ids)).order_by(JOBS.c.id)


def _job_id(key: Key) -> int:
    """Sort key of the order in which rows are locked, equal everywhere to prevent deadlocks."""
    return key[0]


def _bytes_of(report: Report) -> int:
    return statement_bytes(report.progress_note, report.meta_json, *report.lines)


def _report_values(report: Report) -> dict[str, Any]:
    values = {
        "progress": report.progress,
        "progress_note": report.progress_note,
        "meta_json": report.meta_json,
    }
    return {key: value for key, value in values.items() if value is not None}
