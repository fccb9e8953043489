"""Lists of jobs: filtered, sorted, a page at a time, and as quick with a million as with ten."""

from __future__ import annotations

import dataclasses
import datetime as dt
import operator
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import JobStatus
from ...models import Job, by_index, detached_job, has_status, last_event
from ...state import AppState
from .conditions import as_id, is_shown_to_match, sql_conditions
from .cursors import Cursor, decode_cursor
from .filters import JobFilters
from .rows import JobRow, job_row
from .shown import Shown
from .stats import Count

MAX_PER_PAGE = 200
SEARCHED_ROWS = 100_000
"""So many jobs of each status are read at once for what no index knows."""

_COUNTED_NEW = 100
"""New jobs, each of which the visitor must be allowed to see."""
_SEARCH_SECONDS = 2.0
"""For checking what a search found against what is shown of it."""
_MAX_LISTED_PARAMETERS = 16 * 1024
"""Characters of parameters that a list loads; it must stay quick with jobs of 1 MiB."""
_MAX_CHUNK = 2_000
_ID_LAG = dt.timedelta(minutes=1)
"""Within which jobs get their ids in another order than that of their times."""

Comparison = Callable[[Any, Any], sa.ColumnElement[bool]]

_job = Job.__table__
_LIST_COLUMNS = [
    column
    for column in _job.c
    if column.name not in ("parameters", "result", "meta", "unique_hash")
]
_LISTED_PARAMETERS = sa.case(
    (sa.func.length(_job.c.parameters) <= _MAX_LISTED_PARAMETERS, _job.c.parameters),
    else_=None,
).label("parameters")


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of a list, in its order."""

    jobs: list[JobRow]
    newer: str | None
    """Cursor of the page before; pass it as ``before``."""
    older: str | None
    """Cursor of the page after; pass it as ``after``."""
    searches_on: bool = False
    """The next page is not known to hold any job: the search has read its share of rows."""
    is_cut: bool = False
    """The search took too long and was stopped: narrow it."""


def list_jobs(
    state: AppState,
    filters: JobFilters | None = None,
    *,
    after: str | None = None,
    before: str | None = None,
    per: int = 50,
    visible: Callable[[Job], bool] | None = None,
) -> Page:
    """A page of jobs, newest first unless ``filters`` sort otherwise.

    :param after: the ``older`` cursor of a page, to get what follows it.
    :param before: the ``newer`` cursor of a page, to get what precedes it.
    :param per: jobs per page, 1 to 200; other numbers are moved into that range.
    :param visible: leaves out the jobs for which it is false.
    :raises InvalidCursor: when a cursor is not one of ours.
    """
    filters = JobFilters() if filters is None else filters
    per = min(max(per, 1), MAX_PER_PAGE)
    upwards = before is not None and after is None
    cursor = decode_cursor(before if upwards else after, is_timed=filters.order.is_timed)
    with state.store.read() as connection:
        walk = _Walk(state, connection, filters, upwards)
        rows = walk.take(cursor, per + 1, visible)
    onwards = walk.stopped_at
    if len(rows) > per:
        rows = rows[:per]
        onwards = walk.cursor_of(rows[-1])
    back = walk.cursor_of(rows[0]) if rows and cursor is not None else None
    newer, older = (onwards, back) if upwards else (back, onwards)
    return Page(
        jobs=rows[::-1] if upwards else rows,
        newer=None if newer is None else newer.encoded(),
        older=None if older is None else older.encoded(),
        searches_on=onwards is not None and onwards is walk.stopped_at,
        is_cut=walk.is_cut,
    )


def recent_failures(
    state: AppState, limit: int = 5, *, visible: Callable[[Job], bool] | None = None
) -> list[JobRow]:
    """The jobs that failed last, newest failure first."""
    filters = JobFilters(statuses=(JobStatus.FAILED.value,), sort="-finished")
    return list_jobs(state, filters, per=limit, visible=visible).jobs


def count_new(
    state: AppState,
    filters: JobFilters,
    above: int,
    *,
    visible: Callable[[Job], bool] | None = None,
) -> Count:
    """How many jobs a list has got that have a higher id, counted to 100.

    :param filters: in the order of ids.
    """
    page = list_jobs(
        state, filters, before=Cursor(above).encoded(), per=_COUNTED_NEW, visible=visible
    )
    has_more = page.newer is not None and not page.searches_on
    return Count(len(page.jobs) + has_more, _COUNTED_NEW)


def jobs_for_authorizer(state: AppState, ids: Sequence[int]) -> dict[int, Job]:
    """The jobs with these ids, for the authorizer: without result, meta and large parameters."""
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).where(_job.c.id.in_(ids))
    with state.store.read() as connection:
        found = connection.execute(statement).mappings().all()
    return {values["id"]: _listed_job(values) for values in found}


def newest_jobs(state: AppState, number: int) -> list[Job]:
    """So many of the newest jobs, as :func:`jobs_for_authorizer` gives them."""
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).order_by(_job.c.id.desc())
    with state.store.read() as connection:
        found = connection.execute(statement.limit(number)).mappings().all()
    return [_listed_job(values) for values in found]


def job_of_nobody(queue: str | None = None) -> Job:
    """A job that is not there, for asking the authorizer about jobs of others.

    :param queue: where it would be; by default in a queue that does not exist either.
    """
    name = f"nobody-{secrets.token_hex(8)}"
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    values = dict.fromkeys(attribute.key for attribute in Job.__mapper__.column_attrs)
    known = {
        "id": 0,
        "target": name,
        "owner": name,
        "queue": queue or name,
        "status": JobStatus.PENDING.value,
        "parameters_json": "[]",
        "priority": 0,
        "attempt": 0,
        "run_at": now,
        "created_at": now,
    }
    return detached_job({**values, **known})


def is_listed(state: AppState, job: Job, filters: JobFilters) -> bool:
    """Whether what is shown of a job, as :func:`jobs_for_authorizer` gives it, matches."""
    shown = Shown.of(state, job.target, job.method, vars(job).get("parameters_json"))
    return is_shown_to_match(job_row(job, shown), filters)


class _Walk:
    """Reads a list from a cursor on, in one direction, in chunks that grow.

    So the database always plans for a few rows, whatever is left out of what it found.
    """

    def __init__(
        self, state: AppState, connection: sa.Connection, filters: JobFilters, upwards: bool
    ) -> None:
        self._state = state
        self._connection = connection
        self._filters = filters
        self._column = filters.order.column
        self._is_timed = filters.order.is_timed
        self._descending = filters.order.descending != upwards
        self.stopped_at: Cursor | None = None
        """How far it has searched, where there may be more to find."""
        self.is_cut = False
        """Whether time ran out."""

    def cursor_of(self, row: JobRow) -> Cursor:
        """The cursor of a page that ends at a job."""
        return Cursor(row.id, getattr(row, self._column.name) if self._is_timed else None)

    def take(
        self, cursor: Cursor | None, limit: int, visible: Callable[[Job], bool] | None
    ) -> list[JobRow]:
        """The next ``limit`` jobs that match and are visible."""
        wanted = [*sql_conditions(self._filters), *self._times()]
        end = self._end(cursor) if self._filters.needs_reading else None
        named = [] if end is None or cursor is not None else self._named(wanted, end, visible)
        if end is not None:
            wanted.append(self._up_to(end))
        rows: list[JobRow] = []
        chunk = limit
        deadline = time.monotonic() + _SEARCH_SECONDS
        while True:
            found = self._connection.execute(self._statement(wanted, cursor, chunk))
            values_read = found.mappings().all()
            for values in values_read:
                row = _listed_row(self._state, values)
                if self._is_wanted(row, visible):
                    rows.append(row)
                    if len(rows) >= limit:
                        return rows
                # What was found is shown, however long the database took to answer.
                elif time.monotonic() > deadline:
                    self.is_cut = True
                    self.stopped_at = self.cursor_of(row)
                    return rows
            if len(values_read) < chunk:
                self.stopped_at = end
                # Never a whole page and one more: the next page goes on from the end.
                return [*rows, *named][: limit - 1]
            cursor = self.cursor_of(row)
            chunk = min(chunk * 4, _MAX_CHUNK)

    def _named(
        self,
        wanted: Sequence[sa.ColumnElement[bool]],
        end: Cursor,
        visible: Callable[[Job], bool] | None,
    ) -> list[JobRow]:
        """Jobs beyond the end of the search whose ids are words of it: these are found at once."""
        words = (v for term in self._filters.terms if term.field is None for v in term.values)
        ids = [number for word in words if (number := as_id(word)) is not None]
        if not ids:
            return []
        beyond = [*wanted, self._behind(end), _job.c.id.in_(ids)]
        found = self._connection.execute(self._statement(beyond, None, len(ids)))
        rows = [_listed_row(self._state, values) for values in found.mappings()]
        return [row for row in rows if self._is_wanted(row, visible)]

    def _is_wanted(self, row: JobRow, visible: Callable[[Job], bool] | None) -> bool:
        is_visible = visible is None or visible(row.job)
        return is_visible and is_shown_to_match(row, self._filters)

    def _statement(
        self, wanted: Sequence[sa.ColumnElement[bool]], cursor: Cursor | None, limit: int
    ) -> sa.Select[Any]:
        if cursor is not None:
            wanted = [*wanted, self._behind(cursor)]
        ranges = [self._first(each.where(*wanted), limit) for each in self._ranges()]
        if len(ranges) == 1:
            return ranges[0].with_only_columns(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        # One index range per status, merged: with IN, a database would sort every job of them.
        merged = sa.union_all(*(sa.select(each.subquery().c.id) for each in ranges)).subquery()
        statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        return self._first(statement.where(_job.c.id.in_(sa.select(merged.c.id))), limit)

    def _ranges(self) -> list[sa.Select[Any]]:
        statuses = self._filters.ranges
        if statuses is None:
            return [sa.select(_job.c.id)]
        if not statuses:
            # Such as completed jobs in the order in which they are due.
            return [sa.select(_job.c.id).where(sa.false())]
        has_value = [self._column.is_not(None)] if self._is_timed else []
        # Or all jobs might be read by their ids, in the belief that a match comes soon.
        ids = by_index(sa.select(_job.c.id), self._filters.order.index_name)
        return [ids.where(has_status(each), *has_value) for each in statuses]

    def _first(self, statement: sa.Select[Any], limit: int) -> sa.Select[Any]:
        return self._state.store.limit_ordered(self._sorted(statement), limit)

    def _sorted(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        columns = dict.fromkeys([self._column, _job.c.id])
        ordered = [column.desc() if self._descending else column.asc() for column in columns]
        return statement.order_by(*ordered)

    def _behind(self, cursor: Cursor) -> sa.ColumnElement[bool]:
        """True for what comes after the cursor's job."""
        if self._descending:
            return self._compared(cursor, operator.le, operator.lt, operator.lt)
        return self._compared(cursor, operator.ge, operator.gt, operator.gt)

    def _up_to(self, cursor: Cursor) -> sa.ColumnElement[bool]:
        """True for the cursor's job, and for what comes before it."""
        if self._descending:
            return self._compared(cursor, operator.ge, operator.gt, operator.ge)
        return self._compared(cursor, operator.le, operator.lt, operator.le)

    def _compared(
        self, cursor: Cursor, within: Comparison, beyond: Comparison, by_id: Comparison
    ) -> sa.ColumnElement[bool]:
        if not self._is_timed:
            return by_id(_job.c.id, cursor.id)
        # The first condition is the range of the index; the second only splits one moment.
        return sa.and_(
            within(self._column, cursor.when),
            sa.or_(beyond(self._column, cursor.when), by_id(_job.c.id, cursor.id)),
        )

    def _end(self, cursor: Cursor | None) -> Cursor | None:
        """Where the search stops: as soon as it has read its share of one of the statuses."""
        columns = [_job.c.id, self._column] if self._is_timed else [_job.c.id]
        ends = []
        for each in self._ranges():
            rest = each if cursor is None else each.where(self._behind(cursor))
            last = self._first(rest, 1).offset(SEARCHED_ROWS - 1)
            ends += [last.with_only_columns(column).scalar_subquery() for column in columns]
        values = iter(self._connection.execute(sa.select(*ends)).one())
        found = [Cursor(*each) for each in zip(*[values] * len(columns), strict=True) if each[0]]
        nearest = max if self._descending else min
        return nearest(found, key=_place, default=None)

    def _times(self) -> list[sa.ColumnElement[bool]]:
        """What ``since`` and ``until`` ask for."""
        since, until = self._filters.since, self._filters.until
        is_indexed = self._column is _job.c.finished_at
        column = self._column if is_indexed else last_event()
        wanted = [column >= since] if since is not None else []
        if until is not None:
            wanted.append(column <= until)
            if not self._is_timed and self._state.store.seeks_ranges:
                wanted += self._created_by(until)
        return wanted

    def _created_by(self, until: dt.datetime) -> list[sa.ColumnElement[bool]]:
        """The ids up to about this time: what was created later, has not happened before."""
        # Nothing was created in the last minute that a calendar has.
        if until > dt.datetime.max - _ID_LAG:
            return []
        last = _last_id_before(until + _ID_LAG)
        return [_job.c.id <= int(self._connection.execute(sa.select(last)).scalar_one())]


