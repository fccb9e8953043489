"""Waiting jobs: which code they wait for, and how they become pending again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from ...job.records import split_code_name
from ...job.statuses import JobStatus, WaitsFor
from ...models import by_index, has_status
from .. import transitions
from ..database import JOBS, Database

_INDEX = "ix_bgjobs_job_waits"
_MAX_NAMES = 1_000
"""How many names are read. An app waits for a few, a database with forged rows for any number."""
# A literal: a planner that does not know the value could not use the partial index.
_WAITS_FOR_CODE = JOBS.c.waits_for == sa.literal_column(f"'{WaitsFor.CODE.value}'", sa.String)


class CodeWait(NamedTuple):
    """Jobs of one name in one queue that wait for code."""

    queue: str
    stored_name: str
    """See :func:`flask_bgjobs.job.records.code_name`."""
    seconds: float
    """How long the first of them has waited, by the database's clock."""

    @property
    def target(self) -> str:
        """The dotted name of the class or function."""
        return split_code_name(self.stored_name)[0]

    @property
    def method(self) -> str | None:
        """The method of a class; ``None`` for a function."""
        return split_code_name(self.stored_name)[1]

    @property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"


class Waiting(Database):
    """The statements about waiting jobs."""

    def code_waits(
        self, queues: Sequence[str] | None = None, *, within: float | None = None
    ) -> list[CodeWait]:
        """What jobs wait for code, at most 1,000 names, by queue and name.

        :param queues: the queues to look in; ``None``: all.
        :param within: seconds in which the database must respond (default: no limit).
        """
        with self.read(within=within) as connection:
            rows = connection.execute(self._code_waits).all()
        return sorted(
            CodeWait(row.queue, row.waiting_on, (row.now - row.since).total_seconds())
            for row in rows
            if row.since is not None and (queues is None or row.queue in queues)
        )

    def count_waiting(self, wait: CodeWait, limit: int) -> int:
        """The number of jobs that wait for the same code in the same queue, counted up to
        ``limit``."""
        some = _jobs_of(wait).limit(limit).subquery()
        with self.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(some)) or 0

    def free(self, wait: CodeWait, limit: int, *, min_seconds: float = 0.0) -> int:
        """Make jobs that wait for code pending, those that have waited longest first.

        :param min_seconds: how long they must have waited.
        :returns: the number of freed jobs, at most ``limit``.
        """
        jobs = _jobs_of(wait).where(
            has_status(JobStatus.WAITING),
            JOBS.c.waiting_since <= self.after(sa.literal(-min_seconds)),
        )
        ordered = jobs.order_by(JOBS.c.waiting_since, JOBS.c.id).limit(limit)

        def work(connection: sa.Connection) -> int:
            ids = connection.scalars(self.locked(ordered)).all()
            if ids:
                freed = sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(transitions.freed())
                connection.execute(freed)
            return len(ids)

        return self.transaction(work)

    @functools.cached_property
    def _code_waits(self) -> sa.Select[Any]:
        names = self._names_by_seeks() if self.seeks_ranges else self._names_by_group()
        columns = names.c.queue, names.c.waiting_on, names.c.since
        return sa.select(*columns, self.now.label("now")).where(names.c.waiting_on.is_not(None))

    def _names_by_seeks(self) -> sa.Subquery:
        """The names in each queue with their first job, by one index seek each.

        For databases where ``GROUP BY`` would read all these jobs.
        """
        current = JOBS.alias()
        first = _first_job().label("id")
        walk = sa.select(first, sa.literal(1).label("step")).cte("code_name", recursive=True)
        following = sa.func.coalesce(
            _first_job(JOBS.c.queue == current.c.queue, JOBS.c.waiting_on > current.c.waiting_on),
            _first_job(JOBS.c.queue > current.c.queue),
        )
        step = sa.select(following, walk.c.step + 1).join_from(
            walk, current, current.c.id == walk.c.id
        )
        walk = walk.union_all(step.where(walk.c.step < _MAX_NAMES))
        found = sa.select(JOBS.c.queue, JOBS.c.waiting_on, JOBS.c.waiting_since.label("since"))
        return found.join_from(walk, JOBS, JOBS.c.id == walk.c.id).subquery()

    def _names_by_group(self) -> sa.Subquery:
        """The names in each queue with the time of their first job, by ``GROUP BY``.

        For databases that group by index seeks.
        """
        since = sa.func.min(JOBS.c.waiting_since).label("since")
        found = sa.select(JOBS.c.queue, JOBS.c.waiting_on, since).where(_WAITS_FOR_CODE)
        groups = JOBS.c.waits_for, JOBS.c.queue, JOBS.c.waiting_on
        return by_index(found, _INDEX).group_by(*groups).limit(_MAX_NAMES).subquery()


def _jobs_of(wait: CodeWait) -> sa.Select[tuple[int]]:
    """The query for the ids of the jobs that wait for the same code in the same queue."""
    jobs = sa.select(JOBS.c.id).where(
        _WAITS_FOR_CODE, JOBS.c.queue == wait.queue, JOBS.c.waiting_on == wait.stored_name
    )
    return by_index(jobs, _INDEX)


def _first_job(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """The id of the first job that waits for code, in the order of the index."""
    found = sa.select(JOBS.c.id).where(_WAITS_FOR_CODE, *conditions)
    order = JOBS.c.queue, JOBS.c.waiting_on, JOBS.c.waiting_since, JOBS.c.id
    return found.order_by(*order).limit(1).correlate_except(JOBS).scalar_subquery()
