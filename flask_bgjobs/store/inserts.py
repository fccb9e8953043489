"""Enqueue: inserting jobs, and finding the one that holds a ``unique_key``."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ..errors import UniqueKeyTaken
from ..models import Job, detached_job
from .database import JOBS, Database

_UNIQUE_TRIES = 10
_INSERTED = (JOBS.c.id, JOBS.c.created_at, JOBS.c.run_at)


@dataclasses.dataclass(frozen=True, slots=True)
class NewJob:
    """A checked job, ready to be inserted."""

    values: Mapping[str, Any]
    """Column values by attribute name of :class:`~flask_bgjobs.models.Job`."""
    delay_seconds: float | None = None
    """From now by the database's clock, unless ``run_at`` is given."""
    run_at: dt.datetime | None = None
    """UTC, without ``tzinfo``."""


class Inserts(Database):
    """The statements of an enqueue."""

    def insert(self, connection: sa.Connection, jobs: Sequence[NewJob]) -> list[Job]:
        """The inserted jobs, in the order given; with a taken ``unique_key``, its holder.

        :param connection: of our own transaction or of the one that the jobs join.
        """
        if len(jobs) == 1 and jobs[0].values["unique_hash"] is not None:
            return [self._insert_unique(connection, jobs[0])]
        rows = connection.execute(
            self._insert.returning(*_INSERTED, sort_by_parameter_order=True),
            [_insert_parameters(job) for job in jobs],
            execution_options=self.execution_options,
        ).all()
        return [_inserted_job(job, row) for job, row in zip(jobs, rows, strict=True)]

    def _insert_unique(self, connection: sa.Connection, job: NewJob) -> Job:
        statement = self._insert.on_conflict_do_nothing(index_elements=["unique_hash"])
        statement = statement.returning(*_INSERTED)
        for _ in range(_UNIQUE_TRIES):
            row = connection.execute(
                statement, _insert_parameters(job), execution_options=self.execution_options
            ).one_or_none()
            if row is not None:
                return _inserted_job(job, row)
            holder = connection.execute(
                sa.select(JOBS).where(JOBS.c.unique_hash == job.values["unique_hash"]),
                execution_options=self.execution_options,
            ).one_or_none()
            if holder is not None:
                found = loaded_job(holder)
                found.deduplicated = True
                return found
            # The holder finished between the two statements: the key is free again.
        raise UniqueKeyTaken(
            f"the unique_key {job.values['unique_key']!r} changes hands too quickly"
        )

    @functools.cached_property
    def _insert(self) -> Any:
        # Cast, because PostgreSQL must know the type also where nothing but NULL is tested.
        delay = sa.cast(sa.bindparam("delay_seconds", type_=sa.Double), sa.Double)
        run_at = sa.bindparam("given_run_at", type_=JOBS.c.run_at.type)
        due = sa.case((delay.is_not(None), self.after(delay)), else_=self.now)
        return self.insert_into(JOBS).values(
            created_at=self.now, run_at=sa.func.coalesce(run_at, due)
        )


def unique_hash(unique_key: str) -> str:
    """What a job with this ``unique_key`` holds in a unique column while it is active."""
    return hashlib.sha256(unique_key.encode()).hexdigest()


def _insert_parameters(job: NewJob) -> dict[str, Any]:
    values = {_column_name(key): value for key, value in job.values.items()}
    return {**values, "given_run_at": job.run_at, "delay_seconds": job.delay_seconds}


def _column_name(attribute: str) -> str:
    return str(Job.__mapper__.attrs[attribute].columns[0].name)


def _inserted_job(job: NewJob, row: sa.Row[Any]) -> Job:
    nothing_yet = dict.fromkeys(Job.__mapper__.column_attrs.keys())
    return detached_job({**nothing_yet, **job.values, **row._mapping})


def loaded_job(row: sa.Row[Any]) -> Job:
    """The job in a whole row of the table, loaded and detached."""
    columns = Job.__mapper__.column_attrs
    return detached_job({column.key: row._mapping[column.columns[0]] for column in columns})
