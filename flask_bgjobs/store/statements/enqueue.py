"""Enqueue: insert the rows of jobs."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...models import Job, detached_job
from ..database import JOBS
from ..sizes import BATCH_BYTES, batches, statement_bytes
from .seats import Seats

_JOBS_PER_STATEMENT = 5_000
"""Maximum number of jobs in one INSERT."""
COLUMNS = {column.key: column.columns[0] for column in Job.__mapper__.column_attrs}
"""The columns of the table of jobs, by attribute name."""
COLUMN_KEYS = {column.name: key for key, column in COLUMNS.items()}
"""Attribute names by the names of their columns."""
_EMPTY_VALUES = dict.fromkeys(COLUMNS)
_EACH = ("limits", "limit_key_id", "fair_key")
"""The columns for :attr:`NewJobs.each`."""
SET_BY_DATABASE = {"id", "created_at", "run_at"}
"""Attributes whose values come from the INSERT itself."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unique:
    """How jobs are kept unique. Each has a key, which one job at a time holds."""

    keys: Sequence[str]
    """The key of each job."""
    until_start: bool = False
    """Whether a job gives its key up when it is claimed, and not when it ends."""
    for_seconds: float | None = None
    """Minimum seconds for which the key stays taken, also after the end of its job."""
    on_duplicate: str = "keep"
    """What an enqueue does if the key is taken: ``keep`` that job, ``replace`` its parameters and
    options if it has not started, or ``raise``."""
    debounce_seconds: float | None = None
    """Seconds by which each enqueue moves the job on that holds the key and has not started."""
    debounce_max_seconds: float | None = None
    """Maximum seconds from the first enqueue to its job."""
    throttle_seconds: float | None = None
    """Seconds in which at most one job becomes due. It replaces all other fields but ``keys``."""


@dataclasses.dataclass(frozen=True, slots=True)
class NewJobs:
    """Validated jobs to insert, equal in everything but their parameters and what follows from
    them."""

    values: Mapping[str, Any]
    """The common values, by attribute name of :class:`~flask_bgjobs.models.Job`."""
    parameters: Sequence[str]
    """The parameters of each job, as JSON."""
    unique: Unique | None = None
    """How they are kept unique; ``None`` if they are not."""
    delay_seconds: float | None = None
    """Delay from now, by the database's clock; unused if ``run_at`` is given."""
    run_at: dt.datetime | None = None
    """Due time in UTC, without ``tzinfo``."""
    expires_seconds: float | None = None
    """Seconds from now, by the database's clock, after which they expire; ``None``: their
    ``deadline_at`` is among the values."""
    each: Sequence[Mapping[str, Any]] = ()
    """More values of each job, by attribute name, the same names for each; empty if there are
    none."""

    def values_of(self, number: int) -> Mapping[str, Any]:
        """The values of one of the jobs, without its parameters."""
        return {**self.values, **self.each[number]} if self.each else self.values


