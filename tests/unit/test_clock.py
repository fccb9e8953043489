"""The clock calls the worker at the poll interval and when a job is due."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from apscheduler.schedulers import base as apscheduler_base
from apscheduler.schedulers.background import BackgroundScheduler

from flask_bgjobs.system.threads import require_alive
from flask_bgjobs.worker import clock as clock_module
from flask_bgjobs.worker.clock import STEP_SECONDS, Clock, Every
from tests.unit.helpers import wait_until

NEVER = 3_600.0
SLACK = 0.001
"""The wall clock and the scheduler round due times to microseconds."""

MakeClock = Callable[..., Clock]


class Wakes:
    """A callback for the clock; records the time of each call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.time())

    def __len__(self) -> int:
        return len(self.times)


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
def make_clock(wakes: Wakes) -> Iterator[MakeClock]:
    """Starts clocks, and stops them after the test."""
    clocks: list[Clock] = []

    def make(poll_interval: float = NEVER, wake: Callable[[], Any] = wakes) -> Clock:
        clock = Clock(wake, poll_interval)
        clock.start()
        clocks.append(clock)
        return clock

    yield make
    for clock in clocks:
        clock.stop()


def shift_wall_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Shift the wall clock of the module; its monotonic clock stays correct."""
    shifted = SimpleNamespace(time=lambda: time.time() + seconds, monotonic=time.monotonic)
    monkeypatch.setattr(clock_module, "time", shifted)


def finish_due_calls(clock: Clock, wakes: Wakes) -> None:
    """Return when all calls that are due by now have been made: a call added later was made.

    The added call repeats until the clock is stopped, and stays in ``pending_calls``.
    """
    before = len(wakes)
    marker = threading.Event()
    clock.every(STEP_SECONDS, marker.set)
    assert marker.wait(30)
    assert len(wakes) >= before


def test_due_time_wakes_once_and_not_early(make_clock: MakeClock, wakes: Wakes) -> None:
    """The clock wakes once for a due time, and never before it."""
    clock = make_clock()
    began = time.time()
    clock.wake_in([0.12])
    wait_until(lambda: wakes)
    assert wakes.times[0] >= began + 0.12 - SLACK
    clock.wake_in([0.12])
    wait_until(lambda: len(wakes) == 2)
    finish_due_calls(clock, wakes)
    assert len(wakes) == 2


def test_due_times_are_rounded_up(make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Due times are rounded up to a multiple of 50 ms; exact multiples do not change."""
    clock = make_clock()
    now = 4_000_000_000.0  # in the year 2096, so that no call is made during the test
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(time=lambda: now))
    clock.wake_in([0.0, 0.01, 0.049, 0.07, 0.13, 60.0])
    _poll, *due_times = clock.pending_calls
    delays = [due_time - now for due_time in due_times]
    assert delays == pytest.approx([0.0, 0.05, 0.1, 0.15, 60.0], abs=1e-5)


def test_equal_due_times_share_one_trigger(make_clock: MakeClock, wakes: Wakes) -> None:
    """Ten thousand retries due at the same instant need one trigger."""
    clock = make_clock()
    clock.wake_in([0.2] * 10_000)
    wait_until(lambda: wakes)
    finish_due_calls(clock, wakes)
    assert len(wakes) == 1


def test_close_due_times_share_triggers(make_clock: MakeClock, wakes: Wakes) -> None:
    """Ten thousand retries within one second need at most one trigger per 50 ms."""
    clock = make_clock()
    clock.wake_in([number / 10_000 for number in range(10_000)])
    # The first triggers may fire while later ones are still being added.
    assert len(clock.pending_calls) - 1 + len(wakes) <= 1 / STEP_SECONDS + 2
    wait_until(lambda: len(clock.pending_calls) == 1)
    finish_due_calls(clock, wakes)
    assert 1 <= len(wakes) <= 1 / STEP_SECONDS + 2


