"""How a job recurs: its timing, and what happens to ticks that are late or overlap."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ...job import durations
from ...job.text import shown
from ...job.zones import read_zone
from .timing import Timing, read_cron, read_every

MISSED = ("once", "skip", "all")
OVERLAP = ("skip", "queue", "allow")
_MIN_JITTER_SECONDS = 1.0
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """When and how a job recurs. All of it can be overridden at run time."""

    timezone: str
    """The time zone of ``cron``, in which times are also shown."""
    cron: str | None = None
    """The cron expression as written in the code."""
    every: float | None = None
    """The interval in seconds. Exactly one of ``cron`` and ``every`` is set."""
    missed: str = "once"
    """What to run for ticks that no worker ran in time: one job for all (``once``), none
    (``skip``), or one for each (``all``)."""
    grace: float | None = None
    """Seconds after which a late tick is skipped; ``None``: never."""
    overlap: str = "skip"
    """What to do at a tick while the last job is not finished: ``skip`` the tick, ``queue`` it
    until that job has finished, or ``allow`` both to run."""
    jitter: float = 0.0
    """Maximum seconds by which each job is delayed at random."""

    @functools.cached_property
    def timing(self) -> Timing:
        """The ticks."""
        if self.every is not None:
            return read_every(self.every)
        return read_cron(self.cron, read_zone(self.timezone))

    @property
    def expression(self) -> str:
        """The cron expression, or the interval, such as ``every 30 seconds``."""
        return _every(self.every) if self.every is not None else str(self.cron)

    def values(self) -> dict[str, Any]:
        """The values as they are stored, by name."""
        return dataclasses.asdict(self)

    def overridden(self, given: Mapping[str, Any]) -> Recurrence:
        """This recurrence with other values, some of those that :func:`checked` returns."""
        # One of them replaces the other.
        none = {"cron": None, "every": None} if {"cron", "every"} & set(given) else {}
        return Recurrence(**{**self.values(), **none, **given})


def _every(seconds: float) -> str:
    for size, unit in _UNITS:
        number, rest = divmod(seconds, size)
        if number and not rest:
            return f"every {unit}" if number == 1 else f"every {shortest(number)} {unit}s"
    return f"every {shortest(seconds)} seconds"


def shortest(number: float | None) -> str:
    """A number without ``.0`` and without an exponent, such as ``30`` or ``2.5``."""
    return "" if number is None else str(int(number) if number == int(number) else number)


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recurrence, with checked values in the form in which they are stored.

    :param given: some of :data:`~flask_bgjobs.options.RECURRENCE_OPTIONS`. Values that are ``None``
        are left out.
    :raises ValueError: says which value is not valid, and what is allowed.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if "cron" in values and "every" in values:
        raise ValueError("give either cron or every, not both")
    checked = {name: _CHECKS[name](value) for name, value in values.items()}
    if "cron" in checked:
        # The zone does not matter for the check.
        read_cron(checked["cron"], read_zone("UTC"))
    return checked


def _cron(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"cron must be a string such as '0 3 * * *', not {shown(value)}")
    return " ".join(value.split())


def _one_of(name: str, choices: tuple[str, ...], value: object) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return str(value)


def _jitter(value: object) -> float:
    seconds = durations.seconds(value, "jitter")
    if 0 < seconds < _MIN_JITTER_SECONDS:
        raise ValueError(
            f"the jitter of a schedule is 0 or at least 1 s, by which its jobs are delayed at "
            f"random, not {shown(value)}"
        )
    return seconds


_CHECKS: Mapping[str, Callable[[object], Any]] = {
    "cron": _cron,
    "every": lambda value: read_every(value).seconds,
    "timezone": lambda value: read_zone(value).key,
    "missed": functools.partial(_one_of, "missed", MISSED),
    "grace": lambda value: durations.seconds(value, "grace", above=True),
    "overlap": functools.partial(_one_of, "overlap", OVERLAP),
    "jitter": _jitter,
}
