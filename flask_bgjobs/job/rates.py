"""Rate control: when the next jobs of a rate limit may start.

Two rules hold at once. The generic cell rate algorithm (GCRA, ITU-T I.371) spaces starts evenly. A
sliding window with the newest starts makes sure that no period has more than the rate allows, also
after a burst, and if jobs start later than they were admitted.

All times are integers: microseconds since 1970, by the database's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from .limits import Rule

SECOND = 1_000_000
_GRAIN = SECOND // 20
"""How far starts may lag behind an even spacing, and catch up. Workers do not admit jobs more
often than about this."""
_SLOTS = 100
"""In how many parts the window is divided. The starts in one part leave it together, with the last
of them."""


class RateState(NamedTuple):
    """The state of a rate limit for one key."""

    arrival: int | None = None
    """When the next job is due if the starts are evenly spaced; ``None``: none has started."""
    starts: tuple[tuple[int, int], ...] = ()
    """The starts in the window: the time of the last one in each part, and their number."""


class Permission(NamedTuple):
    """How many jobs may be admitted now."""

    number: int
    state: RateState
    """The state after they are admitted."""
    next_at: int | None
    """When more may be admitted; ``None`` if that depends on jobs that have been admitted and have
    not started."""


def with_starts(state: RateState, starts: Iterable[int], rule: Rule, now: int) -> RateState:
    """The state with more starts recorded, and without those that have left the window."""
    period = _period(rule)
    width = max(1, period // _SLOTS)
    slots: dict[int, tuple[int, int]] = {}
    # A time in the future is from before the clock was set back.
    for at, number in [*state.starts, *((start, 1) for start in starts)]:
        at = min(at, now)
        if at > now - period:
            latest, count = slots.get(at // width, (at, 0))
            slots[at // width] = max(latest, at), count + number
    return state._replace(starts=tuple(sorted(slots.values())))


def permit(state: RateState, rule: Rule, now: int, in_flight: int, wanted: int) -> Permission:
    """How many of ``wanted`` jobs may be admitted.

    :param in_flight: number of admitted jobs that have not started, or whose start is not recorded
        yet. They may start at any time, so they count as starts now.
    """
    assert rule.rate is not None
    period = _period(rule)
    spacing = period / rule.rate
    tolerance = (rule.burst - 1) * spacing
    # Not beyond one period ahead: the clock may have been set back.
    arrival = now if state.arrival is None else min(state.arrival, now + period)
    arrival = max(arrival, now - _GRAIN)
    ahead = now + tolerance - arrival
    by_spacing = int(ahead // spacing) + 1 if ahead >= 0 else 0
    recorded = sum(number for at, number in state.starts if at > now - period)
    by_window = rule.rate - recorded - in_flight
    number = max(0, min(wanted, by_spacing, by_window))
    arrival = round(arrival + number * spacing)
    after = state._replace(arrival=arrival)
    next_at: int | None = round(arrival - tolerance)
    if number == by_window:
        next_at = _later(next_at, _time_of_room(state, rule, recorded + in_flight + number))
    return Permission(number, after, next_at)


def given_back(state: RateState, rule: Rule, number: int) -> RateState:
    """The state after jobs that were admitted have lost their seats without having started."""
    assert rule.rate is not None
    if state.arrival is None:
        return state
    return state._replace(arrival=round(state.arrival - number * _period(rule) / rule.rate))


def starts_to_json(state: RateState) -> str | None:
    """The starts as stored."""
    return json.dumps(state.starts) if state.starts else None


def state_from(arrival: int | None, starts: str | None) -> RateState:
    """The state from its row; without starts if their text is not valid."""
    try:
        read = tuple((int(at), int(number)) for at, number in json.loads(starts or "[]"))
    except (ValueError, TypeError, RecursionError):
        read = ()
    return RateState(arrival, read)


def _period(rule: Rule) -> int:
    return round((rule.per_seconds or 0) * SECOND)


def _time_of_room(state: RateState, rule: Rule, used: int) -> int | None:
    """When so many starts have left the window that one more may follow; ``None`` if it is full of
    jobs that have not started."""
    assert rule.rate is not None
    for at, number in state.starts:
        used -= number
        if used < rule.rate:
            return at + _period(rule)
    return None


def _later(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)
