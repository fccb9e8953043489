"""How long jobs take, for how much work to have ready."""

from __future__ import annotations

import time

_SHARE_OF_NEWEST = 0.1
"""Quick to follow, calm against single outliers."""


class Pace:
    """A moving average of seconds per job."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        """``None`` before the first job."""

    def note(self, seconds: float) -> None:
        """Take one more job into account."""
        before = seconds if self.seconds is None else self.seconds
        self.seconds = (1 - _SHARE_OF_NEWEST) * before + _SHARE_OF_NEWEST * seconds


class Throughput:
    """How often jobs end while others wait for a place."""

    def __init__(self) -> None:
        self._gap = Pace()
        self._submitted = 0
        self._ended = 0
        self._looked = 0.0
        self._was_busy = False

    @property
    def seconds_per_job(self) -> float:
        """Between two ends; 0 as long as no job ever waited."""
        return self._gap.seconds or 0.0

    def submitted(self, jobs: int) -> None:
        """Note how many more jobs there are."""
        self._submitted += jobs

    def look(self, waiting: int, running: int) -> None:
        """Note how many of the jobs wait and run by now."""
        now, ended = time.monotonic(), self._submitted - waiting - running
        if self._was_busy and waiting and ended > self._ended:
            self._gap.note((now - self._looked) / (ended - self._ended))
        self._looked, self._ended, self._was_busy = now, ended, waiting > 0
