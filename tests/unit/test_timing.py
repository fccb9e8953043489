"""The ticks of recurring jobs, compared with a model that looks at each minute of a clock."""

from __future__ import annotations

import datetime as dt
import functools
import zoneinfo
from collections.abc import Iterator
from typing import Any

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.flow.schedules.describe import in_words
from flask_bgjobs.flow.schedules.recurrence import Recurrence
from flask_bgjobs.flow.schedules.timing import Every, Timing, read_cron, read_every
from flask_bgjobs.job.zones import read_zone

UTC = zoneinfo.ZoneInfo("UTC")
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
MINUTE = dt.timedelta(minutes=1)
_AROUND = dt.timedelta(hours=30)

CHANGES = [
    ("Europe/Berlin", "2026-03-29T01:00"),
    ("Europe/Berlin", "2026-10-25T01:00"),
    ("America/New_York", "2026-03-08T07:00"),
    ("America/New_York", "2026-11-01T06:00"),
    # The clock changes by half an hour.
    ("Australia/Lord_Howe", "2026-04-04T15:00"),
    ("Australia/Lord_Howe", "2026-10-03T15:30"),
    # The clock is set back for Ramadan.
    ("Africa/Casablanca", "2026-02-15T02:00"),
    ("Africa/Casablanca", "2026-03-22T02:00"),
    # The clock skips midnight.
    ("America/Asuncion", "2022-10-02T04:00"),
    # The clock shows the hour before midnight twice.
    ("America/Santiago", "2026-04-05T03:00"),
    # The clock skips a day.
    ("Pacific/Apia", "2011-12-30T10:00"),
]
"""Time zones, and times in UTC at which their clocks change."""
EXPRESSIONS = [
    "* * * * *",
    "*/15 * * * *",
    "0 * * * *",
    "30 */2 * * *",
    "17 */3 * * *",
    "15 0-23/2 * * *",
    "0 1/2 * * *",
    "*/15 2 * * *",
    "0 0 * * *",
    "30 1 * * *",
    "59 1-3 * * *",
    "5,35 0,1,2,3 * * *",
    "0 3 * * *",
    "0 12 * * SUN",
    "*/7 23,0 * * *",
]


