"""A worker's connection to its supervisor: it reports that it takes jobs, and receives stops.

Both sides use a socket pair instead of signals. Terminals and service managers send a signal to the
supervisor and also to its children. A signal forwarded by the supervisor would then be the second
one, which ends the grace period of running jobs. Through the socket, a child also notices on every
platform that its supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

OPTION = "--supervised"
"""Option of the worker command with the descriptor of the child's socket; for supervisors only."""
TAKES_JOBS, STOP = b"j", b"s"
"""The message that the child sends once, and the message of the supervisor for each signal."""


class Supervised:
    """The connection of a worker to its supervisor.

    :param descriptor: file descriptor of the child's socket.
    :param stop: asks the worker to stop; a second call ends the grace period of its jobs.
    """

    def __init__(self, descriptor: int, stop: Callable[[], None]) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._stop = stop
        self._asked_lock = threading.Lock()
        threading.Thread(target=self._listen, name="bgjobs-supervised", daemon=True).start()

    def on_worker_started(self, *_: object, **__: object) -> None:
        """Report to the supervisor that the worker takes jobs."""
        with contextlib.suppress(OSError):
            self._socket.send(TAKES_JOBS)

    def stop_once(self) -> None:
        """Ask the worker to stop, unless it was asked before. Safe in threads and signal handlers.

        A second signal counts only if the supervisor forwards it.
        """
        if self._asked_lock.acquire(blocking=False):
            self._stop()

    def _listen(self) -> None:
        # End of file means that the supervisor is gone. Stop as well: without a supervisor, this
        # worker would never be stopped or replaced.
        self._receive_stop()
        self.stop_once()
        while self._receive_stop():
            self._stop()

    def _receive_stop(self) -> bool:
        try:
            return self._socket.recv(1) == STOP
        except OSError:
            return False
