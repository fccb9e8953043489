"""The statuses of a job, and what an attempt's outcome makes of them.

Every rule "this outcome leads to that status" stands in :func:`settlement`, so that the
thread pool, the process pool, a give-back and a rescue cannot disagree about it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping


class JobStatus(enum.StrEnum):
    """Where a job stands. The values are the words used in the database, CLI and dashboard."""

    SCHEDULED = "scheduled"
    """Enqueued with a delay or a ``run_at`` that has not come yet."""
    PENDING = "pending"
    """Due, and free for any worker that serves its queue."""
    RUNNING = "running"
    """Claimed by a worker; ``cancelling`` while a cancel request waits for its code to stop."""
    RETRYING = "retrying"
    """Failed, and waiting for the time of its next retry."""
    COMPLETED = "completed"
    FAILED = "failed"
    """Failed with no retry left, on purpose (``Fail``), refused, or crashed too often."""
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """``True`` when nothing but a retry by hand can run the job again."""
        return self in FINAL


FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})
WAITING = frozenset({JobStatus.SCHEDULED, JobStatus.PENDING, JobStatus.RETRYING})
"""Statuses in which nobody runs the job, so that a cancel takes effect at once."""
CAN_CHANGE: Mapping[str, tuple[JobStatus, ...]] = {
    "cancel": (JobStatus.SCHEDULED, JobStatus.RETRYING, JobStatus.PENDING, JobStatus.RUNNING),
    "retry": (JobStatus.RETRYING, JobStatus.FAILED, JobStatus.CANCELLED),
    "delete": tuple(status for status in JobStatus if status is not JobStatus.RUNNING),
}
"""The statuses of the jobs that each action by hand can change. Where many jobs are meant they are
read in this order: one that moves on meanwhile stands in a later one, or has ended since."""


class OutcomeKind(enum.StrEnum):
    """How one attempt ended, before anybody decides what becomes of the job."""

    COMPLETED = "completed"
    FAILED = "failed"
    """The code raised, or its result was not storable, and a retry is allowed."""
    TIMEOUT = "timeout"
    RETRY = "retry"
    """The code raised :class:`~flask_bgjobs.Retry`."""
    SNOOZED = "snoozed"
    """The code raised :class:`~flask_bgjobs.Snooze`: later, without using a retry."""
    FAILED_FINALLY = "failed finally"
    """The code raised :class:`~flask_bgjobs.Fail`, or a retry could change nothing."""
    REFUSED = "refused"
    """The allow-list of the worker does not hold the name: nothing was imported."""
    CANCELLED = "cancelled"
    GIVEN_BACK = "given back"
    """The worker stopped before the attempt ended; no retry is used."""
    LOST = "lost"
    """The worker died before this job was known to have started; it is not blamed."""
    LOST_AMONG = "lost among"
    """The worker died while it ran several suspects that had started. None is blamed; each runs
    with no other suspect beside it next time."""
    CRASHED = "crashed"
    """The job's process died after its start was committed, and no other suspect ran there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a job after one attempt."""

    status: JobStatus
    retry_count: int
    crash_count: int
    suspect: bool = False
    """Its last worker died with it."""
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
    """What an attempt's outcome makes of its job.

    :param kind: how the attempt ended.
    :param retry_count: retries used before this attempt.
    :param retries: retries allowed.
    :param crash_count: proved crashes before this attempt.
    :param max_crashes: crashes at which the job is quarantined as failed.
    :param suspect: whether it was claimed as one whose last worker had died.
    :param cancel_requested: a cancel was asked for while the attempt ran. It wins over
        everything but a completed attempt.
    :param retry_delay: gives the seconds to wait before retry number n.
    :param delay_seconds: the delay that the code itself asked for with ``Retry`` or ``Snooze``.
    """
    if kind is OutcomeKind.COMPLETED:
        return Settlement(JobStatus.COMPLETED, retry_count, crash_count)
    if cancel_requested or kind is OutcomeKind.CANCELLED:
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
        case OutcomeKind.GIVEN_BACK:
            # Nothing was learnt about it.
            return Settlement(JobStatus.PENDING, retry_count, crash_count, suspect=suspect)
        case OutcomeKind.LOST | OutcomeKind.LOST_AMONG:
            return Settlement(JobStatus.PENDING, retry_count, crash_count, suspect=True)
        case OutcomeKind.CRASHED:
            crashes = crash_count + 1
            if crashes >= max_crashes:
                return Settlement(JobStatus.FAILED, retry_count, crashes)
            return Settlement(JobStatus.PENDING, retry_count, crashes, suspect=True)


def lost_kind(*, is_started_suspect: bool, started_suspects: int) -> OutcomeKind:
    """The outcome of an attempt whose worker, or whose pool's processes, died with it.

    :param is_started_suspect: whether the job is a suspect whose start had been committed.
    :param started_suspects: how many of those the worker ran, this one included.
    """
    if not is_started_suspect:
        return OutcomeKind.LOST
    return OutcomeKind.CRASHED if started_suspects == 1 else OutcomeKind.LOST_AMONG
