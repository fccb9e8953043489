"""What an attempt's outcome makes of its job."""

from __future__ import annotations

import itertools

import pytest

from flask_bgjobs.job import statuses
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind, Settlement, lost_kind, settlement

MAX_CRASHES = 3

WITH_A_RETRY_LEFT = {
    OutcomeKind.COMPLETED: "completed",
    OutcomeKind.FAILED: "retrying",
    OutcomeKind.TIMEOUT: "retrying",
    OutcomeKind.RETRY: "retrying",
    OutcomeKind.SNOOZED: "scheduled",
    OutcomeKind.FAILED_FINALLY: "failed",
    OutcomeKind.REFUSED: "failed",
    OutcomeKind.CANCELLED: "cancelled",
    OutcomeKind.GIVEN_BACK: "pending",
    OutcomeKind.LOST: "pending",
    OutcomeKind.LOST_AMONG: "pending",
    OutcomeKind.CRASHED: "pending",
}
WITH_NONE_LEFT = WITH_A_RETRY_LEFT | {
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
def test_who_is_blamed(is_started_suspect: bool, started_suspects: int, kind: OutcomeKind) -> None:
    """Only a suspect that had started, and was the only one, is proved to have crashed."""
    found = lost_kind(is_started_suspect=is_started_suspect, started_suspects=started_suspects)
    assert found is kind


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
    return (WITH_A_RETRY_LEFT if used < 3 else WITH_NONE_LEFT)[kind]


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_status(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """Every outcome leads to one status, by retries left, cancel request and crashes."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    assert settled.status == expected_status(kind, used, cancel, crashes)


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_retry_count(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """A retry is used exactly when the job goes to retrying, and never more than allowed."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    assert settled.retry_count == used + (settled.status == "retrying")
    assert settled.retry_count <= 3


@pytest.mark.parametrize("suspect", [False, True])
def test_a_job_given_back_is_as_suspect_as_before(suspect: bool) -> None:
    """Nothing was learnt about a job that is given back."""
    assert settle(OutcomeKind.GIVEN_BACK, suspect=suspect).suspect is suspect


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_crash_count(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """Only a proved crash raises the crash count, and nothing lowers it."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    crashed = kind is OutcomeKind.CRASHED and not cancel
    assert settled.crash_count == crashes + crashed


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_suspect(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """A job that may have killed its worker is a suspect when it runs again, and no other is."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    died = kind in (OutcomeKind.LOST, OutcomeKind.LOST_AMONG, OutcomeKind.CRASHED)
    assert settled.suspect is (died and settled.status == "pending")


@pytest.mark.parametrize(("kind", "used", "cancel", "crashes"), TABLE)
def test_delay_goes_with_a_wait(kind: OutcomeKind, used: int, cancel: bool, crashes: int) -> None:
    """A delay is given for the jobs that wait, and for no others."""
    settled = settle(kind, retry_count=used, cancel_requested=cancel, crash_count=crashes)
    waits = settled.status in ("retrying", "scheduled")
    assert (settled.delay_seconds is not None) is waits


@pytest.mark.parametrize("kind", [OutcomeKind.FAILED, OutcomeKind.TIMEOUT, OutcomeKind.RETRY])
def test_retry_delay_by_number(kind: OutcomeKind) -> None:
    """The delay is the policy's for the retry that is now used, counted from 1."""
    assert [settle(kind, retry_count=used).delay_seconds for used in range(3)] == [10, 20, 30]


@pytest.mark.parametrize("asked", [0.0, 7.5])
def test_delay_asked_by_code(asked: float) -> None:
    """A delay that the code asked for goes before the policy's, also when it is 0."""
    assert settle(OutcomeKind.RETRY, delay_seconds=asked).delay_seconds == asked
    assert settle(OutcomeKind.SNOOZED, delay_seconds=asked).delay_seconds == asked


def test_snooze_without_delay() -> None:
    """A snooze without a delay is due at once."""
    assert settle(OutcomeKind.SNOOZED).delay_seconds == 0.0


def test_retry_raised_without_retries() -> None:
    """``Retry`` uses a retry, so a job without retries fails."""
    assert settle(OutcomeKind.RETRY, retries=0, delay_seconds=5.0).status == "failed"


def test_crash_uses_no_retry_and_ignores_retries() -> None:
    """A crash runs the job again without retries, and quarantines it whatever is left."""
    assert settle(OutcomeKind.CRASHED, retries=0).status == "pending"
    last = settle(OutcomeKind.CRASHED, retries=9_999, crash_count=MAX_CRASHES - 1)
    assert (last.status, last.crash_count, last.retry_count) == ("failed", MAX_CRASHES, 0)


def test_status_groups() -> None:
    """The statuses are those of the life cycle; each is final, waiting or running."""
    words = {"scheduled", "pending", "running", "retrying", "completed", "failed", "cancelled"}
    assert {status.value for status in JobStatus} == words
    assert {status for status in JobStatus if status.is_final} == statuses.FINAL
    assert statuses.FINAL | statuses.WAITING | {JobStatus.RUNNING} == set(JobStatus)
    assert not statuses.FINAL & (statuses.WAITING | {JobStatus.RUNNING})
