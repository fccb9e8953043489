"""The clock."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flask_bgjobs.system.threads import require_alive
from flask_bgjobs.worker import clock as clock_module
from flask_bgjobs.worker.clock import STEP_SECONDS, Clock
from tests.unit.helpers import wait_until

NEVER = 3_600.0
SLACK = 0.001
"""Wall clock and scheduler round a due time to microseconds."""

MakeClock = Callable[..., Clock]


class Wakes:
    """What a clock calls; remembers when."""

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
    """Makes clocks that run, and stops them after the test."""
    made: list[Clock] = []

    def make(poll_interval: float = NEVER, wake: Callable[[], Any] = wakes) -> Clock:
        clock = Clock(wake, poll_interval)
        clock.start()
        made.append(clock)
        return clock

    yield make
    for clock in made:
        clock.stop()


def shift_wall_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The scheduler's wall clock jumps; its monotonic one does not."""
    shifted = SimpleNamespace(time=lambda: time.time() + seconds, monotonic=time.monotonic)
    monkeypatch.setattr(clock_module, "time", shifted)


def rest(clock: Clock, wakes: Wakes) -> None:
    """Return when all triggers set so far have had their turn: a later one has fired."""
    before = len(wakes)
    marker = threading.Event()
    clock._scheduler.add_job(marker.set, "date")
    assert marker.wait(30)
    assert len(wakes) >= before


def test_fires_once_and_not_early(make_clock: MakeClock, wakes: Wakes) -> None:
    """A due time wakes once, not before it, rounded up to a step of 50 ms."""
    clock = make_clock()
    began = time.time()
    clock.wake_in([0.12])
    wait_until(lambda: wakes)
    assert wakes.times[0] >= began + 0.12 - SLACK
    clock.wake_in([0.12])
    wait_until(lambda: len(wakes) == 2)
    rest(clock, wakes)
    assert len(wakes) == 2


