"""Signal receivers that use ``db.session``: its state afterwards, in a worker and in a request."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from blinker import NamedSignal
from flask import Flask
from sqlalchemy.exc import DBAPIError

from flask_bgjobs import (
    job_cancelled,
    job_completed,
    job_enqueued,
    job_failed,
    job_rescued,
    job_retrying,
    job_started,
    run_background_job,
    worker_started,
    worker_stopped,
)
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.worker import Worker
from tests.conftest import count_jobs

COUNT = "SELECT count(*) FROM bgjobs_job WHERE status = 'completed'"
WORKER_SIGNALS = [worker_started, job_started, job_completed, job_retrying, job_failed]


@pytest.fixture
def session(app: Flask) -> Any:
    """The app's session, with an additional table."""
    session = app.extensions["sqlalchemy"].session
    session.execute(sa.text("CREATE TABLE note (id INTEGER PRIMARY KEY)"))
    session.commit()
    return session


def _run(state: AppState) -> Worker:
    worker = Worker(state, WorkerOptions(burst=True, concurrency=1))
    worker.run()
    return worker


def _read(session: Any, results: list[Any]) -> None:
    results.append(session.execute(sa.text(COUNT)).scalar())


def _break(session: Any, results: list[Any]) -> None:
    """Leave a transaction in which a statement has failed."""
    session.execute(sa.text("INSERT INTO note VALUES (1)"))
    try:
        session.execute(sa.text("INSERT INTO note VALUES (1)"))
    except DBAPIError as error:
        results.append(type(error).__name__)


def _write(session: Any, results: list[Any]) -> None:
    session.execute(sa.text("INSERT INTO note VALUES (1)"))
    results.append("written")


@pytest.mark.parametrize("use", [_read, _break, _write])
@pytest.mark.parametrize("signal", WORKER_SIGNALS, ids=lambda signal: signal.name)
def test_each_receiver_gets_a_clean_session(
    app: Flask, state: AppState, session: Any, use: Callable[..., None], signal: NamedSignal
) -> None:
    """Whatever a receiver leaves in ``db.session``, the next receiver gets a clean session, and
    jobs continue."""
    results: list[Any] = []

    def receiver(_app: Flask, **_values: object) -> None:
        use(session, results)

    for number in range(3):
        run_background_job("tests.jobs.echo", parameters=[number])
        run_background_job("tests.jobs.fail", retries=1, retry_delay=0)
    with signal.connected_to(receiver, app):
        worker = _run(state)
    assert (worker.counts["completed"], worker.counts["failed"]) == (3, 3)
    assert results
    if use is _read and signal is job_completed:
        assert results[-1] == 3
    elif use is not _read:
        assert len(set(results)) == 1
    assert session.execute(sa.text("SELECT count(*) FROM note")).scalar() == 0


def test_rescue_and_stop_leave_no_transaction(app: Flask, state: AppState, session: Any) -> None:
    """The receivers of a rescue and of a worker's stop leave no transaction open."""
    results: list[Any] = []

    def receiver(_app: Flask, **_values: object) -> None:
        _write(session, results)

    run_background_job("tests.jobs.echo")
    # Without heartbeats, its lease expires.
    state.store.claim(register(state, "dead"), 1, None)
    with (
        job_rescued.connected_to(receiver, app),
        worker_stopped.connected_to(receiver, app),
    ):
        _run(state)
    assert len(results) == 2
    assert session.execute(sa.text("SELECT count(*) FROM note")).scalar() == 0


def test_session_of_the_caller_is_kept(app: Flask, state: AppState, session: Any) -> None:
    """A receiver of ``job_enqueued`` shares the caller's session, which keeps its objects; a worker
    in the caller's thread uses another session."""
    results: list[Any] = []

    def receiver(_app: Flask, **_values: object) -> None:
        _read(session, results)

    before = session()
    with job_enqueued.connected_to(receiver, app), job_completed.connected_to(receiver, app):
        session.execute(sa.text("INSERT INTO note VALUES (1)"))
        run_background_job("tests.jobs.echo")
        session.commit()
        run_background_job("tests.jobs.echo", session=None)
        assert session() is before
        session.rollback()
        session.execute(sa.text("SELECT 1"))
        _run(state)
        assert session() is before
        assert session().in_transaction()
    session.rollback()
    assert len(results) == 4


def test_drain_cleans_up_after_receivers(app: Flask, session: Any) -> None:
    """A transaction left open by a receiver does not prevent ``drain`` from running the next
    job."""

    def receiver(_app: Flask, **_values: object) -> None:
        _write(session, [])

    for _ in range(2):
        run_background_job("tests.jobs.echo")
    with job_completed.connected_to(receiver, app):
        assert len(drain(app)) == 2
    assert session.execute(sa.text("SELECT count(*) FROM note")).scalar() == 0


def test_cancel_cleans_up_between_batches(
    app: Flask, session: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction left open by a receiver does not block the next batch of the command."""
    monkeypatch.setattr("flask_bgjobs.operations.actions._BATCH_JOBS", 1)
    results: list[Any] = []

    def receiver(_app: Flask, **_values: object) -> None:
        _write(session, results)

    for _ in range(2):
        run_background_job("tests.jobs.echo")
    with job_cancelled.connected_to(receiver, app):
        run("cancel", "--status", "pending", "--yes")
    assert len(results) == 2
    session.rollback()
    assert count_jobs(app) == 2


def test_import_leaves_no_session(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of ``BGJOBS_IMPORTS`` that reads the database leaves no session."""
    module = types.ModuleType("imported_here")
    app = make_app(BGJOBS_IMPORTS=["imported_here"])
    session = app.extensions["sqlalchemy"].session

    class Finder:
        def find_spec(self, name: str, *_: object) -> Any:
            if name != "imported_here":
                return None
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, self)  # type: ignore[arg-type]  # it is its own loader

        def create_module(self, _spec: object) -> Any:
            return module

        def exec_module(self, _module: object) -> None:
            session.execute(sa.text("SELECT 1"))

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with app.app_context():
        Worker(state_of(app))
        assert not session.registry.has()
    monkeypatch.delitem(sys.modules, "imported_here")
