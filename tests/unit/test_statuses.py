"""How an attempt's outcome changes the status of its job."""

from __future__ import annotations

import itertools

import pytest

from flask_bgjobs.job import statuses
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind, Settlement, lost_kind, settlement

MAX_CRASHES = 3

WITH_RETRIES_LEFT = {
    OutcomeKind.COMPLETED: "completed",
    OutcomeKind.FAILED: "retrying",
    OutcomeKind.TIMEOUT: "retrying",
    OutcomeKind.RETRY: "retrying",
    OutcomeKind.SNOOZED: "scheduled",
    OutcomeKind.FAILED_FINALLY: "failed",
    OutcomeKind.REFUSED: "failed",
    OutcomeKind.CANCELLED: "cancelled",
    OutcomeKind.EXPIRED: "cancelled",
    OutcomeKind.UNKNOWN: "waiting",
    OutcomeKind.GIVEN_BACK: "pending",
    OutcomeKind.LOST: "pending",
    OutcomeKind.LOST_AMONG: "pending",
    OutcomeKind.CRASHED: "pending",
}
WITHOUT_RETRIES_LEFT = WITH_RETRIES_LEFT | {
    OutcomeKind.FAILED: "failed",
    OutcomeKind.TIMEOUT: "failed",
    OutcomeKind.RETRY: "failed",
}
TABLE = list(itertools.product(OutcomeKind, [0, 2, 3], [False, True], [0, 1, 2]))


@pytest.mark.parametrize(
    ("is_started_suspect", "started_suspects", "kind"),
    [
        (False, 0, OutcomeKind.LOST),
        (False, 1, OutcomeKind.LOST),
        (True, 1, OutcomeKind.CRASHED),
        (True, 2, OutcomeKind.LOST_AMONG),
    ],
)
def test_lost_kind(is_started_suspect: bool, started_suspects: int, kind: OutcomeKind) -> None:
    """A suspect is counted as crashed only if it was the only started suspect."""
    lost = lost_kind(is_started_suspect=is_started_suspect, started_suspects=started_suspects)
    assert lost is kind


def settle(kind: OutcomeKind, **changes: object) -> Settlement:
    values = {
        "retry_count": 0,
        "retries": 3,
        "crash_count": 0,
        "max_crashes": MAX_CRASHES,
        "suspect": False,
        "cancel_requested": False,
        "retry_delay": lambda retry: 10.0 * retry,
    }
    return settlement(kind, **{**values, **changes})


def expected_status(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> str:
    if cancel and kind is not OutcomeKind.COMPLETED:
        return "cancelled"
    if kind is OutcomeKind.CRASHED and crashes + 1 == MAX_CRASHES:
        return "failed"
    return (WITH_RETRIES_LEFT if used < 3 else WITHOUT_RETRIES_LEFT)[kind]


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_status_for_outcome(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """Outcome, retries left, cancel request and crashes determine the new status."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    assert settled.status == expected_status(kind, used, cancel, crashes)


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_retry_count(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """A retry is counted only if the job becomes ``retrying``, and never exceeds the limit."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    assert settled.retry_count == used + (settled.status == "retrying")
    assert settled.retry_count <= 3


@pytest.mark.parametrize("suspect", [False, True])
def test_given_back_job_keeps_suspect_flag(suspect: bool) -> None:
    """A job that is given back keeps its suspect flag."""
    assert settle(OutcomeKind.GIVEN_BACK, suspect=suspect).suspect is suspect


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_crash_count(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """Only a proven crash increases the crash count, and nothing decreases it."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    crashed = kind is OutcomeKind.CRASHED and not cancel
    assert settled.crash_count == crashes + crashed


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_lost_job_becomes_suspect(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """Only a job that may have killed its worker becomes a suspect for its next run."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    died = kind in (OutcomeKind.LOST, OutcomeKind.LOST_AMONG, OutcomeKind.CRASHED)
    assert settled.suspect is (died and settled.status == "pending")


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_only_waiting_jobs_have_delay(
    kind: OutcomeKind, used: int, cancel: bool, crashes: int
) -> None:
    """Only jobs that become ``retrying`` or ``scheduled`` have a delay."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    waits = settled.status in ("retrying", "scheduled")
    assert (settled.delay_seconds is not None) is waits


@pytest.mark.parametrize("kind", [OutcomeKind.FAILED, OutcomeKind.TIMEOUT, OutcomeKind.RETRY])
def test_retry_delay_by_retry_number(kind: OutcomeKind) -> None:
    """The retry policy gets the number of the next retry, starting at 1."""
    assert [settle(kind, retry_count=used).delay_seconds for used in range(3)] == [10, 20, 30]


@pytest.mark.parametrize("requested", [0.0, 7.5])
def test_requested_delay_overrides_policy(requested: float) -> None:
    """A delay requested by the code overrides the policy's delay, even if it is 0."""
    assert settle(OutcomeKind.RETRY, delay_seconds=requested).delay_seconds == requested
    assert settle(OutcomeKind.SNOOZED, delay_seconds=requested).delay_seconds == requested


def test_snooze_without_delay() -> None:
    """A snoozed job without a delay is due at once."""
    assert settle(OutcomeKind.SNOOZED).delay_seconds == 0.0


def test_retry_without_retries_left() -> None:
    """``Retry`` uses a retry, so a job without retries fails."""
    assert settle(OutcomeKind.RETRY, retries=0, delay_seconds=5.0).status == "failed"


def test_crash_is_independent_of_retries() -> None:
    """A crash uses no retry; after too many crashes the job fails, even with retries left."""
    assert settle(OutcomeKind.CRASHED, retries=0).status == "pending"
    last = settle(OutcomeKind.CRASHED, retries=9_999, crash_count=MAX_CRASHES - 1)
    assert (last.status, last.crash_count, last.retry_count) == ("failed", MAX_CRASHES, 0)


def test_status_groups() -> None:
    """Each status is exactly one of final, unclaimed or running."""
    unfinished = {"scheduled", "waiting", "pending", "running", "retrying"}
    final = {"completed", "failed", "cancelled"}
    assert {status.value for status in JobStatus} == unfinished | final
    assert {status for status in JobStatus if status.is_final} == statuses.FINAL
    assert statuses.FINAL | statuses.UNCLAIMED | {JobStatus.RUNNING} == set(JobStatus)
    assert not statuses.FINAL & (statuses.UNCLAIMED | {JobStatus.RUNNING})
