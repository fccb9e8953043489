"""Restore process state, such as signal handlers and timers, that a job's code has changed."""

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
"""The signals that programs usually handle. Checking all signals takes as long as a short job."""


_runs_only_jobs = False


@contextlib.contextmanager
def owning_process() -> Iterator[None]:
    """Within this block, the process runs only jobs, so any changed state comes from a job."""
    global _runs_only_jobs
    _runs_only_jobs = True
    try:
        yield
    finally:
        _runs_only_jobs = False


class ThreadState:
    """A block, for any thread, that cancels the job's alarm and restores the mask of signals.

    An alarm that was set before the block is kept. So is one that other code of the process, such
    as a request in its main thread, may have set in the meantime.
    """

    __slots__ = ("_cancels_alarm", "_mask")

    def __enter__(self) -> None:
        if _IS_POSIX:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            is_owner = _runs_only_jobs or threading.current_thread() is threading.main_thread()
            self._cancels_alarm = is_owner and not _is_set(signal.ITIMER_REAL)

    def __exit__(self, *_: object) -> None:
        if _IS_POSIX:
            if self._cancels_alarm and _is_set(signal.ITIMER_REAL):
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


class ProcessState:
    """Signal handlers, timers, working directory and umask of a process, to restore after a job.

    It is for child processes, which run one job at a time in the main thread.
    """

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {n: signal.getsignal(n) for n in _HANDLED}
        self._timers = [t for t in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF) if not _is_set(t)]
        try:
            self._folder = os.getcwd()
        except FileNotFoundError:
            # The folder was removed, so there is none to return to.
            self._folder = os.curdir
        self._umask = os.umask(0)
        os.umask(self._umask)

    def restore(self) -> None:
        """Restore the state that the process had when this object was made."""
        for timer in self._timers:
            signal.setitimer(timer, 0)
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.umask(self._umask)
        with contextlib.suppress(OSError):
            # The folder may have been removed.
            os.chdir(self._folder)


def _is_set(timer: int) -> bool:
    return signal.getitimer(timer)[0] > 0
