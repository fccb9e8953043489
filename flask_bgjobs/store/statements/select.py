"""Selections: find many jobs by status, queue, target, error or time."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator

import sqlalchemy as sa

from ...job.statuses import FINAL, JobStatus
from ...models import has_status, last_event
from ..database import JOBS, Database

Conditions = list[sa.ColumnElement[bool]]
"""Conditions on a job, all of which must be true."""


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that select jobs; an empty field selects all.

    ``since`` and ``until`` are UTC without ``tzinfo``. They apply to the end of a finished job, to
    the newest claim of an unfinished job that was claimed, and to the enqueue of any other job.
    """

    statuses: tuple[JobStatus, ...]
    """Statuses, in the order in which their jobs are read."""
    until: dt.datetime
    """The latest time. It leaves out new jobs, which could otherwise make the work endless."""
    since: dt.datetime | None = None
    """The earliest time."""
    queues: tuple[str, ...] = ()
    target: str | None = None
    """Dotted name of a class or function, or of a class with its method."""
    error: str | None = None
    """Name of the last attempt's exception class."""

    def in_words(self) -> str:
        """The conditions as options of the command line."""
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
    """The queries for the jobs of a selection."""

    def clock(self) -> dt.datetime:
        """The current time of the database, UTC without ``tzinfo``."""
        with self.read() as connection:
            return self.time_on(connection)

    def count_selected(self, selection: Selection) -> int:
        """The number of selected jobs."""
        return self.count_where(_conditions(selection))

    def selected_ids(self, selection: Selection, limit: int) -> Iterator[list[int]]:
        """The ids of the selected jobs, in batches as from :meth:`ids_where`."""
        return self.ids_where(_conditions(selection), limit)

    def count_where(self, each: Iterable[Conditions]) -> int:
        """The number of jobs that match any of several lists of conditions.

        No job may match more than one list.
        """
        with self.read() as connection:
            counts = (sa.select(sa.func.count()).where(*conditions) for conditions in each)
            return sum(connection.scalar(count) or 0 for count in counts)

    def ids_where(self, each: Iterable[Conditions], limit: int) -> Iterator[list[int]]:
        """The ids of the jobs that match each list of conditions, in batches of up to ``limit``.

        Each batch is read when the caller asks for it, starting after the last id of the previous
        one. So the caller may change or delete the jobs of a batch before it asks for the next,
        and a million ids are never in memory at once.
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
