"""The scope in which a job's code can be interrupted from another thread.

CPython can raise an exception in another thread at its next instruction. Such an exception must
never reach library or host code, such as a commit, a log handler or the return of a connection. So
it is sent only while a scope is open around the job's code. When the scope closes, an exception
that has not arrived yet is taken back.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import JobCancelled, JobTimeout
from ..system import forks

T = TypeVar("T")
Interruption = type[JobCancelled] | type[JobTimeout]

_set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc

_REPEAT_SECONDS = 1.0
"""Shortest time between two interruptions. Code that caught the first may be cleaning up."""
_CLOSED = -1
"""Thread id of a closed scope, whose code has ended: nothing may be sent."""


class InterruptScope:
    """Runs one job's code so that :meth:`interrupt` can stop it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._stop_task: Callable[[], object] | None = None
        self._sent_at = -math.inf
        self.interruption: Interruption | None = None
        """The exception that was sent to the code, if any."""
        self.overdue_since: float | None = None
        """Time of the interruption, or else of the end of the code, by ``time.monotonic()``."""
        self.thread_id: int | None = None
        """Id of the thread that runs the code."""

    @property
    def is_closed(self) -> bool:
        """Whether the code has ended."""
        return self._thread == _CLOSED

    def run(self, function: Callable[[], T]) -> T:
        """Run a function in the calling thread with the scope open, and return its result.

        :raises JobCancelled: when the code was interrupted by a cancel.
        :raises JobTimeout: when the code was interrupted by a timeout.
        """
        try:
            self._thread = self.thread_id = threading.get_ident()
            if self.interruption is not None:
                raise self.interruption
            return function()
        finally:
            # An exception that was sent may arrive at any call from here on. Repeat until the
            # scope is closed; then none can be sent. (Every call must be inside the inner `try`,
            # even the call of a property.)
            while self._thread != _CLOSED:
                try:  # noqa: SIM105 - it may arrive in the code of suppress() as well
                    self._close()
                except BaseException:
                    # Also an exception from a signal handler of the job, such as for SIGALRM.
                    pass

    def run_coroutine(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in its own event loop, and return its result; call it within :meth:`run`.

        To interrupt it, its task is cancelled, so that its ``finally`` blocks may await.
        """
        try:
            self._interrupt_with(_stop_no_task)
        except BaseException:
            coroutine.close()
            raise

        async def main() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._interrupt_with(lambda: loop.call_soon_threadsafe(task.cancel))
            try:
                with forks.CopiesEnd():
                    return await coroutine
            finally:
                # The loop ends from here on, and must not be interrupted.
                self._interrupt_with(_stop_no_task)

        try:
            return asyncio.run(main())
        except asyncio.CancelledError as error:
            if self.interruption is None:
                raise
            # The traceback shows where the coroutine was interrupted.
            raise self.interruption().with_traceback(error.__traceback__) from None
        finally:
            coroutine.close()

    def interrupt(self, interruption: Interruption) -> bool:
        """Raise an exception in the code. A blocking C call returns first.

        If :meth:`run` has not begun, it raises the exception at once. If the code has caught an
        earlier one, a later call interrupts it again, at most once a second.

        :returns: ``False`` if the scope is closed.
        """
        with self._lock:
            if self.is_closed:
                return False
            now = time.monotonic()
            if self.interruption is None:
                self.interruption, self.overdue_since = interruption, now
            if self._thread is not None and now - self._sent_at >= _REPEAT_SECONDS:
                self._sent_at = now
                self._send()
            return True

    def _send(self) -> None:
        if self._stop_task is not None:
            self._stop_task()
        elif self._thread == threading.get_ident():
            # Called from a signal handler, which runs inside the code to be stopped.
            assert self.interruption is not None
            raise self.interruption
        else:
            assert self._thread is not None
            _set_async_exception(ctypes.c_ulong(self._thread), ctypes.py_object(self.interruption))

    def _interrupt_with(self, stop_task: Callable[[], object]) -> None:
        """Call ``stop_task`` for interruptions from now on, also for one that came before."""
        with self._lock:
            was_sent = self.interruption is not None
            if was_sent and self._stop_task is None:
                _take_back()
            self._stop_task = stop_task
            if was_sent:
                stop_task()

    def _close(self) -> None:
        with self._lock:
            if self.interruption is not None:
                _take_back()
            self._thread = _CLOSED
            if self.overdue_since is None:
                self.overdue_since = time.monotonic()


class _Replacement(BaseException):
    """Replaces an exception that was sent to a thread and has not arrived yet."""


def _take_back() -> None:
    """Take back an exception that was sent to the calling thread, if it has not arrived yet.

    Another exception replaces it, and is caught here. Sending a null pointer would remove it too,
    but CPython before 3.13 then checks for an exception again and again, for as long as the process
    lives. On 3.11, a profiler or tracer makes that an endless loop.
    """
    try:
        if _set_async_exception(
            ctypes.c_ulong(threading.get_ident()), ctypes.py_object(_Replacement)
        ):
            while True:
                pass
    except _Replacement:
        pass


def _stop_no_task() -> None:
    """Stop no task: there is none before the event loop runs and while it ends."""
