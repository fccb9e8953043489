"""Clocks that jump or differ, and a scheduler that hangs: jobs are neither delayed nor early."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.state import AppState
from tests.acceptance.conftest import WallClock
from tests.acceptance.helpers import beats, enqueue, lines, stop_between_transactions, workers
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

HOUR = 3_600.0
LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.1}
LEASE_IN_BEATS = 20
"""More heartbeats than fit in a lease: each worker has had time to take the other's lease."""


def seconds_ahead() -> float:
    """How far the worker's wall clock is ahead of this process's."""
    return float(enqueue("wall_clock").wait(DEADLINE_SECONDS).result) - time.time()


def assert_on_time(job: Job) -> None:
    """Assert that the job ran when it was due by the database's clock, and not a jump later."""
    assert job.status == "completed"
    assert 0 <= (job.claimed_at - job.run_at).total_seconds() < DEADLINE_SECONDS


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])
def test_jobs_run_on_time_after_a_clock_jump(
    app: Flask, clock: WallClock, start_with: Start, jump: float
) -> None:
    """After the worker's wall clock jumped by an hour, new jobs run at once, and retries and
    delayed jobs run when they are due."""
    start_with(clock, "-c", "2")
    assert abs(seconds_ahead()) < DEADLINE_SECONDS
    clock.jump_to(jump)
    assert seconds_ahead() == pytest.approx(jump, abs=DEADLINE_SECONDS)
    retried = enqueue("fail_times", 1, retries=1, retry_delay=0.4)
    assert_on_time(retried.wait(DEADLINE_SECONDS))
    delayed = enqueue("enqueue_later", 7, 0.4).wait(DEADLINE_SECONDS).result
    later = stored(app, delayed)
    assert_on_time(later.wait(DEADLINE_SECONDS))
    assert (retried.attempt, later.result) == (2, 7)


@pytest.mark.on("postgresql", "mysql")
@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])
def test_server_clock_decides_when_jobs_are_due(
    app: Flask, clock: WallClock, start_with: Start, jump: float
) -> None:
    """Jobs that were scheduled before the jump run when they are due by the server's clock,
    regardless of the worker's clock."""
    start_with(clock, "-c", "2")
    soon = enqueue("echo", 1, delay=2)
    retried = enqueue("fail_times", 1, retries=1, retry_delay=2)
    far = enqueue("echo", 2, delay=HOUR / 2)
    wait_until(lambda: stored(app, retried).status == "retrying", "the failure")
    clock.jump_to(jump)
    assert seconds_ahead() == pytest.approx(jump, abs=DEADLINE_SECONDS)
    assert_on_time(soon.wait(DEADLINE_SECONDS))
    assert_on_time(retried.wait(DEADLINE_SECONDS))
    assert far.refresh().status == "scheduled"


@pytest.mark.on("sqlite")
def test_jump_back_does_not_delay_pending_jobs(
    app: Flask, clock: WallClock, start_with: Start, tmp_path: Path
) -> None:
    """On SQLite the machine's clock decides: after a jump back, pending jobs run at once, and a
    scheduled job runs when that clock shows its time."""
    gate = tmp_path / "gate"
    start_with(clock, "-c", "1")
    holder = enqueue("wait_for_file", str(gate))
    wait_until(lambda: stored(app, holder).started_at is not None, "the start")
    pending = [enqueue("echo", number) for number in range(20)]
    waiting = enqueue("echo", "later", delay=1)
    clock.jump_to(-HOUR)
    gate.touch()
    assert [job.wait(DEADLINE_SECONDS).result for job in pending] == list(range(20))
    wait_until(lambda: waiting.run_at.timestamp() < time.time(), "the true time")
    assert seconds_ahead() == pytest.approx(-HOUR, abs=DEADLINE_SECONDS)
    assert waiting.refresh().status == "scheduled"
    clock.jump_to(0)
    assert_on_time(waiting.wait(DEADLINE_SECONDS))


