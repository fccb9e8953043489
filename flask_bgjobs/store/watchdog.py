"""Deadlines for database connections in use: a dead link must not block a worker for ever."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from ..system.safe_logging import logger as _logger
from ..system.threading_patches import Lock
from ..system.threads import WorkerThread

_CHECK_SECONDS = 0.5
"""How often the thread checks the deadlines."""


class Watch:
    """One use of a connection, which has a deadline.

    :param seconds: how long the use may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = 0.0
        self.connection: Any = None
        """The driver connection; ``None`` until :meth:`begin`."""

    def begin(self, driver_connection: Any) -> None:
        """Begin the use of a driver connection; begin it again to restart the deadline."""
        self._deadline = time.monotonic() + self._seconds
        self.connection = driver_connection

    def is_overdue(self, give_up_at: float) -> bool:
        """Whether the deadline or the time ``give_up_at`` has passed."""
        return self.connection is not None and time.monotonic() >= min(self._deadline, give_up_at)

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """A block that takes a connection from a pool, which may open a new one."""
        token = _connecting.set(self)
        try:
            yield
        finally:
            _connecting.reset(token)


_connecting = contextvars.ContextVar[Watch | None]("bgjobs_connecting_watch", default=None)


def watch_new_connections(engine: sa.Engine) -> None:
    """Limit the time of the statements that set up a new connection of an engine.

    Call this after all other listeners were added to the engine, because this one must run first.
    """

    def begin(driver_connection: Any, _record: object) -> None:
        if (watch := _connecting.get()) is not None:
            watch.begin(driver_connection)

    sa.event.listen(engine, "connect", begin, insert=True)


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
        self._watches: set[Watch] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = Lock()

    @contextlib.contextmanager
    def watching(self, seconds: float, driver_connection: Any = None) -> Iterator[Watch]:
        """Sever a connection if the block uses it for longer than ``seconds``.

        :param driver_connection: the connection; ``None``: the block passes it to
            :meth:`Watch.begin`.
        """
        self._start()
        watch = Watch(seconds)
        watch.begin(driver_connection)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

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
            for watch in self._watches.copy():
                if not watch.is_overdue(self._give_up_at()):
                    continue
                try:
                    self._watches.remove(watch)
                except KeyError:
                    # The use has ended in the meantime.
                    continue
                _logger.error(
                    "No reply from the database within the deadline; closing the connection"
                )
                self._sever(watch.connection)
