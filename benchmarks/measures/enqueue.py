"""Enqueue: one by one, in bulk, and compared with plain inserts into the same database."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from ..contender import Contender
from ..figures import medians
from ..measure import Figures, Measure, Scale
from ..stores import Stores
from ..trial import Trial

_ROUNDS = 5
_ONE_BY_ONE, _IN_BULK = 400, 20_000
"""Number of jobs in a round, and in total."""
_PARAMETERS = '[{"number": 123456}]'


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Jobs per second, and how many plain rows can be inserted in the time of one enqueue.

    Each plain row is committed separately, as each job is.
    """
    with Trial(contender, stores) as trial:
        figures = _one_by_one(trial, scale.number(_ONE_BY_ONE))
        if contender.has_bulk:
            jobs = scale.number(_IN_BULK)
            figures["bulk_per_second"] = jobs / trial.enqueue_in_bulk(range(jobs + 1))
        return figures


MEASURE = Measure("enqueue", run)


def _one_by_one(trial: Trial, jobs: int) -> dict[str, float]:
    """Alternates with the plain inserts, so that other load on the disk affects both equally."""
    inserting = _redis_push if trial.contender.store == "redis" else _sql_insert
    rounds = []
    with inserting(trial.contender.url) as insert:
        insert()
        for _ in range(_ROUNDS):
            seconds, bare_seconds = trial.enqueue_one_by_one(range(jobs + 1)), _time(insert, jobs)
            rounds.append(
                {
                    "one_per_second": jobs / seconds,
                    "bare_per_second": jobs / bare_seconds,
                    "bare_rows_per_job": seconds / bare_seconds,
                }
            )
    return medians(rounds)


def _time(insert: Callable[[], object], rows: int) -> float:
    """The seconds for a number of plain inserts."""
    began = time.perf_counter()
    for _ in itertools.repeat(None, rows):
        insert()
    return time.perf_counter() - began


@contextlib.contextmanager
def _sql_insert(url: str) -> Iterator[Callable[[], object]]:
    """A function that inserts a row into a table like that of a small queue, and commits."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    table = sa.Table(
        "bare",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Index("ix_bare", "status", "priority"),
    )
    table.create(engine)
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    statement = (
        f"INSERT INTO bare (name, parameters, status, priority) VALUES ({', '.join([mark] * 4)})"
    )
    with contextlib.closing(engine.raw_connection()) as pooled:
        connection: Any = pooled.driver_connection
        cursor = connection.cursor()
        if engine.dialect.name == "sqlite":
            # As flask-bgjobs and Huey do. WAL mode is stored in the file.
            cursor.execute("PRAGMA journal_mode = WAL")

        def insert() -> None:
            cursor.execute(statement, ("benchmark.record", _PARAMETERS, "pending", 0))
            connection.commit()

        yield insert


@contextlib.contextmanager
def _redis_push(url: str) -> Iterator[Callable[[], object]]:
    """A function that appends to a list."""
    import redis

    with redis.Redis.from_url(url) as client:
        yield lambda: client.lpush("bare", _PARAMETERS)