class RowInserts(Seats):
    """The statements that insert rows of jobs."""

    def insert_all(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        """Insert jobs, and return them in the order of ``jobs``. If a ``unique_key`` among them is
        taken, the statement fails."""
        if len(jobs.parameters) == 1:
            parameters = self.insert_parameters(connection, jobs)
            # Leave out empty values, about half of the columns: each parameter costs time.
            given = {k: v for k, v in parameters.items() if v is not None or k not in JOBS.c}
            row = connection.execute(self._insert_one, given).one()
            return [inserted_job(jobs, 0, *row[:3])]
        return [job for batch in _batches(jobs) for job in self._insert_batch(connection, batch)]

    def _insert_batch(self, connection: sa.Connection, jobs: NewJobs) -> Iterator[Job]:
        statement, parameters = self._many(connection, jobs)
        inserted = connection.execute(statement, parameters).all()
        # RETURNING gives rows in no particular order; the ids are in the order of the parameters.
        rows = sorted(inserted, key=operator.itemgetter(0))
        return (inserted_job(jobs, number, *row[:3]) for number, row in enumerate(rows))

    def _many(self, connection: sa.Connection, jobs: NewJobs) -> tuple[Any, dict[str, Any]]:
        """The statement that inserts several jobs, and its parameters."""
        parameters = self.insert_parameters(connection, jobs)
        del parameters["parameters"]
        if not jobs.each:
            return self._insert_many, {**parameters, "texts": json.dumps(jobs.parameters)}
        for name in _EACH:
            del parameters[name]
        rows = [
            (text, *(_as_text(values[COLUMN_KEYS[name]]) for name in _EACH))
            for text, values in zip(jobs.parameters, jobs.each, strict=True)
        ]
        return self._insert_each, {**parameters, "rows": json.dumps(rows)}

    def insert_free(self, connection: sa.Connection, jobs: NewJobs) -> list[Job | None]:
        """Insert those of several unique jobs whose keys are free, in one statement for each batch.

        :param jobs: jobs with different unique keys.
        :returns: one entry for each of ``jobs``; ``None`` if another job holds its key.
        """
        return [
            job for batch in _batches(jobs) for job in self._insert_free_batch(connection, batch)
        ]

    def _insert_free_batch(self, connection: sa.Connection, jobs: NewJobs) -> Iterator[Job | None]:
        parameters = self.insert_parameters(connection, jobs)
        names = ("unique_key", "unique_hash", *_EACH)
        for name in ("parameters", *names):
            del parameters[name]
        each = [with_key(jobs, n) for n in range(len(jobs.parameters))]
        rows = [
            (job.parameters[0], *(_as_text(column_values(job)[name]) for name in names))
            for job in each
        ]
        statement = self._insert_free
        inserted = connection.execute(statement, {**parameters, "rows": json.dumps(rows)})
        times_by_hash = {row.unique_hash: row[1:4] for row in inserted}
        for job in each:
            times = times_by_hash.get(job.values["unique_hash"])
            yield None if times is None else inserted_job(job, 0, *times)

    def json_lists(self, array: sa.BindParameter[str], length: int) -> tuple[Any, list[Any]]:
        """Columns to select: the position of each list in a JSON array, and its strings.

        :param length: the number of strings in each list.
        """
        raise NotImplementedError

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        """Columns to select: the position and the text of each string in a JSON array."""
        raise NotImplementedError

    def typed(self, value: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        """``value`` with its type, for a SELECT; an INSERT takes the type from the column."""
        return value

    def insert_unless_taken(self, connection: sa.Connection, jobs: NewJobs) -> Job | None:
        """Insert a job unless another job holds its ``unique_key``.

        A conflict raises no ``IntegrityError``, which would abort the host's transaction on some
        databases.

        :returns: the inserted job; ``None`` if the key is taken.
        """
        statement = self._insert.on_conflict_do_nothing(index_elements=["unique_hash"])
        parameters = self.insert_parameters(connection, jobs)
        row = connection.execute(statement.returning(*self.returned), parameters).one_or_none()
        return None if row is None else inserted_job(jobs, 0, *row[:3])

    @property
    def returned(self) -> tuple[sa.ColumnElement[Any], ...]:
        """The columns that an INSERT returns: id, enqueue time and due time.

        A dialect may append others; callers ignore them.
        """
        return (JOBS.c.id, JOBS.c.created_at, JOBS.c.run_at)

    def insert_parameters(self, connection: sa.Connection, jobs: NewJobs) -> dict[str, Any]:
        """The statement parameters that insert the first of ``jobs``."""
        times = {"given_run_at": jobs.run_at, "delay_seconds": jobs.delay_seconds}
        return {**column_values(jobs), **times}

    @functools.cached_property
    def _insert(self) -> Any:
        return self.insert_into(JOBS).values(created_at=self.now, run_at=self._first_run)

    @functools.cached_property
    def _insert_one(self) -> Any:
        return self._insert.returning(*self.returned)

    @functools.cached_property
    def _insert_many(self) -> Any:
        position, text = self.json_array_rows(sa.bindparam("texts", type_=sa.Text))
        insert = self._insert_from(position, parameters=text)
        return insert.returning(*self.returned)

    @functools.cached_property
    def _insert_each(self) -> Any:
        rows = sa.bindparam("rows", type_=sa.Text)
        position, (text, *others) = self.json_lists(rows, 1 + len(_EACH))
        insert = self._insert_from(position, parameters=text, **_typed(_EACH, others))
        return insert.returning(*self.returned)

    @functools.cached_property
    def _insert_free(self) -> Any:
        rows = sa.bindparam("rows", type_=sa.Text)
        position, (text, key, key_hash, *others) = self.json_lists(rows, 3 + len(_EACH))
        insert = self._insert_from(
            position,
            parameters=text,
            unique_key=key,
            unique_hash=key_hash,
            **_typed(_EACH, others),
        ).on_conflict_do_nothing(index_elements=["unique_hash"])
        return insert.returning(JOBS.c.unique_hash, *self.returned)

    def _insert_from(self, position: Any, **columns: Any) -> Any:
        """An INSERT of rows that differ in some columns.

        :param position: gives their order.
        """
        values = {
            column.name: self.typed(sa.bindparam(column.name, type_=column.type))
            for key, column in COLUMNS.items()
            if key not in SET_BY_DATABASE
        }
        values |= {"created_at": self.now, "run_at": self._first_run, **columns}
        # SQLite needs a WHERE to tell ON CONFLICT from the ON of a join.
        selected = sa.select(*values.values()).where(sa.text("1 = 1")).order_by(position)
        return self.insert_into(JOBS).from_select(list(values), selected)

    @property
    def _first_run(self) -> sa.ColumnElement[dt.datetime]:
        delay = self.seconds_parameter("delay_seconds")
        given = self.typed(sa.bindparam("given_run_at", type_=JOBS.c.run_at.type))
        due = sa.case((delay.is_not(None), self.after(delay)), else_=self.now)
        return sa.func.coalesce(given, due)


def _batches(jobs: NewJobs) -> Iterator[NewJobs]:
    """The jobs in batches for one statement each."""
    keys = () if jobs.unique is None else jobs.unique.keys
    others = max(map(statement_bytes, keys), default=0)
    for name in _EACH:
        texts = (_as_text(values[COLUMN_KEYS[name]]) or "" for values in jobs.each)
        others += max(map(statement_bytes, texts), default=0)
    return split(jobs, lambda text: others + statement_bytes(text), most_jobs=_JOBS_PER_STATEMENT)


def split(
    jobs: NewJobs,
    size_of: Callable[[str], int],
    *,
    limit: int = BATCH_BYTES,
    most_jobs: int | None = None,
) -> Iterator[NewJobs]:
    """Split jobs into batches, each for one statement; see :func:`.sizes.batches`.

    :param size_of: returns the size of a job with these parameters.
    """
    begin = 0
    for batch in batches(jobs.parameters, size_of, limit=limit, most_items=most_jobs):
        yield chosen(jobs, range(begin, begin + len(batch)))
        begin += len(batch)


def chosen(jobs: NewJobs, numbers: Sequence[int]) -> NewJobs:
    """Those of ``jobs`` with these numbers."""
    unique = jobs.unique
    if unique is not None:
        unique = dataclasses.replace(unique, keys=[unique.keys[n] for n in numbers])
    parameters = [jobs.parameters[n] for n in numbers]
    each = [jobs.each[n] for n in numbers] if jobs.each else ()
    return dataclasses.replace(jobs, parameters=parameters, unique=unique, each=each)


def with_key(jobs: NewJobs, number: int) -> NewJobs:
    """One of several unique jobs, with its key and the hash of it among its values."""
    job = chosen(jobs, [number])
    assert job.unique is not None
    (key,) = job.unique.keys
    values = {**job.values, "unique_key": key, "unique_hash": unique_hash(key)}
    return dataclasses.replace(job, values=values)


def unique_hash(unique_key: str) -> str:
    """The value for the unique column ``unique_hash`` while a job holds this key."""
    return hashlib.sha256(unique_key.encode()).hexdigest()


def column_values(jobs: NewJobs) -> dict[str, Any]:
    """The values of the first of ``jobs`` by column name, without id and times."""
    values = {**_EMPTY_VALUES, **jobs.values_of(0), "parameters_json": jobs.parameters[0]}
    return {c.name: values[key] for key, c in COLUMNS.items() if key not in SET_BY_DATABASE}


def inserted_job(
    jobs: NewJobs, number: int, job_id: int, created_at: dt.datetime, run_at: dt.datetime
) -> Job:
    """One of ``jobs`` as a detached :class:`Job`, with the values that the database returned."""
    values = {
        **_EMPTY_VALUES,
        **jobs.values_of(number),
        "parameters_json": jobs.parameters[number],
        "id": job_id,
        "created_at": created_at,
        "run_at": run_at,
    }
    return detached_job(values)


def by_column_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a job by the names of their columns, and not of their attributes."""
    return {COLUMNS[key].name: value for key, value in values.items()}


def _typed(names: Sequence[str], texts: Sequence[Any]) -> dict[str, Any]:
    """Columns by name, from texts of their values."""
    return {
        name: sa.cast(text, JOBS.c[name].type) if name == "limit_key_id" else text
        for name, text in zip(names, texts, strict=True)
    }


def _as_text(value: object) -> str | None:
    return None if value is None else str(value)


def loaded_job(row: sa.Row[Any]) -> Job:
    """The job in a complete row of the table, as a detached :class:`Job`."""
    return detached_job({key: row._mapping[column] for key, column in COLUMNS.items()})
