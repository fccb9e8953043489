"""Limits: throughput of jobs with limits, and the latency of jobs without any beside many that
wait."""

from __future__ import annotations

from ..apps.bgjobs import FULL
from ..contender import Contender
from ..contenders.bgjobs import BY_STORE
from ..figures import percentile
from ..journal import Journal
from ..measure import Figures, Measure, Scale
from ..ours import LIMITS
from ..processes import python
from ..stores import Stores
from ..trial import Trial

_JOBS, _WAITING = 20_000, 100_000
_PACED, _EVERY_SECONDS = 100, 0.1


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Jobs per second by limit, and milliseconds to the start of a job without a limit, on an empty
    table and beside jobs that wait for a full key."""
    numbers = range(scale.number(_JOBS))
    figures = {name: _jobs_per_second(contender, stores, name, numbers) for name in LIMITS}
    for waiting in (0, scale.number(_WAITING)):
        figures[f"start_beside_{'none' if waiting == 0 else 'many'}_ms"] = _start_ms(
            contender, stores, waiting, range(scale.number(_PACED))
        )
    return figures


MEASURE = Measure("limits", run, suits=lambda contender: contender in BY_STORE)


def _jobs_per_second(
    contender: type[Contender], stores: Stores, name: str, numbers: range
) -> float:
    with Trial(contender, stores) as trial:
        _enqueue(trial, name, numbers)
        with trial.worker() as worker:
            trial.wait_until(lambda: trial.recorded() >= len(numbers), worker)
            trial.wait_until_settled(worker)
            return trial.check(numbers).per_second()


def _start_ms(contender: type[Contender], stores: Stores, waiting: int, numbers: range) -> float:
    """Milliseconds from before the enqueue to the start; the median."""
    warm_up = range(len(numbers), len(numbers) + 1)
    with Trial(contender, stores) as trial:
        if waiting:
            _enqueue(trial, FULL, range(waiting))
        with trial.worker() as worker:
            trial.fill(warm_up)
            trial.wait_until(lambda: trial.recorded() >= 1, worker)
            enqueued = trial.enqueue_paced(numbers, _EVERY_SECONDS).times()
            trial.wait_until(lambda: trial.recorded() > len(numbers), worker)
            started = Journal.read(trial.journal).times()
    return percentile([(started[n] - enqueued[n]) / 1e6 for n in numbers], 0.5)


def _enqueue(trial: Trial, name: str, numbers: range) -> None:
    arguments = ("limited", name, str(len(numbers)))
    trial.execute(python("-m", "benchmarks.ours", *arguments))