def test_known_due_time_adds_no_trigger(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: Any
) -> None:
    """A due time that already has a trigger does not get a second one."""
    clock = make_clock()
    instant = time.time()
    monkeypatch.setattr(
        clock_module, "time", SimpleNamespace(time=lambda: instant, monotonic=time.monotonic)
    )
    for _ in range(100):
        clock.wake_in([30.0])
    assert len(clock.pending_calls) == 2, "the poll and one trigger"


def test_past_due_time_wakes_at_once(make_clock: MakeClock, wakes: Wakes) -> None:
    """The clock wakes at once for a due time in the past."""
    make_clock().wake_in([-5.0, 0.0])
    wait_until(lambda: wakes)


def test_poll_repeats(make_clock: MakeClock, wakes: Wakes) -> None:
    """Without due times, the clock wakes at each poll interval."""
    make_clock(0.05)
    wait_until(lambda: len(wakes) >= 3)


def test_error_in_callback_does_not_stop_polling(
    make_clock: MakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in the callback is logged, and the next calls are still made."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("no")

    make_clock(0.05, fail)
    wait_until(lambda: len(calls) >= 2)
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize("jump", [-3_600.0, -1.5, 1.5, 86_400.0])
def test_wall_clock_jump_removes_triggers(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A jump of the wall clock, in either direction, removes the triggers once.

    The caller can then add them again.
    """
    clock = make_clock()
    clock.wake_in([1_000.0, 2_000.0])
    assert not clock.drifted()
    assert len(clock.pending_calls) == 3
    shift_wall_clock(monkeypatch, jump)
    assert clock.drifted()
    assert len(clock.pending_calls) == 1, "only the poll remains"
    assert not clock.drifted()
    monkeypatch.undo()
    assert clock.drifted(), "the jump back counts too"
    clock.wake_in([0.05])
    wait_until(lambda: wakes)


@pytest.mark.parametrize("jump", [-3_600.0, 3_600.0])
def test_wall_clock_jump_polls_at_once(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """After a jump, the clock polls at once and not at the time planned before the jump."""
    clock = make_clock()
    (poll_before,) = clock.pending_calls
    shift_wall_clock(monkeypatch, jump)
    assert clock.drifted()
    wait_until(lambda: len(wakes) == 1)
    finish_due_calls(clock, wakes)
    assert max(clock.pending_calls) > poll_before
    assert len(wakes) == 1


def test_missed_polls_are_made_up_by_one(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a jump of decades, one poll replaces all missed polls, and they are not listed."""
    jump = dt.timedelta(days=20_000)

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Later:
            return super().now(tz) + jump

    clock = make_clock(NEVER)
    monkeypatch.setattr(apscheduler_base, "datetime", Later)
    finish_due_calls(clock, wakes)
    assert len(wakes) == 1
    now = dt.datetime.now(dt.UTC)
    assert Every(NEVER).get_next_fire_time(now - jump, now) > now


def test_stop_does_not_wait_for_hanging_call(
    wakes: Wakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a call hangs, ``stop`` returns after its deadline and logs a warning."""
    monkeypatch.setattr(clock_module, "_STOP_SECONDS", 0.2)
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait()

    clock = Clock(hang, 0.01)
    clock.start()
    assert entered.wait(30)
    threads = clock.threads
    clock.stop()
    assert clock.hangs
    assert "The scheduler did not stop in time" in caplog.text
    release.set()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_removed_due_time_can_be_added_again(
    make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A due time removed after a jump can be added again."""
    clock = make_clock()
    instant = time.time() + 1_000
    for jump in (0.0, 5.0):
        shift_wall_clock(monkeypatch, jump)
        clock.drifted()
        clock.wake_in([instant - time.time() - jump])
        assert len(clock.pending_calls) == 2


def test_small_drift_keeps_triggers(make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drift below one second, typical of NTP, removes no trigger."""
    clock = make_clock()
    clock.wake_in([1_000.0])
    for drift in (0.9, -0.9):
        shift_wall_clock(monkeypatch, drift)
        assert not clock.drifted()
    assert len(clock.pending_calls) == 2


def test_wall_clock_jump_after_triggers_fired(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A jump of the wall clock ignores triggers that have already fired."""
    clock = make_clock()
    clock.wake_in([0.0])
    wait_until(lambda: wakes)
    clock.wake_in([1_000.0])
    shift_wall_clock(monkeypatch, 5)
    assert clock.drifted()
    assert len(clock.pending_calls) == 1


def test_trigger_fires_while_it_is_removed(
    make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing a trigger that fires at the same moment raises no error."""
    clock = make_clock()
    clock.wake_in([1_000.0])
    remove = BackgroundScheduler.remove_job

    def fire_and_remove(scheduler: BackgroundScheduler, job_id: str) -> None:
        remove(scheduler, job_id)  # a trigger that fires is removed
        remove(scheduler, job_id)

    monkeypatch.setattr(BackgroundScheduler, "remove_job", fire_and_remove)
    shift_wall_clock(monkeypatch, 5)
    assert clock.drifted()
    assert len(clock.pending_calls) == 1


def test_stop_while_trigger_fires(wakes: Wakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trigger that fires during ``stop`` raises no error in the clock's threads."""
    clock, firing = Clock(wakes, NEVER), threading.Event()
    remove = BackgroundScheduler.remove_job

    def remove_late(*args: Any) -> None:
        firing.set()
        time.sleep(0.2)
        remove(*args)

    monkeypatch.setattr(BackgroundScheduler, "remove_job", remove_late)
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    clock.start()
    clock.wake_in([0.0])
    assert firing.wait(30)
    clock.stop()
    assert errors == []


def test_stop_waits_for_current_call(wakes: Wakes) -> None:
    """``stop`` returns after the current call has ended, and no call follows."""
    entered, ended = threading.Event(), threading.Event()

    def slow() -> None:
        wakes()
        entered.set()
        time.sleep(0.1)
        ended.set()

    before = set(threading.enumerate())
    clock = Clock(slow, 0.01)
    clock.start()
    assert entered.wait(30)
    threads = set(threading.enumerate()) - before
    assert threads
    clock.stop()
    assert ended.is_set()
    assert not any(thread.is_alive() for thread in threads)


def test_unstarted_clock_makes_no_call(wakes: Wakes) -> None:
    """A clock that was not started does not call the callback."""
    clock = Clock(wakes, 0.001)
    clock.wake_in([0.0])
    assert len(wakes) == 0


def test_threads_are_daemons(make_clock: MakeClock) -> None:
    """The clock's threads do not keep the process alive."""
    before = set(threading.enumerate())
    clock = make_clock()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    clock.wake_in([1.0])


class BrokenFilter:
    """A log filter of the host that fails outside a request."""

    def filter(self, _record: logging.LogRecord) -> bool:
        raise RuntimeError("Working outside of request context.")


def test_failing_log_filter_does_not_stop_clock(make_clock: MakeClock, wakes: Wakes) -> None:
    """The clock keeps running if a log filter of the host raises for each APScheduler line."""
    loggers = [logging.getLogger(f"apscheduler.{n}") for n in ("scheduler", "executors.default")]
    log_filter = BrokenFilter()
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addFilter(log_filter)
    try:
        clock = make_clock(0.05)
        wait_until(lambda: len(wakes) > 3)
        clock.wake_in([0.01])
        wait_until(lambda: len(wakes) > 6)
        require_alive(clock.threads)
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
            logger.removeFilter(log_filter)


def test_calls_are_not_logged(make_clock: MakeClock, wakes: Wakes, caplog: Any) -> None:
    """At level INFO, an idle worker logs nothing when it polls."""
    caplog.set_level(logging.INFO)
    make_clock(0.02)
    wait_until(lambda: len(wakes) > 5)
    assert not [r for r in caplog.records if r.name.startswith("apscheduler.executors")]
