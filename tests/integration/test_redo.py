"""Transactions of ours that a server turns away are done again from their start."""

from __future__ import annotations

import contextlib
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
from flask_bgjobs.job.records import Outcome
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.models import Job
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import CommitInDoubt
from flask_bgjobs.worker.worker import register
from tests.conftest import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.on("postgresql", "mysql")

PASSING = {"postgresql": ("40001", "40P01", "55P03"), "mysql": (1205, 1213)}
"""Serialization failure, deadlock, and lock not available; lock wait timeout and deadlock."""
LASTING = {"postgresql": "57014", "mysql": 1317}
"""A statement that was cancelled."""
RAISE = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{}'; END $$",
    "mysql": "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not now', MYSQL_ERRNO = {}",
}
"""Ends a statement with an error of that code."""


@pytest.fixture
def counter(app: Flask, state: AppState) -> sa.Table:
    """A table of two numbers."""
    table = sa.Table(
        "counter",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer),
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


@pytest.mark.parametrize("in_savepoint", [False, True])
def test_a_deadlock_is_redone(state: AppState, counter: sa.Table, in_savepoint: bool) -> None:
    """Two transactions lock two rows in opposite order: one is turned away, and both are done.

    The one that is turned away loses all that it did, with the savepoint that it was in.
    """
    tries: Counter[int] = Counter()
    both_hold_one = threading.Barrier(2)

    def add_one(connection: sa.Connection, row: int) -> None:
        more = sa.update(counter).values(number=counter.c.number + 1)
        connection.execute(more.where(counter.c.id == row))

    def add(first: int, second: int) -> None:
        def work(connection: sa.Connection) -> None:
            tries[first] += 1
            add_one(connection, first)
            if tries[first] == 1:
                both_hold_one.wait(DEADLINE_SECONDS)
            with connection.begin_nested() if in_savepoint else contextlib.nullcontext():
                add_one(connection, second)

        state.store.transaction(work)

    at_once(lambda: add(1, 2), lambda: add(2, 1))
    assert sorted(tries.values()) == [1, 2]
    assert numbers(state, counter) == [2, 2]


def test_what_the_server_asks_to_be_done_again_is(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """What passes by itself is redone, told by its code."""
    for code in PASSING[database_kind]:
        tries = Counter[None]()

        def work(
            connection: sa.Connection, code: object = code, tries: Counter[None] = tries
        ) -> int:
            tries[None] += 1
            connection.execute(sa.update(counter).values(number=counter.c.number + 1))
            if tries[None] <= 3:
                connection.exec_driver_sql(RAISE[database_kind].format(code))
            return tries[None]

        before = numbers(state, counter)
        assert state.store.transaction(work) == 4
        assert numbers(state, counter) == [number + 1 for number in before]


def test_what_would_fail_each_time_is_not_redone(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """Another error is raised at once."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        connection.exec_driver_sql(RAISE[database_kind].format(LASTING[database_kind]))

    with pytest.raises(OperationalError, match="not now"):
        state.store.transaction(work)
    assert tries == 1


@pytest.mark.on("mysql")
def test_a_lock_that_is_held_for_long_is_waited_for_again(
    state: AppState, counter: sa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for a lock that the server gives up is redone, with all that was done before it."""
    monkeypatch.setattr("flask_bgjobs.store.dialects.mysql._LOCK_WAIT_SECONDS", 1)
    state.store.dispose()
    tried_again = threading.Event()
    tries = 0

    def hold() -> None:
        with state.store.host_engine.begin() as connection:
            connection.execute(sa.update(counter).where(counter.c.id == 2).values(number=10))
            held.set()
            assert tried_again.wait(DEADLINE_SECONDS)

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            tried_again.set()
        for row in (1, 2):
            more = sa.update(counter).values(number=counter.c.number + 1)
            connection.execute(more.where(counter.c.id == row))

    def wait() -> None:
        assert held.wait(DEADLINE_SECONDS)
        state.store.transaction(work)

    held = threading.Event()
    at_once(hold, wait)
    assert numbers(state, counter) == [1, 11]


@pytest.mark.on("postgresql")
@pytest.mark.parametrize("cuts", [1, 2])
def test_a_transaction_that_was_cut_off_is_redone_once(
    state: AppState, counter: sa.Table, cuts: int
) -> None:
    """Where the connection dies before the commit, the transaction is done again, once: what
    fails twice in that way is an outage, and for the caller to wait out."""
    tries = 0

    def work(connection: sa.Connection) -> int:
        nonlocal tries
        tries += 1
        connection.execute(sa.update(counter).values(number=counter.c.number + 1))
        if tries <= cuts:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        return tries

    if cuts == 1:
        assert state.store.transaction(work) == 2
    else:
        with pytest.raises(OperationalError):
            state.store.transaction(work)
    assert tries == 2
    assert numbers(state, counter) == [2 - cuts] * 2


@pytest.mark.on("postgresql")
def test_a_settle_locks_rows_in_the_order_of_their_ids(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bulk completion that waits for a job holds no later one, so that two of them, in whatever
    order their outcomes came, never wait for each other."""
    monkeypatch.setattr(
        "flask_bgjobs.store.dialects.postgresql._LOCK_WAIT_SECONDS", DEADLINE_SECONDS
    )
    store = state.store.with_deadline(DEADLINE_SECONDS)
    worker = register(state, "one")
    first, second = (run_background_job("tests.jobs.echo").id for _ in range(2))
    specs = {spec.id: spec for spec in state.store.claim(worker, 2)}
    # In the table it now comes behind the second.
    state.store.mark_started(worker, [specs[first]])
    both = [(s, Outcome(s.id, s.attempt, OutcomeKind.COMPLETED)) for s in specs.values()]
    row = sa.select(Job.id).where(Job.id == sa.bindparam("id"))
    with ThreadPoolExecutor(1) as threads:
        with state.store.engine.connect() as holder, holder.begin():
            holder.execute(row.with_for_update(), {"id": first})
            settled = threads.submit(store.complete, worker, both[::-1])
            wait_until(lambda: _waits_for_a_lock(state), "the settle")
            with state.store.engine.connect() as other, other.begin():
                other.execute(row.with_for_update(nowait=True), {"id": second})
        assert len(settled.result(DEADLINE_SECONDS)) == 2
    store.dispose()


def _waits_for_a_lock(state: AppState) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with state.store.read() as connection:
        return bool(
            connection.exec_driver_sql(f"{waiting} AND datname = current_database()").scalar()
        )


@pytest.mark.on("postgresql")
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


@pytest.mark.on("postgresql")
def test_a_lone_statement_that_was_cut_off_is_in_doubt(state: AppState, counter: sa.Table) -> None:
    """It may have been done, so it is not redone."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        connection.execute(sa.update(counter).values(number=counter.c.number + 1))
        connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(CommitInDoubt):
        state.store.autocommit_once(work)
    assert tries == 1
    assert numbers(state, counter) == [1, 1]


def test_a_lone_statement_that_the_server_turned_away_is_redone(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """What passes by itself is redone, as it was not done."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            code = PASSING[database_kind][0]
            connection.exec_driver_sql(RAISE[database_kind].format(code))
        connection.execute(sa.update(counter).values(number=counter.c.number + 1))

    state.store.autocommit_once(work)
    assert tries == 2
    assert numbers(state, counter) == [1, 1]
