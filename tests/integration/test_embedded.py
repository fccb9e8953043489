"""``start_worker`` where no server runs: what it refuses, and what starts it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import BgJobs, ConfigError, run_background_job
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.state import state_of
from flask_bgjobs.worker import worker as worker_module
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
def test_child_processes_need_the_apps_path(
    make_app: Callable[..., Flask], config: dict[str, Any], options: Any
) -> None:
    """With the process pool ``BGJOBS_APP`` is needed, and the error says so."""
    with pytest.raises(ConfigError, match="BGJOBS_APP = 'shop:create_app'"):
        BgJobs().start_worker(make_app(**config), **options)


def test_an_in_memory_database_is_refused(make_app: Callable[..., Flask]) -> None:
    """A database that lives in one connection cannot be shared with a worker."""
    with pytest.raises(ConfigError, match="in-memory"):
        BgJobs().start_worker(make_app(database_url="sqlite://"))


def test_an_app_that_was_not_set_up_is_refused() -> None:
    """``start_worker`` comes after ``init_app``."""
    with pytest.raises(ConfigError, match="not set up"):
        BgJobs().start_worker(Flask("bare"))


@pytest.fixture
def embedded(app: Flask) -> Any:
    """A worker of the app that waits for something to start it."""
    worker = BgJobs().start_worker(app, concurrency=2)
    assert not worker.is_running
    yield worker
    worker.stop()
    assert not worker.is_running


def test_the_first_job_starts_it(app: Flask, embedded: EmbeddedWorker) -> None:
    """A process that enqueues is one that serves: the job that it enqueues runs."""
    assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
    assert embedded.is_running


def test_the_first_request_starts_it(app: Flask, embedded: EmbeddedWorker) -> None:
    """The first request starts it, the others change nothing."""
    for _ in range(3):
        assert app.test_client().get("/nothing").status_code == 404
    assert embedded.is_running


def test_an_app_has_one(app: Flask, embedded: EmbeddedWorker) -> None:
    """A second ``start_worker`` for the same app is refused; the first is found at the app."""
    with pytest.raises(ConfigError, match="has a worker already"):
        BgJobs().start_worker(app)
    assert app.extensions["bgjobs_worker"] is embedded


def test_starting_twice_starts_one(app: Flask, embedded: EmbeddedWorker) -> None:
    """A server's hook may call ``start`` where a request has started it already."""
    embedded.start()
    thread = embedded._thread
    embedded.start()
    assert embedded._thread is thread


def test_it_waits_for_the_tables(
    empty_database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot start breaks no request: it says why, and tries again."""
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
def test_it_does_not_start_beside_code_that_still_runs(
    make_app: Callable[..., Flask],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After jobs that cannot be stopped have ended the worker, another one would lose its threads
    in the same way; it starts when their code has ended."""
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
        # Twenty times as long as it would take to start again.
        time.sleep(1)
        assert "The worker restarts when the code of its jobs has ended" in caplog.text
        assert len(rows(state_of(app), WorkerRow)) == 1
        assert stuck.refresh().status == "failed"
        # The code ends as soon as somebody opens the pipe.
        with contextlib.suppress(BrokenPipeError):
            pipe.write_text("go on")
        assert waiting.wait(30).result == 1
        worker.stop()


@pytest.mark.on("sqlite")
def test_an_exit_in_its_loop_is_a_failure_like_any_other(
    make_app: Callable[..., Flask],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``sys.exit()`` in a listener of the host ends neither the server nor the worker for good."""
    monkeypatch.setattr("flask_bgjobs.worker.embedded._LEAST_PAUSE_SECONDS", 0.05)
    roll_up = worker_module.Worker._roll_up
    exits = [SystemExit(0)]

    def exit_once(*args: Any, **kwargs: Any) -> None:
        if exits:
            raise exits.pop()
        roll_up(*args, **kwargs)

    monkeypatch.setattr(worker_module.Worker, "_roll_up", exit_once)
    app = make_app()
    with app.app_context():
        worker = BgJobs().start_worker(app, concurrency=1)
        assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
        assert "The worker inside this process ended" in caplog.text
        worker.stop()
    assert exits == []
