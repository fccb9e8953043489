"""``start_worker`` where no server runs: what it refuses, and what starts it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import BgJobs, ConfigError, run_background_job
from flask_bgjobs.app_state import state_of
from flask_bgjobs.embedded import EmbeddedWorker
from tests.apps import build_app
from tests.conftest import wait_until


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
    database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot start breaks no request: it says why, and tries again."""
    monkeypatch.setattr("flask_bgjobs.embedded._FIRST_PAUSE_SECONDS", 0.05)
    app = build_app(database_url)
    with app.app_context(), caplog.at_level(logging.ERROR, "flask_bgjobs"):
        worker = BgJobs().start_worker(app)
        assert app.test_client().get("/nothing").status_code == 404
        wait_until(lambda: "flask db upgrade" in caplog.text, "the reason")
        app.extensions["sqlalchemy"].create_all()
        assert run_background_job("tests.jobs.echo", parameters=[1]).wait(30).result == 1
        worker.stop()
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()
