"""Wake-ups: how a worker hears at once of jobs that other processes enqueue.

A thread listens where the database can tell. Where it cannot, the worker looks often as long as
there is work, and rarely when there has been none for a while. None of this may be relied on: each
look that a wake-up spares comes with the next poll.
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
_SILENCE_SECONDS = 30.0
"""Without work for so long, the database is no longer asked so often."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 30.0
"""Before the next try to listen, when the last one failed."""


class Wake:
    """An event that a signal handler may set: ``threading.Event`` could deadlock there."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        # What is set already need not be set again, ten thousand times a second.
        if self._queue.empty():
            self._queue.put(None)

    def wait(self, timeout: float) -> None:
        """Return when it is set, or after ``timeout`` seconds; it is unset then."""
        try:
            self._queue.get(timeout=max(timeout, 0.0))
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass


class WakeUps:
    """Calls ``on_news`` when there may be work, until it is stopped.

    :param on_news: called in a thread of its own; must be quick.
    :param poll_interval: seconds between two looks of a worker that hears nothing.
    """

    def __init__(self, store: Store, on_news: Callable[[], object], poll_interval: float) -> None:
        self._store = store
        self._on_news = on_news
        self._poll_interval = poll_interval
        self._worked = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if store.can_listen:
            self._thread = WorkerThread(self._listen, "bgjobs-listener")
            self._thread.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until it is stopped."""
        return [] if self._thread is None else [self._thread]

    def note_work(self) -> None:
        """Note that there was work to do."""
        self._worked = time.monotonic()

    def poll_seconds(self) -> float:
        """After how long the worker must look by itself."""
        if self._thread is not None or self._is_quiet():
            return self._poll_interval
        return min(_QUICK_POLL_SECONDS, self._poll_interval)

    def stop(self) -> None:
        """Listen no longer."""
        self._stopped.set()
        if self._thread is not None:
            self._store.stop_listening()
            self._thread.join()

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._worked > _SILENCE_SECONDS

    def _listen(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._store.listen(self._stopped, self._on_news, self._is_quiet)
            except SQLAlchemyError as error:
                # The worker itself says that the database is away, and polls meanwhile.
                _logger.debug("Not listening for new jobs: %s", getattr(error, "orig", error))
            except Exception:
                _logger.exception("Not listening for new jobs")
            if time.monotonic() - began > _LAST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._stopped.wait(pause)
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)
