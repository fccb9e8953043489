"""For the tests of host apps: run jobs without a worker, also on in-memory SQLite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from flask import Flask, has_app_context

from .enqueue import transactions
from .enqueue.enqueue import committing_clean_sessions
from .errors import BgJobsError
from .execution.current import CurrentJob
from .execution.execute import execute
from .execution.interrupt import InterruptScope
from .job.records import JobSpec, Settled
from .job.row_check import bad_row, checked
from .models import Job
from .observability.failures import report_lost
from .state import AppState, import_jobs, state_of
from .worker.worker import register


@contextlib.contextmanager
def inline(app: Flask) -> Iterator[None]:
    """Within it, each job runs in this thread as soon as its enqueue has committed.

    A job that is saved at once has run when the enqueue returns. One that joined uncommitted
    changes, or the session given as ``session=``, runs when that commits. On in-memory SQLite, and
    where ``db.session`` is bound to a connection, every job joins; there a session without changes
    is committed for it. Delays are not waited for; a failed job is left ``retrying``.

    :raises BgJobsError: when ``db.session`` holds uncommitted changes that keep the database, or
        the connection, from being used.
    """
    state = state_of(app)
    _refuse_uncommitted(state, "inline")
    worker_id = _register(state, "inline")

    def run(job: Job) -> None:
        with app.app_context():
            _run(state, worker_id, state.store.claim_one(worker_id, job.id))
            job.refresh()

    state.enqueued.append(run)
    try:
        with committing_clean_sessions(app):
            yield
    finally:
        state.enqueued.remove(run)
        # It would wait for those changes, or commit them.
        if not _holds_changes(state):
            with app.app_context():
                state.store.stop_worker(worker_id)


def drain(app: Flask, *, queues: list[str] | None = None) -> list[Settled]:
    """The outcomes of all jobs that were due, run in this thread, best first.

    Jobs that those jobs enqueue run as well; delayed ones and retries that are not due stay.
    Timeouts are not enforced.

    :param queues: only these, in strict order; all by default.
    :raises BgJobsError: when ``db.session`` holds uncommitted changes on SQLite, or on a connection
        that the test has bound it to.
    """
    state = state_of(app)
    _refuse_uncommitted(state, "drain")
    import_jobs(state)
    outcomes: list[Settled] = []
    with app.app_context(), committing_clean_sessions(app):
        worker_id = _register(state, "drain")
        state.store.promote()
        while specs := state.store.claim(worker_id, 1, queues):
            outcomes += _run(state, worker_id, specs)
            state.store.promote()
        state.store.stop_worker(worker_id)
    return outcomes


def _register(state: AppState, name: str) -> int:
    with state.app.app_context():
        return register(state, name)


def _refuse_uncommitted(state: AppState, helper: str) -> None:
    if _holds_changes(state):
        raise BgJobsError(f"db.session holds uncommitted changes: commit before {helper}(app)")


def _holds_changes(state: AppState) -> bool:
    """Whether the test's session has written what nobody else can write beside."""
    store = state.store
    if not (store.has_one_writer or store.outer_connection is not None):
        return False
    if not has_app_context() or not state.db.session.registry.has():
        return False
    return transactions.has_written(state.db.session(), store.host_engine)


def _run(state: AppState, worker_id: int, specs: list[JobSpec]) -> list[Settled]:
    settled: list[Settled] = []
    for claimed in specs:
        spec, flaw = checked(claimed)
        job = CurrentJob(spec)
        if flaw is None:
            outcome = execute(state, spec, job, InterruptScope(), time.monotonic())
        else:
            outcome = bad_row(spec, flaw)
        settled += state.store.settle(worker_id, "testing", [(spec, outcome)])
        job.report_failure()
    for entry in settled:
        state.emit_settled(entry)
        report_lost(state, entry)
    return settled
