"""Jobs that misbehave on purpose, to try a cancel on and to see what a crash costs.

They are for child processes: in a thread of the worker a crash would end the worker itself.
So their queue is one that ``BGJOBS_QUEUE_POOLS`` gives to the process pool, and they refuse to
run anywhere else, whoever enqueued them and how.
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
    """Never ends: computes for ever, looks at nothing, and swallows what is raised."""
    _refuse_outside_child()
    while True:
        with contextlib.suppress(Exception):
            sum(range(1_000))


@bgjobs.job(queue=DANGER_QUEUE, retries=0)
def stubborn() -> None:
    """Never ends, and does not listen when it is asked to."""
    _refuse_outside_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


@bgjobs.job(queue=DANGER_QUEUE, retries=0)
def crash() -> None:
    """Ends its process at once, as a fault in C code or a lack of memory would."""
    _refuse_outside_child()
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse_outside_child() -> None:
    if not is_child():
        raise Fail(
            "this job runs in a child process only, where it can hurt nobody: enqueue it into "
            f"{DANGER_QUEUE!r}, which BGJOBS_QUEUE_POOLS gives to the process pool"
        )