def test_rounded_up(make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A due time becomes the next multiple of 50 ms, and one on a step stays."""
    set_for: list[float] = []
    clock = make_clock()
    monkeypatch.setattr(
        clock._scheduler,
        "add_job",
        lambda *args, run_date, **kwargs: (
            set_for.append(run_date.timestamp()) or SimpleNamespace(id="1")
        ),
    )
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(time=lambda: 1_000.0))
    clock.wake_in([0.0, 0.01, 0.049, 0.07, 0.13, 60.0])
    assert set_for == pytest.approx([1000.0, 1000.05, 1000.1, 1000.15, 1060.0])


def test_ten_thousand_at_one_instant(make_clock: MakeClock, wakes: Wakes) -> None:
    """Ten thousand retries due at one instant cost one trigger."""
    clock = make_clock()
    clock.wake_in([0.2] * 10_000)
    wait_until(lambda: wakes)
    rest(clock, wakes)
    assert len(wakes) == 1


def test_ten_thousand_within_a_second(make_clock: MakeClock, wakes: Wakes) -> None:
    """Ten thousand retries spread over a second cost at most one trigger per 50 ms."""
    clock = make_clock()
    clock.wake_in([number / 10_000 for number in range(10_000)])
    # The first steps may fire while the later ones are still being set.
    assert len(clock._scheduler.get_jobs()) - 1 + len(wakes) <= 1 / STEP_SECONDS + 2
    wait_until(lambda: len(clock._scheduler.get_jobs()) == 1)
    rest(clock, wakes)
    assert 1 <= len(wakes) <= 1 / STEP_SECONDS + 2


def test_same_time_asked_again(make_clock: MakeClock, wakes: Wakes, monkeypatch: Any) -> None:
    """A due time that is set already is not set again."""
    clock = make_clock()
    instant = time.time()
    monkeypatch.setattr(
        clock_module, "time", SimpleNamespace(time=lambda: instant, monotonic=time.monotonic)
    )
    for _ in range(100):
        clock.wake_in([30.0])
    assert len(clock._scheduler.get_jobs()) == 2, "the poll and one trigger"


def test_past_due_time(make_clock: MakeClock, wakes: Wakes) -> None:
    """A due time that has passed wakes at once."""
    make_clock().wake_in([-5.0, 0.0])
    wait_until(lambda: wakes)


def test_poll(make_clock: MakeClock, wakes: Wakes) -> None:
    """Without any due time the poll wakes, again and again."""
    make_clock(0.05)
    wait_until(lambda: len(wakes) >= 3)


def test_wake_that_raises(make_clock: MakeClock, caplog: pytest.LogCaptureFixture) -> None:
    """A wake-up that raises does not stop the next ones."""
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise RuntimeError("no")

    make_clock(0.05, broken)
    wait_until(lambda: len(calls) >= 2)
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize("jump", [-3_600.0, -1.5, 1.5, 86_400.0])
def test_wall_clock_jumps(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """A jump of the wall clock, either way, drops the triggers once, so they are set anew."""
    clock = make_clock()
    clock.wake_in([1_000.0, 2_000.0])
    assert not clock.drifted()
    assert len(clock._scheduler.get_jobs()) == 3
    shift_wall_clock(monkeypatch, jump)
    assert clock.drifted()
    assert len(clock._scheduler.get_jobs()) == 1, "only the poll is left"
    assert not clock.drifted()
    monkeypatch.undo()
    assert clock.drifted(), "back again is a jump as well"
    clock.wake_in([0.05])
    wait_until(lambda: wakes)


@pytest.mark.parametrize("jump", [-3_600.0, 3_600.0])
def test_polls_go_on_after_a_jump(
    make_clock: MakeClock, wakes: Wakes, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """After a jump the poll comes at once and not when its old time has come."""
    clock = make_clock()
    (poll,) = clock._scheduler.get_jobs()
    before = poll.next_run_time
    shift_wall_clock(monkeypatch, jump)
    assert clock.drifted()
    wait_until(lambda: len(wakes) == 1)
    rest(clock, wakes)
    (poll,) = clock._scheduler.get_jobs()
    assert poll.next_run_time > before
    assert len(wakes) == 1


def test_missed_polls_are_one(make_clock: MakeClock, wakes: Wakes) -> None:
    """However many polls a blocked scheduler or a jump of decades left out, one makes up for
    them, and they are not even counted."""
    clock = make_clock(NEVER)
    (poll,) = clock._scheduler.get_jobs()
    now = dt.datetime.now(dt.UTC)
    decades_ago = now - dt.timedelta(days=20_000)
    poll.modify(next_run_time=decades_ago)
    wait_until(lambda: wakes)
    rest(clock, wakes)
    assert len(wakes) == 1
    (poll,) = clock._scheduler.get_jobs()
    assert poll.trigger.get_next_fire_time(decades_ago, now) > now


def test_a_call_that_never_ends_does_not_hang_the_stop(
    wakes: Wakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop leaves a scheduler that hangs behind, and says so."""
    monkeypatch.setattr(clock_module, "_STOP_SECONDS", 0.2)
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait()

    clock = Clock(hang, 0.01)
    clock.start()
    assert entered.wait(30)
    clock.stop()
    assert clock.hangs
    assert "The scheduler did not stop in time" in caplog.text
    release.set()
    wait_until(lambda: not clock._scheduler.running)


def test_same_due_time_after_a_jump(make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A due time that was dropped can be set again."""
    clock = make_clock()
    instant = time.time() + 1_000
    for jump in (0.0, 5.0):
        shift_wall_clock(monkeypatch, jump)
        clock.drifted()
        clock.wake_in([instant - time.time() - jump])
        assert len(clock._scheduler.get_jobs()) == 2


def test_small_drift(make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drift below a second, as a time service makes it, changes nothing."""
    clock = make_clock()
    clock.wake_in([1_000.0])
    for drift in (0.9, -0.9):
        shift_wall_clock(monkeypatch, drift)
        assert not clock.drifted()
    assert len(clock._scheduler.get_jobs()) == 2


def test_drift_after_triggers_fired(make_clock: MakeClock, wakes: Wakes) -> None:
    """Triggers that have fired are no trouble when the clock jumps."""
    clock = make_clock()
    clock.wake_in([0.0])
    wait_until(lambda: wakes)
    clock.wake_in([1_000.0])
    clock._offset -= 5
    assert clock.drifted()
    assert len(clock._scheduler.get_jobs()) == 1


def test_trigger_fires_while_others_are_dropped(
    make_clock: MakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger that fires in the very moment in which it is dropped is no trouble."""
    clock = make_clock()
    clock.wake_in([1_000.0])
    find, remove = clock._scheduler.get_job, clock._scheduler.remove_job

    def find_and_fire(job_id: str) -> Any:
        found = find(job_id)
        if found is not None:
            remove(job_id)
        return found

    monkeypatch.setattr(clock._scheduler, "get_job", find_and_fire)
    shift_wall_clock(monkeypatch, 5)
    assert clock.drifted()
    assert len(clock._scheduler.get_jobs()) == 1


def test_stop_while_a_trigger_fires(wakes: Wakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trigger that fires in the very moment of the stop breaks no thread of the clock's."""
    clock, firing = Clock(wakes, NEVER), threading.Event()
    remove = clock._scheduler.remove_job

    def remove_late(*args: Any) -> None:
        firing.set()
        time.sleep(0.2)
        remove(*args)

    monkeypatch.setattr(clock._scheduler, "remove_job", remove_late)
    broken: list[object] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    clock.start()
    clock.wake_in([0.0])
    assert firing.wait(30)
    clock.stop()
    assert broken == []


def test_stop(wakes: Wakes) -> None:
    """A call under way ends before ``stop`` returns, and none comes after it."""
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


def test_not_started(wakes: Wakes) -> None:
    """A clock that was not started calls nobody."""
    clock = Clock(wakes, 0.001)
    clock.wake_in([0.0])
    assert len(wakes) == 0


def test_threads_are_daemons(make_clock: MakeClock) -> None:
    """A clock keeps no process alive."""
    before = set(threading.enumerate())
    clock = make_clock()
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    clock.wake_in([1.0])


class BrokenFilter:
    """A filter of a host that needs a request."""

    def filter(self, _record: logging.LogRecord) -> bool:
        raise RuntimeError("Working outside of request context.")


def test_a_log_filter_that_raises_stops_nothing(make_clock: MakeClock, wakes: Wakes) -> None:
    """The clock goes on where a host's filter raises at each line of APScheduler."""
    loggers = [logging.getLogger(f"apscheduler.{n}") for n in ("scheduler", "executors.default")]
    broken = BrokenFilter()
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addFilter(broken)
    try:
        clock = make_clock(0.05)
        wait_until(lambda: len(wakes) > 3)
        clock.wake_in([0.01])
        wait_until(lambda: len(wakes) > 6)
        require_alive(clock.threads)
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
            logger.removeFilter(broken)


def test_calls_are_not_logged(make_clock: MakeClock, wakes: Wakes, caplog: Any) -> None:
    """An idle worker whose host logs at INFO writes no line for each poll."""
    caplog.set_level(logging.INFO)
    make_clock(0.02)
    wait_until(lambda: len(wakes) > 5)
    assert not [r for r in caplog.records if r.name.startswith("apscheduler.executors")]
