"""The roll-up's arithmetic: what is counted, in which period, and the percentiles read from it."""

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


def counted(*entries: Settled) -> dict[tuple[Any, ...], int]:
    counts = RollupCounts()
    for entry in entries:
        counts.note(entry)
    return {tuple(cell): number for cell, number in counts.cells().items()}


def test_an_attempt_counts_in_its_minute_and_its_hour() -> None:
    """An attempt is counted when it ends, with the time that it waited and that it ran."""
    run, wait = bucket_of(0.25), bucket_of(0.5)
    minute, hour = dt.datetime(2026, 1, 2, 3, 4), dt.datetime(2026, 1, 2, 3)
    assert counted(settled(), settled()) == {
        (MINUTE, minute, "mail", "completed", RUN, run): 2,
        (MINUTE, minute, "mail", "completed", WAIT, wait): 2,
        (HOUR, hour, "mail", "completed", RUN, run): 2,
        (HOUR, hour, "mail", "completed", WAIT, wait): 2,
    }


def test_it_counts_when_it_ends() -> None:
    """An attempt that runs into the next minute belongs to that."""
    begins = {cell[1] for cell in counted(settled(ran=2.0)) if cell[0] == MINUTE}
    assert begins == {dt.datetime(2026, 1, 2, 3, 5)}


def test_the_wait_begins_when_the_job_is_due() -> None:
    """The time before the claim is waiting as well."""
    due = CLAIMED - dt.timedelta(seconds=8)
    buckets = {cell[5] for cell in counted(settled(run_at=due)) if cell[4] == WAIT}
    assert buckets == {bucket_of(8.5)}


def test_code_that_never_started_did_not_wait() -> None:
    """A refused job is counted, without a waiting time."""
    refused = settled(JobStatus.FAILED, OutcomeKind.REFUSED, waited=None, ran=0.0)
    assert {cell[4] for cell in counted(refused)} == {RUN}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (None, OutcomeKind.COMPLETED),
        (JobStatus.PENDING, OutcomeKind.GIVEN_BACK),
        (JobStatus.PENDING, OutcomeKind.LOST),
        (JobStatus.SCHEDULED, OutcomeKind.SNOOZED),
    ],
)
def test_what_is_only_put_off_does_not_count(status: JobStatus | None, kind: OutcomeKind) -> None:
    """A lost lease, a give-back, a rescue and a snooze end nothing."""
    assert counted(settled(status, kind)) == {}


def test_counts_begin_anew() -> None:
    """After it was written, nothing is left to write."""
    counts = RollupCounts()
    assert not counts
    counts.note(settled())
    assert counts
    counts.clear()
    assert not counts
    assert counts.cells() == {}


def test_percentiles_err_by_a_tenth() -> None:
    """A percentile that is read from buckets is within a tenth of the real one."""
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


def test_percentiles_of_nothing() -> None:
    """Where nothing was measured there is no percentile."""
    assert percentile({}, 0.5) is None


@pytest.mark.parametrize(("seconds", "bucket"), [(-1.0, 0), (0.0, 0), (0.001, 0), (1e12, 127)])
def test_the_ends_of_the_buckets(seconds: float, bucket: int) -> None:
    """A clock that went back, and a job of years, have their buckets as well."""
    assert bucket_of(seconds) == bucket
