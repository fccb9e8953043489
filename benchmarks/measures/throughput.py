"""Throughput: empty jobs, all enqueued before one worker starts."""

from __future__ import annotations

import time

from ..contender import Contender
from ..journal import Journal
from ..measure import Figures, Measure, Scale
from ..processes import Background, cpu_seconds, memory_mib
from ..stores import Stores
from ..trial import Trial

_MEMORY_EVERY_SECONDS = 0.2


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Jobs per second, and CPU and memory use.

    The time is measured from the first job to the last, which excludes the start of the worker. CPU
    is counted from the first sample after a job has run to the last outcome.
    """
    numbers = range(scale.jobs_for(contender))
    with Trial(contender, stores) as trial:
        trial.fill(numbers)
        with trial.worker() as worker:
            meter = _Meter(trial, worker)
            trial.wait_until(lambda: meter.look() >= len(numbers), worker)
            trial.wait_until_settled(worker)
            return meter.figures(trial.check(numbers))


MEASURE = Measure("throughput", run)


class _Meter:
    """Samples CPU and memory while a worker runs."""

    def __init__(self, trial: Trial, worker: Background) -> None:
        self._trial = trial
        self._worker = worker
        self._first: tuple[int, float, float] | None = None
        self._memory = 0.0
        self._next_memory = 0.0

    def look(self) -> int:
        """The number of jobs that have run. The first call to find any starts the measurement."""
        count = self._trial.recorded()
        if count and self._first is None:
            self._first = (count, *self._cpu())
        if time.monotonic() >= self._next_memory:
            self._next_memory = time.monotonic() + _MEMORY_EVERY_SECONDS
            self._memory = max(self._memory, memory_mib(self._worker.pid))
        return count

    def figures(self, journal: Journal) -> Figures:
        """The figures, after all jobs have run."""
        assert self._first is not None, "no job has run"
        count, worker_before, store_before = self._first
        worker_after, store_after = self._cpu()
        jobs = max(1, len(journal.entries) - count)
        return {
            "jobs_per_second": journal.per_second(),
            "worker_cpu_ms": (worker_after - worker_before) / jobs * 1_000,
            "store_cpu_ms": (store_after - store_before) / jobs * 1_000,
            "memory_mib": self._memory,
        }

    def _cpu(self) -> tuple[float, float]:
        return cpu_seconds(self._worker.pid), self._trial.store.cpu_seconds()
