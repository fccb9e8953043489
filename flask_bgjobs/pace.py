"""How long jobs take, for how much work to have ready."""

from __future__ import annotations

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
