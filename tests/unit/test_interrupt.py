"""The scope in which a job's code can be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flask_bgjobs import JobCancelled, JobTimeout
from flask_bgjobs.execution import interrupt as interrupt_module
from flask_bgjobs.execution.interrupt import InterruptScope
from tests.unit.helpers import wait_until

INTERRUPTIONS = [JobCancelled, JobTimeout]


class InThread:
    """Runs ``function`` in a thread, and keeps its result or exception."""

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

    def join(self) -> InThread:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the code was not interrupted"
        return self


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Make threads switch every few instructions, to provoke races."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def loop_forever(started: threading.Event) -> None:
    started.set()
    while True:
        pass


def test_result_is_returned() -> None:
    """Without an interruption, ``run`` returns the code's result and closes the scope."""
    scope = InterruptScope()
    assert not scope.is_closed
    assert scope.run(lambda: 5) == 5
    assert scope.is_closed
    assert scope.interruption is None


def test_exception_is_raised_unchanged() -> None:
    """An exception of the code is raised unchanged, and the scope is closed."""
    scope = InterruptScope()
    with pytest.raises(ZeroDivisionError):
        scope.run(lambda: 1 / 0)
    assert scope.is_closed


@pytest.mark.parametrize("stop", INTERRUPTIONS)
def test_interrupted_before_start(stop: Any) -> None:
    """Code that is interrupted before it starts does not run."""
    scope, ran = InterruptScope(), []
    assert scope.interrupt(stop) is True
    with pytest.raises(stop):
        scope.run(lambda: ran.append(1))
    assert ran == []
    assert scope.is_closed


@pytest.mark.parametrize("stop", INTERRUPTIONS)
def test_busy_loop_is_interrupted(stop: Any) -> None:
    """A busy loop in Python is interrupted at its next instruction."""
    scope, started = InterruptScope(), threading.Event()
    code = InThread(lambda: scope.run(lambda: loop_forever(started)))
    assert started.wait(30)
    assert scope.interrupt(stop) is True
    assert type(code.join().error) is stop
    assert scope.interruption is stop
    assert scope.is_closed


@pytest.mark.parametrize("stop", INTERRUPTIONS)
def test_except_exception_does_not_catch_interruption(stop: Any) -> None:
    """``except Exception`` in the code does not catch the interruption."""

    def stubborn() -> None:
        while True:
            try:
                loop_forever(started)
            except Exception:
                swallowed.append(1)

    scope, started, swallowed = InterruptScope(), threading.Event(), []  # type: ignore[var-annotated]
    code = InThread(lambda: scope.run(stubborn))
    assert started.wait(30)
    scope.interrupt(stop)
    assert type(code.join().error) is stop
    assert swallowed == []


def test_finally_blocks_run() -> None:
    """The code's ``finally`` blocks run when it is interrupted."""

    def run_with_finally() -> None:
        try:
            loop_forever(started)
        finally:
            cleaned.append(1)

    scope, started, cleaned = InterruptScope(), threading.Event(), []  # type: ignore[var-annotated]
    code = InThread(lambda: scope.run(run_with_finally))
    assert started.wait(30)
    scope.interrupt(JobCancelled)
    assert isinstance(code.join().error, JobCancelled)
    assert cleaned == [1]


def test_code_catches_interruption_and_returns() -> None:
    """Code that catches the interruption keeps its result; no second interruption follows."""

    def stubborn() -> str:
        try:
            loop_forever(started)
        except JobCancelled:
            return "finished"
        return "never"

    scope, started = InterruptScope(), threading.Event()
    code = InThread(lambda: (scope.run(stubborn), sum(range(10_000))))
    assert started.wait(30)
    scope.interrupt(JobCancelled)
    assert code.join().result == ("finished", sum(range(10_000)))


def test_interrupt_after_end_is_refused() -> None:
    """After the end, ``interrupt`` returns false and raises nothing in the thread."""
    scope = InterruptScope()
    scope.run(lambda: None)
    assert scope.interrupt(JobCancelled) is False
    assert sum(1 for _ in range(10_000)) == 10_000
    assert scope.interruption is None


def test_first_interruption_wins() -> None:
    """Of two interruptions, the first one is raised."""
    scope = InterruptScope()
    scope.interrupt(JobTimeout)
    scope.interrupt(JobCancelled)
    with pytest.raises(JobTimeout):
        scope.run(lambda: None)


