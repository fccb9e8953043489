"""Rate control: brute force over random workloads, clocks and delays."""

from __future__ import annotations

import itertools
import random

import pytest

from flask_bgjobs.job.limits import Rule
from flask_bgjobs.job.rates import (
    SECOND,
    RateState,
    permit,
    starts_to_json,
    state_from,
    with_starts,
)


def most_in_a_window(starts: list[int], period: int) -> int:
    """The largest number of starts in any window of this length, both ends included less 1 µs."""
    ordered = sorted(starts)
    return max(
        (sum(1 for other in ordered if at <= other < at + period) for at in ordered), default=0
    )


def simulate(rule: Rule, seed: int, *, seconds: float, max_delay: float, step: float) -> list[int]:
    """Admit as many jobs as possible. Each starts after a random delay, and is recorded later."""
    chance = random.Random(seed)
    now, state = 1_700_000_000 * SECOND, RateState()
    end = now + round(seconds * SECOND)
    admitted: list[int] = []
    unrecorded: list[tuple[int, int]] = []
    starts: list[int] = []
    while now < end:
        known = [start for start, recorded in unrecorded if recorded <= now]
        unrecorded = [each for each in unrecorded if each[1] > now]
        state = with_starts(state, known, rule, now)
        allowed = permit(state, rule, now, len(unrecorded), chance.choice([1, 3, 10_000]))
        state = state_from(allowed.state.arrival, starts_to_json(allowed.state))
        for _ in range(allowed.number):
            start = now + round(chance.uniform(0, max_delay) * SECOND)
            unrecorded.append((start, start + round(chance.uniform(0, max_delay) * SECOND)))
            starts.append(start)
        admitted += [now] * allowed.number
        now += round(chance.uniform(0, step) * SECOND) + 1
    return starts


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("rate", "per", "burst"), [(1, 1, 1), (5, 2, 1), (10, 1, 10), (10, 3, 4), (100, 1, 20)]
)
def test_no_window_has_more_starts_than_the_rate(
    rate: int, per: float, burst: int, seed: int
) -> None:
    """However late jobs start and are recorded, no period has more than ``rate`` starts."""
    rule = Rule(rate=rate, per_seconds=per, burst=burst)
    max_delay = [0.0, 0.05, 0.5, 3.0][seed % 4]
    starts = simulate(rule, seed, seconds=per * 12, max_delay=max_delay, step=per / 10)
    assert most_in_a_window(starts, round(per * SECOND)) <= rate
    assert starts


@pytest.mark.parametrize(
    ("rate", "per", "burst"), [(5, 2, 1), (10, 1, 10), (100, 1, 5), (1000, 1, 1)]
)
def test_it_reaches_the_rate(rate: int, per: float, burst: int) -> None:
    """Jobs that start at once reach at least 95 % of the rate over ten periods."""
    rule = Rule(rate=rate, per_seconds=per, burst=burst)
    starts = simulate(rule, 1, seconds=per * 10, max_delay=0.0, step=0.01)
    assert len(starts) >= 0.95 * rate * 10


def test_starts_are_evenly_spaced_without_burst() -> None:
    """With a rate of two per second, a job is admitted every half second."""
    rule = Rule(rate=2, per_seconds=1)
    starts = simulate(rule, 3, seconds=5, max_delay=0.0, step=0.001)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(0.44 * SECOND < gap < 0.56 * SECOND for gap in gaps)


def test_a_burst_is_admitted_at_once() -> None:
    """After a pause, ``burst`` jobs may start together, and then one at a time."""
    rule = Rule(rate=10, per_seconds=10, burst=4)
    now = 1_700_000_000 * SECOND
    first = permit(RateState(), rule, now, 0, 100)
    assert first.number == 4
    second = permit(first.state, rule, now + SECOND, 4, 100)
    assert second.number == 1
    assert second.next_at == now + 2 * SECOND


@pytest.mark.parametrize("jump", [-86_400, -100, -1, 1, 100, 86_400])
def test_a_clock_that_jumps_blocks_for_one_period_at_most(jump: int) -> None:
    """After the clock was set, the next job may start within one period."""
    rule = Rule(rate=3, per_seconds=5)
    now = 1_700_000_000 * SECOND
    state = with_starts(RateState(), [now] * 3, rule, now)
    state = permit(state, rule, now, 0, 3).state
    later = now + jump * SECOND
    state = with_starts(state, [], rule, later)
    allowed = permit(state, rule, later, 0, 1)
    if not allowed.number:
        assert allowed.next_at is not None
        assert allowed.next_at <= later + 5 * SECOND
        again = with_starts(allowed.state, [], rule, allowed.next_at)
        assert permit(again, rule, allowed.next_at, 0, 1).number == 1


def test_the_next_time_is_unknown_while_admitted_jobs_have_not_started() -> None:
    """If all of the rate is in flight, only their starts tell when the next job may follow."""
    rule = Rule(rate=2, per_seconds=1, burst=2)
    allowed = permit(RateState(), rule, 1_700_000_000 * SECOND, 2, 5)
    assert allowed.number == 0
    assert allowed.next_at is None


def test_unreadable_starts_count_as_none() -> None:
    """A row that somebody has edited does not stop the limit."""
    for text in ("x", "[[1]]", '{"a": 1}', "[null]"):
        assert state_from(5, text) == RateState(5, ())


def test_the_log_stays_small() -> None:
    """A window with many starts is stored in about a hundred parts."""
    rule = Rule(rate=100_000, per_seconds=60)
    now = 1_700_000_000 * SECOND
    state = with_starts(RateState(), range(now - 60 * SECOND, now, 2_000), rule, now)
    assert sum(number for _, number in state.starts) == 30_000 - 1
    assert len(state.starts) <= 102
