"""The delay before a retry."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.job.retry import BACKOFFS, MAX_DELAY_SECONDS, RetryPolicy


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        ("fixed", [5, 5, 5, 5, 5]),
        ("linear", [5, 10, 15, 20, 25]),
        ("exponential", [5, 10, 20, 40, 80]),
    ],
)
def test_backoff(backoff: str, delays: list[float]) -> None:
    """A single delay stays fixed, grows linearly or doubles with each retry."""
    policy = RetryPolicy((5.0,), backoff)
    assert [policy.delay(retry) for retry in range(1, 6)] == delays


@pytest.mark.parametrize("backoff", BACKOFFS)
def test_list_of_delays(backoff: str) -> None:
    """A list has one delay per retry; its last delay applies to all later retries."""
    policy = RetryPolicy((1.0, 10.0, 60.0), backoff)
    assert [policy.delay(retry) for retry in (1, 2, 3, 4, 10_000)] == [1, 10, 60, 60, 60]


@pytest.mark.parametrize("backoff", BACKOFFS)
def test_max_delay(backoff: str) -> None:
    """No delay exceeds ``max_delay``."""
    policy = RetryPolicy((5.0,), backoff, max_delay=12.0)
    assert max(policy.delay(retry) for retry in range(1, 50)) == (5 if backoff == "fixed" else 12)


def test_max_delay_limits_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With jitter, no delay exceeds ``max_delay`` either."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    assert RetryPolicy((10.0,), jitter=0.5).delay(1) == 15.0
    assert RetryPolicy((10.0,), max_delay=10.0, jitter=0.5).delay(1) == 10.0
    assert RetryPolicy((10.0,), max_delay=12.0, jitter=1.0).delay(1) == 12.0


def test_jitter_range() -> None:
    """Jitter varies a delay in both directions, by at most its share."""
    policy = RetryPolicy((100.0,), jitter=0.1)
    delays = [policy.delay(1) for _ in range(1_000)]
    assert 90 <= min(delays) < 97
    assert 103 < max(delays) <= 110
    assert len(set(delays)) > 900


def test_no_jitter_by_default() -> None:
    """Without jitter, the same retry has the same delay."""
    assert {RetryPolicy((5.0,)).delay(1) for _ in range(100)} == {5.0}


@pytest.mark.parametrize("backoff", BACKOFFS)
@pytest.mark.parametrize("delay", [0.0, 1e-6, 5.0, MAX_DELAY_SECONDS])
def test_large_retry_number(backoff: str, delay: float) -> None:
    """The delay of retry 10,000 is finite and at most a hundred years."""
    delay_seconds = RetryPolicy((delay,), backoff, jitter=1.0).delay(10_000)
    assert 0 <= delay_seconds <= MAX_DELAY_SECONDS


def test_zero_delay_stays_zero() -> None:
    """A delay of 0 stays 0, even if it is doubled many times."""
    assert RetryPolicy((0.0,), "exponential", jitter=1.0).delay(500) == 0.0


@given(
    delays=st.lists(st.floats(0, MAX_DELAY_SECONDS), min_size=1, max_size=5).map(tuple),
    backoff=st.sampled_from(BACKOFFS),
    max_delay=st.none() | st.floats(0, MAX_DELAY_SECONDS),
    jitter=st.floats(0, 1),
    retry=st.integers(1, 10_000),
)
def test_delay_bounds(
    delays: tuple[float, ...], backoff: str, max_delay: float | None, jitter: float, retry: int
) -> None:
    """The delay of any policy is finite and between 0 and its limit."""
    delay_seconds = RetryPolicy(delays, backoff, max_delay, jitter).delay(retry)
    assert math.isfinite(delay_seconds)
    assert 0 <= delay_seconds <= (MAX_DELAY_SECONDS if max_delay is None else max_delay)
