"""The backoff before an ended child process is started again. It only computes; it has no clock."""

from __future__ import annotations

import random

_LEAST_SECONDS, _MOST_SECONDS = 1.0, 30.0
_STEADY_SECONDS = 60.0
"""A child that ran this long is healthy: the backoff starts over."""


class Restarts:
    """Computes the pause before each restart of one child."""

    def __init__(self) -> None:
        self._pause = 0.0

    def pause(self, lived_seconds: float, *, failed: bool) -> float:
        """Seconds to wait before the next start.

        The first restart after a failure is immediate. Repeated failures wait 1, 2, 4, … up to 30
        seconds, with jitter, so that many children do not restart all at once. A child that ended
        as intended, for example at a limit, starts at most once per second.

        :param lived_seconds: from the child's start to its end.
        :param failed: whether the child ended with an error.
        """
        if not failed or lived_seconds >= _STEADY_SECONDS:
            self._pause = 0.0
        if not failed:
            return max(0.0, _LEAST_SECONDS - lived_seconds)
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(max(self._pause * 2, _LEAST_SECONDS), _MOST_SECONDS)
        return pause
