"""For the tests of host apps: run jobs without a worker, also on in-memory SQLite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from flask import Flask

from . import joining
from .app_state import AppState, import_jobs, state_of
from .context import CurrentJob
from .errors import BgJobsError
from .execute import execute
from .models import Job
from .signals import emit_settled
from .spec import JobSpec, Outcome, Settled
from .window import Window
from .worker import register


@contextlib.contextmanager
def inline(app: Flask) -> Iterator[None]:
    """Within it, each job runs in this thread as soon as its enqueue has committed.

    A job that is saved at once has run when the enqueue returns. One that joined uncommitted
    changes runs when they commit; on in-memory SQLite, where every job joins, a session
    without changes is committed for it. Delays are not waited for; a failed job is left
    ``retrying``.
    """
    state = state_of(app)
    worker_id = _register(state, "inline")

    def run(job: Job) -> None:
        with app.app_context():
            _run(state, worker_id, state.store.claim_one(worker_id, job.id))
            job.refresh()

    state.enqueued.append(run)
    try:
        with _commits_clean_sessions(state):
            yield
    finally:
        state.enqueued.remove(run)
        with app.app_context():
            state.store.stop_worker(worker_id)


def drain(app: Flask, *, queues: list[str] | None = None) -> list[Settled]:
    """The outcomes of all jobs that were due, run in this thread, best first.

    Jobs that those jobs enqueue run as well; delayed ones and retries that are not due stay.
    Timeouts are not enforced.

    :param queues: only these, in strict order; all by default.
    :raises BgJobsError: when the session holds uncommitted changes on in-memory SQLite.
    """
    state = state_of(app)
    _refuse_uncommitted(state)
    import_jobs(state)
    outcomes: list[Settled] = []
    with app.app_context(), _commits_clean_sessions(state):
        worker_id = _register(state, "drain")
        state.store.promote()
        while specs := state.store.claim(worker_id, 1, queues):
            outcomes += _run(state, worker_id, specs)
            state.store.promote()
        state.store.stop_worker(worker_id)
    return outcomes


@contextlib.contextmanager
def _commits_clean_sessions(state: AppState) -> Iterator[None]:
    """Make enqueues on in-memory SQLite, which always join, behave as on a file."""
    before, state.commits_clean_sessions = state.commits_clean_sessions, True
    try:
        yield
    finally:
        state.commits_clean_sessions = before


def _register(state: AppState, name: str) -> int:
    with state.app.app_context():
        return register(state, name)


def _refuse_uncommitted(state: AppState) -> None:
    if not state.store.always_joins or not state.db.session.registry.has():
        return
    if joining.holds_writes(state.db.session(), state.store.host_engine):
        raise BgJobsError("db.session holds uncommitted changes: commit before drain(app)")


def _run(state: AppState, worker_id: int, specs: list[JobSpec]) -> list[Settled]:
    settled: list[Settled] = []
    for spec in specs:
        outcome: Outcome = execute(state, spec, CurrentJob(spec), Window(), time.monotonic())
        settled += state.store.settle(worker_id, "testing", [(spec, outcome)])
    for entry in settled:
        emit_settled(state.app, entry)
    return settled
