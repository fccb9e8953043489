"""When a child process that has ended is started again: pure arithmetic, no clock."""

from __future__ import annotations

import random

_LEAST_SECONDS, _MOST_SECONDS = 1.0, 30.0
_STEADY_SECONDS = 60.0
"""A child that ran this long is healthy: the backoff starts over."""


class Restarts:
    """The pauses before the starts of one child after the other in the same place."""

    def __init__(self) -> None:
        self._pause = 0.0

    def pause(self, lived_seconds: float, *, failed: bool) -> float:
        """Seconds to wait before the next start.

        A failure is answered at once, and failures in quick succession after 1, 2, 4, … up to 30
        seconds, with jitter, so that many children do not come all at once. What is meant to end
        from time to time starts once in a second at most.

        :param lived_seconds: from the child's start to its end.
        :param failed: whether it ended otherwise than it should.
        """
        if not failed or lived_seconds >= _STEADY_SECONDS:
            self._pause = 0.0
        if not failed:
            return max(0.0, _LEAST_SECONDS - lived_seconds)
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(max(self._pause * 2, _LEAST_SECONDS), _MOST_SECONDS)
        return pause
