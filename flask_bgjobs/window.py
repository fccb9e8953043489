"""The window in which a job's code may be stopped from another thread.

CPython can raise an exception in another thread at its next instruction. That must never
hit code of ours or of the host (a commit, a log handler, the return of a connection), so it
is sent only while a window is open around user code alone, and one that is still on its way
when the window closes is taken back.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .errors import JobCancelled, JobTimeout

T = TypeVar("T")
Interruption = type[JobCancelled] | type[JobTimeout]

_set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
_NOTHING = ctypes.py_object()
"""A null pointer: takes back an exception that has not arrived yet."""


_CLOSED = -1
"""No thread: the code has ended, and nothing may be sent any more."""


class Window:
    """Runs one job's code so that :meth:`interrupt` can stop it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._stop_task: Callable[[], object] | None = None
        self.interruption: Interruption | None = None
        """What was sent into the code, if anything."""

    @property
    def is_closed(self) -> bool:
        """Whether the code has ended."""
        return self._thread == _CLOSED

    def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises, run in the calling thread with the window open.

        :raises JobCancelled: or :class:`JobTimeout`, when interrupted with it.
        """
        try:
            self._thread = threading.get_ident()
            if self.interruption is not None:
                raise self.interruption
            return function()
        finally:
            # What is still on its way may arrive at any instruction from here on: begin again
            # until the window is shut, after which nothing new can be sent.
            while not self.is_closed:
                try:  # noqa: SIM105 - it may arrive in the code of suppress() as well
                    self._close()
                except (JobCancelled, JobTimeout):
                    pass

    def run_coroutine(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What ``coroutine`` returns, run in an event loop of its own; within :meth:`run`.

        It is interrupted by cancelling its task, so that its ``finally`` blocks may await.
        """

        async def main() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._stop_task = lambda: loop.call_soon_threadsafe(task.cancel)
            try:
                return await coroutine
            finally:
                self._stop_task = None

        try:
            return asyncio.run(main())
        except asyncio.CancelledError:
            if self.interruption is None:
                raise
            raise self.interruption from None

    def interrupt(self, interruption: Interruption) -> bool:
        """Raise ``interruption`` in the code; ``False`` when the window is closed.

        A call in C ends first. Before :meth:`run` it is kept and raised at once there.
        """
        with self._lock:
            if self.is_closed:
                return False
            self.interruption = self.interruption or interruption
            if self._stop_task is not None:
                self._stop_task()
            elif self._thread is not None:
                _set_async_exception(
                    ctypes.c_ulong(self._thread), ctypes.py_object(self.interruption)
                )
            return True

    def _close(self) -> None:
        with self._lock:
            if self._thread is not None:
                _set_async_exception(ctypes.c_ulong(self._thread), _NOTHING)
            self._thread = _CLOSED
