"""The threads of a worker, whose end the worker must notice."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import WorkerFailed
from .safe_logging import logger as _logger


class WorkerThread(threading.Thread):
    """A daemon thread that logs the exception that ends it, and keeps it as :attr:`failure`.

    It is a daemon, so that a job that ignores every request to stop cannot keep the process alive.
    """

    def __init__(self, target: Callable[..., object], name: str, *args: Any) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Call the target."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error
            _logger.exception("The thread %s failed", self.name)


def require_alive(threads: Iterable[threading.Thread]) -> None:
    """Make sure that all of these threads live.

    :raises WorkerFailed: names the first one that has ended, and why.
    """
    for thread in threads:
        if not thread.is_alive():
            failure = getattr(thread, "failure", None)
            why = f": {type(failure).__name__}: {failure}" if failure is not None else ""
            raise WorkerFailed(f"the worker's thread {thread.name} has ended{why}")


def position_of(thread_id: int) -> str:
    """What a thread executes at the moment, as ``file:line, function``."""
    frame = sys._current_frames().get(thread_id)
    if frame is None:
        return "an ended thread"
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno}, {code.co_qualname}"
