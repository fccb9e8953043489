"""The conditions of filters and search terms, in SQL and in Python.

SQL finds candidates by the stored values. Python then compares their masked values, so that a
search cannot reveal a secret by finding the job that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ...job.redact import MASK
from ...models import Job, Worker
from .filters import JobFilters
from .rows import JobRow
from .search import Term

_job = cast(sa.Table, Job.__table__)
_worker = Worker.__table__
_full_name: sa.ColumnElement[str] = sa.func.coalesce(
    _job.c.target + "." + _job.c.method, _job.c.target
)
_TEXT_COLUMNS = (_full_name, _job.c.error, _job.c.owner, _job.c.unique_key)
_JSON_COLUMNS = (_job.c.parameters, _job.c.tags)
_ESCAPE = "/"
"""The escape character of LIKE patterns."""


def sql_conditions(filters: JobFilters) -> Iterator[sa.ColumnElement[bool]]:
    """The SQL conditions on candidates; :func:`is_shown_to_match` decides about each of them."""
    if filters.queues:
        yield _job.c.queue.in_(filters.queues)
    if filters.job:
        yield sa.or_(_job.c.target == filters.job, _full_name == filters.job)
    if filters.tag:
        yield _position(_job.c.tags, json.dumps(filters.tag)) > 0
    if filters.owner:
        yield _job.c.owner == filters.owner
    if filters.error:
        yield _job.c.error_type == filters.error
    for term in filters.terms:
        yield _term_condition(term)


def _term_condition(term: Term) -> sa.ColumnElement[bool]:
    match term.field:
        case "queue":
            return _job.c.queue.in_([value.lower() for value in term.values])
        case "owner":
            return _job.c.owner.in_(term.values)
        case "id":
            return sa.or_(*(_job.c.id.between(ids.start, ids.stop - 1) for ids in term.ids))
        case "worker":
            return _has_worker(term.values)
        case "job":
            return sa.or_(*(_contains(_full_name, value) for value in term.values))
        case "error":
            return sa.or_(*(_contains(_job.c.error, value) for value in term.values))
        case "tag":
            return sa.or_(*(_json_contains(_job.c.tags, value) for value in term.values))
        case "parameters":
            return sa.or_(*(_json_contains(_job.c.parameters, value) for value in term.values))
    return sa.or_(*(condition for value in term.values for condition in _any_column(value)))


def _has_worker(values: tuple[str, ...]) -> sa.ColumnElement[bool]:
    """Whether ``values`` has the name or the id of the job's worker."""
    ids = [number for value in values if (number := as_id(value)) is not None]
    named = sa.select(_worker.c.id).where(_worker.c.name.in_(values))
    return sa.or_(_job.c.worker_id.in_(ids), _job.c.worker_id.in_(named))


def _any_column(value: str) -> Iterator[sa.ColumnElement[bool]]:
    """The conditions of which one must be true for a search word without a field."""
    yield from (_contains(column, value) for column in _TEXT_COLUMNS)
    yield from (_json_contains(column, value) for column in _JSON_COLUMNS)
    if (job_id := as_id(value)) is not None:
        yield _job.c.id == job_id


class _position(FunctionElement[int]):  # noqa: N801  # called like a SQL function
    """The position of a text in another one, from 1; 0 when it is not found."""

    inherit_cache = True
    type = sa.Integer()


@compiles(_position)
def _instr(element: _position, compiler: Any, **kw: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kw)})"


@compiles(_position, "postgresql")
def _strpos(element: _position, compiler: Any, **kw: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kw)})"


class _CaseFolded(FunctionElement[str]):
    """A text that LIKE compares without regard to case."""

    inherit_cache = True
    type = sa.String()


@compiles(_CaseFolded)
def _lower(element: _CaseFolded, compiler: Any, **kw: Any) -> str:
    return f"lower({compiler.process(element.clauses, **kw)})"


@compiles(_CaseFolded, "sqlite")
def _unchanged(element: _CaseFolded, compiler: Any, **kw: Any) -> str:
    """SQLite's LIKE ignores the case of ASCII letters, and ``lower()`` changes only these."""
    return str(compiler.process(element.clauses, **kw))


def _contains(column: sa.ColumnElement[Any], text: str) -> sa.ColumnElement[bool]:
    """Whether a column contains ``text``, without regard to case."""
    special = (_ESCAPE, "%", "_")
    escaped = text.translate({ord(character): f"{_ESCAPE}{character}" for character in special})
    # One literal: SQLAlchemy's `contains()` would concatenate the pattern for each row.
    return _CaseFolded(column).like(_CaseFolded(sa.literal(f"%{escaped}%")), escape=_ESCAPE)


def _json_contains(column: sa.ColumnElement[Any], text: str) -> sa.ColumnElement[bool]:
    """Whether JSON contains ``text``, as it is or with non-ASCII letters and quotes escaped."""
    return sa.or_(*(_contains(column, stored) for stored in {text, json.dumps(text)[1:-1]}))


def as_id(text: str) -> int | None:
    """The job id in a word such as ``42`` or ``#42``; ``None`` for other words."""
    digits = text.removeprefix("#")
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) < 19 else None


def is_shown_to_match(row: JobRow, filters: JobFilters) -> bool:
    """Whether the masked values of a job match the filters and all search terms."""
    if filters.tag and filters.tag not in row.tags:
        return False
    if filters.owner and filters.owner != row.owner:
        return False
    if filters.error and filters.error != row.error_type:
        return False
    return all(_term_matches(row, term) for term in filters.terms)


def _term_matches(row: JobRow, term: Term) -> bool:
    match term.field:
        case "id" | "queue" | "worker" | "job":
            # Already decided in SQL, because these values are never masked.
            return True
        case "owner":
            return row.owner in term.values
        case "tag":
            return any(value in row.tags for value in term.values)
        case "error":
            return any(_is_in(value, row.error) for value in term.values)
        case "parameters":
            return _has_parameter(row, term)
    return any(_is_in_any_text(row, value) for value in term.values)


def _is_in_any_text(row: JobRow, value: str) -> bool:
    shown = (row.name, row.parameters, row.error, row.owner, row.unique_key, *row.tags)
    return row.id == as_id(value) or any(_is_in(value, text) for text in shown)


def _is_in(value: str, text: str | None) -> bool:
    return text is not None and value.casefold() in text.casefold()


def _has_parameter(row: JobRow, term: Term) -> bool:
    """Whether the masked parameters have one of the term's values at its path."""
    if row.parameters is None:
        return False
    found: Any = json.loads(row.parameters)
    for key in term.path:
        if isinstance(found, Mapping):
            found = found.get(key, MASK)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return False
    if found == MASK or isinstance(found, list | dict):
        return False
    return (found if isinstance(found, str) else json.dumps(found)) in term.values
