"""Prune: delete jobs whose retention is over, and the rows of workers that ended long ago."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from ...job.statuses import JobStatus
from ...models import Attempt, JobLog
from ..database import JOBS, WORKERS, Database

_WORKERS_KEPT_SECONDS = 7 * 86_400.0
"""How long rows of ended workers are kept: they tell which worker ran the jobs of the last week.
Every restart of a worker leaves a row."""

_MAX_LOCK_TIMEOUTS = 3
"""Lock timeouts in one batch after which its remaining jobs are left for a later pass."""

_DEADLINE = "deadline"
"""The group of jobs with their own retention."""

Retention = Mapping[JobStatus, float | None]
"""Seconds for which finished jobs are kept, by status. Jobs of a status that is missing or has the
value ``None`` are kept for ever."""


@dataclasses.dataclass(frozen=True, slots=True)
class PruneCursor:
    """The last job of a batch: the next batch starts after it."""

    group: str
    """Its status, or ``deadline`` if it has its own retention."""
    at: dt.datetime
    """Its end, or its deadline."""
    id: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pruned:
    """The result of pruning one batch."""

    deleted: int
    """Number of deleted jobs."""
    held: int
    """Number of jobs that stay because a row of another table refers to them, or a lock timed
    out."""
    cursor: PruneCursor | None
    """Where the next batch starts; ``None`` when no more jobs are old enough."""


class Prunes(Database):
    """The statements that delete old rows."""

    def prune(self, retention: Retention, limit: int, after: PruneCursor | None = None) -> Pruned:
        """Delete up to ``limit`` jobs that are older than their retention.

        Their attempts and log lines are deleted in the same transaction. The database's clock
        decides which jobs are old.

        :param after: the cursor of the previous batch, so that each held job is tried only once.
        """
        return self.transaction(lambda c: self._prune(c, retention, limit, after))

    def count_prunable(self, retention: Retention) -> int:
        """The number of jobs that are older than their retention, including held ones."""
        with self.read() as connection:
            conditions = [self._is_old(status, kept) for status, kept in _limited(retention)]
            return sum(
                connection.scalar(sa.select(sa.func.count()).select_from(JOBS).where(*each)) or 0
                for each in (*conditions, self._is_over)
            )

    def prune_workers(self, limit: int) -> int:
        """Delete up to ``limit`` rows of workers that ended over a week ago.

        :returns: the number of deleted rows.
        """

        def work(connection: sa.Connection) -> int:
            ended = sa.select(WORKERS.c.id).where(
                WORKERS.c.status.in_(["stopped", "dead"]),
                WORKERS.c.stopped_at < self.after(sa.literal(-_WORKERS_KEPT_SECONDS)),
            )
            ids = connection.scalars(ended.limit(limit)).all()
            if ids:
                connection.execute(sa.delete(WORKERS).where(WORKERS.c.id.in_(ids)))
            return len(ids)

        return self.transaction(work)

    def _prune(
        self,
        connection: sa.Connection,
        retention: Retention,
        limit: int,
        after: PruneCursor | None,
    ) -> Pruned:
        found: list[PruneCursor] = []
        for statement in self._old_jobs(retention, after):
            rows = connection.execute(
                # Locked jobs are left for the next pass.
                self.limit_ordered(statement, limit - len(found)).with_for_update(skip_locked=True)
            )
            found += (PruneCursor(row.group, row.at, row.id) for row in rows)
            if len(found) >= limit:
                break
        held = delete_unheld(connection, [each.id for each in found], self.is_lock_timeout)
        cursor = found[-1] if len(found) >= limit else None
        return Pruned(deleted=len(found) - len(held), held=len(held), cursor=cursor)

    def _old_jobs(
        self, retention: Retention, after: PruneCursor | None
    ) -> Iterator[sa.Select[tuple[Any, ...]]]:
        """The queries for old jobs, one for each status, in the order of an index."""
        groups = {
            status.value: (JOBS.c.finished_at, self._is_old(status, kept))
            for status, kept in _limited(retention)
        }
        groups[_DEADLINE] = JOBS.c.deadline_at, self._is_over
        for group, (at, conditions) in groups.items():
            name = sa.literal_column(f"'{group}'", sa.String)
            statement = (
                sa.select(name.label("group"), at.label("at"), JOBS.c.id)
                .where(*conditions)
                .order_by(at, JOBS.c.id)
            )
            if after is None:
                yield statement
            elif group == after.group:
                yield statement.where(*_follows(at, after))
                after = None

    @property
    def _is_over(self) -> tuple[sa.ColumnElement[bool], ...]:
        """The conditions that a job's own retention is over."""
        return JOBS.c.deadline_at <= self.now, JOBS.c.finished_at.is_not(None), *self._holds_no_key

    @property
    def _holds_no_key(self) -> tuple[sa.ColumnElement[bool], ...]:
        """The condition that no unique key is taken because of this row."""
        expires = JOBS.c.unique_expires_at
        return (sa.or_(expires.is_(None), expires <= self.now),)

    def _is_old(self, status: JobStatus, kept: float) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            JOBS.c.status == status.value,
            JOBS.c.finished_at <= self.after(sa.literal(-kept)),
            # Those with their own retention are deleted at their deadline.
            JOBS.c.retention_seconds.is_(None),
            *self._holds_no_key,
        )


def delete_unheld(
    connection: sa.Connection, ids: Sequence[int], is_lock_timeout: Callable[[DBAPIError], bool]
) -> set[int]:
    """Delete jobs with their attempts and log lines.

    A job stays if a row of another table refers to it. A job also stays if its deletion fails with
    a lock timeout, for example because such a row is locked.

    :param is_lock_timeout: tells whether an error is a lock timeout.
    :returns: the ids of the jobs that stay.
    """
    lock_timeouts = 0

    def delete(chosen: Sequence[int]) -> bool:
        nonlocal lock_timeouts
        try:
            return _delete_together(connection, chosen)
        except DBAPIError as error:
            if not is_lock_timeout(error):
                raise
            lock_timeouts += 1
            return False

    if not ids or delete(ids):
        return set()
    # Few lock timeouts only: the worker is blocked while it waits for a lock.
    return {i for i in ids if lock_timeouts > _MAX_LOCK_TIMEOUTS or not delete([i])}


def _delete_together(connection: sa.Connection, ids: Sequence[int]) -> bool:
    try:
        with connection.begin_nested():
            connection.execute(sa.delete(JOBS).where(JOBS.c.id.in_(ids)))
            connection.execute(sa.delete(Attempt).where(Attempt.job_id.in_(ids)))
            connection.execute(sa.delete(JobLog).where(JobLog.job_id.in_(ids)))
    except IntegrityError:
        return False
    return True


def _limited(retention: Retention) -> list[tuple[JobStatus, float]]:
    return [(status, kept) for status, kept in retention.items() if kept is not None]


def _follows(at: sa.ColumnElement[Any], cursor: PruneCursor) -> tuple[sa.ColumnElement[bool], ...]:
    # The first condition is a range of the index; the second skips jobs with the cursor's own time
    # that come before it.
    return at >= cursor.at, sa.or_(at > cursor.at, JOBS.c.id > cursor.id)
