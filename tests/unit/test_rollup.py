"""The rollup: which attempts it counts, in which period, and its percentiles."""

from __future__ import annotations

import datetime as dt
import random
import statistics
from typing import Any

import pytest

from flask_bgjobs.job.records import Outcome, Settled
from flask_bgjobs.job.rollup import HOUR, MINUTE, RUN, WAIT, RollupCounts, bucket_of, percentile
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from tests.unit.helpers import make_spec

CLAIMED = dt.datetime(2026, 1, 2, 3, 4, 58)


def settled(
    status: JobStatus | None = JobStatus.COMPLETED,
    kind: OutcomeKind = OutcomeKind.COMPLETED,
    waited: float | None = 0.5,
    ran: float = 0.25,
    **changes: Any,
) -> Settled:
    spec = make_spec(**{"claimed_at": CLAIMED, "run_at": CLAIMED, "queue": "mail", **changes})
    return Settled(spec, Outcome(1, 1, kind, wait_seconds=waited, run_seconds=ran), status)


def count_cells(*entries: Settled) -> dict[tuple[Any, ...], int]:
    counts = RollupCounts()
    for entry in entries:
        counts.note(entry)
    return {tuple(cell): number for cell, number in counts.cells().items()}


def test_attempt_is_counted_by_minute_and_hour() -> None:
    """An attempt is counted with its waiting time and its run time, per minute and hour."""
    run, wait = bucket_of(0.25), bucket_of(0.5)
    minute, hour = dt.datetime(2026, 1, 2, 3, 4), dt.datetime(2026, 1, 2, 3)
    assert count_cells(settled(), settled()) == {
        (MINUTE, minute, "mail", "completed", RUN, run): 2,
        (MINUTE, minute, "mail", "completed", WAIT, wait): 2,
        (HOUR, hour, "mail", "completed", RUN, run): 2,
        (HOUR, hour, "mail", "completed", WAIT, wait): 2,
    }


def test_attempt_is_counted_at_its_end() -> None:
    """An attempt is counted in the minute in which it ends."""
    minutes = {cell[1] for cell in count_cells(settled(ran=2.0)) if cell[0] == MINUTE}
    assert minutes == {dt.datetime(2026, 1, 2, 3, 5)}


def test_waiting_time_starts_at_due_time() -> None:
    """The waiting time includes the time between the due time and the claim."""
    due = CLAIMED - dt.timedelta(seconds=8)
    buckets = {cell[5] for cell in count_cells(settled(run_at=due)) if cell[4] == WAIT}
    assert buckets == {bucket_of(8.5)}


def test_refused_job_has_no_waiting_time() -> None:
    """A refused job is counted without a waiting time."""
    refused = settled(JobStatus.FAILED, OutcomeKind.REFUSED, waited=None, ran=0.0)
    assert {cell[4] for cell in count_cells(refused)} == {RUN}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (None, OutcomeKind.COMPLETED),
        (JobStatus.PENDING, OutcomeKind.GIVEN_BACK),
        (JobStatus.PENDING, OutcomeKind.LOST),
        (JobStatus.SCHEDULED, OutcomeKind.SNOOZED),
    ],
)
def test_postponed_job_is_not_counted(status: JobStatus | None, kind: OutcomeKind) -> None:
    """An attempt that is given back, rescued or snoozed, or lost its lease, is not counted."""
    assert count_cells(settled(status, kind)) == {}


def test_clear_removes_counts() -> None:
    """After ``clear``, no counts are left to write."""
    counts = RollupCounts()
    assert not counts
    counts.note(settled())
    assert counts
    counts.clear()
    assert not counts
    assert counts.cells() == {}


def test_percentile_accuracy() -> None:
    """A percentile calculated from buckets differs from the exact one by at most 10 %."""
    numbers = random.Random(7)
    for scale in (0.002, 0.5, 30.0, 9_000.0):
        times = [numbers.lognormvariate(0, 1) * scale for _ in range(5_000)]
        counts: dict[int, int] = {}
        for seconds in times:
            counts[bucket_of(seconds)] = counts.get(bucket_of(seconds), 0) + 1
        exact = statistics.quantiles(times, n=100)
        for share in (0.5, 0.95):
            read = percentile(counts, share)
            assert read == pytest.approx(exact[round(share * 100) - 1], rel=0.1, abs=0.001)


def test_percentile_without_values() -> None:
    """Without values there is no percentile."""
    assert percentile({}, 0.5) is None


@pytest.mark.parametrize(("seconds", "bucket"), [(-1.0, 0), (0.0, 0), (0.001, 0), (1e12, 127)])
def test_first_and_last_bucket(seconds: float, bucket: int) -> None:
    """A negative duration is in the first bucket, a duration of years in the last."""
    assert bucket_of(seconds) == bucket
