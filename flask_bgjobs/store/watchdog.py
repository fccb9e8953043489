"""Deadlines for connections in use: a dead link must not hold a worker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..system.safe_logging import logger as _logger
from ..system.threading_patches import Lock
from ..system.threads import WorkerThread

_LOOK_SECONDS = 0.5


class Watchdog:
    """Severs connections that are in use for longer than they may be.

    A half-open link gives no error: the other side is gone, and nobody says so. Drivers wait for
    ever then, so a thread looks after the connections that are in use.

    :param sever: breaks a driver's connection, so that who waits for it gets an error.
    :param give_up_at: when all are severed, by ``time.monotonic()``; it may change.
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
        """Sever the connection when the block takes longer than ``seconds``."""
        self._start()
        token = object()
        self._in_use[token] = (time.monotonic() + seconds, driver_connection)
        try:
            yield
        finally:
            self._in_use.pop(token, None)

    def end(self) -> None:
        """End the thread; the next use starts another."""
        self._ended.set()

    @property
    def threads(self) -> list[threading.Thread]:
        """Its thread, as long as it must live."""
        with self._starting:
            return [] if self._thread is None or self._ended.is_set() else [self._thread]

    def _start(self) -> None:
        with self._starting:
            if self._thread is None or self._ended.is_set():
                self._ended = threading.Event()
                self._thread = WorkerThread(self._look, "bgjobs-deadlines", self._ended)
                self._thread.start()

    def _look(self, ended: threading.Event) -> None:
        while not ended.wait(_LOOK_SECONDS):
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
