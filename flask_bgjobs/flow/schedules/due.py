"""What happens to the due ticks of a schedule: which run, and which are skipped."""

from __future__ import annotations

import bisect
import datetime as dt
import itertools
import math
from collections.abc import Iterator, Sequence

from ...models import Schedule
from ...store import Plan, Run, Skip
from .definition import Definition
from .recurrence import Recurrence
from .timing import Timing

_MAX_TICKS = 100
"""Ticks that are run one by one. Of more, the oldest are skipped."""
_ON_TIME_SECONDS = 60.0
"""With ``missed="skip"`` and no grace, a tick runs if it is at most this late."""


def plan(
    schedule: Schedule, definition: Definition, recurrence: Recurrence, now: dt.datetime
) -> Plan:
    """What to do with the due ticks of a schedule.

    :param schedule: the row, whose ``next_tick_at`` is not later than ``now``.
    :param now: the time of the database's clock, in UTC, without ``tzinfo``.
    """
    first, last = schedule.next_tick_at, schedule.last_tick_at
    if last is not None and first <= last:
        # Not written by this code. A tick never runs twice.
        first = next_tick(recurrence.timing, last)
    ticks, has_older = due_ticks(recurrence.timing, first, now)
    skips = []
    if has_older:
        skips.append(Skip(first, f"only the newest {_MAX_TICKS} ticks are kept"))
    late = _late(ticks, recurrence.grace, now)
    if late:
        assert recurrence.grace is not None
        skips.append(_skip_all(late, f"more than {recurrence.grace:g} s late"))
    ticks = ticks[len(late) :]
    runs, skipped = _select(ticks, recurrence, now, is_held=schedule.held_at is not None)
    if skipped:
        skips.append(_skip_all(skipped, "no worker ran it in time"))
    is_held = recurrence.overlap == "queue" and len(runs) > 1
    if is_held:
        following, _ = runs[1]
        runs = runs[:1]
    return Plan(
        schedule=schedule,
        runs=[
            Run(tick, definition.job(tick, jitter=recurrence.jitter), missed)
            for tick, missed in runs
        ],
        skips=skips,
        next_tick_at=following if is_held else next_tick(recurrence.timing, max(first, now)),
        overlap=recurrence.overlap,
        is_held=is_held,
    )


def next_tick(timing: Timing, after: dt.datetime) -> dt.datetime:
    """The first tick later than ``after``. Both are in UTC, without ``tzinfo``."""
    return timing.next_after(after.replace(tzinfo=dt.UTC)).replace(tzinfo=None)


def due_ticks(
    timing: Timing, first: dt.datetime, now: dt.datetime
) -> tuple[list[dt.datetime], bool]:
    """The newest 100 ticks from ``first`` to ``now``, oldest first; and whether there are more.

    :param first: the first of them, which is included.
    """
    if first > now:
        return [], False
    ticks = [first, *itertools.islice(_ticks(timing, first, now), _MAX_TICKS)]
    if len(ticks) <= _MAX_TICKS:
        return ticks, False

    def newest_after(seconds: int) -> list[dt.datetime]:
        after = first + dt.timedelta(seconds=seconds)
        return list(itertools.islice(_ticks(timing, after, now), _MAX_TICKS + 1))

    # Reading all of them could take minutes: there are 86,400 a day if it runs every second.
    span = range(math.ceil((now - first).total_seconds()))
    start = bisect.bisect_left(span, True, key=lambda s: len(newest_after(s)) <= _MAX_TICKS)
    return newest_after(start), True


def _ticks(timing: Timing, after: dt.datetime, until: dt.datetime) -> Iterator[dt.datetime]:
    while (after := next_tick(timing, after)) <= until:
        yield after


def _late(
    ticks: Sequence[dt.datetime], grace: float | None, now: dt.datetime
) -> Sequence[dt.datetime]:
    """The ticks whose grace has passed."""
    if grace is None:
        return ()
    return ticks[: bisect.bisect_left(ticks, now - dt.timedelta(seconds=grace))]


def _select(
    ticks: Sequence[dt.datetime], recurrence: Recurrence, now: dt.datetime, *, is_held: bool
) -> tuple[list[tuple[dt.datetime, int]], Sequence[dt.datetime]]:
    """The ticks to run, each with the number of earlier ticks for which it stands, and those to
    skip.

    :param is_held: whether they were queued while the last job ran, so that none was missed.
    """
    if not ticks:
        return [], ()
    if is_held or recurrence.missed == "all":
        return [(tick, 0) for tick in ticks], ()
    on_time = now - dt.timedelta(seconds=_ON_TIME_SECONDS)
    if recurrence.missed == "skip" and recurrence.grace is None and ticks[-1] < on_time:
        return [], ticks
    return [(ticks[-1], len(ticks) - 1)], ()


def _skip_all(ticks: Sequence[dt.datetime], reason: str) -> Skip:
    return Skip(ticks[-1], reason, len(ticks) - 1)
