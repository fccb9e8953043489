"""Recurrences in words."""

from __future__ import annotations

from ...job.text import sentence
from .recurrence import Recurrence
from .timing import Cron


def in_words(recurrence: Recurrence) -> str:
    """When a job runs, such as ``At 03:00, only on Sunday`` or ``Every 30 seconds``.

    The words for a cron expression are those of the library ``cron-descriptor``.
    """
    timing = recurrence.timing
    if not isinstance(timing, Cron):
        return sentence(recurrence.expression)
    # Imported here, because only people read the words.
    from cron_descriptor import Options, get_description

    options = Options(use_24hour_time_format=True, locale_code="en_US")
    try:
        return str(get_description(timing.expression, options))
    except Exception:
        # The library does not know all expressions that cronsim accepts.
        return timing.expression
