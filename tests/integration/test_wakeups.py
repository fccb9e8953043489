"""Wake-ups: a worker notices at once when another process enqueues a job."""

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
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.integration.test_worker import running_worker
from tests.servers import PostgresServer

SOON_SECONDS = DEADLINE_SECONDS
"""Far below the poll interval, so that only a wake-up is fast enough."""
POLL_SECONDS = 600

pytestmark = pytest.mark.on("sqlite", "postgresql")


@pytest.fixture
def other(make_app: Callable[..., Flask]) -> Flask:
    """Another app on the same database, which shares nothing else with the worker's app."""
    return make_app()


def without_polling(make_app: Callable[..., Flask]) -> Flask:
    """An app whose worker practically never polls."""
    return make_app(
        BGJOBS_POLL_INTERVAL=POLL_SECONDS, BGJOBS_HEARTBEAT_INTERVAL=100, BGJOBS_LEASE=600
    )


def enqueue_in(app: Flask, number: int) -> Job:
    with app.app_context():
        return run_background_job("tests.jobs.echo", parameters=[number])


def assert_completes_soon(app: Flask, job: Job) -> None:
    with app.app_context():
        assert job.wait(SOON_SECONDS).status == "completed"


def listener_pids(app: Flask) -> list[int]:
    """The server's process ids of the listening connections."""
    listening = sa.text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND query ~ '^(LISTEN|SELECT 1$)'"
    )
    with state_of(app).store.host_engine.connect() as connection:
        return list(connection.scalars(listening))


def test_saved_job_wakes_worker(make_app: Callable[..., Flask], other: Flask) -> None:
    """Each job that another process saves wakes the worker."""
    with running_worker(without_polling(make_app)):
        for number in range(3):
            assert_completes_soon(other, enqueue_in(other, number))


def test_commit_of_joined_job_wakes_worker(make_app: Callable[..., Flask], other: Flask) -> None:
    """The commit of a transaction that a job joined wakes the worker."""
    with running_worker(without_polling(make_app)), other.app_context():
        session = other.extensions["sqlalchemy"].session
        job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
        session.commit()
        assert job.wait(SOON_SECONDS).result == 1


def test_many_jobs_wake_worker(make_app: Callable[..., Flask], other: Flask) -> None:
    """The worker gets all jobs of one call."""
    with running_worker(without_polling(make_app)), other.app_context():
        state = state_of(other)
        jobs = enqueue(state, "tests.jobs.echo", None, [[n] for n in range(50)], NO_OPTIONS)
        assert [job.wait(SOON_SECONDS).result for job in jobs] == list(range(50))


def test_delayed_job_wakes_worker(make_app: Callable[..., Flask], other: Flask) -> None:
    """A job with a short delay wakes the worker, so that it sets its clock."""
    with running_worker(without_polling(make_app)), other.app_context():
        job = run_background_job("tests.jobs.echo", parameters=[1], delay=0.5)
        assert job.wait(SOON_SECONDS).result == 1


def test_manual_retry_and_resume_wake_worker(make_app: Callable[..., Flask], other: Flask) -> None:
    """A manual retry and a resumed queue wake the worker."""
    store = state_of(other).store
    with running_worker(without_polling(make_app)), other.app_context():
        failed = run_background_job("tests.jobs.fail", retries=0)
        assert failed.wait(SOON_SECONDS).status == "failed"
        store.retry([failed.id])
        wait_until(lambda: failed.refresh().attempt == 2, "the second attempt", SOON_SECONDS)
        store.pause("default")
        held = run_background_job("tests.jobs.echo", parameters=[1])
        assert_completes_soon(
            other, run_background_job("tests.jobs.echo", parameters=[2], queue="free")
        )
        assert held.refresh().status == "pending"
        store.resume("default")
        assert_completes_soon(other, held)


@pytest.mark.on("postgresql")
def test_listener_reconnects(make_app: Callable[..., Flask], other: Flask) -> None:
    """After its connection was closed by the server, the listener reconnects, and the worker looks
    for missed jobs."""
    with running_worker(without_polling(make_app)):
        assert_completes_soon(other, enqueue_in(other, 1))
        (pid,) = wait_until(lambda: listener_pids(other), "the listener")
        with state_of(other).store.host_engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_terminate_backend(pid)))
        wait_until(lambda: listener_pids(other) not in ([], [pid]), "the next listener")
        assert_completes_soon(other, enqueue_in(other, 2))


@pytest.mark.on("postgresql")
def test_job_in_a_two_phase_transaction(make_app: Callable[..., Flask]) -> None:
    """A job can join a two-phase transaction, in which PostgreSQL allows no notification."""
    with PostgresServer(max_prepared_transactions="2") as server:
        app = make_app(database_url=server.url(server.create_database()))
        with app.app_context(), running_worker(app):
            session = sa.orm.Session(state_of(app).store.host_engine, twophase=True)
            job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
            session.prepare()
            session.commit()
            assert job.wait(SOON_SECONDS).result == 1


class NoNotifications:
    """A database without notifications."""

    can_listen = False


class QuietNotifications:
    """A database with notifications, none of which arrives."""

    can_listen = True

    def listen(
        self, stopped: threading.Event, wake: Callable[[], object], _is_quiet: object
    ) -> None:
        stopped.wait()

    def stop_listening(self) -> None:
        pass


@pytest.mark.on("sqlite")
def test_polls_decay(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without notifications, a worker polls often for a while after work, and rarely afterwards."""
    now = time.monotonic()
    wake_ups = WakeUps(NoNotifications(), lambda: None, 1.0)  # type: ignore[arg-type]
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
def test_listener_polls_rarely(app: Flask) -> None:
    """With notifications, a worker polls rarely, to find what it may have missed."""
    wake_ups = WakeUps(QuietNotifications(), lambda: None, 1.0)  # type: ignore[arg-type]
    wake_ups.note_work()
    assert wake_ups.poll_seconds() == 1.0
    wake_ups.stop()


@pytest.mark.on("sqlite")
def test_quiet_file_is_checked_less_often(state: AppState) -> None:
    """Without work, a worker checks the file for changes less often, even while heartbeats change
    it."""
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
