"""Helpers for the tests of an app: run jobs without a worker, also on in-memory SQLite."""

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
from .flow.limits.keeper import admit_all
from .job.records import JobSpec, Settled
from .job.row_check import bad_row, checked
from .models import Job
from .observability.failures import report_lost
from .state import AppState, import_jobs, state_of
from .worker.registration import register


@contextlib.contextmanager
def inline(app: Flask) -> Iterator[None]:
    """Context manager in which each job runs in the current thread as soon as its enqueue has
    committed.

    A job that does not join a transaction has run when the enqueue returns. A job that joined
    uncommitted changes, or the session given as ``session=``, runs when they are committed. On
    in-memory SQLite, and if ``db.session`` is bound to a connection, every job joins the session;
    if the session holds no changes, ``inline`` commits it. Delays are ignored. A failed job stays
    ``retrying`` and is not run again.

    ``inline`` never waits for a limit. A job whose limits do not allow it stays ``waiting``, and
    runs when the end of another job in this block allows it.

    :raises BgJobsError: when ``db.session`` holds uncommitted changes, on SQLite or while it is
        bound to a connection: they would block the database or the connection.
    """
    state = state_of(app)
    _refuse_uncommitted(state, "inline")
    worker_id = _register(state, "inline")

    waiting: list[Job] = []

    def run(job: Job) -> None:
        with app.app_context():
            if job.limit_key_id is None:
                _run(state, worker_id, state.store.claim_one(worker_id, job.id))
            else:
                state.store.promote_one(job.id)
                waiting.append(job)
                _run_allowed(state, worker_id, waiting)
            job.refresh()

    state.enqueued.append(run)
    try:
        with committing_clean_sessions(app):
            yield
    finally:
        state.enqueued.remove(run)
        # With uncommitted changes, the statement would wait for them, or commit them.
        if not _holds_changes(state):
            with app.app_context():
                state.store.stop_worker(worker_id)


def drain(app: Flask, *, queues: list[str] | None = None) -> list[Settled]:
    """Run all jobs that are due in the current thread, in the order in which a worker would claim
    them, and return their outcomes.

    Jobs that these jobs enqueue are run too. Delayed jobs and retries that are not due yet are not
    run, and neither are those that wait for a limit at the end. Timeouts are not enforced.

    :param queues: the only queues to serve, in strict order; default: all queues.
    :returns: one item for each attempt, with ``status``, ``error`` and ``result`` among others.
    :raises BgJobsError: when ``db.session`` holds uncommitted changes, on SQLite or while it is
        bound to a connection.
    """
    state = state_of(app)
    _refuse_uncommitted(state, "drain")
    import_jobs(state)
    outcomes: list[Settled] = []
    with app.app_context(), committing_clean_sessions(app):
        worker_id = _register(state, "drain")
        while specs := _claim_next(state, worker_id, queues):
            outcomes += _run(state, worker_id, specs)
        state.store.stop_worker(worker_id)
    return outcomes


def _claim_next(state: AppState, worker_id: int, queues: list[str] | None) -> list[JobSpec]:
    """Claim the next job that is due and that the limits allow."""
    state.store.promote(state.config.weights)
    admit_all(state.store)
    return state.store.claim(worker_id, 1, queues)


def _run_allowed(state: AppState, worker_id: int, waiting: list[Job]) -> None:
    """Run those of the jobs that their limits allow, and remove them from the list."""
    has_run = True
    while has_run:
        has_run = False
        admit_all(state.store)
        for job in list(waiting):
            if job in waiting and (specs := state.store.claim_one(worker_id, job.id)):
                waiting.remove(job)
                _run(state, worker_id, specs)
                job.refresh()
                has_run = True


def _register(state: AppState, name: str) -> int:
    with state.app.app_context():
        return register(state, name)


def _refuse_uncommitted(state: AppState, helper: str) -> None:
    if _holds_changes(state):
        raise BgJobsError(f"db.session holds uncommitted changes: commit before {helper}(app)")


def _holds_changes(state: AppState) -> bool:
    """Whether the test's session holds changes that block other writers."""
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
