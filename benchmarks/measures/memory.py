"""Memory: the memory use of a worker while it runs very many jobs."""

from __future__ import annotations

import statistics
import threading
from types import TracebackType
from typing import Self

from ..contender import Contender
from ..contenders.bgjobs import BY_STORE
from ..measure import Curve, Figures, Measure, Scale
from ..processes import Background, memory_mib
from ..stores import Stores
from ..trial import Trial

_JOBS, _AT_ONCE, _WARM_UP = 500_000, 20_000, 50_000
_EVERY_SECONDS = 1.0
_SAMPLES = 5
"""Number of samples for a figure, because a single one may be a peak."""


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """MiB when idle, MiB at the end, and the growth after the first 50,000 jobs.

    The curve is the MiB above the idle worker, by number of jobs.
    """
    jobs, warm_up = scale.number(_JOBS), scale.number(_WARM_UP)
    with Trial(contender, stores) as trial, trial.worker() as worker:
        trial.fill(range(1))
        trial.wait_until_settled(worker)
        idle = memory_mib(worker.pid)
        with _Sampler(trial, worker) as sampler:
            for start in range(1, jobs, _AT_ONCE):
                trial.fill(range(start, min(start + _AT_ONCE, jobs)))
                # The worker always has jobs, but never more than two parts are queued.
                _wait_for(trial, start, worker)
            trial.wait_until_settled(worker)
        trial.check(range(jobs))
    warm = [mib for count, mib in sampler.samples if count >= warm_up]
    return {
        "idle_mib": idle,
        "end_mib": statistics.median(warm[-_SAMPLES:]),
        "growth_mib": statistics.median(warm[-_SAMPLES:]) - statistics.median(warm[:_SAMPLES]),
        "curve": [(count, mib - idle) for count, mib in sampler.samples],
    }


MEASURE = Measure("memory", run, suits=lambda contender: contender in BY_STORE, most_runs=1)


def _wait_for(trial: Trial, jobs: int, worker: Background) -> None:
    trial.wait_until(lambda: trial.recorded() >= jobs, worker)


class _Sampler:
    """A context manager that samples the number of jobs and the worker's memory every second."""

    def __init__(self, trial: Trial, worker: Background) -> None:
        self.samples: Curve = []
        self._trial = trial
        self._worker = worker
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.samples.append((self._trial.recorded(), memory_mib(self._worker.pid)))
            if self._done.wait(_EVERY_SECONDS):
                return
