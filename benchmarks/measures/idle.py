"""Idle cost: statements and CPU of a worker that has no jobs."""

from __future__ import annotations

import time

from .. import tracing
from ..contender import Contender
from ..measure import Figures, Measure, Scale
from ..processes import cpu_seconds
from ..stores import Stores
from ..trial import Trial

_SECONDS = 60.0
_SETTLE_SECONDS = 32.0
"""Wait after the first job until the worker is idle: it may poll more often for a while."""


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Statements and milliseconds of CPU per minute, for the worker and its child processes.

    The worker has run one job before, so that its start is not measured.
    """
    with (
        Trial(contender, stores) as trial,
        trial.store.counting(trial.trace) as statements,
        trial.worker(**{tracing.VARIABLE: str(trial.trace)}) as worker,
    ):
        trial.fill(range(1))
        trial.wait_until(lambda: trial.recorded() >= 1, worker)
        trial.wait_until_settled(worker)
        time.sleep(_SETTLE_SECONDS)
        began, asked, used = time.monotonic(), statements(), cpu_seconds(worker.pid)
        time.sleep(scale.idle_seconds or scale.seconds(_SECONDS))
        used, asked = cpu_seconds(worker.pid) - used, statements() - asked
        minutes = (time.monotonic() - began) / 60
    return {"statements_per_minute": asked / minutes, "cpu_ms_per_minute": used * 1e3 / minutes}


MEASURE = Measure("idle", run, most_runs=1)
