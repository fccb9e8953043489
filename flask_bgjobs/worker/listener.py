"""Wake-ups: how a worker learns at once of jobs that other processes enqueue.

If the database can notify, a thread listens for its notifications. Otherwise the worker polls often
while there is work, and at the poll interval after 30 seconds without work. A wake-up may be lost:
the next poll finds the same jobs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from ..store import Store
from ..system.safe_logging import logger as _logger
from ..system.threads import WorkerThread

_QUICK_POLL_SECONDS = 0.02
_QUIET_AFTER_SECONDS = 30.0
"""Time without work after which the database is polled less often."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 30.0
"""Shortest and longest pause before the next try to listen, after a failure."""


class Wake:
    """An event that a signal handler may set; ``threading.Event`` could deadlock there."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        # Skipped if it is set already: finished jobs may call this ten thousand times a second.
        if self._queue.empty():
            self._queue.put(None)

    def wait(self, timeout: float) -> None:
        """Return when the event is set, or after ``timeout`` seconds, and clear it."""
        try:
            self._queue.get(timeout=max(timeout, 0.0))
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass


class WakeUps:
    """Calls a function when there may be new work, until :meth:`stop`.

    :param wake: the function; called in the listener's thread, must be quick.
    :param poll_interval: longest time between two polls, in seconds.
    """

    def __init__(self, store: Store, wake: Callable[[], object], poll_interval: float) -> None:
        self._store = store
        self._wake = wake
        self._poll_interval = poll_interval
        self._work_noted_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if store.can_listen:
            self._thread = WorkerThread(self._listen, "bgjobs-listener")
            self._thread.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until :meth:`stop`."""
        return [] if self._thread is None else [self._thread]

    def note_work(self) -> None:
        """Note that the worker has just found work."""
        self._work_noted_at = time.monotonic()

    def poll_seconds(self) -> float:
        """Seconds after which the worker must poll without a wake-up."""
        if self._thread is not None or self._is_quiet():
            return self._poll_interval
        return min(_QUICK_POLL_SECONDS, self._poll_interval)

    def stop(self) -> None:
        """Stop listening."""
        self._stopped.set()
        if self._thread is not None:
            self._store.stop_listening()
            self._thread.join()

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._work_noted_at > _QUIET_AFTER_SECONDS

    def _listen(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._store.listen(self._stopped, self._wake, self._is_quiet)
            except SQLAlchemyError as error:
                # The worker logs the outage, and polls in the meantime.
                _logger.debug("Not listening for new jobs: %s", getattr(error, "orig", error))
            except Exception:
                _logger.exception("Not listening for new jobs")
            if time.monotonic() - began > _LAST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._stopped.wait(pause)
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)
