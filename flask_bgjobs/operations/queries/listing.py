"""Lists of jobs: filtered, sorted and read page by page, quickly even with a million jobs."""

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
"""Largest number of jobs of each status that one page reads for a search without an index."""

_MAX_COUNTED_NEW = 100
"""Limit of :func:`count_new`, which has to ask for each job whether the visitor may see it."""
_SEARCH_SECONDS = 2.0
"""How long one page may compare found jobs with what is shown of them."""
_MAX_LISTED_PARAMETERS = 16 * 1024
"""Longest parameters that a list loads, in characters. It must stay quick with jobs of 1 MiB."""
_MAX_CHUNK = 2_000
"""Largest number of jobs that one query reads."""
_ID_LAG = dt.timedelta(minutes=1)
"""Jobs may have ids out of order if their times differ by less than this."""

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
    """One page of a list of jobs."""

    jobs: list[JobRow]
    newer: str | None
    """Cursor of the previous page, to pass as ``before``; ``None``: there is none."""
    older: str | None
    """Cursor of the next page, to pass as ``after``; ``None``: there is none."""
    may_find_more: bool = False
    """Whether the search has read its limit of rows, so that the next page may have no jobs."""
    timed_out: bool = False
    """Whether the search took too long and was stopped."""


def list_jobs(
    state: AppState,
    filters: JobFilters | None = None,
    *,
    after: str | None = None,
    before: str | None = None,
    per: int = 50,
    visible: Callable[[Job], bool] | None = None,
) -> Page:
    """A page of jobs, newest first unless ``filters`` has another order.

    :param after: the ``older`` cursor of a page, to get the page after it.
    :param before: the ``newer`` cursor of a page, to get the page before it.
    :param per: jobs per page, 1 to 200. Other numbers are replaced by the nearest limit.
    :param visible: returns whether to list a job; default: all jobs are listed.
    :raises InvalidCursor: when a cursor is invalid, or belongs to a list in another order.
    """
    filters = JobFilters() if filters is None else filters
    per = min(max(per, 1), MAX_PER_PAGE)
    backward = before is not None and after is None
    cursor = decode_cursor(before if backward else after, is_timed=filters.order.is_timed)
    with state.store.read() as connection:
        reader = _ListReader(state, connection, filters, backward)
        rows = reader.take(cursor, per + 1, visible)
    next_cursor = reader.stopped_at
    if len(rows) > per:
        rows = rows[:per]
        next_cursor = reader.cursor_of(rows[-1])
    return_cursor = reader.cursor_of(rows[0]) if rows and cursor is not None else None
    newer, older = (next_cursor, return_cursor) if backward else (return_cursor, next_cursor)
    return Page(
        jobs=rows[::-1] if backward else rows,
        newer=None if newer is None else newer.encoded(),
        older=None if older is None else older.encoded(),
        may_find_more=next_cursor is not None and next_cursor is reader.stopped_at,
        timed_out=reader.timed_out,
    )


def recent_failures(
    state: AppState, limit: int = 5, *, visible: Callable[[Job], bool] | None = None
) -> list[JobRow]:
    """The jobs that failed most recently, newest failure first."""
    filters = JobFilters(statuses=(JobStatus.FAILED.value,), sort="-finished")
    return list_jobs(state, filters, per=limit, visible=visible).jobs


def count_new(
    state: AppState,
    filters: JobFilters,
    above: int,
    *,
    visible: Callable[[Job], bool] | None = None,
) -> Count:
    """The number of jobs in a list with a higher id than ``above``, counted up to 100.

    :param filters: must sort by id.
    """
    page = list_jobs(
        state, filters, before=Cursor(above).encoded(), per=_MAX_COUNTED_NEW, visible=visible
    )
    has_more = page.newer is not None and not page.may_find_more
    return Count(len(page.jobs) + has_more, _MAX_COUNTED_NEW)


def jobs_for_authorizer(state: AppState, ids: Sequence[int]) -> dict[int, Job]:
    """The jobs with these ids, for the authorizer, without results, meta and large parameters."""
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).where(_job.c.id.in_(ids))
    with state.store.read() as connection:
        rows = connection.execute(statement).mappings().all()
    return {values["id"]: _listed_job(values) for values in rows}


def newest_jobs(state: AppState, number: int) -> list[Job]:
    """The newest jobs, with the same columns as from :func:`jobs_for_authorizer`.

    :param number: largest number of jobs.
    """
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).order_by(_job.c.id.desc())
    with state.store.read() as connection:
        rows = connection.execute(statement.limit(number)).mappings().all()
    return [_listed_job(values) for values in rows]


