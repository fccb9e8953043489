"""Transactions of flask-bgjobs that the server aborts are redone from the start."""

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
from flask_bgjobs.worker.registration import register
from tests.conftest import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.on("postgresql", "mysql")

TRANSIENT = {"postgresql": ("40001", "40P01", "55P03"), "mysql": (1205, 1213)}
"""Serialization failure, deadlock, and lock not available; lock wait timeout and deadlock."""
LASTING = {"postgresql": "57014", "mysql": 1317}
"""Query cancelled: not redone."""
RAISE = {
    "postgresql": "DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{}'; END $$",
    "mysql": "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not now', MYSQL_ERRNO = {}",
}
"""A statement that raises an error with this code."""


@pytest.fixture
def counter(app: Flask, state: AppState) -> sa.Table:
    """A table with two counters."""
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


def run_concurrently(*works: Callable[[], Any]) -> list[Any]:
    """The results of the functions, each called in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as threads:
        return [done.result(DEADLINE_SECONDS) for done in [threads.submit(w) for w in works]]


def numbers(state: AppState, counter: sa.Table) -> list[int]:
    with state.store.read() as connection:
        return list(connection.scalars(sa.select(counter.c.number).order_by(counter.c.id)))


@pytest.mark.parametrize("in_savepoint", [False, True])
def test_deadlock_is_redone(state: AppState, counter: sa.Table, in_savepoint: bool) -> None:
    """If two transactions lock two rows in opposite order, one is aborted and redone, and both
    succeed.

    The aborted transaction loses all its changes, even if the deadlock occurs in a savepoint.
    """
    tries: Counter[int] = Counter()
    both_have_one_lock = threading.Barrier(2)

    def add_one(connection: sa.Connection, row: int) -> None:
        more = sa.update(counter).values(number=counter.c.number + 1)
        connection.execute(more.where(counter.c.id == row))

    def add(first: int, second: int) -> None:
        def work(connection: sa.Connection) -> None:
            tries[first] += 1
            add_one(connection, first)
            if tries[first] == 1:
                both_have_one_lock.wait(DEADLINE_SECONDS)
            with connection.begin_nested() if in_savepoint else contextlib.nullcontext():
                add_one(connection, second)

        state.store.transaction(work)

    run_concurrently(lambda: add(1, 2), lambda: add(2, 1))
    assert sorted(tries.values()) == [1, 2]
    assert numbers(state, counter) == [2, 2]


def test_transient_errors_are_redone(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """A transaction is redone if the code of its error is that of a transient error."""
    for code in TRANSIENT[database_kind]:
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


def test_lasting_error_is_not_redone(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """Any other error is raised at once."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        connection.exec_driver_sql(RAISE[database_kind].format(LASTING[database_kind]))

    with pytest.raises(OperationalError, match="not now"):
        state.store.transaction(work)
    assert tries == 1


@pytest.mark.on("mysql")
def test_lock_wait_timeout_is_redone(
    state: AppState, counter: sa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that exceeds the server's lock wait timeout is redone as a whole."""
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
    run_concurrently(hold, wait)
    assert numbers(state, counter) == [1, 11]


@pytest.mark.on("postgresql")
@pytest.mark.parametrize("cuts", [1, 2])
def test_transaction_with_lost_connection_is_redone_once(
    state: AppState, counter: sa.Table, cuts: int
) -> None:
    """If the connection is lost before the commit, the transaction is redone once; a second loss is
    raised."""
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
def test_settle_locks_rows_in_order_of_ids(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bulk completion that waits for a locked job holds no lock on a job with a higher id. So two
    of them cannot deadlock, whatever the order of their outcomes."""
    monkeypatch.setattr(
        "flask_bgjobs.store.dialects.postgresql._LOCK_WAIT_SECONDS", DEADLINE_SECONDS
    )
    store = state.store.with_deadline(DEADLINE_SECONDS)
    worker = register(state, "one")
    first, second = (run_background_job("tests.jobs.echo").id for _ in range(2))
    specs = {spec.id: spec for spec in state.store.claim(worker, 2)}
    # The update moves the row behind the second in the table.
    state.store.mark_started(worker, [specs[first]])
    both = [(s, Outcome(s.id, s.attempt, OutcomeKind.COMPLETED)) for s in specs.values()]
    row = sa.select(Job.id).where(Job.id == sa.bindparam("id"))
    with ThreadPoolExecutor(1) as threads:
        with state.store.engine.connect() as holder, holder.begin():
            holder.execute(row.with_for_update(), {"id": first})
            settled = threads.submit(store.complete, worker, both[::-1])
            wait_until(lambda: _is_waiting_for_lock(state), "the settle")
            with state.store.engine.connect() as other, other.begin():
                other.execute(row.with_for_update(nowait=True), {"id": second})
        assert len(settled.result(DEADLINE_SECONDS)) == 2
    store.dispose()


def _is_waiting_for_lock(state: AppState) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with state.store.read() as connection:
        return bool(
            connection.exec_driver_sql(f"{waiting} AND datname = current_database()").scalar()
        )


@pytest.mark.on("postgresql")
def test_claims_with_serializable_isolation(
    app: Flask, state: AppState, make_app: Callable[..., Flask]
) -> None:
    """With ``default_transaction_isolation = serializable``, concurrent workers claim each job
    once."""
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

    taken = run_concurrently(*(lambda s=store: claim_all(s) for store in stores))
    assert sorted(job_id for each in taken for job_id in each) == ids


@pytest.mark.on("postgresql")
def test_autocommit_with_lost_connection_is_in_doubt(state: AppState, counter: sa.Table) -> None:
    """If the connection is lost in autocommit, a statement may have been committed, so it is not
    redone."""
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


def test_transient_error_in_autocommit_is_redone(
    state: AppState, counter: sa.Table, database_kind: str
) -> None:
    """In autocommit, a transient error is redone, because the statement had no effect."""
    tries = 0

    def work(connection: sa.Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            code = TRANSIENT[database_kind][0]
            connection.exec_driver_sql(RAISE[database_kind].format(code))
        connection.execute(sa.update(counter).values(number=counter.c.number + 1))

    state.store.autocommit_once(work)
    assert tries == 2
    assert numbers(state, counter) == [1, 1]
