"""Start latency: one job at a time for an otherwise idle worker."""

from __future__ import annotations

from ..contender import Contender
from ..figures import percentile
from ..measure import Figures, Measure, Scale
from ..stores import Stores
from ..trial import Trial

_SECONDS = 10.0
_EVERY_SECONDS, _EVERY_SECONDS_MARIADB = 0.05, 0.5
"""Longer, because MariaDB has no notifications: the latency is mostly the polling interval."""
_SHARES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Milliseconds from just before the enqueue to the first line of the job's code.

    The time of the enqueue is included. The jobs are enqueued by another process; both processes
    read the monotonic clock of the machine.
    """
    every = _EVERY_SECONDS_MARIADB if contender.store == "mariadb" else _EVERY_SECONDS
    warm_up = range(1)
    numbers = range(1, 1 + max(10, round(scale.seconds(_SECONDS) / every)))
    with Trial(contender, stores) as trial, trial.worker() as worker:
        trial.fill(warm_up)
        trial.wait_until(lambda: trial.recorded() >= 1, worker)
        enqueued = trial.enqueue_paced(numbers, every).times()
        trial.wait_until(lambda: trial.recorded() > len(numbers), worker)
        trial.wait_until_settled(worker)
        started = trial.check(range(numbers.stop)).times()
    waits = [(started[number] - enqueued[number]) / 1e6 for number in numbers]
    return {name: percentile(waits, share) for name, share in _SHARES.items()}


MEASURE = Measure("latency", run)