def moment(text: str) -> dt.datetime:
    """A time in UTC."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def ticks(timing: Timing, begin: dt.datetime, end: dt.datetime) -> list[dt.datetime]:
    """The ticks later than ``begin``, up to ``end``."""
    found = []
    while (begin := timing.next_after(begin)) <= end:
        found.append(begin)
    return found


@functools.cache
def clock(zone: str, change: str) -> dict[dt.datetime, dt.datetime]:
    """What a clock shows at each minute around a change, by the time in UTC."""
    begin, end = moment(change) - 2 * _AROUND, moment(change) + 2 * _AROUND
    minutes = (begin + n * MINUTE for n in range((end - begin) // MINUTE))
    tz = zoneinfo.ZoneInfo(zone)
    return {minute: minute.astimezone(tz).replace(tzinfo=None) for minute in minutes}


def expected(expression: str, zone: str, change: str) -> Iterator[dt.datetime]:
    """The ticks around a change, by looking at each minute."""
    shown = clock(zone, change)
    first, last = min(shown.values()), max(shown.values())
    matching = set()
    for time in CronSim(expression, first - MINUTE):
        if time > last:
            break
        matching.add(time)
    if expression.split()[1] == "*" or "/" in expression.split()[1]:
        yield from (minute for minute, time in shown.items() if time in matching)
        return
    seen: set[dt.datetime] = set()
    highest = first - MINUTE
    for minute, time in shown.items():
        skipped = {highest + n * MINUTE for n in range(1, (time - highest) // MINUTE)}
        if (time in matching and time not in seen) or skipped & matching:
            yield minute
        seen.add(time)
        highest = max(highest, time)


@pytest.mark.slow
@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize(("zone", "change"), CHANGES)
def test_ticks_when_clocks_change(zone: str, change: str, expression: str) -> None:
    """The ticks around each change are those of a model, wherever the search begins."""
    tz = zoneinfo.ZoneInfo(zone)
    instant = moment(change)
    before, after = (tz.utcoffset((instant + n * MINUTE).astimezone(tz)) for n in (-1, 0))
    assert before != after, "the test's time is wrong"
    begin, end = instant - _AROUND, instant + _AROUND
    model = [tick for tick in expected(expression, zone, change) if begin < tick <= end]
    timing = read_cron(expression, tz)
    assert ticks(timing, begin, end) == model
    for minutes in range(-150, 150, 7):
        now = instant + minutes * MINUTE
        assert timing.next_after(now) == next((t for t in model if t > now), timing.next_after(end))


def test_change_in_the_documentation() -> None:
    """In Berlin, times between 2 and 3 run once at the gap, and once when they occur twice."""
    timing = read_cron("*/15 2 * * *", BERLIN)
    spring = ticks(timing, moment("2026-03-28T22:00"), moment("2026-03-29T12:00"))
    assert spring == [moment("2026-03-29T01:00")]
    autumn = ticks(timing, moment("2026-10-24T22:00"), moment("2026-10-25T12:00"))
    assert autumn == [moment(f"2026-10-25T00:{minute}") for minute in ("00", "15", "30", "45")]


@given(
    st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2060, 1, 1), timezones=st.just(UTC)),
    st.sampled_from(EXPRESSIONS),
    st.sampled_from(sorted({zone for zone, _ in CHANGES})),
)
def test_next_tick_is_the_first(now: dt.datetime, expression: str, zone: str) -> None:
    """The next tick is later than any time, and no tick lies between them."""
    timing = read_cron(expression, zoneinfo.ZoneInfo(zone))
    tick = timing.next_after(now)
    assert now < tick
    assert tick.second == tick.microsecond == 0
    assert timing.next_after(now + (tick - now) / 2) == tick
    assert timing.next_after(tick) > tick


def test_six_fields_begin_with_seconds() -> None:
    """The first of six fields is for the seconds."""
    timing = read_cron("*/20 30 4 * * *", UTC)
    found = ticks(timing, moment("2026-01-01T00:00"), moment("2026-01-01T12:00"))
    assert [tick.strftime("%H:%M:%S") for tick in found] == ["04:30:00", "04:30:20", "04:30:40"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("@yearly", "2027-01-01T00:00"),
        ("@annually", "2027-01-01T00:00"),
        ("@monthly", "2026-12-01T00:00"),
        ("@Weekly", "2026-11-29T00:00"),
        (" @daily ", "2026-11-28T00:00"),
        ("@midnight", "2026-11-28T00:00"),
        ("@hourly", "2026-11-27T13:00"),
        ("0 9 * * mon-fri", "2026-11-30T09:00"),
        ("0\t9  1  jan *", "2027-01-01T09:00"),
        ("0 0 L * *", "2026-11-30T00:00"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 0 * * 7", "2026-11-29T00:00"),
        ("0 0 * * 5#2", "2026-12-11T00:00"),
    ],
)
def test_names(name: str, first: str) -> None:
    """Names of expressions, months and days in any case, and rare dates."""
    assert read_cron(name, UTC).next_after(moment("2026-11-27T12:30")) == moment(first)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("0 0 31 2 *", "it would never run, because no such date exists"),
        ("0 0 31 4,6,9,11 *", "it would never run"),
        ("* * * * * * *", "has five fields .* not 7"),
        ("* * *", "not 3"),
        ("", "not 0"),
        ("60 * * * *", "'60' is not a minute .0 to 59; lists"),
        ("* 24 * * *", "'24' is not an hour"),
        ("* * 0 * *", "'0' is not a day of the month"),
        ("* * * 13 *", "'13' is not a month .1 to 12 or JAN to DEC"),
        ("* * * * 8", "'8' is not a day of the week"),
        ("61 0 0 * * *", "'61' is not a second"),
        ("*/0 * * * *", r"'\*/0' is not a minute"),
        ("9-5 * * * *", "'9-5' is not a minute"),
        ("1,,2 * * * *", "is not a minute"),
        ("@reboot", "the names are @yearly, "),
        (None, "cron must be a string such as '0 3 . . .', not None"),
        (5, "not 5"),
    ],
)
def test_invalid_expressions(expression: object, message: str) -> None:
    """The error names the field, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        read_cron(expression, UTC)


