"""Transactions of ours that PostgreSQL turns away are done again from their start."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import OperationalError

from flask_bgjobs import run_background_job
from flask_bgjobs.app_state import AppState, state_of
from flask_bgjobs.worker import register
from tests.conftest import DEADLINE_SECONDS

pytestmark = pytest.mark.on("postgresql")


@pytest.fixture
def counter(app: Flask, state: AppState) -> sa.Table:
    """A table of two numbers."""
    table = sa.Table(
        "counter", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("number", sa.Integer)
    )
    table.create(state.store.engine)
    with state.store.engine.begin() as connection:
        connection.execute(sa.insert(table), [{"id": 1, "number": 0}, {"id": 2, "number": 0}])
    return table


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What the functions return, each called in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as threads:
        return [done.result(DEADLINE_SECONDS) for done in [threads.submit(w) for w in works]]


def numbers(state: AppState, counter: sa.Table) -> list[int]:
    with state.store.read() as connection:
        return list(connection.scalars(sa.select(counter.c.number).order_by(counter.c.id)))


def test_a_deadlock_is_redone(state: AppState, counter: sa.Table) -> None:
    """Two transactions lock two rows in opposite order: one is turned away, and both are done."""
    tries: Counter[int] = Counter()
    both_hold_one = threading.Barrier(2)

    def add(first: int, second: int) -> None:
        def work(connection: sa.Connection) -> None:
            tries[first] += 1
            for row in (first, second):
                connection.execute(
                    sa.update(counter)
                    .where(counter.c.id == row)
                    .values(number=counter.c.number + 1)
                )
                if row == first and tries[first] == 1:
                    both_hold_one.wait(DEADLINE_SECONDS)

        state.store.transaction(work)

    at_once(lambda: add(1, 2), lambda: add(2, 1))
    assert sorted(tries.values()) == [1, 2]
    assert numbers(state, counter) == [2, 2]


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03"])
def test_what_the_server_asks_to_be_done_again_is(
    state: AppState, counter: sa.Table, code: str
) -> None:
    """A serialization failure, a deadlock and a lock that is not free are redone, by their code."""
    tries = 0

    def work(connection: sa.Connection) -> int:
        nonlocal tries
        tries += 1
        connection.execute(sa.update(counter).values(number=counter.c.number + 1))
        if tries <= 3:
            connection.exec_driver_sql(
                f"DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END $$"
            )
        return tries

    assert state.store.transaction(work) == 4
    assert numbers(state, counter) == [1, 1]


def test_what_would_fail_each_time_is_not_redone(state: AppState, counter: sa.Table) -> None:
    """Another error is raised at once."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        connection.exec_driver_sql(
            "DO $$ BEGIN RAISE EXCEPTION 'never' USING ERRCODE = '57014'; END $$"
        )

    with pytest.raises(OperationalError, match="never"):
        state.store.transaction(work)
    assert tries == 1


def test_claims_where_the_server_isolates_strictly(
    app: Flask, state: AppState, make_app: Callable[..., Flask]
) -> None:
    """``default_transaction_isolation = serializable`` keeps no worker from claiming, once each."""
    with app.extensions["sqlalchemy"].engine.begin() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar()
        connection.exec_driver_sql(
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"
        )
    state.store.dispose()
    ids = [run_background_job("tests.jobs.echo", parameters=[n]).id for n in range(60)]
    stores = [state_of(make_app()).store for _ in range(3)]

    def claim_all(store: Any) -> list[int]:
        worker = register(state, "one")
        taken: list[int] = []
        while specs := store.claim(worker, 5):
            taken += [spec.id for spec in specs]
        return taken

    taken = at_once(*(lambda s=store: claim_all(s) for store in stores))
    assert sorted(job_id for each in taken for job_id in each) == ids
