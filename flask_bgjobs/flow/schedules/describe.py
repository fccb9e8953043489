"""Recurrences in words."""

from __future__ import annotations

from .recurrence import Recurrence
from .timing import Cron

_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def in_words(recurrence: Recurrence) -> str:
    """When a job runs, such as ``At 03:00, only on Sunday`` or ``Every 30 seconds``.

    The words for a cron expression are those of the library ``cron-descriptor``.
    """
    if recurrence.every is not None:
        return _every(recurrence.every)
    timing = recurrence.timing
    assert isinstance(timing, Cron)
    # Imported here, because only people read the words.
    from cron_descriptor import Options, get_description

    options = Options(use_24hour_time_format=True, locale_code="en_US")
    try:
        return str(get_description(timing.expression, options))
    except Exception:
        # The library does not know all expressions that cronsim accepts.
        return timing.expression


def _every(seconds: float) -> str:
    for size, unit in _UNITS:
        number, rest = divmod(seconds, size)
        if number and not rest:
            return f"Every {unit}" if number == 1 else f"Every {number:g} {unit}s"
    return f"Every {seconds:g} seconds"