def test_swallowed_interruption_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the code catches an interruption and continues, a later call interrupts it again.

    This happens at most once per second.
    """
    now, ticks, interruption_times = [0.0], [0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(interrupt_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def stubborn() -> str:
        while len(interruption_times) < 2:
            try:
                while True:
                    ticks[0] += 1
            except JobCancelled:
                interruption_times.append(now[0])
        return "stopped"

    scope = InterruptScope()
    code = InThread(lambda: scope.run(stubborn))
    wait_until(lambda: ticks[0])
    for _ in range(100):
        assert scope.interrupt(JobCancelled)
    wait_until(lambda: interruption_times)
    now[0] = 0.9
    assert scope.interrupt(JobCancelled)
    ticks_before = ticks[0]
    wait_until(lambda: ticks[0] > ticks_before + 1_000)
    assert interruption_times == [0.0]
    now[0] = 1.0
    assert scope.interrupt(JobCancelled)
    assert code.join().result == "stopped"
    assert interruption_times == [0.0, 1.0]


def test_blocking_call_ends_before_interruption() -> None:
    """A blocking call is not interrupted; the interruption follows right after it."""
    scope, started, gate = InterruptScope(), threading.Event(), threading.Event()
    after: list[int] = []

    def block() -> None:
        started.set()
        gate.wait(30)
        for _ in range(1_000_000):
            after.append(1)

    code = InThread(lambda: scope.run(block))
    assert started.wait(30)
    assert scope.interrupt(JobCancelled)
    assert code.error is None
    gate.set()
    assert isinstance(code.join().error, JobCancelled)
    assert len(after) < 1_000_000


def test_other_thread_is_not_interrupted() -> None:
    """Only the thread of the interrupted scope is interrupted."""
    started, released = [threading.Event(), threading.Event()], threading.Event()

    def wait_for_event() -> str:
        started[1].set()
        while not released.is_set():
            pass
        return "finished"

    first, second = InterruptScope(), InterruptScope()
    interrupted = InThread(lambda: first.run(lambda: loop_forever(started[0])))
    other = InThread(lambda: second.run(wait_for_event))
    assert all(event.wait(30) for event in started)
    first.interrupt(JobCancelled)
    assert isinstance(interrupted.join().error, JobCancelled)
    released.set()
    assert other.join().result == "finished"


def test_code_can_be_profiled_after_an_interruption() -> None:
    """After an interruption, a profiler can be used in the same process.

    The test starts a separate process: on Python 3.11, a failure is an endless loop that handles
    no signals.
    """
    program = """
        import contextlib, cProfile, threading
        from flask_bgjobs import JobCancelled
        from flask_bgjobs.execution.interrupt import InterruptScope

        def loop_forever():
            started.set()
            while True:
                pass

        def interrupt():
            started.wait()
            scope.interrupt(JobCancelled)

        scope, started = InterruptScope(), threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with contextlib.suppress(JobCancelled):
            scope.run(loop_forever)
        thread.join()
        print(cProfile.Profile().runcall(lambda: "finished"))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "finished\n"


class Race:
    """Interrupts each scope assigned to ``scope`` again and again, until :meth:`stop`."""

    def __init__(self) -> None:
        self.scope: InterruptScope | None = None
        self.errors: list[BaseException] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            scope = self.scope
            if scope is None:
                time.sleep(0)
                continue
            try:
                while scope.interrupt(JobCancelled) and not self._stopped:
                    pass
            except BaseException as error:
                self.errors.append(error)
            if self.scope is scope:
                self.scope = None

    def stop(self) -> None:
        self._stopped = True

    def join(self) -> None:
        self.stop()
        self._thread.join(30)
        assert not self._thread.is_alive(), "interrupt() hangs"


@pytest.mark.usefixtures("frequent_switches")
def test_no_interruption_after_run_returns() -> None:
    """An interruption that races with the end is never raised after ``run`` has returned."""
    race, outcomes, late = Race(), [], []  # type: ignore[var-annotated]

    def code(scope: InterruptScope, steps: int) -> str:
        race.scope = scope
        for _ in range(steps):
            pass
        return "finished"

    def run_once(steps: int) -> None:
        scope = InterruptScope()
        try:
            outcomes.append(scope.run(lambda: code(scope, steps)))
        except JobCancelled:
            outcomes.append("cancelled")
        for _ in range(50):  # a late interruption would be raised here
            pass
        if not scope.is_closed:
            race.stop()
            late.append("scope still open")

    def run_many() -> None:
        deadline = time.monotonic() + 4
        while len(outcomes) < 20_000 and not late and time.monotonic() < deadline:
            try:
                run_once(random.randrange(200))
            except JobCancelled:
                race.stop()
                late.append("raised after run")

    thread = InThread(run_many)
    try:
        thread.join()
    finally:
        race.join()
    assert late == []
    assert thread.error is None
    assert race.errors == []
    assert set(outcomes) <= {"finished", "cancelled"}
    assert len(outcomes) > 100


