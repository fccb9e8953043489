"""Manual actions: dispatch, cancel, retry and delete jobs, pause and resume queues.

The command line and the dashboard call these functions. Their parameter ``by`` is the person who
makes the change, for the audit trail.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..enqueue.enqueue import run_background_job
from ..errors import QueueNotFound
from ..models import Job
from ..state import AppState
from ..store import ActionResult, Actor, Selection

_BATCH_JOBS = 500
"""Jobs per transaction when many are selected. Other transactions wait for its write lock."""

Act = Callable[[AppState, Sequence[int], Actor | None], ActionResult]


def dispatch(
    state: AppState, by: Actor, target: str, method: str | None, parameters: Any, **options: Any
) -> Job:
    """Enqueue a job by hand, and record it in the audit trail.

    :param options: the options of :func:`~flask_bgjobs.run_background_job`.
    :returns: the saved job, or the existing job with the same ``unique_key``.
    :raises BgJobsError: when the job is refused.
    """
    job = run_background_job(target, method, parameters, **options, session=None)
    if not job.committed:
        # An in-memory database has only one connection, so the job joined the host's session.
        state.db.session.commit()
    if not job.deduplicated:
        state.store.record(by, "dispatch", subject=job.name, jobs=[job.id])
    return job


def cancel(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Cancel jobs: waiting ones at once; running ones are asked to stop.

    :returns: ``done`` jobs are cancelled, ``requested`` jobs are running and were asked to stop,
        and ``skipped`` jobs had finished or do not exist.
    """
    return state.cancel(ids, by)


def retry(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Make failed, cancelled or retrying jobs pending again, due now, with all their retries.

    :returns: ``done`` jobs are pending; ``skipped`` gives the reason for each other job, such as
        another job with the same ``unique_key``.
    """
    return state.store.retry(ids, by)


def delete(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Delete jobs that are not running, with their attempts and log lines.

    :returns: ``done`` jobs are deleted; ``skipped`` jobs do not exist, are running, or are
        referenced by a row of another table.
    """
    return state.store.delete(ids, by)


def act_on_selected(
    state: AppState, act: Act, selection: Selection, by: Actor | None = None
) -> Iterator[ActionResult]:
    """Apply ``act`` to the selected jobs, in batches, and yield the result of each batch.

    Each batch has its own application context. If a signal receiver leaves a transaction of the
    session open, the end of the context ends it, so that it cannot block the next batch.

    :param act: :func:`cancel`, :func:`retry` or :func:`delete`.
    """
    for ids in state.store.selected_ids(selection, _BATCH_JOBS):
        with state.app.app_context():
            result = act(state, ids, by)
        yield result


def pause(state: AppState, queue: str, by: Actor | None = None) -> bool:
    """Stop workers from claiming jobs of ``queue``. Running jobs continue.

    :returns: ``False`` when the queue was already paused.
    :raises QueueNotFound: when the queue does not exist.
    """
    _check_exists(state, queue)
    return state.store.pause(queue, by)


def resume(state: AppState, queue: str, by: Actor | None = None) -> bool:
    """Let workers claim jobs of ``queue`` again.

    :returns: ``False`` when the queue was not paused.
    :raises QueueNotFound: when the queue does not exist.
    """
    _check_exists(state, queue)
    return state.store.resume(queue, by)


def _check_exists(state: AppState, queue: str) -> None:
    config = state.config
    configured = {"default", *(config.queues or ()), *config.queue_pools, *state.registry.queues()}
    known = state.store.queue_names() | configured
    if queue not in known:
        close = difflib.get_close_matches(queue, sorted(known), n=1)
        names = ", ".join(sorted(known))
        hint = f"did you mean {close[0]!r}?" if close else f"the known queues are {names}"
        raise QueueNotFound(f"there is no queue {queue!r}; {hint}")
