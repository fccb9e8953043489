"""What people do by hand: dispatch, cancel, retry and delete jobs, pause and resume queues.

The CLI and the dashboard call these. ``by`` is who makes the change, for the audit trail.
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

_AT_ONCE = 500
"""Jobs per transaction when many are chosen: others wait for the write lock meanwhile."""

Act = Callable[[AppState, Sequence[int], Actor | None], ActionResult]


def dispatch(
    state: AppState, by: Actor, target: str, method: str | None, parameters: Any, **options: Any
) -> Job:
    """The job that somebody enqueues by hand, saved and written down; or the one that is there.

    :param options: as of :func:`~flask_bgjobs.run_background_job`.
    :raises BgJobsError: when it is refused.
    """
    job = run_background_job(target, method, parameters, **options, session=None)
    if not job.committed:
        # An in-memory database has one connection only, so the job joined the host's session.
        state.db.session.commit()
    if not job.deduplicated:
        state.store.record(by, "dispatch", subject=job.name, jobs=[job.id])
    return job


def cancel(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Cancel jobs: at once where they wait, by asking where they run.

    :returns: ``done`` are cancelled, ``requested`` run and are asked to stop, ``skipped`` were
        finished or do not exist.
    """
    return state.cancel(ids, by)


def retry(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Run failed, cancelled or retrying jobs again, now, with all their retries.

    :returns: ``done`` are pending; ``skipped`` says why not, such as a taken ``unique_key``.
    """
    return state.store.retry(ids, by)


def delete(state: AppState, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
    """Delete jobs that do not run, with their attempts and log lines.

    :returns: ``done`` are gone; ``skipped`` run, or another table's row refers to them.
    """
    return state.store.delete(ids, by)


def act_on_selected(
    state: AppState, act: Act, selection: Selection, by: Actor | None = None
) -> Iterator[ActionResult]:
    """What ``act`` did to the jobs that are selected, batch by batch.

    Each batch has an application context of its own. A transaction that a receiver of its signals
    leaves open ends with it, and cannot block the next batch.

    :param act: :func:`cancel`, :func:`retry` or :func:`delete`.
    """
    for ids in state.store.selected_ids(selection, _AT_ONCE):
        with state.app.app_context():
            result = act(state, ids, by)
        yield result


def pause(state: AppState, queue: str, by: Actor | None = None) -> bool:
    """Let no worker claim jobs of ``queue``; running ones go on.

    :returns: ``False`` when it was paused already.
    :raises QueueNotFound: when there is no such queue.
    """
    _check_exists(state, queue)
    return state.store.pause(queue, by)


def resume(state: AppState, queue: str, by: Actor | None = None) -> bool:
    """Let workers claim jobs of ``queue`` again.

    :returns: ``False`` when it was not paused.
    :raises QueueNotFound: when there is no such queue.
    """
    _check_exists(state, queue)
    return state.store.resume(queue, by)


def _check_exists(state: AppState, queue: str) -> None:
    config = state.config
    named = {"default", *(config.queues or ()), *config.queue_pools, *state.registry.queues()}
    known = state.store.queue_names() | named
    if queue not in known:
        close = difflib.get_close_matches(queue, sorted(known), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
        raise QueueNotFound(f"there is no queue {queue!r}; {hint}")
