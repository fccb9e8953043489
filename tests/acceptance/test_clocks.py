"""Clocks that jump and differ, and a scheduler that hangs: nothing stalls, and nothing is early."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import beats, enqueue, lines, stop_between_transactions, workers
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

HOUR = 3_600.0
LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.1}
LEASE_IN_BEATS = 20
"""More beats than two workers need to see of each other before one could take the other's lease."""

SLEEP_BY_SELECT = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds)
"""
"""Read by every Python that starts with a faked clock: libfaketime 0.9.10 breaks the call that
``time.sleep`` makes, ``clock_nanosleep`` until a monotonic time."""


class WallClock:
    """The wall clock of processes that are started :meth:`shown` it; it alone jumps."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file, self._library = file, library
        self.jump_to(0)

    def jump_to(self, seconds: float) -> None:
        """Be so many seconds ahead of the true time from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+g}")
        new.replace(self._file)

    def shown(self) -> dict[str, str]:
        """The environment of a process that reads this clock."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@pytest.fixture
def make_clock(tmp_path: Path) -> Callable[[str], WallClock]:
    """Makes wall clocks, each with a name."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        missing = "libfaketime is not installed (apt-get install faketime)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    (tmp_path / "sitecustomize.py").write_text(SLEEP_BY_SELECT)
    return lambda name: WallClock(tmp_path / name, library)


@pytest.fixture
def clock(make_clock: Callable[[str], WallClock]) -> WallClock:
    """A wall clock."""
    return make_clock("clock")


@pytest.fixture
def start_with(start_worker: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a worker whose wall clock is the one given."""

    def start(clock: WallClock, *options: str, **config: object) -> Any:
        with monkeypatch.context() as environment:
            for name, value in clock.shown().items():
                environment.setenv(name, value)
            return start_worker(*options, **config)

    return start


def ahead() -> float:
    """How far the worker's wall clock is ahead of this process's."""
    return float(enqueue("wall_clock").wait(DEADLINE_SECONDS).result) - time.time()


def assert_on_time(job: Job) -> None:
    """By the database's clock: not early, and not late by anything like a jump."""
    assert job.status == "completed"
    assert 0 <= (job.claimed_at - job.run_at).total_seconds() < DEADLINE_SECONDS


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])
def test_a_jump_stalls_nothing(
    app: Flask, clock: WallClock, start_with: Start, jump: float
) -> None:
    """After the wall clock has jumped by an hour, jobs run at once, and retries and delayed jobs
    when they are due."""
    start_with(clock, "-c", "2")
    assert abs(ahead()) < DEADLINE_SECONDS
    clock.jump_to(jump)
    assert ahead() == pytest.approx(jump, abs=DEADLINE_SECONDS)
    retried = enqueue("fail_times", 1, retries=1, retry_delay=0.4)
    assert_on_time(retried.wait(DEADLINE_SECONDS))
    delayed = enqueue("enqueue_later", 7, 0.4).wait(DEADLINE_SECONDS).result
    later = stored(app, delayed)
    assert_on_time(later.wait(DEADLINE_SECONDS))
    assert (retried.attempt, later.result) == (2, 7)


@pytest.mark.on("postgresql", "mysql")
@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["ahead", "back"])
def test_the_servers_clock_decides_what_is_due(
    app: Flask, clock: WallClock, start_with: Start, jump: float
) -> None:
    """Due times from before the jump are kept to by the server's clock, whatever the worker's
    clock does."""
    start_with(clock, "-c", "2")
    soon = enqueue("echo", 1, delay=2)
    retried = enqueue("fail_times", 1, retries=1, retry_delay=2)
    far = enqueue("echo", 2, delay=HOUR / 2)
    wait_until(lambda: stored(app, retried).status == "retrying", "the failure")
    clock.jump_to(jump)
    assert ahead() == pytest.approx(jump, abs=DEADLINE_SECONDS)
    assert_on_time(soon.wait(DEADLINE_SECONDS))
    assert_on_time(retried.wait(DEADLINE_SECONDS))
    assert far.refresh().status == "scheduled"


@pytest.mark.on("sqlite")
def test_a_jump_back_delays_no_pending_job(
    app: Flask, clock: WallClock, start_with: Start, tmp_path: Path
) -> None:
    """On SQLite the machine's clock decides: after a jump back, jobs that are pending run at
    once, those that wait for a time wait until that clock shows it, and none is lost."""
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
    assert ahead() == pytest.approx(-HOUR, abs=DEADLINE_SECONDS)
    assert waiting.refresh().status == "scheduled"
    clock.jump_to(0)
    assert_on_time(waiting.wait(DEADLINE_SECONDS))


@pytest.mark.on("sqlite")
def test_a_jump_ahead_may_start_jobs_early(app: Flask, clock: WallClock, start_with: Start) -> None:
    """On SQLite the machine's clock decides: a jump ahead makes due what it passed, and only
    that."""
    start_with(clock)
    passed = enqueue("echo", 1, delay=HOUR / 2)
    not_passed = enqueue("echo", 2, delay=2 * HOUR)
    clock.jump_to(HOUR)
    assert passed.wait(DEADLINE_SECONDS).status == "completed"
    assert passed.claimed_at >= passed.run_at
    assert not_passed.refresh().status == "scheduled"


def test_clocks_an_hour_off_cost_no_lease(
    app: Flask,
    state: AppState,
    make_clock: Callable[[str], WallClock],
    start_with: Start,
    journal: Path,
) -> None:
    """Workers whose clocks are an hour ahead and an hour behind take nothing from each other
    while both live, and rescue the jobs of one that really is silent."""
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


def test_a_jump_back_delays_no_rescue(
    app: Flask,
    state: AppState,
    clock: WallClock,
    start_worker: Start,
    start_with: Start,
    journal: Path,
) -> None:
    """While a worker is silent, the wall clock of the one that watches it jumps back by an hour:
    the silence is measured on, and the job is rescued when the lease is over."""
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
    """Time in which a worker has swept: it does so as often as it shows that it lives."""
    wait_until(lambda: name in beats(state), "the first beat")
    before = beats(state)[name]
    wait_until(lambda: beats(state)[name] >= before + more, "more beats")


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("part", ["executor", "main"])
def test_a_scheduler_that_hangs_stops_nothing(
    app: Flask, state: AppState, start_worker: Start, journal: Path, part: str
) -> None:
    """While the scheduler's threads hang, the worker's loop itself polls, promotes what is due
    and rescues, and a stop still ends the process with exit code 0."""
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
