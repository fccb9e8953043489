"""The threads of a worker, and a check that they are alive."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import WorkerFailed
from .safe_logging import logger as _logger


class WorkerThread(threading.Thread):
    """A daemon thread that logs an exception that ends it, and keeps it as :attr:`failure`.

    Daemon threads do not keep the process alive if a job ignores all requests to stop.
    """

    def __init__(self, target: Callable[..., object], name: str, *args: Any) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Call the target, and log its exception."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error
            _logger.exception("The thread %s failed", self.name)


def require_alive(threads: Iterable[threading.Thread]) -> None:
    """Check that all threads are alive.

    :raises WorkerFailed: if one has ended; names the first, and its exception if there was one.
    """
    for thread in threads:
        if not thread.is_alive():
            failure = getattr(thread, "failure", None)
            why = f": {type(failure).__name__}: {failure}" if failure is not None else ""
            raise WorkerFailed(f"the worker's thread {thread.name} has ended{why}")


def position_of(thread_id: int) -> str:
    """The code that a thread is executing, as ``file:line, function``."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "an ended thread"
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno}, {code.co_qualname}"
