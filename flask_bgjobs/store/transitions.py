"""Every move of a job from one status to another, and the values written with it.

No other module of the store writes a status. A job that may run from now on gets the values of
:func:`ready`: it is pending, or it waits for its limits. Add values for every job that becomes
pending to :func:`pending`, and values for every job that ends to :func:`ended`.

========  ===================================  ====================  =============================
Move      From                                 To                    Made by
========  ===================================  ====================  =============================
enqueue   (new)                                ready, scheduled      the app
promote   scheduled, retrying                  pending, waiting      a worker, when it is due
free      waiting                              ready                 a worker
admit     waiting                              pending               a worker, if limits allow
withdraw  pending                              waiting               a worker, if limits say so
replace   scheduled, waiting, pending          ready, scheduled      the app, with another enqueue
claim     pending                              running               a worker
settle    running                              as the outcome says   the worker that claimed it, or
                                                                     the worker that rescues it
cancel    scheduled, waiting, pending,         cancelled             a person or the app
          retrying
expire    scheduled, waiting, pending          cancelled             a worker
retry     retrying, failed, cancelled          ready                 a person
delete    all but running                      (gone)                a person, or the retention
========  ===================================  ====================  =============================

*Ready* stands for pending. For a job with limits it stands for waiting, and for one that takes
turns with others for scheduled: it gets its turn when it is promoted.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ..job.records import MAX_ATTEMPT
from ..job.statuses import CAN_CHANGE, FINAL, NOT_STARTED, UNCLAIMED, JobStatus, WaitsFor
from .database import JOBS

Time = sa.ColumnElement[dt.datetime]
Values = dict[str, Any]
"""The values that a move writes, by column name."""

# Cast and capped: SQLite may hold a value of any type, and other databases refuse larger numbers.
_ATTEMPT = sa.cast(JOBS.c.attempt, sa.Integer)
NEXT_ATTEMPT = sa.case((_ATTEMPT >= MAX_ATTEMPT, MAX_ATTEMPT), else_=_ATTEMPT + 1)
"""The number of the attempt that a claim starts."""


_GIVES_KEY_UP = sa.and_(JOBS.c.unique_until_start, JOBS.c.unique_expires_at.is_(None))
"""The condition that a job is no longer unique when it is claimed."""
HAS_LIMITS = JOBS.c.limit_key_id.is_not(None)
"""The condition that a job has limits."""
TAKES_TURNS = JOBS.c.fair_key.is_not(None)
"""The condition that a job takes turns with the jobs of other keys."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """The statuses between which a job may move."""

    sources: frozenset[JobStatus]
    """Statuses before the move; empty for a new job."""
    targets: frozenset[JobStatus]
    """Statuses after the move; empty for a deleted job."""


_DELAYED = frozenset({JobStatus.SCHEDULED, JobStatus.RETRYING})
_RUNNING = frozenset({JobStatus.RUNNING})
_PENDING = frozenset({JobStatus.PENDING})
_WAITING = frozenset({JobStatus.WAITING})
_ADMISSIBLE = _PENDING | _WAITING
_READY = frozenset({*_ADMISSIBLE, JobStatus.SCHEDULED})
MOVES: Mapping[str, Move] = {
    "enqueue": Move(frozenset(), _READY),
    "promote": Move(_DELAYED, _ADMISSIBLE),
    "free": Move(_WAITING, _READY),
    "admit": Move(_WAITING, _PENDING),
    "withdraw": Move(_PENDING, _WAITING),
    "replace": Move(_READY, _READY),
    "claim": Move(_PENDING, _RUNNING),
    "settle": Move(_RUNNING, FINAL | _DELAYED | _PENDING | _WAITING),
    "cancel": Move(UNCLAIMED, frozenset({JobStatus.CANCELLED})),
    "expire": Move(NOT_STARTED, frozenset({JobStatus.CANCELLED})),
    "retry": Move(frozenset(CAN_CHANGE["retry"]), _READY),
    "delete": Move(frozenset(CAN_CHANGE["delete"]), frozenset()),
}


def enqueued(*, waits: bool, has_limits: bool = False, takes_turns: bool = False) -> Values:
    """The values of a new job.

    :param waits: whether the job has a due time in the future.
    """
    initial_values = {"attempt": 0, "retry_count": 0, "crash_count": 0, "suspect": False}
    status = scheduled() if waits else _ready(has_limits=has_limits, takes_turns=takes_turns)
    return {**status, **initial_values}


def scheduled() -> Values:
    """The values of a job that a worker promotes when it is due."""
    return {**_with_status(JobStatus.SCHEDULED), "waits_for": None}


def pending() -> Values:
    """The values of a job that any worker may claim, whatever its status was before."""
    return {**_with_status(JobStatus.PENDING), "waits_for": None}


def ready() -> Values:
    """The values of a job that may run from now on, if its limits allow, and that is due.

    Give seats to those with limits: :meth:`.seats.Seats.line_up`.
    """
    return {
        name: sa.case((TAKES_TURNS, value), else_=promoted()[name])
        for name, value in scheduled().items()
    } | {"waiting_on": None}


def promoted() -> Values:
    """The values of a job that is due, and has its turn if it takes turns.

    Give seats to those with limits: :meth:`.seats.Seats.line_up`.
    """
    waiting, pending_now = JobStatus.WAITING.value, JobStatus.PENDING.value
    return {
        "status": sa.case((HAS_LIMITS, waiting), else_=pending_now),
        "waits_for": sa.case((HAS_LIMITS, WaitsFor.LIMIT.value), else_=sa.null()),
        "waiting_on": None,
    }


def waiting_for_limits() -> Values:
    """The values of a job that waits for its limits."""
    return {**_with_status(JobStatus.WAITING), "waits_for": WaitsFor.LIMIT.value}


def waiting_for_queue() -> Values:
    """The values of a job with limits whose queue is paused or has no worker."""
    return {**_with_status(JobStatus.WAITING), "waits_for": WaitsFor.QUEUE.value}


def replaced(*, is_due: sa.ColumnElement[bool], has_limits: bool, takes_turns: bool) -> Values:
    """The values of a job that has not started when its due time is moved.

    :param is_due: whether it is due nevertheless, because it must not be moved further.
    :param has_limits: whether the job has limits now.
    :param takes_turns: whether it takes turns with the jobs of other keys now.
    """
    now, later = _ready(has_limits=has_limits, takes_turns=takes_turns), scheduled()
    return {
        name: sa.case((is_due, sa.literal(now[name], sa.String)), else_=later[name]) for name in now
    }


def claimed(worker_id: Any, now: Any) -> Values:
    """The values of a claimed job. They reset those of the previous attempt."""
    return {
        **_with_status(JobStatus.RUNNING),
        "attempt": NEXT_ATTEMPT,
        "worker_id": worker_id,
        "claimed_at": now,
        "unique_hash": sa.case((_GIVES_KEY_UP, sa.null()), else_=JOBS.c.unique_hash),
        **_not_started(),
        "progress": None,
        "progress_note": None,
    }


def started(now: Time) -> Values:
    """The values of a running job whose code starts."""
    return {"started_at": now}


def completed(started_at: Time, finished_at: Time, result: Any, deleted_at: Any) -> Values:
    """The values of a job that completed without a report.

    :param deleted_at: when a job with its own retention is deleted.
    """
    return {
        **_with_status(JobStatus.COMPLETED),
        **ended(finished_at, deleted_at),
        "started_at": started_at,
        "result": result,
        "suspect": False,
        "error_type": None,
        "error": None,
    }


def settled(
    status: Any,
    *,
    waits: sa.ColumnElement[bool],
    now: Time,
    is_final: sa.ColumnElement[bool],
    has_started: sa.ColumnElement[bool],
    finished_at: Time,
    deleted_at: Any,
    due_at: Time,
    **columns: Any,
) -> Values:
    """The values of a job after any outcome, as SQL expressions for one statement.

    :param status: the new status, one of the targets of ``settle``.
    :param waits: whether the new status is ``waiting``.
    :param is_final: whether the new status is final.
    :param has_started: whether its code may have started, so that it does not expire any more.
    :param deleted_at: when a job with its own retention is deleted.
    :param due_at: when the job is due.
    :param columns: values from the outcome and the report.
    """
    final_values = {
        name: sa.case((is_final, value), else_=JOBS.c[name])
        for name, value in ended(finished_at, deleted_at).items()
    }
    final_values["deadline_at"] = sa.case(
        (is_final, deleted_at), (has_started, sa.null()), else_=JOBS.c.deadline_at
    )
    waiting_since = sa.case(
        (waits, sa.func.coalesce(JOBS.c.waiting_since, now)),
        (has_started, sa.null()),
        else_=JOBS.c.waiting_since,
    )
    return {
        "status": status,
        **columns,
        **final_values,
        "run_at": due_at,
        "waiting_since": waiting_since,
    }


def ended(finished_at: Time, deleted_at: Any) -> Values:
    """The values of every job that ends: its end time, when it is deleted if it has its own
    retention, and the release of its unique key, unless it keeps the key for some time."""
    keeps_key = JOBS.c.unique_expires_at.is_not(None)
    return {
        "finished_at": finished_at,
        "deadline_at": deleted_at,
        "unique_hash": sa.case((keeps_key, JOBS.c.unique_hash)),
    }


def cancelled(now: Time, deleted_at: Any) -> Values:
    """The values of a job that no worker holds when it is cancelled."""
    return {
        **_with_status(JobStatus.CANCELLED),
        **_waits_for_nothing(),
        **ended(now, deleted_at),
    }


def expired(now: Time, deleted_at: Any) -> Values:
    """The values of a job that did not start in time."""
    return {
        **cancelled(now, deleted_at),
        "error_type": "Expired",
        "error": "Expired: no worker started it in time",
    }


def asked_to_stop(now: Time) -> Values:
    """The values of a running job that is cancelled. It stays ``running`` until its code stops."""
    return {"cancel_requested_at": sa.func.coalesce(JOBS.c.cancel_requested_at, now)}


def retried_by_hand(now: Time) -> Values:
    """The values of a job that a person or the app retries, with no retry used."""
    return {
        **ready(),
        "run_at": now,
        "retry_count": 0,
        "crash_count": 0,
        "suspect": False,
        "deadline_at": None,
        "cancel_requested_at": None,
        "waiting_since": None,
        **_not_started(),
    }


def is_running_for(worker_id: Any, attempt: Any) -> sa.ColumnElement[bool]:
    """The fence of a settle: the condition that the worker still holds this attempt."""
    return sa.and_(
        JOBS.c.status == JobStatus.RUNNING.value,
        JOBS.c.attempt == attempt,
        JOBS.c.worker_id == worker_id,
    )


def _ready(*, has_limits: bool, takes_turns: bool) -> Values:
    """As :func:`ready`, for a job whose values are known."""
    if takes_turns:
        return scheduled()
    return waiting_for_limits() if has_limits else pending()


def _with_status(status: JobStatus) -> Values:
    return {"status": status.value}


def _waits_for_nothing() -> Values:
    return {"waits_for": None, "waiting_on": None}


def _not_started() -> Values:
    return {"started_at": None, "finished_at": None}
