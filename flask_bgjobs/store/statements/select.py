"""Selections: many jobs at once, chosen by what they have in common."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator

import sqlalchemy as sa

from ...job.statuses import FINAL, JobStatus
from ...models import has_status, last_event
from ..database import JOBS, Database

Conditions = list[sa.ColumnElement[bool]]
"""On a job, all of which hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which jobs to act on; what is empty does not select.

    Times are UTC without ``tzinfo``. They are about the end of a finished job, about the newest
    attempt of one that was tried, and about the enqueue of any other.
    """

    statuses: tuple[JobStatus, ...]
    """In the order in which they are read."""
    until: dt.datetime
    """Jobs of a later time are left out, so that new ones cannot make the work endless."""
    since: dt.datetime | None = None
    queues: tuple[str, ...] = ()
    target: str | None = None
    """Dotted name of a class or function, or of a class with its method."""
    error: str | None = None
    """Name of the last attempt's exception class."""

    def in_words(self) -> str:
        """What selects, as options of the command line."""
        chosen = [
            *(f"--status {status.value}" for status in self.statuses),
            *(f"--queue {queue}" for queue in self.queues),
        ]
        if self.target is not None:
            chosen.append(f"--target {self.target}")
        if self.error is not None:
            chosen.append(f"--error {self.error}")
        if self.since is not None:
            chosen.append(f"--since {self.since:%Y-%m-%dT%H:%M:%S}")
        return " ".join([*chosen, f"--until {self.until:%Y-%m-%dT%H:%M:%S}"])


class Selections(Database):
    """The statements that find the jobs of a selection. They change nothing."""

    def clock(self) -> dt.datetime:
        """The time of the database, UTC without ``tzinfo``."""
        with self.read() as connection:
            now: dt.datetime = connection.execute(sa.select(self.now)).scalar_one()
        return now

    def count_selected(self, selection: Selection) -> int:
        """How many jobs are selected."""
        return self.count_where(_conditions(selection))

    def selected_ids(self, selection: Selection, limit: int) -> Iterator[list[int]]:
        """The ids of the jobs that are selected, as by :meth:`ids_where`."""
        return self.ids_where(_conditions(selection), limit)

    def count_where(self, each: Iterable[Conditions]) -> int:
        """How many jobs fulfil one of several lists of conditions, of which none fulfils two."""
        with self.read() as connection:
            counts = (sa.select(sa.func.count()).where(*conditions) for conditions in each)
            return sum(connection.scalar(count) or 0 for count in counts)

    def ids_where(self, each: Iterable[Conditions], limit: int) -> Iterator[list[int]]:
        """The ids of these jobs, list by list, in batches of ``limit`` at most.

        Each batch is read when it is asked for, behind the one before: what the caller did to
        that one does not matter, and a million ids are never in memory.
        """
        for conditions in each:
            after = 0
            while ids := self._next_ids(conditions, after, limit):
                yield ids
                after = ids[-1]

    def _next_ids(self, conditions: Conditions, after: int, limit: int) -> list[int]:
        wanted = sa.select(JOBS.c.id).where(*conditions, JOBS.c.id > after)
        with self.read() as connection:
            return list(connection.scalars(self.limit_ordered(wanted.order_by(JOBS.c.id), limit)))


def _conditions(selection: Selection) -> list[Conditions]:
    return [_wanted(selection, status) for status in selection.statuses]


def _wanted(selection: Selection, status: JobStatus) -> Conditions:
    when = JOBS.c.finished_at if status in FINAL else last_event()
    wanted = [has_status(status), when <= selection.until]
    if selection.since is not None:
        wanted.append(when >= selection.since)
    if selection.queues:
        wanted.append(JOBS.c.queue.in_(selection.queues))
    if selection.target is not None:
        full_name = JOBS.c.target + "." + JOBS.c.method
        wanted.append(sa.or_(JOBS.c.target == selection.target, full_name == selection.target))
    if selection.error is not None:
        wanted.append(JOBS.c.error_type == selection.error)
    return wanted
