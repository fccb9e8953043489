"""The window in which a job's code may be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flask_bgjobs import JobCancelled, JobTimeout
from flask_bgjobs.execution import interrupt as window_module
from flask_bgjobs.execution.interrupt import InterruptScope
from tests.unit.helpers import wait_until

STOPS = [JobCancelled, JobTimeout]


class InThread:
    """Runs ``function`` in a thread, and gives what came out of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error

    def end(self) -> InThread:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the code was not stopped"
        return self


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns every few instructions, so that races happen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def spin(started: threading.Event) -> None:
    started.set()
    while True:
        pass


def test_result() -> None:
    """Without an interruption the code's result comes back, and the window is closed."""
    window = InterruptScope()
    assert not window.is_closed
    assert window.run(lambda: 5) == 5
    assert window.is_closed
    assert window.interruption is None


def test_own_exception() -> None:
    """What the code raises comes out as it is, and the window is closed."""
    window = InterruptScope()
    with pytest.raises(ZeroDivisionError):
        window.run(lambda: 1 / 0)
    assert window.is_closed


@pytest.mark.parametrize("stop", STOPS)
def test_before_it_runs(stop: Any) -> None:
    """Interrupted before it ran, the code does not run at all."""
    window, ran = InterruptScope(), []
    assert window.interrupt(stop) is True
    with pytest.raises(stop):
        window.run(lambda: ran.append(1))
    assert ran == []
    assert window.is_closed


@pytest.mark.parametrize("stop", STOPS)
def test_busy_loop(stop: Any) -> None:
    """A busy loop of Python code is stopped at its next instruction."""
    window, started = InterruptScope(), threading.Event()
    code = InThread(lambda: window.run(lambda: spin(started)))
    assert started.wait(30)
    assert window.interrupt(stop) is True
    assert type(code.end().error) is stop
    assert window.interruption is stop
    assert window.is_closed


@pytest.mark.parametrize("stop", STOPS)
def test_broad_except(stop: Any) -> None:
    """``except Exception`` in the code does not swallow the stop."""

    def stubborn() -> None:
        while True:
            try:
                spin(started)
            except Exception:
                swallowed.append(1)

    window, started, swallowed = InterruptScope(), threading.Event(), []  # type: ignore[var-annotated]
    code = InThread(lambda: window.run(stubborn))
    assert started.wait(30)
    window.interrupt(stop)
    assert type(code.end().error) is stop
    assert swallowed == []


def test_finally_blocks_run() -> None:
    """The code's own ``finally`` blocks run when it is stopped."""

    def tidy() -> None:
        try:
            spin(started)
        finally:
            cleaned.append(1)

    window, started, cleaned = InterruptScope(), threading.Event(), []  # type: ignore[var-annotated]
    code = InThread(lambda: window.run(tidy))
    assert started.wait(30)
    window.interrupt(JobCancelled)
    assert isinstance(code.end().error, JobCancelled)
    assert cleaned == [1]


def test_finished_in_spite_of_it() -> None:
    """Code that catches the stop and finishes keeps its result; nothing follows it."""

    def stubborn() -> str:
        try:
            spin(started)
        except JobCancelled:
            return "finished"
        return "never"

    window, started = InterruptScope(), threading.Event()
    code = InThread(lambda: (window.run(stubborn), sum(range(10_000))))
    assert started.wait(30)
    window.interrupt(JobCancelled)
    assert code.end().result == ("finished", sum(range(10_000)))


def test_after_the_end() -> None:
    """After the end an interruption is refused, and never arrives."""
    window = InterruptScope()
    window.run(lambda: None)
    assert window.interrupt(JobCancelled) is False
    assert sum(1 for _ in range(10_000)) == 10_000
    assert window.interruption is None


def test_first_reason_counts() -> None:
    """Of two interruptions the first says why."""
    window = InterruptScope()
    window.interrupt(JobTimeout)
    window.interrupt(JobCancelled)
    with pytest.raises(JobTimeout):
        window.run(lambda: None)


