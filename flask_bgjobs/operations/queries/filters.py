"""What a list of jobs is asked for: filters, words and order."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from ...job.statuses import FINAL, JobStatus
from ...models import Job
from . import search

_job = cast(sa.Table, Job.__table__)


class Order(NamedTuple):
    """How a list is sorted: by a column that an index of each status has, then by id."""

    column: sa.Column[Any]
    descending: bool
    statuses: frozenset[JobStatus]
    """The jobs that have a value in the column, in an index."""
    index_name: str
    """Has the jobs of each status in this order."""
    words: str

    @property
    def is_timed(self) -> bool:
        """Whether it sorts by a time rather than in the order of the enqueue, by id."""
        return self.column is not _job.c.id


_LIST, _FINISHED, _DUE = "ix_bgjobs_job_list", "ix_bgjobs_job_finished", "ix_bgjobs_job_due"
_DELAYED = frozenset({JobStatus.SCHEDULED, JobStatus.RETRYING})
ORDERS: Mapping[str, Order] = {
    "-created": Order(_job.c.id, True, frozenset(JobStatus), _LIST, "Newest first"),
    "created": Order(_job.c.id, False, frozenset(JobStatus), _LIST, "Oldest first"),
    "-finished": Order(_job.c.finished_at, True, FINAL, _FINISHED, "Last finished first"),
    "finished": Order(_job.c.finished_at, False, FINAL, _FINISHED, "First finished first"),
    "due": Order(_job.c.run_at, False, _DELAYED, _DUE, "Next due first"),
    "-due": Order(_job.c.run_at, True, _DELAYED, _DUE, "Last due first"),
}
DEFAULT_ORDER = "-created"


@dataclasses.dataclass(frozen=True, slots=True)
class JobFilters:
    """Which jobs to list; what is empty does not filter.

    :raises ValueError: when a status or an order does not exist.
    :raises InvalidSearch: when ``q`` cannot be read.
    """

    statuses: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    job: str = ""
    """The dotted name of a class or function, or of a class with its method."""
    tag: str = ""
    owner: str = ""
    error: str = ""
    """Name of the last attempt's exception class."""
    since: dt.datetime | None = None
    """Of the end of a finished job, of the newest attempt of one that was tried, and of the
    enqueue of any other; UTC without ``tzinfo``, as is the next."""
    until: dt.datetime | None = None
    q: str = ""
    """See :mod:`.search`."""
    sort: str = DEFAULT_ORDER

    def __post_init__(self) -> None:
        known = [status.value for status in JobStatus]
        for status in self.statuses:
            if status not in known:
                raise ValueError(f"there is no status {status!r}; there are {', '.join(known)}")
        if self.sort not in ORDERS:
            raise ValueError(f"there is no order {self.sort!r}; there are {', '.join(ORDERS)}")
        _ = self.terms

    def __bool__(self) -> bool:
        return self != JobFilters(sort=self.sort)

    @property
    def order(self) -> Order:
        """How the list is sorted."""
        return ORDERS[self.sort]

    @property
    def terms(self) -> tuple[search.Term, ...]:
        """What ``q`` asks for."""
        return _parsed(self.q)

    @property
    def ranges(self) -> tuple[JobStatus, ...] | None:
        """The statuses that are read one by one; ``None``: all jobs, in the order of ids."""
        chosen = [JobStatus(status) for status in self.statuses] or list(JobStatus)
        if not self.statuses and not self.order.is_timed:
            return None
        return tuple(status for status in chosen if status in self.order.statuses)

    @property
    def is_narrowed(self) -> bool:
        """Whether more is asked for than a status and an order."""
        return self != JobFilters(statuses=self.statuses, sort=self.sort)

    @property
    def offers_all(self) -> bool:
        """Whether *All that match* can be offered: words match what is shown, which the database
        does not have."""
        return not self.q

    @property
    def asks_for_texts(self) -> bool:
        """Whether it asks for texts that may be masked where they are shown."""
        return bool(self.tag or self.owner)

    @property
    def needs_reading(self) -> bool:
        """Whether rows must be looked at one by one, as no index knows what is asked for."""
        words = [term for term in self.terms if term.field != "id"]
        # Sorted by the end, the index covers the time asked for.
        times = (self.since or self.until) and self.order.column is not _job.c.finished_at
        named = self.queues or self.job or self.tag or self.owner or self.error
        return bool(named or words or times)


# Pages ask for the terms of one text several times.
_parsed = functools.lru_cache(256)(search.parse)
