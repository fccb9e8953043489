"""Durations at the edge: seconds or ``timedelta`` in, checked float seconds out."""

from __future__ import annotations

import datetime as dt
import math

from .retry import MAX_DELAY_SECONDS

Duration = int | float | dt.timedelta


def seconds(value: object, name: str, *, minimum: float = 0.0, above: bool = False) -> float:
    """``value`` as float seconds.

    :param value: an int or float of seconds, or a ``timedelta``.
    :param name: what it is called in the error.
    :param minimum: the least value allowed, or with ``above`` the value to exceed.
    :raises ValueError: for another type, NaN, infinity, or a value out of bounds.
    """
    if isinstance(value, dt.timedelta):
        number = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        raise ValueError(f"{name} must be seconds (int or float) or a timedelta, not {value!r}")
    too_small = number <= minimum if above else number < minimum
    if math.isnan(number) or too_small or number > MAX_DELAY_SECONDS:
        bound = "more than" if above else "at least"
        raise ValueError(
            f"{name} must be {bound} {minimum:g} s and at most a hundred years, not {value!r}"
        )
    return number
