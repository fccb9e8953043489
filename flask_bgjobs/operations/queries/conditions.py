"""Conditions: what filters and words ask of a row, in SQL and of what is shown of it.

SQL finds the jobs that may match, by the text that is stored. What a search finds must be *shown*
to match as well, so that nobody can find out by searching what is masked.
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
_TEXTS = (_full_name, _job.c.error, _job.c.owner, _job.c.unique_key)
_JSON = (_job.c.parameters, _job.c.tags)
_ESCAPE = "/"
"""Before a sign of LIKE that stands for itself."""


def sql_conditions(filters: JobFilters) -> Iterator[sa.ColumnElement[bool]]:
    """True for the jobs that :func:`is_shown_to_match` has to look at."""
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
            return sa.or_(*(_holds(_job.c.tags, value) for value in term.values))
        case "parameters":
            return sa.or_(*(_holds(_job.c.parameters, value) for value in term.values))
    return sa.or_(*(condition for value in term.values for condition in _anywhere(value)))


def _has_worker(values: tuple[str, ...]) -> sa.ColumnElement[bool]:
    """Whether the job's worker has one of the names, or ids."""
    ids = [number for value in values if (number := as_id(value)) is not None]
    named = sa.select(_worker.c.id).where(_worker.c.name.in_(values))
    return sa.or_(_job.c.worker_id.in_(ids), _job.c.worker_id.in_(named))


def _anywhere(value: str) -> Iterator[sa.ColumnElement[bool]]:
    yield from (_contains(column, value) for column in _TEXTS)
    yield from (_holds(column, value) for column in _JSON)
    if (job_id := as_id(value)) is not None:
        yield _job.c.id == job_id


class _position(FunctionElement[int]):  # noqa: N801  # written as the function that it is
    """Where a text stands in another one, letter for letter; 0 where it does not."""

    inherit_cache = True
    type = sa.Integer()


@compiles(_position)
def _instr(element: _position, compiler: Any, **kw: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kw)})"


@compiles(_position, "postgresql")
def _strpos(element: _position, compiler: Any, **kw: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kw)})"


class _CaseFolded(FunctionElement[str]):
    """What LIKE compares in any case of its letters."""

    inherit_cache = True
    type = sa.String()


@compiles(_CaseFolded)
def _lower(element: _CaseFolded, compiler: Any, **kw: Any) -> str:
    return f"lower({compiler.process(element.clauses, **kw)})"


@compiles(_CaseFolded, "sqlite")
def _as_it_is(element: _CaseFolded, compiler: Any, **kw: Any) -> str:
    """Its LIKE looks past the case of ASCII letters, and its ``lower()`` knows no others."""
    return str(compiler.process(element.clauses, **kw))


def _contains(column: sa.ColumnElement[Any], text: str) -> sa.ColumnElement[bool]:
    escaped = text.translate({ord(sign): f"{_ESCAPE}{sign}" for sign in (_ESCAPE, "%", "_")})
    # One value, and not a text that each row puts together again.
    return _CaseFolded(column).like(_CaseFolded(sa.literal(f"%{escaped}%")), escape=_ESCAPE)


def _holds(column: sa.ColumnElement[Any], text: str) -> sa.ColumnElement[bool]:
    """Whether JSON holds ``text``, where other letters and quotes are stored as escapes."""
    return sa.or_(*(_contains(column, stored) for stored in {text, json.dumps(text)[1:-1]}))


def as_id(text: str) -> int | None:
    """The id that a word names, as in ``42`` or ``#42``."""
    digits = text.removeprefix("#")
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) < 19 else None


def is_shown_to_match(row: JobRow, filters: JobFilters) -> bool:
    """Whether what is shown of a job has everything that is asked for."""
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
            # SQL has decided; these are never masked.
            return True
        case "owner":
            return row.owner in term.values
        case "tag":
            return any(value in row.tags for value in term.values)
        case "error":
            return any(_is_in(value, row.error) for value in term.values)
        case "parameters":
            return _has_parameter(row, term)
    return any(_is_anywhere(row, value) for value in term.values)


def _is_anywhere(row: JobRow, value: str) -> bool:
    shown = (row.name, row.parameters, row.error, row.owner, row.unique_key, *row.tags)
    return row.id == as_id(value) or any(_is_in(value, text) for text in shown)


def _is_in(value: str, text: str | None) -> bool:
    return text is not None and value.casefold() in text.casefold()


def _has_parameter(row: JobRow, term: Term) -> bool:
    """Whether the parameters, as they are shown, have one of the values at the path."""
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
