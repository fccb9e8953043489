"""Waiting jobs: which code they wait for, and how they become pending again."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import sqlalchemy as sa

from ...job.records import split_code_name
from ...job.statuses import JobStatus, WaitsFor
from ...models import by_index, has_status
from .. import transitions
from ..database import JOBS
from .seats import Seats

MAX_NAMES = 1_000
"""How many names are read at once. Usually there are a few, but forged rows may have any number."""
_INDEX = "ix_bgjobs_job_waits"
# A literal: a planner that does not know the value could not use the partial index.
_WAITS_FOR_CODE = JOBS.c.waits_for == sa.literal_column(f"'{WaitsFor.CODE.value}'", sa.String)
_HAS_VALUES = JOBS.c.waiting_on.is_not(None), JOBS.c.waiting_since.is_not(None)
"""The conditions that exclude edited rows."""
_Position = tuple[sa.ColumnElement[str], sa.ColumnElement[str]]
"""A queue, and a name in it."""


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


class Waiting(Seats):
    """The statements about waiting jobs."""

    def code_waits(
        self, *, after: CodeWait | None = None, within: float | None = None
    ) -> list[CodeWait]:
        """What jobs wait for code, at most 1,000 names, by queue and name.

        :param after: only queues and names after this one.
        :param within: seconds in which the database must respond (default: no limit).
        """
        statement = self._first_code_waits if after is None else self._later_code_waits
        given = {} if after is None else {"queue": after.queue, "name": after.stored_name}
        with self.read(within=within) as connection:
            rows = connection.execute(statement, given).all()
        return [
            CodeWait(row.queue, row.waiting_on, (row.now - row.since).total_seconds())
            for row in rows
        ]

    def count_waiting(self, wait: CodeWait, limit: int) -> int:
        """The number of jobs that wait for the same code in the same queue, counted up to
        ``limit``."""
        some = _jobs_of(wait).limit(limit).subquery()
        with self.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(some)) or 0

    def free(self, wait: CodeWait, limit: int, *, min_seconds: float = 0.0) -> int:
        """Make jobs that wait for code ready, those that have waited longest first.

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
                freed = sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(transitions.ready())
                connection.execute(freed)
                self.line_up(connection, ids)
            return len(ids)

        return self.transaction(work)

    @functools.cached_property
    def _first_code_waits(self) -> sa.Select[Any]:
        return self._code_waits(after=None)

    @functools.cached_property
    def _later_code_waits(self) -> sa.Select[Any]:
        given = (sa.bindparam(name, type_=sa.String) for name in ("queue", "name"))
        return self._code_waits(after=(next(given), next(given)))

    def _code_waits(self, after: _Position | None) -> sa.Select[Any]:
        build = self._names_by_seeks if self.seeks_ranges else self._names_by_group
        names = build(after)
        columns = names.c.queue, names.c.waiting_on, names.c.since
        found = sa.select(*columns, self.now.label("now"))
        return found.order_by(names.c.queue, names.c.waiting_on)

    def _names_by_seeks(self, after: _Position | None) -> sa.Subquery:
        """The names in each queue with their first job, by one index seek each.

        For databases where ``GROUP BY`` would read all these jobs.
        """
        current = JOBS.alias()
        first = _first_job() if after is None else _first_job_after(*after)
        begin = sa.select(first.label("id"), sa.literal(1).label("step"))
        walk = begin.cte("code_name", recursive=True)
        following = _first_job_after(current.c.queue, current.c.waiting_on)
        step = sa.select(following, walk.c.step + 1).join_from(
            walk, current, current.c.id == walk.c.id
        )
        walk = walk.union_all(step.where(walk.c.step < MAX_NAMES))
        found = sa.select(JOBS.c.queue, JOBS.c.waiting_on, JOBS.c.waiting_since.label("since"))
        return found.join_from(walk, JOBS, JOBS.c.id == walk.c.id).subquery()

    def _names_by_group(self, after: _Position | None) -> sa.Subquery:
        """The names in each queue with the time of their first job, by ``GROUP BY``.

        For databases that group by index seeks.
        """
        since = sa.func.min(JOBS.c.waiting_since).label("since")
        found = sa.select(JOBS.c.queue, JOBS.c.waiting_on, since)
        found = found.where(_WAITS_FOR_CODE, *_HAS_VALUES)
        if after is not None:
            queue, name = after
            is_same = sa.and_(JOBS.c.queue == queue, JOBS.c.waiting_on > name)
            found = found.where(sa.or_(JOBS.c.queue > queue, is_same))
        groups = JOBS.c.waits_for, JOBS.c.queue, JOBS.c.waiting_on
        ordered = by_index(found, _INDEX).group_by(*groups).order_by(*groups)
        return ordered.limit(MAX_NAMES).subquery()


def _jobs_of(wait: CodeWait) -> sa.Select[tuple[int]]:
    """The query for the ids of the jobs that wait for the same code in the same queue."""
    jobs = sa.select(JOBS.c.id).where(
        _WAITS_FOR_CODE, JOBS.c.queue == wait.queue, JOBS.c.waiting_on == wait.stored_name
    )
    return by_index(jobs, _INDEX)


def _first_job_after(queue: Any, name: Any) -> sa.ColumnElement[int]:
    """The id of the first job after a queue and a name."""
    return sa.func.coalesce(
        _first_job(JOBS.c.queue == queue, JOBS.c.waiting_on > name),
        _first_job(JOBS.c.queue > queue),
    )


def _first_job(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    """The id of the first job that waits for code, in the order of the index."""
    found = sa.select(JOBS.c.id).where(_WAITS_FOR_CODE, *_HAS_VALUES, *conditions)
    order = JOBS.c.queue, JOBS.c.waiting_on, JOBS.c.waiting_since, JOBS.c.id
    return found.order_by(*order).limit(1).correlate_except(JOBS).scalar_subquery()
