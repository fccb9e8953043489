"""``start_worker`` without a server: refused apps, and the start of the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import BgJobs, ConfigError, run_background_job
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.state import state_of
from flask_bgjobs.store import Store
from flask_bgjobs.worker.embedded import EmbeddedWorker
from tests.apps import build_app
from tests.conftest import wait_until
from tests.integration.test_worker import rows


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"BGJOBS_POOL": "process"}, {}),
        ({"BGJOBS_QUEUE_POOLS": {"images": "process"}}, {}),
        ({}, {"pool": "process"}),
    ],
)
def test_process_pool_needs_an_import_path(
    make_app: Callable[..., Flask], config: dict[str, Any], options: Any
) -> None:
    """With the process pool, a missing ``BGJOBS_APP`` raises an error that names the key."""
    with pytest.raises(ConfigError, match="BGJOBS_APP = 'shop:create_app'"):
        BgJobs().start_worker(make_app(**config), **options)


def test_in_memory_database_is_refused(make_app: Callable[..., Flask]) -> None:
    """A worker refuses an in-memory database, which has a single connection."""
    with pytest.raises(ConfigError, match="in-memory"):
        BgJobs().start_worker(make_app(database_url="sqlite://"))


def test_app_without_init_app_is_refused() -> None:
    """``start_worker`` needs ``init_app`` first."""
    with pytest.raises(ConfigError, match="not set up"):
        BgJobs().start_worker(Flask("bare"))


@pytest.fixture
def embedded(app: Flask) -> Any:
    """An embedded worker that has not started yet."""
    worker = BgJobs().start_worker(app, concurrency=2)
    assert not worker.is_running
    yield worker
    worker.stop()
    assert not worker.is_running


def test_first_job_starts_the_worker(app: Flask, embedded: EmbeddedWorker) -> None:
    """The first job that the process enqueues starts the worker, which runs the job."""
    assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
    assert embedded.is_running


def test_first_request_starts_the_worker(app: Flask, embedded: EmbeddedWorker) -> None:
    """The first request starts the worker, and later requests change nothing."""
    for _ in range(3):
        assert app.test_client().get("/nothing").status_code == 404
    assert embedded.is_running


def test_second_worker_of_an_app_is_refused(app: Flask, embedded: EmbeddedWorker) -> None:
    """A second ``start_worker`` for an app is refused; the first worker is stored in the app's
    extensions."""
    with pytest.raises(ConfigError, match="has a worker already"):
        BgJobs().start_worker(app)
    assert app.extensions["bgjobs_worker"] is embedded


def test_start_twice_starts_one_thread(app: Flask, embedded: EmbeddedWorker) -> None:
    """A second ``start``, such as in a server's hook, starts no second thread."""
    embedded.start()
    embedded.start()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("bgjobs-worker") == 1


def test_worker_waits_for_the_tables(
    empty_database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot start does not break requests: it logs the reason and tries again."""
    monkeypatch.setattr("flask_bgjobs.worker.embedded._LEAST_PAUSE_SECONDS", 0.05)
    app = build_app(empty_database_url)
    with app.app_context(), caplog.at_level(logging.ERROR, "flask_bgjobs"):
        worker = BgJobs().start_worker(app)
        assert app.test_client().get("/nothing").status_code == 404
        wait_until(lambda: "flask db upgrade" in caplog.text, "the reason")
        app.extensions["sqlalchemy"].create_all()
        assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
        worker.stop()
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


@pytest.mark.on("sqlite")
def test_worker_restarts_after_stuck_code_has_ended(
    make_app: Callable[..., Flask],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After jobs that cannot be stopped have ended the worker, it restarts only when their code has
    ended."""
    monkeypatch.setattr("flask_bgjobs.worker.embedded._LEAST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("flask_bgjobs.worker.embedded._LOOK_SECONDS", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    app = make_app(BGJOBS_LEASE=2, BGJOBS_HEARTBEAT_INTERVAL=0.5, BGJOBS_SHUTDOWN_TIMEOUT=0.5)
    with app.app_context():
        worker = BgJobs().start_worker(app, concurrency=1)
        stuck = run_background_job(
            "tests.jobs.read_pipe", parameters=[str(pipe)], timeout=0.3, retries=0
        )
        wait_until(lambda: "The worker inside this process ended" in caplog.text, "the end")
        assert "no thread is free" in caplog.text
        waiting = run_background_job("tests.jobs.echo", parameters=[1])
        # Twenty times the pause before a restart.
        time.sleep(1)
        assert "The worker restarts when the code of its jobs has ended" in caplog.text
        assert len(rows(state_of(app), WorkerRow)) == 1
        assert stuck.refresh().status == "failed"
        # The code ends when the pipe is opened.
        with contextlib.suppress(BrokenPipeError):
            pipe.write_text("go on")
        assert waiting.wait(30).result == 1
        worker.stop()


@pytest.mark.on("sqlite")
def test_system_exit_in_the_loop_restarts_the_worker(
    make_app: Callable[..., Flask],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``sys.exit()`` in the worker's loop neither ends the server nor stops the worker for good."""
    monkeypatch.setattr("flask_bgjobs.worker.embedded._LEAST_PAUSE_SECONDS", 0.05)
    look = Store.look
    exits = [SystemExit(0)]

    def exit_once(*args: Any, **kwargs: Any) -> Any:
        if exits:
            raise exits.pop()
        return look(*args, **kwargs)

    monkeypatch.setattr(Store, "look", exit_once)
    app = make_app()
    with app.app_context():
        worker = BgJobs().start_worker(app, concurrency=1)
        assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
        assert "The worker inside this process ended" in caplog.text
        worker.stop()
    assert exits == []
