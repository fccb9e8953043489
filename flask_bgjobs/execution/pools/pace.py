"""Averages of run time and throughput, from which a worker decides how many jobs to prefetch."""

from __future__ import annotations

import time

_SHARE_OF_NEWEST = 0.1
"""Weight of the newest value: the average follows changes soon, but not single outliers."""


class Pace:
    """A moving average of seconds per job."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        """The average; ``None`` before the first job."""

    def note(self, seconds: float) -> None:
        """Add the seconds of one job to the average."""
        before = seconds if self.seconds is None else self.seconds
        self.seconds = (1 - _SHARE_OF_NEWEST) * before + _SHARE_OF_NEWEST * seconds


class Throughput:
    """How often jobs end while other jobs wait."""

    def __init__(self) -> None:
        self._gap = Pace()
        self._submitted = 0
        self._ended = 0
        self._updated_at = 0.0
        self._was_busy = False

    @property
    def seconds_per_job(self) -> float:
        """Average seconds between the ends of two jobs; 0 until a job has had to wait."""
        return self._gap.seconds or 0.0

    def note_submitted(self, jobs: int) -> None:
        """Note that jobs were submitted.

        :param jobs: how many; negative for jobs that were taken back.
        """
        self._submitted += jobs

    def update(self, waiting: int, running: int) -> None:
        """Note how many submitted jobs are waiting and running at this time."""
        now, ended = time.monotonic(), self._submitted - waiting - running
        if self._was_busy and waiting and ended > self._ended:
            self._gap.note((now - self._updated_at) / (ended - self._ended))
        self._updated_at, self._ended, self._was_busy = now, ended, waiting > 0