@pytest.mark.usefixtures("frequent_switches")
def test_interruption_races_with_coroutine_end() -> None:
    """An interruption that races with a coroutine's end raises no other error."""
    race, outcomes, failures = Race(), [], []  # type: ignore[var-annotated]

    async def code(scope: InterruptScope, steps: int) -> str:
        race.scope = scope
        for _ in range(steps):
            await asyncio.sleep(0)
        return "finished"

    def run_many() -> None:
        deadline = time.monotonic() + 4
        while len(outcomes) < 3_000 and not failures and time.monotonic() < deadline:
            scope = InterruptScope()
            coroutine = code(scope, random.randrange(4))
            try:
                outcomes.append(scope.run(lambda: scope.run_coroutine(coroutine)))  # noqa: B023
            except JobCancelled:
                outcomes.append("cancelled")
            except BaseException as error:
                race.stop()
                failures.append(error)
            finally:
                coroutine.close()

    thread = InThread(run_many)
    try:
        thread.join()
    finally:
        race.join()
    assert failures == []
    assert thread.error is None
    assert race.errors == []
    assert set(outcomes) <= {"finished", "cancelled"}


def run_coroutine(scope: InterruptScope, coroutine: Any) -> Any:
    return scope.run(lambda: scope.run_coroutine(coroutine))


def test_coroutine_result_is_returned() -> None:
    """``run_coroutine`` returns the coroutine's result."""

    async def add() -> int:
        await asyncio.sleep(0)
        return 5

    assert run_coroutine(InterruptScope(), add()) == 5


@pytest.mark.parametrize("stop", INTERRUPTIONS)
def test_coroutine_is_cancelled_through_task(stop: Any) -> None:
    """An interrupted coroutine gets ``CancelledError`` where it awaits, and can clean up."""
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

    scope = InterruptScope()
    code = InThread(lambda: run_coroutine(scope, wait()))
    assert waiting.wait(30)
    assert scope.interrupt(stop) is True
    assert type(code.join().error) is stop
    assert seen == ["cancelled", "cleaned up"]
    assert scope.is_closed


def test_coroutine_catches_interruption_and_returns() -> None:
    """A coroutine that catches ``CancelledError`` and returns keeps its result."""
    waiting = threading.Event()

    async def stubborn() -> str:
        waiting.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "finished"

    scope = InterruptScope()
    code = InThread(lambda: run_coroutine(scope, stubborn()))
    assert waiting.wait(30)
    scope.interrupt(JobCancelled)
    assert code.join().result == "finished"


def test_coroutine_raises_own_cancelled_error() -> None:
    """A ``CancelledError`` raised by the code itself is not a cancel of the job."""

    async def raise_cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_coroutine(InterruptScope(), raise_cancelled())


def test_coroutine_interrupted_before_first_await() -> None:
    """A coroutine interrupted before its first await stops at that await."""
    scope = InterruptScope()
    reached: list[str] = []

    async def await_after_interruption() -> None:
        wait_until(lambda: scope.interruption is not None)
        await asyncio.sleep(0)
        reached.append("after the first await")

    code = InThread(lambda: run_coroutine(scope, await_after_interruption()))
    wait_until(lambda: scope.interrupt(JobCancelled))
    assert isinstance(code.join().error, JobCancelled)
    assert reached == []


def test_signal_handler_interrupts_own_thread() -> None:
    """A signal handler's interruption is raised at once, even in a blocking call."""
    scope = InterruptScope()
    before = signal.signal(signal.SIGALRM, lambda *_: scope.interrupt(JobTimeout))
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(JobTimeout):
            scope.run(lambda: time.sleep(60))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 30
    assert scope.is_closed


def test_signal_handler_interrupts_coroutine() -> None:
    """A signal handler interrupts a coroutine through its task, so that it can clean up."""
    scope = InterruptScope()
    cleaned: list[bool] = []

    async def code() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    before = signal.signal(signal.SIGALRM, lambda *_: scope.interrupt(JobCancelled))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(JobCancelled):
            scope.run(lambda: scope.run_coroutine(code()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cleaned == [True]


def test_scope_closes_despite_failing_signal_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler of the job that raises during the close does not keep the scope open."""
    close = InterruptScope._close
    raised = []

    def close_at_second_call(scope: InterruptScope) -> None:
        if not raised:
            raised.append(True)
            raise TimeoutError
        close(scope)

    monkeypatch.setattr(InterruptScope, "_close", close_at_second_call)
    scope = InterruptScope()
    assert scope.run(lambda: 5) == 5
    assert scope.is_closed