def test_interval_is_counted_from_the_epoch() -> None:
    """The ticks of an interval do not depend on when a worker starts, whatever the interval."""
    timing = read_every(90)
    assert timing == Every(90.0)
    assert timing.next_after(moment("2026-01-01T00:00:10")) == moment("2026-01-01T00:01:30")
    assert timing.next_after(moment("2026-01-01T00:01:30")) == moment("2026-01-01T00:03:00")
    assert read_every(dt.timedelta(hours=1)) == Every(3600.0)


@given(
    st.floats(1, 1e6),
    st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2060, 1, 1), timezones=st.just(UTC)),
)
def test_interval_always_advances(seconds: float, now: dt.datetime) -> None:
    """Each tick is later than the one before, by the interval, to the microsecond."""
    timing = Every(seconds)
    first = timing.next_after(now)
    second = timing.next_after(first)
    assert now < first <= now + dt.timedelta(seconds=seconds, microseconds=2)
    assert abs((second - first).total_seconds() - seconds) < 1e-5


@pytest.mark.parametrize("every", [0, -1, 0.5, "60", None, float("nan"), dt.timedelta(0)])
def test_invalid_intervals(every: object) -> None:
    """An interval is at least a second."""
    with pytest.raises(ValueError, match="every must be"):
        read_every(every)


@pytest.mark.parametrize(
    ("zone", "message"),
    [
        ("europe/berlin", "did you mean 'Europe/Berlin'"),
        ("Europe/Berln", "did you mean 'Europe/Berlin'"),
        ("Atlantis", "there is no time zone 'Atlantis'"),
        ("Europe", "there is no time zone"),
        ("../etc/passwd", "there is no time zone"),
        ("", "there is no time zone"),
        ("a\0b", "there is no time zone"),
        (None, "is a name such as 'Europe/Berlin', not None"),
        (dt.UTC, "is a name such as"),
    ],
)
def test_invalid_zones(zone: object, message: str) -> None:
    """An unknown time zone is refused, with a suggestion if a known name is similar."""
    with pytest.raises(ValueError, match=message):
        read_zone(zone)


def test_system_without_time_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no data about time zones is installed, the error says what to install."""

    def find_none(name: str) -> None:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", find_none)
    monkeypatch.setattr(zoneinfo, "available_timezones", set)
    with pytest.raises(ValueError, match="pip install tzdata"):
        read_zone("Europe/Berlin")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cron": "0 3 * * *"}, "At 03:00"),
        ({"cron": "@weekly"}, "At 00:00, only on Sunday"),
        ({"cron": "*/15 2 * * mon-fri"}, "Every 15 minutes, between 02:00 and 02:59, Monday"),
        ({"cron": "0 3 LW * *"}, "At 03:00, on the last weekday of the month"),
        ({"every": 1.0}, "Every second"),
        ({"every": 90.0}, "Every 90 seconds"),
        ({"every": 120.0}, "Every 2 minutes"),
        ({"every": 86_400.0}, "Every day"),
        ({"every": 1.5}, "Every 1.5 seconds"),
    ],
    ids=str,
)
def test_words(options: Any, words: str) -> None:
    """A recurrence is described in plain English."""
    assert in_words(Recurrence("UTC", **options)).startswith(words)