def _place(cursor: Cursor) -> tuple[Any, ...]:
    return cursor.when, cursor.id


def _last_id_before(moment: dt.datetime) -> sa.ScalarSelect[int]:
    """An id up to which all jobs were created before ``moment``, and behind it none was.

    Found by halving the range of ids, within one statement.
    """
    newest = sa.select(sa.func.coalesce(sa.func.max(_job.c.id), 0)).scalar_subquery()
    # Cast, because psycopg2 writes a number without its type into the statement.
    zero = sa.cast(0, sa.BigInteger)
    halves = sa.select(zero.label("low"), (newest + 1).label("high")).cte("halves", recursive=True)
    low, high = halves.c.low, halves.c.high
    middle = (low + high) // 2
    created = (
        sa.select(_job.c.created_at)
        .where(_job.c.id >= middle)
        .order_by(_job.c.id)
        .limit(1)
        .correlate(halves)
        .scalar_subquery()
    )
    is_before = created < moment
    halves = halves.union_all(
        sa.select(
            sa.case((is_before, middle), else_=low), sa.case((is_before, high), else_=middle)
        ).where(high - low > 1)
    )
    return sa.select(sa.func.max(halves.c.low)).scalar_subquery()


def _listed_row(state: AppState, values: Mapping[Any, Any]) -> JobRow:
    shown = Shown.of(state, values["target"], values["method"], values["parameters"])
    return job_row(_listed_job(values), shown)


def _listed_job(values: Mapping[Any, Any]) -> Job:
    attributes = {
        Job.__mapper__.get_property_by_column(column).key: values[column.name]
        for column in _LIST_COLUMNS
    }
    if values["parameters"] is not None:
        attributes["parameters_json"] = values["parameters"]
    return detached_job(attributes)
