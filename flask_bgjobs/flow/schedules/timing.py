"""When a recurring job runs: by a cron expression in a time zone, or at an interval.

Each time at which it runs is called a tick.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime as dt
import math
import zoneinfo
from typing import Protocol

from cronsim import CronSim, CronSimError

from ...job import durations
from ...job.text import shown

_SHORT_NAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS = (
    ("a second", "0 to 59"),
    ("a minute", "0 to 59"),
    ("an hour", "0 to 23"),
    ("a day of the month", "1 to 31, L for the last, LW for the last weekday"),
    ("a month", "1 to 12 or JAN to DEC"),
    ("a day of the week", "0 (Sunday) to 7 or SUN to SAT, 5#2 for the second Friday, 5L the last"),
)
"""What each field contains, and its single values."""
_MIN_EVERY_SECONDS = 1.0
_SECOND = dt.timedelta(seconds=1)
_ANY_TIME = dt.datetime(2000, 1, 1)


class Timing(Protocol):
    """When a recurring job runs."""

    @property
    def follows_real_time(self) -> bool:
        """Whether ticks keep their distance when the clock is set back, and so may be repeated."""

    def next_after(self, moment: dt.datetime) -> dt.datetime:
        """The first tick later than ``moment``; both are in UTC, with ``tzinfo``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Every:
    """Ticks at a fixed interval, counted from 1970-01-01 UTC, so that a deploy does not shift
    them."""

    seconds: float

    @property
    def follows_real_time(self) -> bool:
        """``True``: an interval does not depend on what a clock shows."""
        return True

    def next_after(self, moment: dt.datetime) -> dt.datetime:
        """The first tick later than ``moment``; both are in UTC, with ``tzinfo``."""
        number = math.floor(moment.timestamp() / self.seconds) + 1
        tick = dt.datetime.fromtimestamp(number * self.seconds, dt.UTC)
        # The division may have been rounded down to the tick at ``moment``.
        return tick if tick > moment else tick + dt.timedelta(seconds=self.seconds)


