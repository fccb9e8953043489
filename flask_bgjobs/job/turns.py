"""The order of claims: by priority, and by turns among the jobs of a queue that share it fairly.

Turns follow start-time fair queueing (P. Goyal, H. M. Vin and H. Cheng, 1996). The jobs of a queue
and a priority are divided by keys, such as tenants. In each turn, every key with jobs runs as many
of them as its weight says. A job gets its turn when it is due. With weight 1, this is the turn
after that of the previous job with the same key, or the current turn if that is later. So a key
with many jobs does not delay a key with few, and a key without jobs saves no turns for later.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeGuard

from .limits import hashed
from .text import shown

_RANKS_PER_PRIORITY = 2**32
"""The claim ranks of two priorities are so far apart."""
MAX_TURN = _RANKS_PER_PRIORITY - 1
"""The last turn. All later jobs share it, in the order of their due times. Since the ranks of turns
are the lowest 32 bits of claim ranks, it is also the mask of these bits."""
FIRST_TURN = 1.0
"""Jobs without a key have turn 0: they are claimed before those with one."""
_ROUNDING = 1e-6
"""More than the rounding errors of sums of fractions, such as three thirds, and less than any
fraction of a turn."""
DEFAULT_WEIGHT = 1.0
"""The weight of keys for which no other is set."""
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1_000.0
MAX_FAIR_KEY = 255
"""Maximum length of a key."""


class TurnsSeen(NamedTuple):
    """The turns of jobs with a priority, each ``None`` if there are no such jobs."""

    running: int | None = None
    """The latest turn of a running job in the queue."""
    pending: int | None = None
    """The earliest turn of a pending job in the queue."""
    waiting: int | None = None
    """The earliest turn of a job in the queue that waits for its limits."""
    elsewhere: int | None = None
    """The earliest turn of a pending job in any queue. A worker that serves all queues compares the
    turns of all, so a queue that had no jobs starts there, and not long before the others."""


class Standing(NamedTuple):
    """Where a queue is in its turns, within one priority."""

    turn: float = FIRST_TURN
    """The current turn: no earlier one is given to a job."""
    last: float = FIRST_TURN
    """The end of the latest turn that was given to a job."""
    round: int = 0
    """How often the queue has run out of jobs with turns. The turns of keys then begin anew."""

    def at(self, seen: TurnsSeen) -> Standing:
        """The standing now."""
        if seen.pending is not None:
            return self._replace(turn=max(self.turn, seen.pending))
        if seen.waiting is not None:
            running = min(seen.running or 0, self.last)
            return self._replace(turn=max(self.turn, running, seen.waiting))
        # Nobody is ahead of anybody else.
        start = max(FIRST_TURN, seen.elsewhere or 0)
        return Standing(start, start, self.round + 1)


def claim_rank(priority: int, turn: int = 0) -> int:
    """The number by which jobs are claimed, in ascending order."""
    return turn - priority * _RANKS_PER_PRIORITY


def take_turn(standing: Standing, following: float | None, weight: float) -> tuple[int, float]:
    """The turn of the next job with a key.

    :param following: where the turn of its previous job ended; ``None`` if it had none.
    :returns: the turn, and where it ends.
    """
    start = max(standing.turn, following or 0.0)
    return min(math.floor(start + _ROUNDING), MAX_TURN), start + 1.0 / weight


def is_weight(weight: object) -> TypeGuard[float]:
    """Whether a value is a valid weight."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return is_number and MIN_WEIGHT <= weight <= MAX_WEIGHT  # type: ignore[operator]


def check_weight(weight: object) -> float:
    """The weight of a key as a number.

    :raises ValueError: when it is not valid.
    """
    if not is_weight(weight):
        raise ValueError(
            f"a weight is a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:,g}, not {shown(weight)}"
        )
    return float(weight)


def queue_id(queue: str, priority: int) -> int:
    """The id of a queue and a priority."""
    return hashed(queue, str(priority))


def fair_key_id(queue: str, priority: int, key: str) -> int:
    """The id of a key in a queue and a priority."""
    return hashed(queue, str(priority), key)


def weight_id(key: str) -> int:
    """The id of the weight of a key."""
    return hashed(key)
