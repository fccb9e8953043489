"""The roll-up: how many attempts ended, and how long they waited and ran, per minute and hour.

Charts of a million jobs are drawn from it. Times are kept as counts in buckets, each a fifth wider
than the one before, so that a percentile of any period can be read with an error of a tenth.
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
"""Seconds of the two periods that are kept."""
RUN, WAIT = "run", "wait"
"""What was measured: the time that the code took, or that a due job waited for its start."""
OUTCOMES = (JobStatus.COMPLETED, JobStatus.RETRYING, JobStatus.FAILED, JobStatus.CANCELLED)
"""What an attempt that is counted made of its job."""

_EPOCH = dt.datetime(1970, 1, 1)
_PER_DOUBLING = 4
_SHORTEST_SECONDS = 0.001
_LAST_BUCKET = 127
"""Of fifty days and more."""


class Cell(NamedTuple):
    """What is counted together."""

    seconds: int
    """Of the period: :data:`MINUTE` or :data:`HOUR`."""
    begins_at: dt.datetime
    """The period's first moment, UTC without ``tzinfo``."""
    queue: str
    outcome: str
    """One of :data:`OUTCOMES`."""
    measure: str
    """:data:`RUN`, of every attempt, or :data:`WAIT`, of those whose code has started."""
    bucket: int
    """See :func:`bucket_of`."""


class Tally:
    """The attempts that one worker has settled since they were written last."""

    def __init__(self) -> None:
        # Of each job one entry, with both its buckets: that is written for every job that runs.
        self._counts: dict[tuple[int, str, JobStatus, int, int | None], int] = {}
        self._claimed_at, self._claimed = _EPOCH, 0.0
        """The last time of a claim, also in seconds: a batch of jobs has the same."""

    def __bool__(self) -> bool:
        return bool(self._counts)

    def note(self, settled: Settled) -> None:
        """Count an attempt, unless it was only put off, or is no longer the worker's."""
        spec, outcome, status = settled.spec, settled.outcome, settled.status
        if status not in OUTCOMES or outcome.kind is OutcomeKind.SNOOZED:
            return
        if spec.claimed_at != self._claimed_at:
            self._claimed_at = spec.claimed_at
            self._claimed = (spec.claimed_at - _EPOCH).total_seconds()
        waited, run_seconds = outcome.wait_seconds, outcome.run_seconds
        minute = int(self._claimed + (waited or 0.0) + run_seconds) // MINUTE
        wait_bucket = None
        if waited is not None:
            wait_bucket = bucket_of((spec.claimed_at - spec.run_at).total_seconds() + waited)
        key = (minute, spec.queue, status, bucket_of(run_seconds), wait_bucket)
        self._counts[key] = self._counts.get(key, 0) + 1

    def clear(self) -> None:
        """Begin anew, once all was written."""
        self._counts.clear()

    def cells(self) -> Mapping[Cell, int]:
        """What was counted, for minutes and for hours."""
        cells: collections.Counter[Cell] = collections.Counter()
        for (minute, queue, status, run_bucket, wait_bucket), number in self._counts.items():
            for seconds in (MINUTE, HOUR):
                begins = _EPOCH + dt.timedelta(seconds=minute * MINUTE // seconds * seconds)
                for measure, bucket in ((RUN, run_bucket), (WAIT, wait_bucket)):
                    if bucket is not None:
                        cells[Cell(seconds, begins, queue, status.value, measure, bucket)] += number
        return cells


def bucket_of(seconds: float) -> int:
    """The bucket of a time."""
    if seconds <= _SHORTEST_SECONDS:
        return 0
    return min(int(math.log2(seconds / _SHORTEST_SECONDS) * _PER_DOUBLING), _LAST_BUCKET)


def percentile(counts: Mapping[int, int], share: float) -> float | None:
    """Seconds that ``share`` of the counted times do not exceed; ``None`` when there are none.

    :param counts: by bucket.
    :param share: 0 to 1.
    """
    left = share * sum(counts.values())
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            # The middle of the bucket, in proportion.
            return float(_SHORTEST_SECONDS * 2 ** ((bucket + 0.5) / _PER_DOUBLING))
    return None
