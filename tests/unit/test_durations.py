"""Reading durations from options and from the command line."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal

import pytest

from flask_bgjobs.job.durations import in_words, parse, seconds
from flask_bgjobs.job.retry import MAX_DELAY_SECONDS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (5, 5.0),
        (0.25, 0.25),
        (dt.timedelta(minutes=1), 60.0),
        (dt.timedelta(), 0.0),
        (MAX_DELAY_SECONDS, MAX_DELAY_SECONDS),
    ],
)
def test_valid_seconds(value: object, expected: float) -> None:
    """Seconds as int or float, and timedeltas, become float seconds."""
    number = seconds(value, "delay")
    assert number == expected
    assert type(number) is float


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -1e-9,
        dt.timedelta(microseconds=-1),
        math.nan,
        math.inf,
        -math.inf,
        MAX_DELAY_SECONDS * 1.001,
        10**400,
        10**5_000,
        dt.timedelta.max,
        True,
        False,
        None,
        "5",
        Decimal(5),
        [5],
        5j,
    ],
    ids=lambda value: repr(value) if not isinstance(value, int) else f"int{value.bit_length()}",
)
def test_invalid_seconds(value: object) -> None:
    """Anything but 0 s to a hundred years raises ``ValueError``."""
    with pytest.raises(ValueError):  # noqa: PT011 - the message cannot show an int of 5,000 digits
        seconds(value, "delay")


def test_error_message() -> None:
    """The message has the option's name, the allowed values and the given value."""
    with pytest.raises(ValueError, match=r"delay must be at least 0 s .*hundred years, not -3"):
        seconds(-3, "delay")
    with pytest.raises(ValueError, match=r"timeout must be seconds .* or a timedelta, not 'soon'"):
        seconds("soon", "timeout")


def test_minimum() -> None:
    """The minimum itself is valid, unless the value must be above it."""
    assert seconds(2, "lease", minimum=2) == 2.0
    with pytest.raises(ValueError, match="at least 2 s"):
        seconds(1.9, "lease", minimum=2)
    with pytest.raises(ValueError, match="more than 0 s"):
        seconds(0, "timeout", above=True)
    assert seconds(1e-6, "timeout", above=True) == 1e-6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("15m", 900.0),
        ("2h", 7_200.0),
        ("7d", 604_800.0),
        ("0.5d", 43_200.0),
    ],
)
def test_valid_string(text: str, expected: float) -> None:
    """A string is a number of seconds, or a number with a unit."""
    assert parse(text, "age") == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "d", "7 d", "7w", "7D", "1h30m", "7d\n", "\N{ARABIC-INDIC DIGIT SEVEN}d"),
        *("-1", "+1", "-7d", "nan", "inf", "-inf", "1e3", ".5", "1.", "1_000", "40000d", "9" * 400),
    ],
)
def test_invalid_string(text: str) -> None:
    """Any other string, or more than a hundred years, raises ``ValueError``."""
    with pytest.raises(ValueError, match="age must be"):
        parse(text, "age")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (0.9, "0 s"),
        (1, "1 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (7_199, "1 h"),
        (86_400, "1 d"),
        (864_000, "10 d"),
    ],
)
def test_duration_in_words(seconds: float, expected: str) -> None:
    """A duration is shown in whole numbers of its largest unit."""
    assert in_words(seconds) == expected
