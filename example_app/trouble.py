"""Jobs that misbehave on purpose, to demonstrate cancels and crashes.

They must run in child processes: in a thread, a crash would end the worker itself. Therefore
``BGJOBS_QUEUE_POOLS`` assigns their queue to the process pool, and they refuse to run elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from flask_bgjobs import Fail
from flask_bgjobs.execution.pools import is_child

from .config import DANGER_QUEUE
from .extensions import bgjobs


@bgjobs.job(queue=DANGER_QUEUE, retries=0)
def hang() -> None:
    """Computes without end, never checks for a cancel, and catches every ``Exception``."""
    _refuse_outside_child()
    while True:
        with contextlib.suppress(Exception):
            sum(range(1_000))


@bgjobs.job(queue=DANGER_QUEUE, retries=0)
def stubborn() -> None:
    """Sleeps without end, and ignores SIGTERM."""
    _refuse_outside_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


@bgjobs.job(queue=DANGER_QUEUE, retries=0)
def crash() -> None:
    """Kills its own process, as a fault in C code or a lack of memory would."""
    _refuse_outside_child()
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse_outside_child() -> None:
    if not is_child():
        raise Fail(
            "this job runs only in a child process, where it cannot affect other jobs: enqueue it "
            f"in the queue {DANGER_QUEUE!r}, which BGJOBS_QUEUE_POOLS assigns to the process pool"
        )
