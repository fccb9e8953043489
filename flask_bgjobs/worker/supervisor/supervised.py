"""The worker's side of a supervisor: it says that it takes jobs, and hears when it must stop.

Both talk over a pair of sockets. A signal would not do, as nobody can tell who sent it: a terminal
and a service manager signal the supervisor and its children alike, and what the supervisor then
passes on would count as the second signal, which ends the grace of running jobs. The sockets also
tell a child on every system that its supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

OPTION = "--supervised"
"""Of the worker command, with the descriptor of the child's socket; for supervisors only."""
TAKES_JOBS, STOP = b"j", b"s"
"""What the child tells once, and what the supervisor tells at each signal."""


class Supervised:
    """The tie of a worker to its supervisor.

    :param descriptor: of the child's socket.
    :param stop: asks the worker to stop; the second call ends the grace of its running jobs.
    """

    def __init__(self, descriptor: int, stop: Callable[[], None]) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._stop = stop
        self._asked = threading.Lock()
        threading.Thread(target=self._listen, name="bgjobs-supervised", daemon=True).start()

    def on_worker_started(self, *_: object, **__: object) -> None:
        """Tell the supervisor that the worker takes jobs."""
        with contextlib.suppress(OSError):
            self._socket.send(TAKES_JOBS)

    def stop_once(self) -> None:
        """Ask the worker to stop, unless that was done; from any thread and signal handler.

        A second signal counts only when the supervisor passes it on.
        """
        if self._asked.acquire(blocking=False):
            self._stop()

    def _listen(self) -> None:
        # Without a word the supervisor is gone: nobody would ever stop or replace this worker.
        self._hear()
        self.stop_once()
        while self._hear():
            self._stop()

    def _hear(self) -> bool:
        try:
            return self._socket.recv(1) == STOP
        except OSError:
            return False