def test_swallowed_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that swallowed a stop is interrupted again by a later call, once a second at most."""
    now, ticks, stops = [0.0], [0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(window_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def stubborn() -> str:
        while len(stops) < 2:
            try:
                while True:
                    ticks[0] += 1
            except JobCancelled:
                stops.append(now[0])
        return "gave in"

    window = InterruptScope()
    code = InThread(lambda: window.run(stubborn))
    wait_until(lambda: ticks[0])
    for _ in range(100):
        assert window.interrupt(JobCancelled)
    wait_until(lambda: stops)
    now[0] = 0.9
    assert window.interrupt(JobCancelled)
    passed = ticks[0]
    wait_until(lambda: ticks[0] > passed + 1_000)
    assert stops == [0.0]
    now[0] = 1.0
    assert window.interrupt(JobCancelled)
    assert code.end().result == "gave in"
    assert stops == [0.0, 1.0]


def test_blocking_call_ends_first() -> None:
    """A blocking call ends first; the stop comes right after it."""
    window, started, gate = InterruptScope(), threading.Event(), threading.Event()
    after: list[int] = []

    def block() -> None:
        started.set()
        gate.wait(30)
        for _ in range(1_000_000):
            after.append(1)

    code = InThread(lambda: window.run(block))
    assert started.wait(30)
    assert window.interrupt(JobCancelled)
    assert code.error is None
    gate.set()
    assert isinstance(code.end().error, JobCancelled)
    assert len(after) < 1_000_000


def test_neighbour_is_not_hit() -> None:
    """Only the thread of this window is stopped, not its neighbour."""
    started, free = [threading.Event(), threading.Event()], threading.Event()

    def neighbour() -> str:
        started[1].set()
        while not free.is_set():
            pass
        return "whole"

    first, second = InterruptScope(), InterruptScope()
    stopped = InThread(lambda: first.run(lambda: spin(started[0])))
    other = InThread(lambda: second.run(neighbour))
    assert all(event.wait(30) for event in started)
    first.interrupt(JobCancelled)
    assert isinstance(stopped.end().error, JobCancelled)
    free.set()
    assert other.end().result == "whole"


class Race:
    """Interrupts each window handed to it, again and again, until it is told to stop."""

    def __init__(self) -> None:
        self.window: InterruptScope | None = None
        self.errors: list[BaseException] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            window = self.window
            if window is None:
                time.sleep(0)
                continue
            try:
                while window.interrupt(JobCancelled) and not self._over:
                    pass
            except BaseException as error:
                self.errors.append(error)
            if self.window is window:
                self.window = None

    def stop(self) -> None:
        self._over = True

    def end(self) -> None:
        self.stop()
        self._thread.join(30)
        assert not self._thread.is_alive(), "interrupt() hangs"


@pytest.mark.usefixtures("eager_switches")
def test_nothing_arrives_after_the_end() -> None:
    """However an interruption races with the end, nothing arrives once ``run`` is over."""
    race, outcomes, late = Race(), [], []  # type: ignore[var-annotated]

    def code(window: InterruptScope, steps: int) -> str:
        race.window = window
        for _ in range(steps):
            pass
        return "finished"

    def one(steps: int) -> None:
        window = InterruptScope()
        try:
            outcomes.append(window.run(lambda: code(window, steps)))
        except JobCancelled:
            outcomes.append("cancelled")
        for _ in range(50):  # what would arrive late arrives here
            pass
        if not window.is_closed:
            race.stop()
            late.append("left open")

    def many() -> None:
        deadline = time.monotonic() + 4
        while len(outcomes) < 20_000 and not late and time.monotonic() < deadline:
            try:
                one(random.randrange(200))
            except JobCancelled:
                race.stop()
                late.append("arrived late")

    thread = InThread(many)
    try:
        thread.end()
    finally:
        race.end()
    assert late == []
    assert thread.error is None
    assert race.errors == []
    assert set(outcomes) <= {"finished", "cancelled"}
    assert len(outcomes) > 100


@pytest.mark.usefixtures("eager_switches")
def test_coroutine_race() -> None:
    """However an interruption races with a coroutine's end, neither side breaks."""
    race, outcomes, broken = Race(), [], []  # type: ignore[var-annotated]

    async def code(window: InterruptScope, steps: int) -> str:
        race.window = window
        for _ in range(steps):
            await asyncio.sleep(0)
        return "finished"

    def many() -> None:
        deadline = time.monotonic() + 4
        while len(outcomes) < 3_000 and not broken and time.monotonic() < deadline:
            window = InterruptScope()
            coroutine = code(window, random.randrange(4))
            try:
                outcomes.append(window.run(lambda: window.run_coroutine(coroutine)))  # noqa: B023
            except JobCancelled:
                outcomes.append("cancelled")
            except BaseException as error:
                race.stop()
                broken.append(error)
            finally:
                coroutine.close()

    thread = InThread(many)
    try:
        thread.end()
    finally:
        race.end()
    assert broken == []
    assert thread.error is None
    assert race.errors == []
    assert set(outcomes) <= {"finished", "cancelled"}


