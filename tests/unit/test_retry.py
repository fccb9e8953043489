"""How long to wait before a retry."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.job.retry import BACKOFFS, MAX_DELAY_SECONDS, RetryPolicy


@pytest.mark.parametrize(
    ("backoff", "waits"),
    [
        ("fixed", [5, 5, 5, 5, 5]),
        ("linear", [5, 10, 15, 20, 25]),
        ("exponential", [5, 10, 20, 40, 80]),
    ],
)
def test_backoff(backoff: str, waits: list[float]) -> None:
    """A single delay stays, grows by itself, or doubles from retry to retry."""
    policy = RetryPolicy((5.0,), backoff)
    assert [policy.delay(retry) for retry in range(1, 6)] == waits


@pytest.mark.parametrize("backoff", BACKOFFS)
def test_list(backoff: str) -> None:
    """A list gives one wait per retry, its last one serves all later ones, and nothing grows."""
    policy = RetryPolicy((1.0, 10.0, 60.0), backoff)
    assert [policy.delay(retry) for retry in (1, 2, 3, 4, 10_000)] == [1, 10, 60, 60, 60]


@pytest.mark.parametrize("backoff", BACKOFFS)
def test_cap(backoff: str) -> None:
    """No wait exceeds ``max_delay``."""
    policy = RetryPolicy((5.0,), backoff, max_delay=12.0)
    assert max(policy.delay(retry) for retry in range(1, 50)) == (5 if backoff == "fixed" else 12)


def test_cap_holds_for_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter does not lift a wait above ``max_delay``."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    assert RetryPolicy((10.0,), jitter=0.5).delay(1) == 15.0
    assert RetryPolicy((10.0,), max_delay=10.0, jitter=0.5).delay(1) == 10.0
    assert RetryPolicy((10.0,), max_delay=12.0, jitter=1.0).delay(1) == 12.0


def test_jitter_spreads() -> None:
    """Jitter spreads equal waits over both sides of the delay, by its share at most."""
    policy = RetryPolicy((100.0,), jitter=0.1)
    waits = [policy.delay(1) for _ in range(1_000)]
    assert 90 <= min(waits) < 97
    assert 103 < max(waits) <= 110
    assert len(set(waits)) > 900


def test_no_jitter_by_default() -> None:
    """Without jitter, the same retry waits the same time."""
    assert {RetryPolicy((5.0,)).delay(1) for _ in range(100)} == {5.0}


@pytest.mark.parametrize("backoff", BACKOFFS)
@pytest.mark.parametrize("delay", [0.0, 1e-6, 5.0, MAX_DELAY_SECONDS])
def test_retry_ten_thousand(backoff: str, delay: float) -> None:
    """Retry number 10,000 overflows nothing: its wait is finite and within a hundred years."""
    wait = RetryPolicy((delay,), backoff, jitter=1.0).delay(10_000)
    assert 0 <= wait <= MAX_DELAY_SECONDS


def test_zero_stays_zero() -> None:
    """A delay of 0 is no wait, however often it is doubled."""
    assert RetryPolicy((0.0,), "exponential", jitter=1.0).delay(500) == 0.0


@given(
    delays=st.lists(st.floats(0, MAX_DELAY_SECONDS), min_size=1, max_size=5).map(tuple),
    backoff=st.sampled_from(BACKOFFS),
    max_delay=st.none() | st.floats(0, MAX_DELAY_SECONDS),
    jitter=st.floats(0, 1),
    retry=st.integers(1, 10_000),
)
def test_bounds(
    delays: tuple[float, ...], backoff: str, max_delay: float | None, jitter: float, retry: int
) -> None:
    """Whatever the policy, a wait is a finite number from 0 to its limit."""
    wait = RetryPolicy(delays, backoff, max_delay, jitter).delay(retry)
    assert math.isfinite(wait)
    assert 0 <= wait <= (MAX_DELAY_SECONDS if max_delay is None else max_delay)
