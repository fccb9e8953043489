"""The statuses of a job, and the outcomes of attempts that lead to them.

:func:`settlement` contains all rules by which an outcome leads to a status. The thread pool, the
process pool, a give-back and a rescue all use it, so they cannot differ.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping


class JobStatus(enum.StrEnum):
    """The status of a job. The values are used in the database, the CLI and the dashboard."""

    SCHEDULED = "scheduled"
    """Enqueued with a delay or a ``run_at`` that has not come yet."""
    WAITING = "waiting"
    """Not allowed to run yet. ``Job.waits_for`` says what it waits for; see :class:`WaitsFor`."""
    PENDING = "pending"
    """Due, and ready for any worker that serves its queue."""
    RUNNING = "running"
    """Claimed by a worker. Shown as *cancelling* while a cancel waits for the code to stop."""
    RETRYING = "retrying"
    """The last attempt failed, and the job waits for the time of its next retry."""
    COMPLETED = "completed"
    FAILED = "failed"
    """Failed with no retry left or with ``Fail``, was refused, or crashed too often."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """``True`` if only a retry by hand can run the job again."""
        return self in FINAL


class WaitsFor(enum.StrEnum):
    """What a job with the status ``waiting`` waits for."""

    CODE = "code"
    """The worker that claimed it does not have the job's code. A worker that has it, such as one
    of another release of the app, runs it."""
    LIMIT = "limit"
    """One of its limits does not allow it yet."""
    QUEUE = "queue"
    """It has limits, and its queue is paused or no live worker serves it. Meanwhile, other jobs
    with these limits may run."""


FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})
UNCLAIMED = frozenset(
    {JobStatus.SCHEDULED, JobStatus.WAITING, JobStatus.PENDING, JobStatus.RETRYING}
)
"""Statuses of unfinished jobs that no worker holds, so that a cancel takes effect at once."""
NOT_STARTED = frozenset({JobStatus.SCHEDULED, JobStatus.WAITING, JobStatus.PENDING})
"""Statuses before the code has started for the first time."""
CAN_CHANGE: Mapping[str, tuple[JobStatus, ...]] = {
    "cancel": (
        JobStatus.SCHEDULED,
        JobStatus.RETRYING,
        JobStatus.WAITING,
        JobStatus.PENDING,
        JobStatus.RUNNING,
    ),
    "retry": (JobStatus.RETRYING, JobStatus.FAILED, JobStatus.CANCELLED),
    "delete": tuple(status for status in JobStatus if status is not JobStatus.RUNNING),
}
"""The statuses that each action by hand applies to. An action on many jobs reads them in this
order: a job that moves on meanwhile gets a status that is read later, or has ended."""


class OutcomeKind(enum.StrEnum):
    """How one attempt ended. :func:`settlement` then decides the job's next status."""

    COMPLETED = "completed"
    FAILED = "failed"
    """The code raised an exception, or its result could not be stored. A retry may follow."""
    TIMEOUT = "timeout"
    RETRY = "retry"
    """The code raised :class:`~flask_bgjobs.Retry`."""
    SNOOZED = "snoozed"
    """The code raised :class:`~flask_bgjobs.Snooze`. The job runs later, and no retry is used."""
    FAILED_FINALLY = "failed finally"
    """The code raised :class:`~flask_bgjobs.Fail`, or a retry could not succeed."""
    REFUSED = "refused"
    """The name is not on the worker's allow-list. Nothing was imported."""
    UNKNOWN = "unknown"
    """The worker's code does not have the job, but another release of the app may have it. The job
    waits for code, and no retry is used."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """It was claimed after its ``expires``. Its code was not started."""
    GIVEN_BACK = "given back"
    """The worker stopped before the attempt ended. No retry is used."""
    LOST = "lost"
    """The worker died, but the job was no started suspect, so no crash is counted for it."""
    LOST_AMONG = "lost among"
    """The worker died while it ran several started suspects. No crash is counted for any of them.
    Next time, each runs without another suspect."""
    CRASHED = "crashed"
    """The worker or child process died while this job was its only started suspect."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settlement:
    """The values of a job after an attempt."""

    status: JobStatus
    retry_count: int
    crash_count: int
    suspect: bool = False
    """Whether the job's last worker or child process died while it held the job."""
    delay_seconds: float | None = None
    """Seconds until the job is due again, by the database's clock."""


def settlement(
    kind: OutcomeKind,
    *,
    retry_count: int,
    retries: int,
    crash_count: int,
    max_crashes: int,
    suspect: bool,
    cancel_requested: bool,
    retry_delay: Callable[[int], float],
    delay_seconds: float | None = None,
) -> Settlement:
    """Decide what happens to a job after an attempt.

    :param kind: how the attempt ended.
    :param retry_count: number of retries used before this attempt.
    :param retries: number of allowed retries.
    :param crash_count: number of proved crashes before this attempt.
    :param max_crashes: number of crashes at which the job is quarantined as failed.
    :param suspect: whether the job was a suspect when it was claimed.
    :param cancel_requested: whether a cancel was requested while the attempt ran. The job is then
        cancelled after every outcome but a completed attempt.
    :param retry_delay: returns the seconds to wait before retry number n.
    :param delay_seconds: the delay that the code set with ``Retry`` or ``Snooze``.
    """
    if kind is OutcomeKind.COMPLETED:
        return Settlement(JobStatus.COMPLETED, retry_count, crash_count)
    if cancel_requested or kind in (OutcomeKind.CANCELLED, OutcomeKind.EXPIRED):
        return Settlement(JobStatus.CANCELLED, retry_count, crash_count)
    match kind:
        case OutcomeKind.FAILED_FINALLY | OutcomeKind.REFUSED:
            return Settlement(JobStatus.FAILED, retry_count, crash_count)
        case OutcomeKind.FAILED | OutcomeKind.TIMEOUT | OutcomeKind.RETRY:
            if retry_count >= retries:
                return Settlement(JobStatus.FAILED, retry_count, crash_count)
            used = retry_count + 1
            delay = retry_delay(used) if delay_seconds is None else delay_seconds
            return Settlement(JobStatus.RETRYING, used, crash_count, delay_seconds=delay)
        case OutcomeKind.SNOOZED:
            return Settlement(
                JobStatus.SCHEDULED, retry_count, crash_count, delay_seconds=delay_seconds or 0.0
            )
        case OutcomeKind.UNKNOWN:
            return Settlement(JobStatus.WAITING, retry_count, crash_count, suspect=suspect)
        case OutcomeKind.GIVEN_BACK:
            # The attempt proves nothing, so a suspect stays a suspect.
            return Settlement(JobStatus.PENDING, retry_count, crash_count, suspect=suspect)
        case OutcomeKind.LOST | OutcomeKind.LOST_AMONG:
            return Settlement(JobStatus.PENDING, retry_count, crash_count, suspect=True)
        case OutcomeKind.CRASHED:
            crashes = crash_count + 1
            if crashes >= max_crashes:
                return Settlement(JobStatus.FAILED, retry_count, crashes)
            return Settlement(JobStatus.PENDING, retry_count, crashes, suspect=True)


def lost_kind(*, is_started_suspect: bool, started_suspects: int) -> OutcomeKind:
    """The outcome of an attempt whose worker, or whose pool's processes, died while it ran.

    :param is_started_suspect: whether the job is a suspect whose start was committed.
    :param started_suspects: number of such suspects that the worker ran, including this one.
    """
    if not is_started_suspect:
        return OutcomeKind.LOST
    return OutcomeKind.CRASHED if started_suspects == 1 else OutcomeKind.LOST_AMONG