@pytest.mark.on("sqlite")
def test_jump_ahead_starts_the_jobs_that_it_passed(
    app: Flask, clock: WallClock, start_with: Start
) -> None:
    """On SQLite the machine's clock decides: after a jump ahead, exactly the jobs whose time has
    passed are due."""
    start_with(clock)
    passed = enqueue("echo", 1, delay=HOUR / 2)
    not_passed = enqueue("echo", 2, delay=2 * HOUR)
    clock.jump_to(HOUR)
    assert passed.wait(DEADLINE_SECONDS).status == "completed"
    assert passed.claimed_at >= passed.run_at
    assert not_passed.refresh().status == "scheduled"


def test_workers_with_wrong_clocks_keep_their_leases(
    app: Flask,
    state: AppState,
    make_clock: Callable[[str], WallClock],
    start_with: Start,
    journal: Path,
) -> None:
    """Workers whose clocks are an hour ahead and an hour behind rescue no jobs of each other while
    both send heartbeats, and rescue the jobs of a worker that is silent."""
    fast, slow = make_clock("fast"), make_clock("slow")
    fast.jump_to(HOUR)
    slow.jump_to(-HOUR)
    silent = start_with(fast, "-n", "fast", "-c", "1", **LEASE)
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    start_with(slow, "-n", "slow", "-c", "1", **LEASE)
    first = beats(state)
    wait_until(
        lambda: all(n >= first[name] + LEASE_IN_BEATS for name, n in beats(state).items()),
        "the beats of both",
    )
    assert list(workers(state).values()) == ["alive", "alive"]
    assert stored(app, held).attempt == 1
    stop_between_transactions(silent, state)
    assert held.wait(DEADLINE_SECONDS).result == 2
    assert list(workers(state).values()) == ["dead", "alive"]


def test_jump_back_does_not_delay_a_rescue(
    app: Flask,
    state: AppState,
    clock: WallClock,
    start_worker: Start,
    start_with: Start,
    journal: Path,
) -> None:
    """If the wall clock of a worker jumps back by an hour while another worker is silent, the job
    of the silent worker is still rescued after one lease."""
    silent = start_worker("-n", "silent", "-c", "1", **LEASE)
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    start_with(clock, "-n", "watching", "-c", "1", **LEASE)
    _wait_for_beats(state, "watching", 3)
    stop_between_transactions(silent, state)
    _wait_for_beats(state, "watching", 3)
    clock.jump_to(-HOUR)
    assert held.wait(DEADLINE_SECONDS).result == 2
    assert next(iter(workers(state).values())) == "dead"


def _wait_for_beats(state: AppState, name: str, more: int) -> None:
    """Wait until a worker has sent more heartbeats; it sweeps equally often."""
    wait_until(lambda: name in beats(state), "the first beat")
    before = beats(state)[name]
    wait_until(lambda: beats(state)[name] >= before + more, "more beats")


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("part", ["executor", "main"])
def test_worker_continues_if_its_scheduler_hangs(
    app: Flask, state: AppState, start_worker: Start, journal: Path, part: str
) -> None:
    """While a thread of the scheduler hangs, the worker's main loop polls, promotes due jobs and
    rescues jobs, and SIGTERM still ends the process with exit code 0."""
    silent = start_worker("-c", "1", **LEASE)
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    worker = start_worker("-c", "2", **LEASE)
    enqueue("hang_scheduler", part).wait(DEADLINE_SECONDS)
    stop_between_transactions(silent, state)
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    assert_on_time(enqueue("echo", 2, delay=0.4).wait(DEADLINE_SECONDS))
    retried = enqueue("fail_times", 1, retries=1, retry_delay=0.4).wait(DEADLINE_SECONDS)
    assert (retried.status, retried.attempt) == ("completed", 2)
    assert held.wait(DEADLINE_SECONDS).result == 2
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert "The scheduler did not stop in time" in worker.log.read_text()
