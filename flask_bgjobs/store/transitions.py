"""Every move of a job from one status to another, and what is written with it.

No other module of the store writes a status. Add what has to happen whenever a job becomes pending
to :func:`pending`, and what has to happen whenever it ends to :func:`ended`. Only
:func:`flask_bgjobs.testing.inline` claims a scheduled job without promoting it first.

============  ============================  =======================  ==============================
Move          From                          To                       Who makes it
============  ============================  =======================  ==============================
enqueue       (new)                         pending or scheduled     the app
promote       scheduled, retrying           pending                  a worker, when it is due
claim         pending                       running                  a worker
settle        running                       as the outcome decides   the worker that claimed it, or
                                                                     the one that rescues it
cancel        scheduled, pending, retrying  cancelled                a person or the app
retry         retrying, failed, cancelled   pending                  a person
delete        all but running               (gone)                   a person, or the retention
============  ============================  =======================  ==============================
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ..job.records import MAX_ATTEMPT
from ..job.statuses import CAN_CHANGE, FINAL, WAITING, JobStatus
from .database import JOBS

Time = sa.ColumnElement[dt.datetime]
Values = dict[str, Any]
"""Column names, and what a move writes into them."""

# SQLite may hold any type there, and others refuse a number that is too large.
_ATTEMPT = sa.cast(JOBS.c.attempt, sa.Integer)
NEXT_ATTEMPT = sa.case((_ATTEMPT >= MAX_ATTEMPT, MAX_ATTEMPT), else_=_ATTEMPT + 1)
"""The number of the attempt that a claim begins."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """From where to where a job may go."""

    sources: frozenset[JobStatus]
    """Empty for a new job."""
    targets: frozenset[JobStatus]
    """Empty for a job that is deleted."""


_DELAYED = frozenset({JobStatus.SCHEDULED, JobStatus.RETRYING})
_RUNNING = frozenset({JobStatus.RUNNING})
_PENDING = frozenset({JobStatus.PENDING})
MOVES: Mapping[str, Move] = {
    "enqueue": Move(frozenset(), frozenset({JobStatus.PENDING, JobStatus.SCHEDULED})),
    "promote": Move(_DELAYED, _PENDING),
    "claim": Move(_PENDING, _RUNNING),
    "settle": Move(_RUNNING, FINAL | _DELAYED | _PENDING),
    "cancel": Move(WAITING, frozenset({JobStatus.CANCELLED})),
    "retry": Move(frozenset(CAN_CHANGE["retry"]), _PENDING),
    "delete": Move(frozenset(CAN_CHANGE["delete"]), frozenset()),
}


def enqueued(*, waits: bool) -> Values:
    """A new job, which nobody has tried.

    :param waits: whether it has a time of its own that has not come.
    """
    nothing_yet = {"attempt": 0, "retry_count": 0, "crash_count": 0, "suspect": False}
    return {**(_in(JobStatus.SCHEDULED) if waits else pending()), **nothing_yet}


def pending() -> Values:
    """A job that any worker may claim, however it came to that."""
    return _in(JobStatus.PENDING)


def promoted() -> Values:
    """A job whose time has come."""
    return pending()


def claimed(worker_id: Any, now: Any) -> Values:
    """A job that a worker runs, with nothing left of the attempt before."""
    return {
        **_in(JobStatus.RUNNING),
        "attempt": NEXT_ATTEMPT,
        "worker_id": worker_id,
        "claimed_at": now,
        **_not_started(),
        "progress": None,
        "progress_note": None,
    }


def started(now: Time) -> Values:
    """A running job whose code begins."""
    return {"started_at": now}


def completed(started_at: Time, finished_at: Time, result: Any) -> Values:
    """A job that completed, and told nothing more than its result."""
    return {
        **_in(JobStatus.COMPLETED),
        **ended(finished_at),
        "started_at": started_at,
        "result": result,
        "suspect": False,
        "error_type": None,
        "error": None,
    }


def settled(
    status: Any,
    *,
    is_final: sa.ColumnElement[bool],
    finished_at: Time,
    due_at: Time,
    **columns: Any,
) -> Values:
    """A job whose attempt is over, whatever became of it; one statement serves all outcomes.

    :param status: the new one, one of the targets of ``settle``.
    :param is_final: whether nothing but a retry by hand can run the job again.
    :param due_at: when it may run again.
    :param columns: what the outcome and the report say.
    """
    end = {
        name: sa.case((is_final, value), else_=JOBS.c[name])
        for name, value in ended(finished_at).items()
    }
    return {"status": status, **columns, **end, "run_at": due_at}


def ended(finished_at: Time) -> Values:
    """What every end leaves behind: its time, and a ``unique_key`` that others may take."""
    return {"finished_at": finished_at, "unique_hash": None}


def cancelled(now: Time) -> Values:
    """A waiting job that was cancelled."""
    return {**_in(JobStatus.CANCELLED), **ended(now)}


def asked_to_stop(now: Time) -> Values:
    """A running job that was cancelled: it stays ``running`` until its code has stopped."""
    return {"cancel_requested_at": sa.func.coalesce(JOBS.c.cancel_requested_at, now)}


def retried_by_hand(now: Time) -> Values:
    """A job that runs again because somebody wants it, with all its retries."""
    return {
        **pending(),
        "run_at": now,
        "retry_count": 0,
        "crash_count": 0,
        "suspect": False,
        "cancel_requested_at": None,
        **_not_started(),
    }


def is_running_for(worker_id: Any, attempt: Any) -> sa.ColumnElement[bool]:
    """The condition of a settle: the attempt is still this worker's. Nobody else's is touched."""
    return sa.and_(
        JOBS.c.status == JobStatus.RUNNING.value,
        JOBS.c.attempt == attempt,
        JOBS.c.worker_id == worker_id,
    )


def _in(status: JobStatus) -> Values:
    return {"status": status.value}


def _not_started() -> Values:
    return {"started_at": None, "finished_at": None}
