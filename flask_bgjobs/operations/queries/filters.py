"""The filters, search text and order of a list of jobs."""

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
    """The order of a list: by an indexed column, then by id."""

    column: sa.Column[Any]
    descending: bool
    statuses: frozenset[JobStatus]
    """The statuses whose jobs are in the index, with a value in the column."""
    index_name: str
    """The index that has the jobs of each status in this order."""
    words: str
    """The label on the page."""

    @property
    def is_timed(self) -> bool:
        """Whether the list is sorted by a time, and not by id."""
        return self.column is not _job.c.id


_LIST, _FINISHED, _DUE = "ix_bgjobs_job_list", "ix_bgjobs_job_finished", "ix_bgjobs_job_due"
_DELAYED = frozenset({JobStatus.SCHEDULED, JobStatus.RETRYING})
ORDERS: Mapping[str, Order] = {
    "-created": Order(_job.c.id, True, frozenset(JobStatus), _LIST, "Newest first"),
    "created": Order(_job.c.id, False, frozenset(JobStatus), _LIST, "Oldest first"),
    "-finished": Order(_job.c.finished_at, True, FINAL, _FINISHED, "Latest finished first"),
    "finished": Order(_job.c.finished_at, False, FINAL, _FINISHED, "Earliest finished first"),
    "due": Order(_job.c.run_at, False, _DELAYED, _DUE, "Earliest due first"),
    "-due": Order(_job.c.run_at, True, _DELAYED, _DUE, "Latest due first"),
}
DEFAULT_ORDER = "-created"


@dataclasses.dataclass(frozen=True, slots=True)
class JobFilters:
    """The filters of a list of jobs. Empty values do not filter.

    :raises ValueError: when a status or the order is unknown.
    :raises InvalidSearch: when ``q`` has a syntax error.
    """

    statuses: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    job: str = ""
    """The dotted name of a function or class, or of a class and its method."""
    tag: str = ""
    owner: str = ""
    error: str = ""
    """The exact name of the last attempt's exception class."""
    since: dt.datetime | None = None
    """Earliest time of the job's end; if it has not ended, of its newest claim; before the first
    claim, of its enqueue. UTC without ``tzinfo``."""
    until: dt.datetime | None = None
    """Latest time, compared in the same way. UTC without ``tzinfo``."""
    q: str = ""
    """The search text; see :mod:`.search`."""
    sort: str = DEFAULT_ORDER
    """A key of :data:`ORDERS`."""

    def __post_init__(self) -> None:
        known = [status.value for status in JobStatus]
        for status in self.statuses:
            if status not in known:
                statuses = ", ".join(known)
                raise ValueError(f"there is no status {status!r}; the statuses are {statuses}")
        if self.sort not in ORDERS:
            raise ValueError(f"there is no order {self.sort!r}; the orders are {', '.join(ORDERS)}")
        # Parsed here to raise InvalidSearch.
        _ = self.terms

    def __bool__(self) -> bool:
        return self != JobFilters(sort=self.sort)

    @property
    def order(self) -> Order:
        """The order of the list."""
        return ORDERS[self.sort]

    @property
    def terms(self) -> tuple[search.Term, ...]:
        """The parsed terms of ``q``."""
        return _parsed(self.q)

    @property
    def ranges(self) -> tuple[JobStatus, ...] | None:
        """The statuses whose index ranges are read; ``None`` to read all jobs by id."""
        wanted = [JobStatus(status) for status in self.statuses] or list(JobStatus)
        if not self.statuses and not self.order.is_timed:
            return None
        return tuple(status for status in wanted if status in self.order.statuses)

    @property
    def is_narrowed(self) -> bool:
        """Whether the list is filtered by more than the status."""
        return self != JobFilters(statuses=self.statuses, sort=self.sort)

    @property
    def offers_all(self) -> bool:
        """Whether *All matching* can be offered. Not for a search text: it is compared with masked
        values, and the database has only the unmasked ones."""
        return not self.q

    @property
    def has_maskable_fields(self) -> bool:
        """Whether a filter compares a value that may be masked on the page."""
        return bool(self.tag or self.owner)

    @property
    def needs_reading(self) -> bool:
        """Whether rows must be checked one by one, because no index covers the filters."""
        words = [term for term in self.terms if term.field != "id"]
        # In a list sorted by its end, the index covers `since` and `until`.
        times = (self.since or self.until) and self.order.column is not _job.c.finished_at
        named = self.queues or self.job or self.tag or self.owner or self.error
        return bool(named or words or times)


# Cached, because a page parses the same text several times.
_parsed = functools.lru_cache(256)(search.parse)
