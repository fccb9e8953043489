"""Pool health: jobs that cannot be stopped, and pools that can run no more jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..errors import WorkerFailed
from ..execution.pools.trouble import Overdue
from ..job.records import JobSpec, Key
from ..system.safe_logging import logger as _logger
from .routing import Route, WorkerPools

_CHECK_SECONDS = 1.0
"""Interval for finding jobs that cannot be stopped."""
_FIRST_LOG_SECONDS = 10.0
"""Time after which such a job is logged. It is logged again each time that this has doubled."""


class PoolHealth:
    """Watches the pools of one worker.

    :param lease: seconds after which a pool that can run no jobs ends the worker.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._checked_at = 0.0
        self._log_at: dict[Key, float] = {}
        """Seconds after which a job that cannot be stopped is logged again."""

    def check_overdue(self, pools: WorkerPools) -> None:
        """Log jobs that cannot be stopped, at most once a second.

        :raises WorkerFailed: when they have filled a whole pool for the time of a lease.
        """
        now = time.monotonic()
        if now - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = now
        for routed in pools:
            overdue = routed.pool.overdue()
            for job in overdue:
                self._log(job, routed.route)
            held = [job for job in overdue if job.seconds >= self._lease]
            if len(held) >= routed.route.size:
                raise WorkerFailed(
                    f"no {routed.route.kind.place} is free: {len(held)} jobs have not stopped for "
                    f"at least {min(job.seconds for job in held):.0f} s (the log names them). "
                    "Give blocking calls a time limit, or run such jobs in the process pool"
                )

    def forget(self, key: Key) -> None:
        """Drop what was noted of an attempt that has ended."""
        self._log_at.pop(key, None)

    def take_from_failing(self, pools: WorkerPools) -> Iterator[JobSpec]:
        """Take the unstarted jobs out of pools whose child processes cannot start.

        :raises WorkerFailed: when several starts have failed over the time of a lease; raised after
            the jobs of that pool.
        """
        for routed in pools:
            failing = routed.pool.failing()
            if failing is None:
                continue
            yield from routed.take_unstarted()
            if failing.is_hopeless and failing.seconds >= self._lease:
                raise WorkerFailed(
                    f"no child process could start for {failing.seconds:.0f} s: {failing.reason}"
                )

    def _log(self, job: Overdue, route: Route) -> None:
        log_at = self._log_at.get(job.spec.key, _FIRST_LOG_SECONDS)
        if job.seconds < log_at:
            return
        self._log_at[job.spec.key] = 2 * log_at
        reason = "teardown" if job.interruption is None else job.interruption.__name__
        _logger.warning(
            "Job cannot be stopped | Job: %s | Class: %s | Reason: %s | For: %.0f s | In: %s | "
            "It holds a %s until that ends",
            job.spec.id,
            job.spec.target,
            reason,
            job.seconds,
            job.position,
            route.kind.place,
        )
