"""Enqueue: inserting jobs, and finding the one that holds a ``unique_key``."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...errors import UniqueKeyTaken
from ...models import Job, detached_job
from ..database import JOBS, Database
from ..sizes import batches, statement_bytes

_UNIQUE_TRIES = 10
_AT_ONCE = 5_000
"""Jobs per statement."""
COLUMNS = {column.key: column.columns[0] for column in Job.__mapper__.column_attrs}
"""By attribute name."""
_NOTHING_YET = dict.fromkeys(COLUMNS)
BY_THE_DATABASE = {"id", "created_at", "run_at"}


@dataclasses.dataclass(frozen=True, slots=True)
class NewJobs:
    """Checked jobs, ready to be inserted, that differ in nothing but their parameters."""

    values: Mapping[str, Any]
    """What they have in common, by attribute name of :class:`~flask_bgjobs.models.Job`."""
    parameters: Sequence[str]
    """As JSON, one text for each job."""
    delay_seconds: float | None = None
    """From now by the database's clock, unless ``run_at`` is given."""
    run_at: dt.datetime | None = None
    """UTC, without ``tzinfo``."""


class Inserts(Database):
    """The statements of an enqueue."""

    _holders = sa.select(JOBS)
    """Jobs that hold a key, as the newest transaction left them."""

    def insert(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        """The inserted jobs, in the order given; with a taken ``unique_key``, its holder.

        :param connection: of our own transaction or of the one that the jobs join.
        """
        with self.in_our_schema(connection):
            if jobs.values["unique_hash"] is not None:
                return [self._insert_unique(connection, jobs)]
            return self.insert_all(connection, jobs)

    def save(self, jobs: NewJobs) -> list[Job]:
        """The same as :meth:`insert`, in a transaction of its own.

        :raises CommitInDoubt: when the connection dies, and nobody can tell whether they are saved.
        """
        is_one_statement = len(jobs.parameters) == 1 and jobs.values["unique_hash"] is None
        commit = self.autocommit_once if is_one_statement else self.transaction
        return commit(lambda connection: self.insert(connection, jobs))

    def insert_all(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        """The inserted jobs, in the order given."""
        if len(jobs.parameters) == 1:
            parameters = self.insert_parameters(connection, jobs)
            # Half of the columns are empty, and each would cost a parameter.
            given = {k: v for k, v in parameters.items() if v is not None or k not in JOBS.c}
            row = connection.execute(self._insert_one, given).one()
            return [inserted_job(jobs, jobs.parameters[0], *row[:3])]
        return [job for part in _parts(jobs) for job in self._insert_part(connection, part)]

    def _insert_part(self, connection: sa.Connection, jobs: NewJobs) -> Iterator[Job]:
        parameters = self.insert_parameters(connection, jobs)
        del parameters["parameters"]
        inserted = connection.execute(
            self._insert_many, {**parameters, "texts": json.dumps(jobs.parameters)}
        ).all()
        # RETURNING promises no order, but the ids were drawn in that of the parameters.
        rows = sorted(inserted, key=operator.itemgetter(0))
        made = zip(jobs.parameters, rows, strict=True)
        return (inserted_job(jobs, text, *row[:3]) for text, row in made)

    def json_array_rows(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        """Position and text of the strings in a JSON array, as columns to select."""
        raise NotImplementedError

    def typed(self, value: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        """``value``, fit to be selected rather than inserted."""
        return value

    def _insert_unique(self, connection: sa.Connection, jobs: NewJobs) -> Job:
        for _ in range(_UNIQUE_TRIES):
            inserted = self.insert_unless_taken(connection, jobs)
            if inserted is not None:
                return inserted
            holder = connection.execute(
                self._holders.where(JOBS.c.unique_hash == jobs.values["unique_hash"])
            ).one_or_none()
            if holder is not None:
                found = loaded_job(holder)
                found.deduplicated = True
                return found
            # The holder finished between the two statements: the key is free again.
        raise UniqueKeyTaken(
            f"the unique_key {jobs.values['unique_key']!r} changes hands too quickly"
        )

    def insert_unless_taken(self, connection: sa.Connection, jobs: NewJobs) -> Job | None:
        """The inserted job; ``None`` when another holds its ``unique_key``, and nothing is undone.

        An ``IntegrityError`` would end the host's transaction on some databases.
        """
        statement = self._insert.on_conflict_do_nothing(index_elements=["unique_hash"])
        parameters = self.insert_parameters(connection, jobs)
        row = connection.execute(statement.returning(*self.returned), parameters).one_or_none()
        return None if row is None else inserted_job(jobs, jobs.parameters[0], *row[:3])

    @property
    def returned(self) -> tuple[sa.ColumnElement[Any], ...]:
        """What an insert returns: id, time of the enqueue, due time, and what does not matter."""
        return (JOBS.c.id, JOBS.c.created_at, JOBS.c.run_at)

    def insert_parameters(self, connection: sa.Connection, jobs: NewJobs) -> dict[str, Any]:
        """The parameters of the statement that inserts the first of them."""
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
        values = {
            column.name: self.typed(sa.bindparam(column.name, type_=column.type))
            for key, column in COLUMNS.items()
            if key not in BY_THE_DATABASE
        }
        values |= {"parameters": text, "created_at": self.now, "run_at": self._first_run}
        selected = sa.select(*values.values()).order_by(position)
        return sa.insert(JOBS).from_select(list(values), selected).returning(*self.returned)

    @property
    def _first_run(self) -> sa.ColumnElement[dt.datetime]:
        delay = self.seconds_parameter("delay_seconds")
        given = self.typed(sa.bindparam("given_run_at", type_=JOBS.c.run_at.type))
        due = sa.case((delay.is_not(None), self.after(delay)), else_=self.now)
        return sa.func.coalesce(given, due)


def unique_hash(unique_key: str) -> str:
    """What a job with this ``unique_key`` holds in a unique column while it is active."""
    return hashlib.sha256(unique_key.encode()).hexdigest()


def _parts(jobs: NewJobs) -> Iterator[NewJobs]:
    for texts in batches(jobs.parameters, statement_bytes, most_items=_AT_ONCE):
        yield dataclasses.replace(jobs, parameters=texts)


def column_values(jobs: NewJobs) -> dict[str, Any]:
    """What is stored of the first of them, by column name, apart from id and times."""
    values = {**_NOTHING_YET, **jobs.values, "parameters_json": jobs.parameters[0]}
    return {c.name: values[key] for key, c in COLUMNS.items() if key not in BY_THE_DATABASE}


def inserted_job(
    jobs: NewJobs, parameters: str, job_id: int, created_at: dt.datetime, run_at: dt.datetime
) -> Job:
    """One of the jobs, with what the database gave it, loaded and detached."""
    given = {"id": job_id, "created_at": created_at, "run_at": run_at}
    return detached_job({**_NOTHING_YET, **jobs.values, "parameters_json": parameters, **given})


def loaded_job(row: sa.Row[Any]) -> Job:
    """The job in a whole row of the table, loaded and detached."""
    return detached_job({key: row._mapping[column] for key, column in COLUMNS.items()})
