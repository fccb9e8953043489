"""The scope in which a job's code may be stopped from another thread.

CPython can raise an exception in another thread at its next instruction. That must never
hit code of ours or of the host (a commit, a log handler, the return of a connection), so it
is sent only while a scope is open around user code alone, and one that is still on its way
when the scope closes is taken back.
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
_NOTHING = ctypes.py_object()
"""A null pointer: takes back an exception that has not arrived yet."""


_AGAIN_SECONDS = 1.0
"""Between two interruptions of code that swallowed the first: it may be cleaning up."""
_CLOSED = -1
"""No thread: the code has ended, and nothing may be sent any more."""


class InterruptScope:
    """Runs one job's code so that :meth:`interrupt` can stop it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._stop_task: Callable[[], object] | None = None
        self._sent_at = -math.inf
        self.interruption: Interruption | None = None
        """What was sent into the code, if anything."""
        self.overdue_since: float | None = None
        """When it was interrupted, or else when its code ended, by ``time.monotonic()``."""
        self.thread_id: int | None = None
        """Of the thread that runs the code."""

    @property
    def is_closed(self) -> bool:
        """Whether the code has ended."""
        return self._thread == _CLOSED

    def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises, run in the calling thread with the scope open.

        :raises JobCancelled: or :class:`JobTimeout`, when interrupted with it.
        """
        try:
            self._thread = self.thread_id = threading.get_ident()
            if self.interruption is not None:
                raise self.interruption
            return function()
        finally:
            # What is still on its way may arrive at any call from here on: begin again until
            # the scope is shut, after which nothing new can be sent. (No call stands outside
            # the inner `try`, not even of a property.)
            while self._thread != _CLOSED:
                try:  # noqa: SIM105 - it may arrive in the code of suppress() as well
                    self._close()
                except BaseException:
                    # Also what a signal handler of the job raises, such as that of its alarm.
                    pass

    def run_coroutine(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What ``coroutine`` returns, run in an event loop of its own; within :meth:`run`.

        It is interrupted by cancelling its task, so that its ``finally`` blocks may await.
        """
        try:
            self._interrupt_through(_nothing)
        except BaseException:
            coroutine.close()
            raise

        async def main() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._interrupt_through(lambda: loop.call_soon_threadsafe(task.cancel))
            try:
                with forks.CopiesEnd():
                    return await coroutine
            finally:
                # From here on the loop ends, and must not be disturbed.
                self._interrupt_through(_nothing)

        try:
            return asyncio.run(main())
        except asyncio.CancelledError as error:
            if self.interruption is None:
                raise
            # With the place where the coroutine stood.
            raise self.interruption().with_traceback(error.__traceback__) from None
        finally:
            coroutine.close()

    def interrupt(self, interruption: Interruption) -> bool:
        """Raise ``interruption`` in the code; ``False`` when the scope is closed.

        A call in C ends first. Before :meth:`run` it is kept and raised at once there. Code that
        swallowed it is interrupted again by a later call, at most once a second.
        """
        with self._lock:
            if self.is_closed:
                return False
            now = time.monotonic()
            if self.interruption is None:
                self.interruption, self.overdue_since = interruption, now
            if self._thread is not None and now - self._sent_at >= _AGAIN_SECONDS:
                self._sent_at = now
                self._send()
            return True

    def _send(self) -> None:
        if self._stop_task is not None:
            self._stop_task()
        elif self._thread == threading.get_ident():
            # From a signal's handler, which stands within the code that is to stop.
            assert self.interruption is not None
            raise self.interruption
        else:
            assert self._thread is not None
            _set_async_exception(ctypes.c_ulong(self._thread), ctypes.py_object(self.interruption))

    def _interrupt_through(self, stop_task: Callable[[], object]) -> None:
        """Send interruptions to a task from now on, also one that came before it began."""
        with self._lock:
            was_sent = self.interruption is not None
            if was_sent and self._stop_task is None and self._thread is not None:
                _set_async_exception(ctypes.c_ulong(self._thread), _NOTHING)
            self._stop_task = stop_task
            if was_sent:
                stop_task()

    def _close(self) -> None:
        with self._lock:
            # Only what was sent: CPython slows down for good by taking back nothing.
            if self._thread is not None and self.interruption is not None:
                _set_async_exception(ctypes.c_ulong(self._thread), _NOTHING)
            self._thread = _CLOSED
            if self.overdue_since is None:
                self.overdue_since = time.monotonic()


def _nothing() -> None:
    """Stops no task: there is none at the moment."""