def placeholder_job(queue: str | None = None) -> Job:
    """A job that does not exist, to ask the authorizer about jobs of other owners.

    :param queue: the job's queue; default: a queue that does not exist.
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
    """Whether the shown values of a job match the filters.

    :param job: a job from :func:`jobs_for_authorizer`.
    """
    shown = Shown.of(state, job.target, job.method, vars(job).get("parameters_json"))
    return is_shown_to_match(job_row(job, shown), filters)


class _ListReader:
    """Reads a list from a cursor on, in one direction, in chunks of growing size.

    The limit of each query is small, so that the database chooses a plan for few rows, however many
    rows are left out afterwards.
    """

    def __init__(
        self, state: AppState, connection: sa.Connection, filters: JobFilters, backward: bool
    ) -> None:
        self._state = state
        self._connection = connection
        self._filters = filters
        self._column = filters.order.column
        self._is_timed = filters.order.is_timed
        self._descending = filters.order.descending != backward
        self.stopped_at: Cursor | None = None
        """The last job that was searched; ``None``: there are no more jobs to search."""
        self.timed_out = False
        """Whether the search was stopped because it took too long."""

    def cursor_of(self, row: JobRow) -> Cursor:
        """The cursor of a page whose last job is ``row``."""
        return Cursor(row.id, getattr(row, self._column.name) if self._is_timed else None)

    def take(
        self, cursor: Cursor | None, limit: int, visible: Callable[[Job], bool] | None
    ) -> list[JobRow]:
        """The next jobs that match and are visible, up to ``limit``."""
        conditions = [*sql_conditions(self._filters), *self._time_conditions()]
        end = self._search_end(cursor) if self._filters.needs_reading else None
        named_jobs = (
            []
            if end is None or cursor is not None
            else self._jobs_named_by_id(conditions, end, visible)
        )
        if end is not None:
            conditions.append(self._up_to_and_including(end))
        rows: list[JobRow] = []
        chunk = limit
        deadline = time.monotonic() + _SEARCH_SECONDS
        while True:
            result = self._connection.execute(self._statement(conditions, cursor, chunk))
            values_read = result.mappings().all()
            for values in values_read:
                row = _listed_row(self._state, values)
                if self._matches(row, visible):
                    rows.append(row)
                    if len(rows) >= limit:
                        return rows
                # Only after a job that does not match: matches are listed even after a slow query.
                elif time.monotonic() > deadline:
                    self.timed_out = True
                    self.stopped_at = self.cursor_of(row)
                    return rows
            if len(values_read) < chunk:
                self.stopped_at = end
                # Fewer than ``limit``, so that the next page continues at the end of the search.
                return [*rows, *named_jobs][: limit - 1]
            cursor = self.cursor_of(row)
            chunk = min(chunk * 4, _MAX_CHUNK)

    def _jobs_named_by_id(
        self,
        conditions: Sequence[sa.ColumnElement[bool]],
        end: Cursor,
        visible: Callable[[Job], bool] | None,
    ) -> list[JobRow]:
        """Jobs after the end of the search whose ids are words of the search.

        An index finds them at once.
        """
        words = (v for term in self._filters.terms if term.field is None for v in term.values)
        ids = [number for word in words if (number := as_id(word)) is not None]
        if not ids:
            return []
        conditions = [*conditions, self._after(end), _job.c.id.in_(ids)]
        result = self._connection.execute(self._statement(conditions, None, len(ids)))
        rows = [_listed_row(self._state, values) for values in result.mappings()]
        return [row for row in rows if self._matches(row, visible)]

    def _matches(self, row: JobRow, visible: Callable[[Job], bool] | None) -> bool:
        is_visible = visible is None or visible(row.job)
        return is_visible and is_shown_to_match(row, self._filters)

    def _statement(
        self, conditions: Sequence[sa.ColumnElement[bool]], cursor: Cursor | None, limit: int
    ) -> sa.Select[Any]:
        if cursor is not None:
            conditions = [*conditions, self._after(cursor)]
        ranges = [self._limited(ids.where(*conditions), limit) for ids in self._ranges()]
        if len(ranges) == 1:
            return ranges[0].with_only_columns(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        # Merge one index range per status. With IN, a database would sort all jobs of the statuses.
        merged = sa.union_all(*(sa.select(ids.subquery().c.id) for ids in ranges)).subquery()
        statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        return self._limited(statement.where(_job.c.id.in_(sa.select(merged.c.id))), limit)

    def _ranges(self) -> list[sa.Select[Any]]:
        statuses = self._filters.ranges
        if statuses is None:
            return [sa.select(_job.c.id)]
        if not statuses:
            # The order excludes the statuses, for example completed jobs sorted by due time.
            return [sa.select(_job.c.id).where(sa.false())]
        has_value = [self._column.is_not(None)] if self._is_timed else []
        # Otherwise the planner may read all jobs by id, because it expects an early match.
        ids = by_index(sa.select(_job.c.id), self._filters.order.index_name)
        return [ids.where(has_status(status), *has_value) for status in statuses]

    def _limited(self, statement: sa.Select[Any], limit: int) -> sa.Select[Any]:
        return self._state.store.limit_ordered(self._sorted(statement), limit)

    def _sorted(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        columns = dict.fromkeys([self._column, _job.c.id])
        ordered = [column.desc() if self._descending else column.asc() for column in columns]
        return statement.order_by(*ordered)

    def _after(self, cursor: Cursor) -> sa.ColumnElement[bool]:
        """The condition for the jobs after the cursor's job, in the order of reading."""
        if self._descending:
            return self._compare(cursor, operator.le, operator.lt, operator.lt)
        return self._compare(cursor, operator.ge, operator.gt, operator.gt)

    def _up_to_and_including(self, cursor: Cursor) -> sa.ColumnElement[bool]:
        """The condition for the cursor's job and the jobs before it, in the order of reading."""
        if self._descending:
            return self._compare(cursor, operator.ge, operator.gt, operator.ge)
        return self._compare(cursor, operator.le, operator.lt, operator.le)

    def _compare(
        self, cursor: Cursor, within: Comparison, beyond: Comparison, by_id: Comparison
    ) -> sa.ColumnElement[bool]:
        if not self._is_timed:
            return by_id(_job.c.id, cursor.id)
        # The first condition is the index range. The second separates jobs with the same time.
        return sa.and_(
            within(self._column, cursor.when),
            sa.or_(beyond(self._column, cursor.when), by_id(_job.c.id, cursor.id)),
        )

    def _search_end(self, cursor: Cursor | None) -> Cursor | None:
        """Where the search stops: at the first status of which :data:`SEARCHED_ROWS` jobs are read.

        :returns: ``None`` if no status has so many jobs.
        """
        columns = [_job.c.id, self._column] if self._is_timed else [_job.c.id]
        ends = []
        for ids in self._ranges():
            rest = ids if cursor is None else ids.where(self._after(cursor))
            last = self._limited(rest, 1).offset(SEARCHED_ROWS - 1)
            ends += [last.with_only_columns(column).scalar_subquery() for column in columns]
        values = iter(self._connection.execute(sa.select(*ends)).one())
        cursors = [Cursor(*row) for row in zip(*[values] * len(columns), strict=True) if row[0]]
        nearest = max if self._descending else min
        return nearest(cursors, key=_sort_key, default=None)

    def _time_conditions(self) -> list[sa.ColumnElement[bool]]:
        """The conditions for ``since`` and ``until``."""
        since, until = self._filters.since, self._filters.until
        is_indexed = self._column is _job.c.finished_at
        column = self._column if is_indexed else last_event()
        conditions = [column >= since] if since is not None else []
        if until is not None:
            conditions.append(column <= until)
            if not self._is_timed and self._state.store.seeks_ranges:
                conditions += self._created_until(until)
        return conditions

    def _created_until(self, until: dt.datetime) -> list[sa.ColumnElement[bool]]:
        """The condition that leaves out ids of later jobs: they have no events before ``until``."""
        # The addition below would overflow, and no job was created so late.
        if until > dt.datetime.max - _ID_LAG:
            return []
        last = _last_id_before(until + _ID_LAG)
        return [_job.c.id <= int(self._connection.execute(sa.select(last)).scalar_one())]


def _sort_key(cursor: Cursor) -> tuple[Any, ...]:
    return cursor.when, cursor.id


def _last_id_before(moment: dt.datetime) -> sa.ScalarSelect[int]:
    """The highest id of a job that was created before ``moment``; 0: there is none.

    One statement finds it by binary search, as if creation times always rose with the ids.
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
