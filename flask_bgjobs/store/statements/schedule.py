"""Schedules: register and change them, enqueue the jobs of due ticks, and prune old ticks."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...errors import UniqueKeyTaken
from ...job.statuses import FINAL
from ...models import Job, Schedule, ScheduleTick
from ..database import JOBS, SCHEDULES, TICKS, WORKERS
from ..sizes import batches
from .audit import Actor, Audits
from .enqueue import NewJobs
from .unique import Inserts

_CHANGES_PER_TRANSACTION = 500
_TICKS_PER_STATEMENT = 100
"""Schedules whose ticks one statement reads. SQLite allows 500 parts in a compound statement."""
_ESCAPE = "/"
"""The escape character of LIKE patterns."""
_MAX_REASON = 255
_NEXT_TIME = dt.timedelta(microseconds=1)
_HOLD_SECONDS = 1.0
"""How often it is checked whether the job has finished for which a tick waits."""
_TICKS_KEPT_SECONDS = 7 * 86_400.0
_TICKS_KEPT = 5
"""Ticks of each schedule that are kept, however old."""
_RETIRED_KEPT_SECONDS = 30 * 86_400.0
"""How long schedules are kept that the code of no live worker has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A due tick whose job is to be enqueued."""

    tick_at: dt.datetime
    job: NewJobs
    missed: int = 0
    """Number of earlier ticks for which this one stands."""


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    """A due tick that is skipped."""

    tick_at: dt.datetime
    reason: str
    missed: int = 0
    """Number of earlier ticks that are skipped for the same reason."""
    job_id: int | None = None
    """The job because of which it is skipped."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with the due ticks of a schedule."""

    schedule: Schedule
    """The row that was read. If it has changed since, the plan is not carried out."""
    runs: Sequence[Run]
    skips: Sequence[Skip]
    next_tick_at: dt.datetime
    overlap: str
    """What to do if its last job is not finished: ``skip``, ``queue`` or ``allow``."""
    is_held: bool = False
    """Whether the next tick is due already, and waits for the job of this one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fired:
    """The result of a :class:`Plan` that was carried out."""

    name: str
    jobs: Sequence[tuple[Run, Job]]
    skips: Sequence[Skip]


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduleChange:
    """A change of one row, which is made only if the row has not changed since it was read."""

    schedule: Schedule
    values: Mapping[str, Any]
    """The new values, by column name."""
    forget_after: dt.datetime | None = None
    """Delete the ticks after this time."""


class Schedules(Inserts, Audits):
    """The statements about schedules."""

    schedule_order: sa.ColumnElement[str] = SCHEDULES.c.name
    """The name of a schedule, in the order of its code points, like strings in Python."""

    def schedules(self, name: str | None = None) -> tuple[dt.datetime, list[Schedule]]:
        """The time of the database's clock, and all schedules, or the one with this name."""
        rows = sa.select(SCHEDULES).order_by(SCHEDULES.c.name)
        if name is not None:
            rows = rows.where(SCHEDULES.c.name == name)
        return self.autocommit(lambda c: self._read(c, rows))

    def read_schedules(
        self,
        name: str | None = None,
        *,
        after: str = "",
        contains: str = "",
        limit: int | None = None,
    ) -> tuple[dt.datetime, list[Schedule]]:
        """Like :meth:`schedules`, for pages: on a connection for reading, and in parts.

        :param after: only names after this one, in the order of their code points.
        :param contains: only names with this text, in any case.
        :param limit: how many to read at most (default: all).
        """
        order = self.schedule_order
        rows = sa.select(SCHEDULES).order_by(order).limit(limit)
        if name is not None:
            rows = rows.where(SCHEDULES.c.name == name)
        if after:
            rows = rows.where(order > after)
        if contains:
            rows = rows.where(_contains(SCHEDULES.c.name, contains))
        with self.read() as connection:
            return self._read(connection, rows)

    def due_schedules(self, limit: int) -> tuple[dt.datetime, list[Schedule]]:
        """The time of the database's clock, and up to ``limit`` due schedules, in order."""
        due = sa.select(SCHEDULES).where(SCHEDULES.c.due_at <= self.now)
        due = due.order_by(SCHEDULES.c.due_at, SCHEDULES.c.id).limit(limit)
        return self.autocommit(lambda c: self._read(c, due))

    def _read(
        self, connection: sa.Connection, rows: sa.Select[Any]
    ) -> tuple[dt.datetime, list[Schedule]]:
        found = [Schedule(**row._mapping) for row in connection.execute(rows)]
        return self.time_on(connection), found

    def add_schedules(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert schedules, except those that another process has inserted meanwhile.

        :param rows: the values of each, by column name.
        """
        insertion = self._schedule_insertion
        for some in batches(rows, _one, limit=_CHANGES_PER_TRANSACTION):
            self.transaction(functools.partial(_execute_many, statement=insertion, rows=some))

    @property
    def _schedule_insertion(self) -> Any:
        """The insertion of a row, which changes nothing if there is one with its name."""
        row = self.insert_into(SCHEDULES).values(revision=0)
        return row.on_conflict_do_nothing(index_elements=[SCHEDULES.c.name])

    def change_schedules(
        self, changes: Sequence[ScheduleChange], by: Actor | None = None, action: str = ""
    ) -> list[ScheduleChange]:
        """Change schedules, and record it in the audit trail.

        :param by: who changes them; ``None``: nothing is recorded.
        :param action: for the audit trail.
        :returns: the changes that were not made, because the row had changed since it was read.
        """
        refused: list[ScheduleChange] = []
        for some in batches(changes, _one, limit=_CHANGES_PER_TRANSACTION):
            work = functools.partial(self._change_some, changes=some, by=by, action=action)
            refused += self.transaction(work)
        return refused

    def _change_some(
        self,
        connection: sa.Connection,
        *,
        changes: Sequence[ScheduleChange],
        by: Actor | None,
        action: str,
    ) -> list[ScheduleChange]:
        return [each for each in changes if not self._change(connection, each, by, action)]

    def _change(
        self, connection: sa.Connection, change: ScheduleChange, by: Actor | None, action: str
    ) -> bool:
        schedule = change.schedule
        update = self._update(schedule).values(**change.values)
        if not connection.execute(update).rowcount:
            return False
        if change.forget_after is not None:
            later = TICKS.c.schedule_id == schedule.id, TICKS.c.tick_at > change.forget_after
            connection.execute(sa.delete(TICKS).where(*later))
        self.audit(connection, by, action, subject=schedule.name)
        return True

    def _update(self, schedule: Schedule) -> sa.Update:
        """The update of a row that has not changed since it was read."""
        return (
            sa.update(SCHEDULES)
            .where(SCHEDULES.c.id == schedule.id, SCHEDULES.c.revision == schedule.revision)
            .values(revision=schedule.revision + 1)
        )

    def fire(self, plans: Sequence[Plan]) -> list[Fired]:
        """Enqueue the jobs of due ticks and record the ticks, in one transaction.

        Plans for rows that have changed, or that another worker has locked, are left out.
        """
        return self.transaction(lambda c: self._fire(c, plans))

    def _fire(self, connection: sa.Connection, plans: Sequence[Plan]) -> list[Fired]:
        ids = sorted(plan.schedule.id for plan in plans)
        rows = (
            sa.select(SCHEDULES.c.id, SCHEDULES.c.revision, SCHEDULES.c.last_job_id)
            .where(SCHEDULES.c.id.in_(ids))
            .order_by(SCHEDULES.c.id)
            .with_for_update(skip_locked=True)
        )
        locked = {row.id: row for row in connection.execute(rows)}
        # Read after the rows are locked: a job that a person has run since is then seen.
        last_jobs = [row.last_job_id for row in locked.values() if row.last_job_id is not None]
        unfinished = self._unfinished_among(connection, last_jobs)
        ours = (p for p in plans if p.schedule.id in locked)
        return [
            self._carry_out(connection, plan, unfinished.get(locked[plan.schedule.id].last_job_id))
            for plan in ours
            if locked[plan.schedule.id].revision == plan.schedule.revision
        ]

    def _unfinished_among(
        self, connection: sa.Connection, job_ids: Collection[int]
    ) -> dict[int | None, int]:
        final = [status.value for status in FINAL]
        unfinished = sa.select(JOBS.c.id).where(
            JOBS.c.id.in_(sorted(job_ids)), JOBS.c.status.not_in(final)
        )
        return {job_id: job_id for job_id in connection.scalars(unfinished)} if job_ids else {}

    def _carry_out(self, connection: sa.Connection, plan: Plan, last_job: int | None) -> Fired:
        """Carry out a plan.

        :param last_job: the last job of the schedule, if it is not finished.
        """
        runs, skips = plan.runs, list(plan.skips)
        values: dict[str, Any] = {"next_tick_at": plan.next_tick_at, "due_at": plan.next_tick_at}
        values["held_at"] = self.now if plan.is_held else None
        if runs and last_job is not None and plan.overlap == "queue":
            values = {
                "next_tick_at": runs[0].tick_at,
                "due_at": self.after(sa.literal(_HOLD_SECONDS)),
                "held_at": sa.func.coalesce(SCHEDULES.c.held_at, self.now),
            }
            runs = ()
        if runs and last_job is not None and plan.overlap == "skip":
            reason = f"job {last_job} is not finished"
            skips += [Skip(run.tick_at, reason, run.missed, last_job) for run in runs]
            runs = ()
        new_jobs = []
        for run in runs:
            try:
                (job,) = self.insert_within(connection, run.job)
            except UniqueKeyTaken as error:
                skips.append(Skip(run.tick_at, str(error)[:_MAX_REASON], run.missed))
                continue
            if job.deduplicated:
                reason = f"job {job.id} holds its unique_key"
                skips.append(Skip(run.tick_at, reason, run.missed, job.id))
            else:
                new_jobs.append((run, job))
        if new_jobs:
            values["last_job_id"] = new_jobs[-1][1].id
        self._record_ticks(connection, plan.schedule.id, new_jobs, skips)
        if ticks := [*(run.tick_at for run, _ in new_jobs), *(skip.tick_at for skip in skips)]:
            values["last_tick_at"] = max(ticks)
        connection.execute(self._update(plan.schedule).values(**values))
        return Fired(plan.schedule.name, new_jobs, skips)

    def _record_ticks(
        self,
        connection: sa.Connection,
        schedule_id: int,
        jobs: Sequence[tuple[Run, Job]],
        skips: Sequence[Skip],
    ) -> None:
        fired: list[dict[str, Any]] = [
            {"tick_at": run.tick_at, "outcome": "fired", "missed": run.missed, "job_id": job.id}
            for run, job in jobs
        ]
        skipped: list[dict[str, Any]] = [
            {
                "tick_at": skip.tick_at,
                "outcome": "skipped",
                "missed": skip.missed,
                "reason": skip.reason,
                "job_id": skip.job_id,
            }
            for skip in skips
        ]
        rows = [{"reason": None, **row, "schedule_id": schedule_id} for row in (*fired, *skipped)]
        if rows:
            connection.execute(sa.insert(TICKS).values(created_at=self.now), rows)

    def run_schedule(self, schedule: Schedule, job: NewJobs, by: Actor | None) -> Job:
        """Enqueue a job of a schedule now. Its ticks stay as they are.

        :returns: the job, or the one that holds its ``unique_key``.
        """

        def work(connection: sa.Connection) -> Job:
            mine = sa.select(SCHEDULES.c.id).where(SCHEDULES.c.id == schedule.id)
            connection.execute(mine.with_for_update())
            (saved,) = self.insert(connection, job)
            if saved.deduplicated:
                return saved
            connection.execute(
                sa.update(SCHEDULES)
                .where(SCHEDULES.c.id == schedule.id)
                .values(last_job_id=saved.id, revision=SCHEDULES.c.revision + 1)
            )
            # Two of them may have the same time. The lock of the row keeps others from inserting.
            newest = sa.select(sa.func.max(TICKS.c.tick_at)).where(
                TICKS.c.schedule_id == schedule.id, TICKS.c.tick_at >= saved.created_at
            )
            taken = connection.scalar(newest)
            connection.execute(
                sa.insert(TICKS).values(
                    schedule_id=schedule.id,
                    tick_at=saved.created_at if taken is None else taken + _NEXT_TIME,
                    outcome="by hand",
                    missed=0,
                    job_id=saved.id,
                    created_at=self.now,
                )
            )
            self.audit(connection, by, "run schedule", subject=schedule.name, jobs=[saved.id])
            return saved

        return self.transaction(work)

    def last_ticks(self, schedule_ids: Sequence[int], number: int) -> dict[int, list[ScheduleTick]]:
        """The newest ticks of schedules, newest first, by the id of the schedule."""
        found: dict[int, list[ScheduleTick]] = {schedule_id: [] for schedule_id in schedule_ids}
        with self.read() as connection:
            for some in batches(schedule_ids, _one, limit=_TICKS_PER_STATEMENT):
                # One seek in the index for each: a window function would read all their ticks.
                newest = sa.union_all(*(_newest_ticks(each, number) for each in some))
                for row in connection.execute(newest):
                    found[row.schedule_id].append(ScheduleTick(**row._mapping))
        for ticks in found.values():
            ticks.sort(key=lambda tick: tick.tick_at, reverse=True)
        return found

    def live_schedule_names(self) -> set[str]:
        """The names of the schedules that the code of any live worker has."""
        # The workers of one release have the same list.
        lists = sa.select(WORKERS.c.schedules).where(
            WORKERS.c.status == "alive", WORKERS.c.schedules.is_not(None)
        )
        with self.read() as connection:
            found = connection.scalars(lists.distinct()).all()
        return {name for names in found for name in json.loads(names)}

    def prune_schedules(self, limit: int) -> int:
        """Delete up to ``limit`` ticks older than a week, and schedules retired for 30 days.

        The five newest ticks of each schedule stay.

        :returns: the number of deleted rows.
        """
        return self.transaction(lambda c: self._prune_schedules(c, limit))

    def _prune_schedules(self, connection: sa.Connection, limit: int) -> int:
        retired = sa.select(SCHEDULES.c.id).where(
            SCHEDULES.c.retired_at < self.after(sa.literal(-_RETIRED_KEPT_SECONDS))
        )
        gone = connection.scalars(retired.limit(limit)).all()
        if gone:
            connection.execute(sa.delete(TICKS).where(TICKS.c.schedule_id.in_(gone)))
            connection.execute(sa.delete(SCHEDULES).where(SCHEDULES.c.id.in_(gone)))
        deleted = len(gone)
        mine = TICKS.c.schedule_id == SCHEDULES.c.id
        oldest = sa.select(sa.func.min(TICKS.c.tick_at)).where(mine).scalar_subquery()
        kept = (
            sa.select(TICKS.c.tick_at)
            .where(mine)
            .order_by(TICKS.c.tick_at.desc())
            .limit(1)
            .offset(_TICKS_KEPT - 1)
            .scalar_subquery()
        )
        cutoff = self.after(sa.literal(-_TICKS_KEPT_SECONDS))
        old = sa.select(SCHEDULES.c.id, kept.label("kept")).where(oldest < cutoff, oldest < kept)
        for row in connection.execute(old.limit(limit)).all():
            ticks = sa.select(TICKS.c.tick_at).where(
                TICKS.c.schedule_id == row.id, TICKS.c.tick_at < row.kept, TICKS.c.tick_at < cutoff
            )
            times = connection.scalars(ticks.order_by(TICKS.c.tick_at).limit(limit - deleted)).all()
            connection.execute(
                sa.delete(TICKS).where(TICKS.c.schedule_id == row.id, TICKS.c.tick_at.in_(times))
            )
            deleted += len(times)
            if deleted >= limit:
                break
        return deleted


def _newest_ticks(schedule_id: int, number: int) -> sa.Select[Any]:
    mine = sa.select(TICKS).where(TICKS.c.schedule_id == schedule_id)
    # A subquery, because SQLite allows no LIMIT in the parts of a compound statement.
    return sa.select(mine.order_by(TICKS.c.tick_at.desc()).limit(number).subquery())


def _contains(column: sa.ColumnElement[str], text: str) -> sa.ColumnElement[bool]:
    """Whether a column contains ``text``, in any case."""
    special = (_ESCAPE, "%", "_")
    escaped = text.translate({ord(character): f"{_ESCAPE}{character}" for character in special})
    pattern = sa.func.lower(f"%{escaped}%")
    return sa.func.lower(column).like(pattern, escape=_ESCAPE)


def _execute_many(
    connection: sa.Connection, *, statement: Any, rows: Sequence[Mapping[str, Any]]
) -> None:
    connection.execute(statement, rows)


def _one(_item: object) -> int:
    """The size of each item, so that a batch is limited by their number."""
    return 1
