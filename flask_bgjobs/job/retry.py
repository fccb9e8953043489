"""Retry delays and backoff: computed without a clock."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal, get_args

Backoff = Literal["fixed", "linear", "exponential"]
BACKOFFS: tuple[str, ...] = get_args(Backoff)

MAX_DELAY_SECONDS = 100 * 365.25 * 86_400
"""A hundred years. Dates much further ahead are not valid in every database."""


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The delays between the attempts of a job."""

    delays: tuple[float, ...]
    """Seconds before the first, second, … retry. The last value applies to all later retries."""
    backoff: str = "fixed"
    """How a single delay grows per retry: ``fixed``, ``linear`` or ``exponential`` (doubling)."""
    max_delay: float | None = None
    """Maximum seconds of a delay, including jitter."""
    jitter: float = 0.0
    """Maximum random change of each delay, up or down, as a fraction of it, 0 to 1."""

    def delay(self, retry: int) -> float:
        """Seconds to wait before a retry.

        :param retry: the number of the retry, starting at 1.
        """
        listed_delay = self.delays[min(retry, len(self.delays)) - 1]
        seconds = listed_delay if len(self.delays) > 1 else listed_delay * self._growth(retry)
        seconds *= 1 + random.uniform(-self.jitter, self.jitter)
        limit = MAX_DELAY_SECONDS if self.max_delay is None else self.max_delay
        return min(seconds, limit)

    def _growth(self, retry: int) -> float:
        if self.backoff == "linear":
            return float(retry)
        if self.backoff == "exponential":
            # A float would overflow later, and by then every delay has reached its limit.
            return float(2 ** min(retry - 1, 64))
        return 1.0
