"""Workers and web processes behind PgBouncer in transaction mode.

Each transaction can run on a different server connection, so no session state can be kept.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.state import state_of
from tests.acceptance.helpers import enqueue, lines
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, stored, wait_until
from tests.servers import PgBouncer, PostgresServer

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

# As documented: PgBouncer before 1.21 does not track prepared statements.
NO_PREPARED_STATEMENTS: dict[str, Any] = {
    "SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"prepare_threshold": None}},
    "BGJOBS_APP": "host",
}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that is used only through the pooler."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def pooler(server: PostgresServer) -> Iterator[PgBouncer]:
    """A pooler with fewer server connections than clients."""
    with PgBouncer(server.port) as pooler:
        yield pooler


@pytest.fixture
def database_url(server: PostgresServer, pooler: PgBouncer) -> str:
    """A new database, through the pooler."""
    return server.url(server.create_database(), port=pooler.port)


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    """The app in this process, which uses the pooler like the workers."""
    app = build_app(database_url, **NO_PREPARED_STATEMENTS)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    yield app
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


def test_jobs_run_through_pgbouncer(app: Flask, start_worker: Start, journal: Path) -> None:
    """Enqueue, claim, retry, delay, unique key and cancel work in transaction mode."""
    workers = [
        start_worker("-P", pool, "-c", "3", **NO_PREPARED_STATEMENTS)
        for pool in ("thread", "process")
    ]
    quick = [enqueue("echo", number) for number in range(200)]
    retried = enqueue("fail_times", 2, retries=3)
    delayed = run_background_job("tests.jobs.echo", parameters=["late"], delay=1)
    failed = enqueue("fail", retries=1)
    unique = [enqueue("hold", str(journal), 600, unique_key="one") for _ in range(2)]
    assert unique[0].id == unique[1].id
    wait_until(lambda: lines(journal), "the start")
    result = app.test_cli_runner().invoke(args=["bgjobs", "cancel", str(unique[0].id)])
    assert "was asked to stop" in result.output
    assert [job.wait(DEADLINE_SECONDS).result for job in quick] == list(range(200))
    assert (retried.wait(DEADLINE_SECONDS).status, retried.attempt) == ("completed", 3)
    assert delayed.wait(DEADLINE_SECONDS).result == "late"
    assert (failed.wait(DEADLINE_SECONDS).status, failed.retry_count) == ("failed", 1)
    assert unique[0].wait(DEADLINE_SECONDS).status == "cancelled"
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(DEADLINE_SECONDS) == 0
        assert "Database not usable" not in worker.log.read_text()


def test_rescue_works_through_pgbouncer(app: Flask, start_worker: Start, journal: Path) -> None:
    """The jobs of a killed worker and of a stalled worker run again."""
    config = {**NO_PREPARED_STATEMENTS, "BGJOBS_LEASE": 4}
    killed = start_worker("-c", "1", **config)
    first = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: _started(app, first), "the first start")
    stalled = start_worker("-c", "1", **config)
    second = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: _started(app, second), "the second start")
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(stalled.pid, signal.SIGSTOP)
    killed.wait()
    start_worker("-c", "2", **config)
    for job in (first, second):
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert (job.attempt, job.retry_count, job.crash_count) == (2, 0, 0)
    os.kill(stalled.pid, signal.SIGCONT)
    wait_until(lambda: "ease lost" in stalled.log.read_text(), "the notice")


def _started(app: Flask, job: Job) -> bool:
    return stored(app, job).started_at is not None
