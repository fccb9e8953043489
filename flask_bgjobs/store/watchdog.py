"""Deadlines for database connections in use: a dead link must not block a worker for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..system.safe_logging import logger as _logger
from ..system.threading_patches import Lock
from ..system.threads import WorkerThread

_CHECK_SECONDS = 0.5
"""How often the thread checks the deadlines."""


class Watchdog:
    """Severs connections that are in use beyond their deadline.

    A half-open link raises no error, because no packet says that the other side is gone. A driver
    would wait for ever, so a thread checks the connections in use.

    :param sever: breaks a driver connection, so that a thread that waits for it gets an error.
    :param give_up_at: returns the time at which all connections are severed, by
        ``time.monotonic()``; the time may change.
    """

    def __init__(self, sever: Callable[[Any], None], give_up_at: Callable[[], float]) -> None:
        self._sever = sever
        self._give_up_at = give_up_at
        self._in_use: dict[object, tuple[float, Any]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = Lock()

    @contextlib.contextmanager
    def watching(self, driver_connection: Any, seconds: float) -> Iterator[None]:
        """Sever the connection if the block takes longer than ``seconds``."""
        self._start()
        token = object()
        self._in_use[token] = (time.monotonic() + seconds, driver_connection)
        try:
            yield
        finally:
            self._in_use.pop(token, None)

    def end(self) -> None:
        """Stop the thread; the next use starts a new one."""
        self._ended.set()

    @property
    def threads(self) -> list[threading.Thread]:
        """The running thread, unless it was told to stop."""
        with self._starting:
            return [] if self._thread is None or self._ended.is_set() else [self._thread]

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or self._ended.is_set():
                self._ended = threading.Event()
                self._thread = WorkerThread(self._close_overdue, "bgjobs-deadlines", self._ended)
                self._thread.start()

    def _close_overdue(self, ended: threading.Event) -> None:
        while not ended.wait(_CHECK_SECONDS):
            now = time.monotonic()
            for token, (deadline, driver_connection) in list(self._in_use.items()):
                if (
                    now >= min(deadline, self._give_up_at())
                    and self._in_use.pop(token, None) is not None
                ):
                    _logger.error(
                        "No reply from the database within the deadline; closing the connection"
                    )
                    self._sever(driver_connection)
