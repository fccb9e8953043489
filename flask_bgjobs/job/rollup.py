"""The roll-up: number of finished attempts, and their wait and run times, per minute and hour.

Charts read the roll-up instead of millions of jobs. Times are stored as counts in a histogram. The
upper bound of each bucket is about a fifth above its lower bound, so that percentiles of any period
have an error of at most a tenth.
"""

from __future__ import annotations

import collections
import datetime as dt
import math
from collections.abc import Mapping
from typing import NamedTuple

from .records import Settled
from .statuses import JobStatus, OutcomeKind

MINUTE, HOUR = 60, 3_600
"""Seconds of the two kinds of periods."""
RUN, WAIT = "run", "wait"
"""The two measures: how long the code ran, and how long the due job waited for its start."""
OUTCOMES = (JobStatus.COMPLETED, JobStatus.RETRYING, JobStatus.FAILED, JobStatus.CANCELLED)
"""Statuses of a job after an attempt that is counted."""

_EPOCH = dt.datetime(1970, 1, 1)
_BUCKETS_PER_DOUBLING = 4
"""Number of buckets in which the time doubles."""
_SHORTEST_SECONDS = 0.001
_LAST_BUCKET = 127
"""The bucket of all times from about 41 days on."""


class Cell(NamedTuple):
    """The key of a count: attempts with equal values are counted together."""

    seconds: int
    """Length of the period: :data:`MINUTE` or :data:`HOUR`."""
    begins_at: dt.datetime
    """Start of the period, UTC without ``tzinfo``."""
    queue: str
    outcome: str
    """One of :data:`OUTCOMES`."""
    measure: str
    """:data:`RUN`, for every attempt, or :data:`WAIT`, for attempts whose code has started."""
    bucket: int
    """Number of the histogram bucket; see :func:`bucket_of`."""


class RollupCounts:
    """Counts of the attempts that one worker has settled since the counts were last written."""

    def __init__(self) -> None:
        # One key holds both buckets, because note() runs for every job. cells() splits them.
        self._counts: dict[tuple[int, str, JobStatus, int, int | None], int] = {}
        self._claimed_at, self._claimed = _EPOCH, 0.0
        """Claim time of the last counted attempt, also in seconds. Jobs of one batch share it."""

    def __bool__(self) -> bool:
        return bool(self._counts)

    def note(self, settled: Settled) -> None:
        """Count an attempt.

        Attempts that were snoozed or given back, were taken in a rescue to run again, or lost their
        lease are not counted.
        """
        spec, outcome, status = settled.spec, settled.outcome, settled.status
        if status not in OUTCOMES or outcome.kind is OutcomeKind.SNOOZED:
            return
        if spec.claimed_at != self._claimed_at:
            self._claimed_at = spec.claimed_at
            self._claimed = (spec.claimed_at - _EPOCH).total_seconds()
        wait_seconds, run_seconds = outcome.wait_seconds, outcome.run_seconds
        minute = int(self._claimed + (wait_seconds or 0.0) + run_seconds) // MINUTE
        wait_bucket = None
        if wait_seconds is not None:
            wait_bucket = bucket_of((spec.claimed_at - spec.run_at).total_seconds() + wait_seconds)
        key = (minute, spec.queue, status, bucket_of(run_seconds), wait_bucket)
        self._counts[key] = self._counts.get(key, 0) + 1

    def clear(self) -> None:
        """Remove all counts, to be called after they were written."""
        self._counts.clear()

    def cells(self) -> Mapping[Cell, int]:
        """The counts, for minutes and for hours."""
        cells: collections.Counter[Cell] = collections.Counter()
        for (minute, queue, status, run_bucket, wait_bucket), number in self._counts.items():
            for seconds in (MINUTE, HOUR):
                begins = _EPOCH + dt.timedelta(seconds=minute * MINUTE // seconds * seconds)
                for measure, bucket in ((RUN, run_bucket), (WAIT, wait_bucket)):
                    if bucket is not None:
                        cells[Cell(seconds, begins, queue, status.value, measure, bucket)] += number
        return cells


def bucket_of(seconds: float) -> int:
    """The number of the histogram bucket for a time, starting at 0."""
    if seconds <= _SHORTEST_SECONDS:
        return 0
    return min(int(math.log2(seconds / _SHORTEST_SECONDS) * _BUCKETS_PER_DOUBLING), _LAST_BUCKET)


def percentile(counts: Mapping[int, int], share: float) -> float | None:
    """A percentile of the counted times.

    :param counts: number of times in each bucket.
    :param share: the percentile as a fraction, 0 to 1.
    :returns: seconds; ``None`` when nothing was counted.
    """
    remaining = share * sum(counts.values())
    for bucket in sorted(counts):
        remaining -= counts[bucket]
        if remaining <= 0:
            # The geometric mean of the bounds of the bucket.
            return float(_SHORTEST_SECONDS * 2 ** ((bucket + 0.5) / _BUCKETS_PER_DOUBLING))
    return None
