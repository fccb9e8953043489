"""Convert durations from users (numbers, ``timedelta`` or text) to validated float seconds."""

from __future__ import annotations

import datetime as dt
import math
import re

from .retry import MAX_DELAY_SECONDS
from .text import shown

Duration = int | float | dt.timedelta

_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_WORDS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def seconds(value: object, name: str, *, minimum: float = 0.0, above: bool = False) -> float:
    """Convert a duration to float seconds.

    :param value: an int or float of seconds, or a ``timedelta``.
    :param name: the name of the value in the error message.
    :param minimum: the smallest allowed value in seconds; 0 by default.
    :param above: whether the value must exceed ``minimum``.
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
        raise ValueError(
            f"{name} must be seconds (int or float) or a timedelta, not {shown(value)}"
        )
    too_small = number <= minimum if above else number < minimum
    if math.isnan(number) or too_small or number > MAX_DELAY_SECONDS:
        bound = "more than" if above else "at least"
        raise ValueError(
            f"{name} must be {bound} {minimum:g} s and at most a hundred years, not {shown(value)}"
        )
    return number


def parse(text: str, name: str) -> float:
    """Convert a text such as ``90``, ``90s``, ``15m``, ``2h`` or ``7d`` to float seconds.

    :param name: the name of the value in the error message.
    :raises ValueError: for any other text, or more than a hundred years.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{name} must be seconds or like 90s, 15m, 2h or 7d, not {shown(text)}")
    return seconds(float(match[1]) * _UNIT_SECONDS[match[2]], name)


def in_words(seconds: float) -> str:
    """The duration in whole units of the largest unit that fits, such as ``3 min``."""
    for size, unit in _WORDS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "0 s"