def run_coroutine(window: InterruptScope, coroutine: Any) -> Any:
    return window.run(lambda: window.run_coroutine(coroutine))


def test_coroutine() -> None:
    """A coroutine's result comes back as a function's does."""

    async def add() -> int:
        await asyncio.sleep(0)
        return 5

    assert run_coroutine(InterruptScope(), add()) == 5


@pytest.mark.parametrize("stop", STOPS)
def test_coroutine_is_cancelled_through_its_task(stop: Any) -> None:
    """A coroutine sees a ``CancelledError`` where it awaits, may clean up, and is stopped."""
    seen: list[str] = []
    waiting = threading.Event()

    async def wait() -> None:
        try:
            waiting.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    window = InterruptScope()
    code = InThread(lambda: run_coroutine(window, wait()))
    assert waiting.wait(30)
    assert window.interrupt(stop) is True
    assert type(code.end().error) is stop
    assert seen == ["cancelled", "cleaned up"]
    assert window.is_closed


def test_coroutine_finishes_in_spite_of_it() -> None:
    """A coroutine that catches the cancel and returns keeps its result."""
    waiting = threading.Event()

    async def stubborn() -> str:
        waiting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "finished"

    window = InterruptScope()
    code = InThread(lambda: run_coroutine(window, stubborn()))
    assert waiting.wait(30)
    window.interrupt(JobCancelled)
    assert code.end().result == "finished"


def test_coroutine_that_cancels_itself() -> None:
    """A ``CancelledError`` of the code's own is its own, and no cancel of the job."""

    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_coroutine(InterruptScope(), give_up())


def test_interrupted_before_the_coroutine_awaits() -> None:
    """A coroutine that is interrupted before its first await is stopped at it."""
    window = InterruptScope()
    reached: list[str] = []

    async def late() -> None:
        wait_until(lambda: window.interruption is not None)
        await asyncio.sleep(0)
        reached.append("after the first await")

    code = InThread(lambda: run_coroutine(window, late()))
    wait_until(lambda: window.interrupt(JobCancelled))
    assert isinstance(code.end().error, JobCancelled)
    assert reached == []


def test_a_signal_handler_may_interrupt_its_own_thread() -> None:
    """From a signal's handler the interruption is raised on the spot, also in a blocking call."""
    window = InterruptScope()
    before = signal.signal(signal.SIGALRM, lambda *_: window.interrupt(JobTimeout))
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(JobTimeout):
            window.run(lambda: time.sleep(30))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 10
    assert window.is_closed


def test_a_signal_handler_may_interrupt_a_coroutine() -> None:
    """From a signal's handler a coroutine is stopped through its task, so that it can clean up."""
    window = InterruptScope()
    cleaned: list[bool] = []

    async def code() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    before = signal.signal(signal.SIGALRM, lambda *_: window.interrupt(JobCancelled))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(JobCancelled):
            window.run(lambda: window.run_coroutine(code()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cleaned == [True]


def test_closes_whatever_a_signal_handler_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler of the job's that raises while the window is being closed does not keep it
    open."""
    close = InterruptScope._close
    raised = []

    def close_in_the_end(window: InterruptScope) -> None:
        if not raised:
            raised.append(True)
            raise TimeoutError
        close(window)

    monkeypatch.setattr(InterruptScope, "_close", close_in_the_end)
    window = InterruptScope()
    assert window.run(lambda: 5) == 5
    assert window.is_closed
