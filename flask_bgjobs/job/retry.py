"""How long to wait before a retry: pure arithmetic, no clock."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal, get_args

Backoff = Literal["fixed", "linear", "exponential"]
BACKOFFS: tuple[str, ...] = get_args(Backoff)

MAX_DELAY_SECONDS = 100 * 365.25 * 86_400
"""A hundred years: further ahead, databases disagree about what a date is."""


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The waits between the attempts of one job."""

    delays: tuple[float, ...]
    """Seconds before the first, second, … retry; the last one serves all later retries."""
    backoff: str = "fixed"
    """How a single delay grows: ``fixed``, ``linear`` or ``exponential`` (doubling)."""
    max_delay: float | None = None
    """Seconds that no wait exceeds, jitter included."""
    jitter: float = 0.0
    """Share of the delay, 0 to 1, by which each wait is spread at random up and down."""

    def delay(self, retry: int) -> float:
        """Seconds to wait before retry number ``retry``, which counts from 1."""
        listed = self.delays[min(retry, len(self.delays)) - 1]
        seconds = listed if len(self.delays) > 1 else listed * self._growth(retry)
        seconds *= 1 + random.uniform(-self.jitter, self.jitter)
        limit = MAX_DELAY_SECONDS if self.max_delay is None else self.max_delay
        return min(seconds, limit)

    def _growth(self, retry: int) -> float:
        if self.backoff == "linear":
            return float(retry)
        if self.backoff == "exponential":
            # Beyond 2**64 every delay has met its limit, and a float would overflow.
            return float(2 ** min(retry - 1, 64))
        return 1.0