@dataclasses.dataclass(frozen=True, slots=True)
class Cron:
    """Ticks at the times of a cron expression, by the clocks of a time zone.

    The hour field decides what happens when clocks change. If it is ``*`` or has a step, such as
    ``*/2`` or ``0-23/2``, there is a tick whenever the clock shows a time of the expression, so
    ``*/15 * * * *`` ticks every 15 minutes. Otherwise, each time of the expression has one tick.
    For times that the clock skips, this is a single tick at the end of the gap. For a time that
    the clock shows twice, it is the first of the two.
    """

    expression: str
    """Five fields, or six with the seconds first."""
    zone: zoneinfo.ZoneInfo

    @property
    def follows_real_time(self) -> bool:
        """Whether the hour field is ``*`` or has a step."""
        hours = self.expression.split()[-4]
        return hours.startswith("*") or "/" in hours

    def next_after(self, moment: dt.datetime) -> dt.datetime:
        """The first tick later than ``moment``; both are in UTC, with ``tzinfo``."""
        here = moment.astimezone(self.zone)
        return self._next_shown(here) if self.follows_real_time else self._next_once(here)

    def _next_once(self, here: dt.datetime) -> dt.datetime:
        ticks = map(self._first_shown, CronSim(self.expression, here.replace(tzinfo=None)))
        return next(tick for tick in ticks if tick > here)

    def _next_shown(self, here: dt.datetime) -> dt.datetime:
        """The next time at which the clock shows a time of the expression."""
        tick = self._next_shown_later(here.replace(tzinfo=None), here)
        set_back = self._set_back_after(here)
        if set_back is None or tick < set_back:
            return tick
        # The clock repeats times that it has already shown.
        just_before = set_back - _SECOND
        repeated = set_back.astimezone(self.zone).replace(tzinfo=None)
        return self._next_shown_later(repeated - _SECOND, just_before)

    def _next_shown_later(self, local: dt.datetime, moment: dt.datetime) -> dt.datetime:
        """The first tick after ``moment``, among times of the expression later than ``local``."""
        times = map(self._when_shown, CronSim(self.expression, local))
        return next(tick for ticks in times for tick in ticks if tick > moment)

    def _when_shown(self, local: dt.datetime) -> list[dt.datetime]:
        """When the clock shows ``local``, in order: never, once or twice."""
        folds = (local.replace(tzinfo=self.zone, fold=fold).astimezone(dt.UTC) for fold in (0, 1))
        return sorted({f for f in folds if f.astimezone(self.zone).replace(tzinfo=None) == local})

    def _first_shown(self, local: dt.datetime) -> dt.datetime:
        """When the clock first shows ``local``; the end of the gap, if the clock skips it."""
        for first in self._when_shown(local):
            return first
        # In a gap, fold=1 applies the offset that is valid after it. The result is before the gap.
        before, after = (local.replace(tzinfo=self.zone, fold=fold) for fold in (1, 0))
        return self._change_after(before, _offset_seconds(before) - _offset_seconds(after))

    def _set_back_after(self, here: dt.datetime) -> dt.datetime | None:
        """When the clock will be set back, if it will show ``here`` again."""
        first, second = here.replace(fold=0), here.replace(fold=1)
        repeated_seconds = _offset_seconds(first) - _offset_seconds(second)
        if here.fold or repeated_seconds <= 0:
            return None
        return self._change_after(here, repeated_seconds)

    def _change_after(self, here: dt.datetime, seconds: float) -> dt.datetime:
        """When the clock changes next, which is within so many seconds."""
        start = here.astimezone(dt.UTC).replace(microsecond=0)
        former = _offset_seconds(start.astimezone(self.zone))

        def has_changed(number: int) -> bool:
            return _offset_seconds((start + number * _SECOND).astimezone(self.zone)) != former

        number = bisect.bisect_left(range(math.ceil(seconds) + 1), True, key=has_changed)
        return start + number * _SECOND


def _offset_seconds(local: dt.datetime) -> float:
    offset = local.utcoffset()
    assert offset is not None
    return offset.total_seconds()


def read_cron(expression: object, zone: zoneinfo.ZoneInfo) -> Cron:
    """The timing of a cron expression.

    :param expression: five fields, six with the seconds first, or a name such as ``@daily``.
    :raises ValueError: says what is wrong, and what is allowed.
    """
    if not isinstance(expression, str):
        raise ValueError(f"cron must be a string such as '0 3 * * *', not {shown(expression)}")
    fields = " ".join(expression.upper().split())
    if fields.startswith("@"):
        fields = _SHORT_NAMES.get(fields.lower(), fields)
    try:
        next(CronSim(fields, _ANY_TIME))
    except (CronSimError, StopIteration):
        raise ValueError(f"cron {shown(expression)}: {_fault(fields)}") from None
    return Cron(fields, zone)


def _fault(fields: str) -> str:
    """What is wrong with a cron expression."""
    if fields.startswith("@"):
        return f"the names are {', '.join(_SHORT_NAMES)}"
    parts = fields.split()
    if len(parts) not in (5, 6):
        return (
            "an expression has five fields (minute, hour, day of the month, month, day of the "
            f"week), or six with the seconds first, not {len(parts)}"
        )
    for index, (what, allowed) in enumerate(_FIELDS[-len(parts) :]):
        alone = ["*"] * len(parts)
        alone[index] = parts[index]
        try:
            CronSim(" ".join(alone), _ANY_TIME)
        except CronSimError:
            values = f"{allowed}; lists, ranges and steps of these; or *"
            return f"{shown(parts[index])} is not {what} ({values})"
    return "it would never run, because no such date exists"


def read_every(value: object) -> Every:
    """The timing of an interval.

    :param value: seconds or a ``timedelta``, at least a second.
    :raises ValueError: for any other value.
    """
    return Every(durations.seconds(value, "every", minimum=_MIN_EVERY_SECONDS))
