"""Give jobs back: what a worker does with its jobs when it stops or cannot go on."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..job.records import JobSpec, Outcome
from ..job.statuses import OutcomeKind
from ..system.safe_logging import logger as _logger
from .outbox import Outbox
from .routing import WorkerPools
from .suspects import Suspects


def given_back(spec: JobSpec) -> Outcome:
    """The outcome of an attempt that is given back. It uses no retry."""
    return Outcome(spec.id, spec.attempt, OutcomeKind.GIVEN_BACK)


def give_back_unstarted(pools: WorkerPools, suspects: Suspects, outbox: Outbox) -> None:
    """Give back the jobs that have not started."""
    for spec in [*pools.take_unstarted(), *suspects.take_waiting()]:
        outbox.put(spec, given_back(spec))


def give_back_running(pools: WorkerPools, outbox: Outbox, sleep: Callable[[float], None]) -> None:
    """Stop the running jobs, then give them back.

    The code is stopped first, because another worker may start a job as soon as it is given back.

    :param sleep: waits for a number of seconds, or until a job ends.
    """
    running = pools.running_specs()
    stopped = {spec.key for spec in running}
    for spec in running:
        pools.cancel(spec)
    deadline = time.monotonic() + pools.stop_seconds
    while pools.running() and (left := deadline - time.monotonic()) > 0:
        sleep(left)
    # Read before the outcomes: a job that ends in between is then found twice, and never missed.
    still_running = {spec.key: spec for spec in pools.running_specs()}
    for spec, outcome in outbox.take_all():
        still_running.pop(spec.key, None)
        # A reported failure was not caused by the cancel above.
        stopped_by_us = spec.key in stopped and not outcome.is_reported
        if stopped_by_us and outcome.kind is not OutcomeKind.COMPLETED:
            outcome = given_back(spec)._replace(report=outcome.report)
        outbox.put(spec, outcome)
    timed_out = pools.timed_out()
    for spec in still_running.values():
        _logger.warning("Job %s did not stop; it is settled although its code still runs", spec.id)
        outbox.put(spec, _timeout(spec) if spec.key in timed_out else given_back(spec))


def _timeout(spec: JobSpec) -> Outcome:
    """The outcome of a job that has exceeded its timeout and whose code did not stop."""
    return Outcome(
        spec.id,
        spec.attempt,
        OutcomeKind.TIMEOUT,
        error_type="JobTimeout",
        error=f"JobTimeout: it ran longer than {spec.timeout} s, and its code could not be stopped",
    )
