"""What people do to jobs by hand: cancel, retry, delete. The CLI and the dashboard call these."""

from __future__ import annotations

from collections.abc import Sequence

from .app_state import AppState
from .signals import job_cancelled
from .store import ActionResult


def cancel(state: AppState, ids: Sequence[int]) -> ActionResult:
    """Cancel jobs: at once where they wait, by asking where they run.

    :returns: ``done`` are cancelled, ``requested`` run and are asked to stop, ``skipped`` were
        finished or do not exist.
    """
    result = state.store.cancel(ids)
    for job_id in result.done:
        job = state.store.get(job_id)
        if job is not None:
            state.emit(job_cancelled, job=job)
    return result


def retry(state: AppState, ids: Sequence[int]) -> ActionResult:
    """Run failed, cancelled or retrying jobs again, now, with all their retries.

    :returns: ``done`` are pending; ``skipped`` says why not, such as a taken ``unique_key``.
    """
    return state.store.retry(ids)


def delete(state: AppState, ids: Sequence[int]) -> ActionResult:
    """Delete jobs that do not run, with their attempts and log lines.

    :returns: ``done`` are gone; ``skipped`` run, or another table's row refers to them.
    """
    return state.store.delete(ids)
