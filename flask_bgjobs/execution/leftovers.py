"""What a job's code leaves behind in its process, undone before the next job begins."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_IS_POSIX = hasattr(signal, "setitimer") and hasattr(signal, "pthread_sigmask")
_HANDLED = tuple(
    getattr(signal, name)
    for name in (
        "SIGALRM", "SIGCHLD", "SIGHUP", "SIGINT", "SIGPIPE", "SIGPROF", "SIGQUIT", "SIGTERM",
        "SIGUSR1", "SIGUSR2", "SIGVTALRM",
    )
    if hasattr(signal, name)
)  # fmt: skip
"""The signals that programs handle; to look at all of them would take as long as a short job."""


_runs_only_jobs = False


@contextlib.contextmanager
def owning_process() -> Iterator[None]:
    """Declare that this process runs nothing but jobs: whatever is left behind is a job's."""
    global _runs_only_jobs
    _runs_only_jobs = True
    try:
        yield
    finally:
        _runs_only_jobs = False


class ThreadState:
    """A block after which the alarm is off and signals are blocked as before, in any thread.

    An alarm that was set before the block stays, and so does one that other code of the process,
    such as a request in its main thread, may have set meanwhile.
    """

    __slots__ = ("_disarms", "_mask")

    def __enter__(self) -> None:
        if _IS_POSIX:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            is_ours = _runs_only_jobs or threading.current_thread() is threading.main_thread()
            self._disarms = is_ours and not _is_set(signal.ITIMER_REAL)

    def __exit__(self, *_: object) -> None:
        if _IS_POSIX:
            if self._disarms and _is_set(signal.ITIMER_REAL):
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


class ProcessState:
    """What a process is like that runs one job at a time in its main thread: handlers of signals,
    timers, working directory and umask."""

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {n: signal.getsignal(n) for n in _HANDLED}
        self._timers = [t for t in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF) if not _is_set(t)]
        try:
            self._folder = os.getcwd()
        except FileNotFoundError:
            # It has been removed: there is nowhere to go back to.
            self._folder = os.curdir
        self._umask = os.umask(0)
        os.umask(self._umask)

    def restore(self) -> None:
        """Make the process what it was."""
        for timer in self._timers:
            signal.setitimer(timer, 0)
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.umask(self._umask)
        with contextlib.suppress(OSError):
            # It may have been removed.
            os.chdir(self._folder)


def _is_set(timer: int) -> bool:
    return signal.getitimer(timer)[0] > 0
