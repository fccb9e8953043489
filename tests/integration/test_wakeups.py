"""Wake-ups: a worker hears at once of what other processes enqueue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue
from flask_bgjobs.options import NO_OPTIONS
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.worker.listener import WakeUps
from tests.conftest import wait_until
from tests.integration.test_worker import running_worker
from tests.servers import PostgresServer

SOON_SECONDS = 20
"""Far below the poll interval, so that only a wake-up can be as soon; machines are slow."""
DEAF_SECONDS = 600

pytestmark = pytest.mark.on("sqlite", "postgresql")


@pytest.fixture
def other(make_app: Callable[..., Flask]) -> Flask:
    """An app on the same database that shares nothing else with the worker's."""
    return make_app()


def deaf(make_app: Callable[..., Flask]) -> Flask:
    """An app whose worker finds nothing by polling."""
    return make_app(
        BGJOBS_POLL_INTERVAL=DEAF_SECONDS, BGJOBS_HEARTBEAT_INTERVAL=100, BGJOBS_LEASE=600
    )


def enqueue_in(app: Flask, number: int) -> Job:
    with app.app_context():
        return run_background_job("tests.jobs.echo", parameters=[number])


def ends_soon(app: Flask, job: Job) -> None:
    with app.app_context():
        assert job.wait(SOON_SECONDS).status == "completed"


def listeners(app: Flask) -> list[int]:
    """The server's processes of connections that listen."""
    listening = sa.text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND query ~ '^(LISTEN|SELECT 1$)'"
    )
    with state_of(app).store.host_engine.connect() as connection:
        return list(connection.scalars(listening))


def test_a_job_saved_at_once(make_app: Callable[..., Flask], other: Flask) -> None:
    """Each job that another process saves is heard of."""
    with running_worker(deaf(make_app)):
        for number in range(3):
            ends_soon(other, enqueue_in(other, number))


def test_a_job_that_joined_a_transaction(make_app: Callable[..., Flask], other: Flask) -> None:
    """A job is heard of when the transaction that it joined commits."""
    with running_worker(deaf(make_app)), other.app_context():
        session = other.extensions["sqlalchemy"].session
        job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
        session.commit()
        assert job.wait(SOON_SECONDS).result == 1


def test_many_at_once(make_app: Callable[..., Flask], other: Flask) -> None:
    """All jobs of one call are heard of."""
    with running_worker(deaf(make_app)), other.app_context():
        state = state_of(other)
        jobs = enqueue(state, "tests.jobs.echo", None, [[n] for n in range(50)], NO_OPTIONS)
        assert [job.wait(SOON_SECONDS).result for job in jobs] == list(range(50))


def test_a_delayed_job(make_app: Callable[..., Flask], other: Flask) -> None:
    """A job with a short delay is heard of as well, and the clock is set for it."""
    with running_worker(deaf(make_app)), other.app_context():
        job = run_background_job("tests.jobs.echo", parameters=[1], delay=0.5)
        assert job.wait(SOON_SECONDS).result == 1


def test_a_retry_by_hand_and_a_resumed_queue(make_app: Callable[..., Flask], other: Flask) -> None:
    """What people make claimable again is heard of."""
    store = state_of(other).store
    with running_worker(deaf(make_app)), other.app_context():
        failed = run_background_job("tests.jobs.fail", retries=0)
        assert failed.wait(SOON_SECONDS).status == "failed"
        store.retry([failed.id])
        wait_until(lambda: failed.refresh().attempt == 2, "the second attempt", SOON_SECONDS)
        store.pause("default")
        held = run_background_job("tests.jobs.echo", parameters=[1])
        ends_soon(other, run_background_job("tests.jobs.echo", parameters=[2], queue="free"))
        assert held.refresh().status == "pending"
        store.resume("default")
        ends_soon(other, held)


@pytest.mark.on("postgresql")
def test_a_connection_that_is_cut_is_opened_again(
    make_app: Callable[..., Flask], other: Flask
) -> None:
    """A worker that can hear no more listens on a new connection, and looks what it missed."""
    with running_worker(deaf(make_app)):
        ends_soon(other, enqueue_in(other, 1))
        (pid,) = wait_until(lambda: listeners(other), "the listener")
        with state_of(other).store.host_engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_terminate_backend(pid)))
        wait_until(lambda: listeners(other) not in ([], [pid]), "the next listener")
        ends_soon(other, enqueue_in(other, 2))


@pytest.mark.on("postgresql")
def test_a_two_phase_transaction_notifies_nobody(make_app: Callable[..., Flask]) -> None:
    """A job may join a transaction that is prepared, which PostgreSQL allows no notification."""
    with PostgresServer(max_prepared_transactions="2") as server:
        app = make_app(database_url=server.url(server.create_database()))
        with app.app_context(), running_worker(app):
            session = sa.orm.Session(state_of(app).store.host_engine, twophase=True)
            job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
            session.prepare()
            session.commit()
            assert job.wait(SOON_SECONDS).result == 1


class Deaf:
    """A database that cannot tell, as far as wake-ups ask it."""

    can_listen = False


class Silent:
    """A database that can tell, and has nothing to say."""

    can_listen = True

    def listen(
        self, stopped: threading.Event, wake: Callable[[], object], _is_quiet: object
    ) -> None:
        stopped.wait()

    def stop_listening(self) -> None:
        pass


@pytest.mark.on("sqlite")
def test_polls_decay(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the database cannot tell, it is asked often after work, and rarely after a silence."""
    now = time.monotonic()
    wake_ups = WakeUps(Deaf(), lambda: None, 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr("flask_bgjobs.worker.listener.time.monotonic", lambda: now)
    wake_ups.note_work()
    assert wake_ups.poll_seconds() == 0.02
    now += 29
    assert wake_ups.poll_seconds() == 0.02
    now += 2
    assert wake_ups.poll_seconds() == 1.0
    wake_ups.note_work()
    assert wake_ups.poll_seconds() == 0.02


@pytest.mark.on("sqlite")
def test_who_listens_polls_rarely(app: Flask) -> None:
    """Where the database tells, polls are for what it might not have told."""
    wake_ups = WakeUps(Silent(), lambda: None, 1.0)  # type: ignore[arg-type]
    wake_ups.note_work()
    assert wake_ups.poll_seconds() == 1.0
    wake_ups.stop()


@pytest.mark.on("sqlite")
def test_a_quiet_file_is_looked_at_less_often(state: AppState) -> None:
    """Looks cost a little, so there are fewer where there is nothing to do, also while workers
    write that they live."""
    waits: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return len(waits) == 4

    news: list[int] = []
    state.store.listen(Stopped(), lambda: news.append(len(waits)), lambda: len(waits) >= 2)
    assert waits == [0.005, 0.005, 0.015, 0.015]
    assert news == [0]
