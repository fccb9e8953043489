"""Lists of jobs: newest first, filtered, a page at a time."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Job, detached_job
from ...states import JobStatus
from .cursors import decode_cursor, encode_cursor
from .rows import JobRow, job_row
from .shown import Shown

MAX_PER_PAGE = 200
SEARCHED_ROWS = 100_000
"""A text search reads the newest rows only: no index can serve it."""

_SEARCH_SECONDS = 2.0
"""For checking what a search found against what is shown of it."""
_MAX_LISTED_PARAMETERS = 16 * 1024
"""Characters of parameters that a list loads; it must stay quick with jobs of 1 MiB."""
_MAX_CHUNK = 2_000

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
class JobFilters:
    """Which jobs to list; what is empty does not filter.

    :raises ValueError: when a status is not one of :class:`~flask_bgjobs.JobStatus`.
    """

    statuses: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    q: str = ""
    """Part of what is shown of a job, without regard to case, or exactly its id."""

    def __post_init__(self) -> None:
        known = [status.value for status in JobStatus]
        for status in self.statuses:
            if status not in known:
                raise ValueError(f"there is no status {status!r}; there are {', '.join(known)}")

    def __bool__(self) -> bool:
        return bool(self.statuses or self.queues or self.q)


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of a list, newest first."""

    jobs: list[JobRow]
    newer: str | None
    """Cursor of the page before; pass it as ``before``."""
    older: str | None
    """Cursor of the page after; pass it as ``after``."""
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
    """A page of jobs, newest first.

    :param after: the ``older`` cursor of a page, to get what follows it.
    :param before: the ``newer`` cursor of a page, to get what precedes it.
    :param per: jobs per page, 1 to 200; other numbers are moved into that range.
    :param visible: leaves out the jobs for which it is false.
    :raises InvalidCursor: when a cursor is not one of ours.
    """
    filters = filters or JobFilters()
    per = min(max(per, 1), MAX_PER_PAGE)
    upwards = before is not None and after is None
    cursor = decode_cursor(before if upwards else after)
    with state.store.read() as connection:
        rows, is_cut = _take(state, connection, filters, cursor, upwards, visible, per + 1)
    more = len(rows) > per
    rows = rows[:per]
    if upwards:
        rows.reverse()
    has_newer = more if upwards else cursor is not None
    has_older = upwards or more
    return Page(
        jobs=rows,
        newer=encode_cursor(rows[0].id) if rows and has_newer else None,
        older=encode_cursor(rows[-1].id) if rows and has_older else None,
        is_cut=is_cut,
    )


def recent_failures(
    state: AppState, limit: int = 5, *, visible: Callable[[Job], bool] | None = None
) -> list[JobRow]:
    """The jobs that failed last, newest failure first."""
    statement = (
        sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        .where(_job.c.status == JobStatus.FAILED.value, _job.c.finished_at.is_not(None))
        .order_by(_job.c.finished_at.desc(), _job.c.id.desc())
    )
    # Some may be hidden from the visitor; a few more make up for them.
    statement = statement.limit(limit if visible is None else limit * 10)
    with state.store.read() as connection:
        found = connection.execute(statement).mappings().all()
    rows = [_listed_row(state, values) for values in found]
    return [row for row in rows if visible is None or visible(row.job)][:limit]


def _take(
    state: AppState,
    connection: sa.Connection,
    filters: JobFilters,
    cursor: int | None,
    upwards: bool,
    visible: Callable[[Job], bool] | None,
    limit: int,
) -> tuple[list[JobRow], bool]:
    """The first ``limit`` rows that match and are visible, and whether time ran out.

    Read in chunks that grow, so that the database always plans for a few rows.
    """
    rows: list[JobRow] = []
    chunk = limit
    deadline = time.monotonic() + _SEARCH_SECONDS
    while True:
        found = connection.execute(_list_statement(filters, cursor, upwards, chunk)).mappings()
        values_read = found.all()
        for values in values_read:
            row = _listed_row(state, values)
            if (visible is None or visible(row.job)) and _matches(row, filters.q):
                rows.append(row)
            if len(rows) >= limit or time.monotonic() > deadline:
                return rows, len(rows) < limit
        if len(values_read) < chunk:
            return rows, False
        cursor = values_read[-1]["id"]
        chunk = min(chunk * 4, _MAX_CHUNK)


def _list_statement(
    filters: JobFilters, cursor: int | None, upwards: bool, limit: int
) -> sa.Select[Any]:
    order = _job.c.id.asc() if upwards else _job.c.id.desc()
    wanted: list[sa.ColumnElement[bool]] = []
    if filters.queues:
        wanted.append(_job.c.queue.in_(filters.queues))
    if filters.q:
        wanted.append(_may_match(filters.q))
    if cursor is not None:
        wanted.append(_job.c.id > cursor if upwards else _job.c.id < cursor)
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).order_by(order).limit(limit)
    if len(filters.statuses) < 2:
        return statement.where(*wanted, *(_job.c.status == each for each in filters.statuses))
    # One index range per status, merged: with IN, a database would sort every job of them.
    ranges = [
        sa.select(_job.c.id)
        .where(_job.c.status == status, *wanted)
        .order_by(order)
        .limit(limit)
        .subquery()
        for status in filters.statuses
    ]
    merged = sa.union_all(*(sa.select(each.c.id) for each in ranges)).subquery()
    return statement.where(_job.c.id.in_(sa.select(merged.c.id)))


def _may_match(q: str) -> sa.ColumnElement[bool]:
    """True for every row that :func:`_matches` could accept; what is masked may match as well."""
    newest = sa.select(sa.func.coalesce(sa.func.max(_job.c.id), 0)).scalar_subquery()
    texts = (_job.c.target, _job.c.method, _job.c.error, _job.c.owner, _job.c.unique_key)
    name = sa.func.coalesce(_job.c.target + "." + _job.c.method, _job.c.target)
    found: list[sa.ColumnElement[bool]] = [
        text.icontains(q, autoescape=True) for text in (*texts, name)
    ]
    # Parameters and tags are stored as JSON, where other letters and quotes are escapes.
    as_stored = {q, json.dumps(q)[1:-1]}
    found += [
        column.icontains(text, autoescape=True)
        for column in (_job.c.parameters, _job.c.tags)
        for text in as_stored
    ]
    recent = sa.and_(_job.c.id > newest - SEARCHED_ROWS, sa.or_(*found))
    job_id = _as_id(q)
    return recent if job_id is None else sa.or_(_job.c.id == job_id, recent)


def _matches(row: JobRow, q: str) -> bool:
    """Whether what is *shown* of the job contains ``q``, so that no search finds a secret."""
    if not q or row.id == _as_id(q):
        return True
    shown = (
        row.target,
        row.method,
        row.name,
        row.parameters,
        row.error,
        row.owner,
        row.unique_key,
        *row.tags,
    )
    wanted = q.casefold()
    return any(text is not None and wanted in text.casefold() for text in shown)


def _listed_row(state: AppState, values: Mapping[Any, Any]) -> JobRow:
    attributes = {
        Job.__mapper__.get_property_by_column(column).key: values[column.name]
        for column in _LIST_COLUMNS
    }
    if values["parameters"] is not None:
        attributes["parameters_json"] = values["parameters"]
    shown = Shown.of(state, values["target"], values["method"], values["parameters"])
    return job_row(detached_job(attributes), shown)


def _as_id(q: str) -> int | None:
    text = q.removeprefix("#")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
