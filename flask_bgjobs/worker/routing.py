"""Routes: which queues' jobs run in which pool of a worker.

A worker has one pool, unless the configuration names a pool for single queues. The pools do not
wait for each other: how many jobs are claimed for a pool depends on that pool alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..errors import JobTimeout
from ..execution.pools.kinds import KINDS, PoolKind
from ..execution.pools.pace import Pace, Throughput
from ..execution.pools.protocol import Finished, Pool
from ..job.records import JobSpec, Key, Outcome, Report

_PREFETCH_SECONDS = 0.1
"""Seconds of work to claim ahead. With more, a new high-priority job would wait too long."""
_MAX_CLAIM = 1_000


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """The queues whose jobs run in one pool."""

    pool: str
    """One of the names of :data:`~flask_bgjobs.execution.pools.kinds.KINDS`."""
    size: int
    """Number of jobs that run at once."""
    queues: tuple[str, ...] | None
    """The queues, served in this strict order; ``None``: all but those of the other routes."""
    excluded: frozenset[str] = frozenset()
    """Queues that have a route of their own."""

    @property
    def kind(self) -> PoolKind:
        """The kind of the pool."""
        return KINDS[self.pool]

    def serves(self, queue: str) -> bool:
        """Whether jobs of ``queue`` take this route."""
        return queue not in self.excluded if self.queues is None else queue in self.queues


class RoutedPool:
    """One pool, and how many jobs to claim for it.

    :param make_pool: makes the pool; its argument is the callback for each job and its outcome.
    :param on_finished: called with each job and its outcome.
    """

    def __init__(
        self, route: Route, make_pool: Callable[[Finished], Pool], on_finished: Finished
    ) -> None:
        self.route = route
        self.expects_jobs = True
        """Whether there may be jobs to claim for this pool."""
        self._on_finished = on_finished
        self._pace = Pace()
        self._throughput = Throughput()
        self.pool = make_pool(self._note)

    def submit(self, specs: Sequence[JobSpec], claimed: float) -> None:
        """Run jobs in this order, each as soon as a thread or child process is free."""
        self._throughput.note_submitted(len(specs))
        self.pool.submit(specs, claimed)

    def take_unstarted(self) -> list[JobSpec]:
        """Remove the jobs that have not started from the pool, and return them."""
        taken = self.pool.take_unstarted()
        self._throughput.note_submitted(-len(taken))
        return taken

    def room(self) -> int:
        """Number of jobs to claim: as many as the pool can run, and a few to prefetch."""
        capacity = self.pool.capacity()
        if capacity == 0:
            return 0
        unstarted, running = self.pool.unstarted(), self.pool.running()
        self._throughput.update(unstarted, running)
        ahead = self._prefetch()
        if unstarted > ahead // 2:
            return 0
        return min(capacity + ahead - running - unstarted, _MAX_CLAIM)

    def _prefetch(self) -> int:
        if self._pace.seconds is None:
            return 0
        # Jobs that share a resource, such as the GIL, finish less often than their run time says.
        seconds = max(self._pace.seconds / self.route.size, self._throughput.seconds_per_job)
        return int(_PREFETCH_SECONDS / max(seconds, _PREFETCH_SECONDS / _MAX_CLAIM))

    def _note(self, spec: JobSpec, outcome: Outcome) -> None:
        if outcome.wait_seconds is not None:
            self._pace.note(outcome.run_seconds)
        self._on_finished(spec, outcome)


class WorkerPools:
    """All pools of a worker, with the methods of one pool."""

    def __init__(self, pools: Sequence[RoutedPool]) -> None:
        self._pools = pools

    def __iter__(self) -> Iterator[RoutedPool]:
        return iter(self._pools)

    @property
    def stop_seconds(self) -> float:
        """Time within which cancelled code stops, unless it ignores the cancel."""
        return max(each.pool.stop_seconds for each in self._pools)

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until the pools are closed."""
        return [thread for each in self._pools for thread in each.pool.threads]

    def expect_jobs(self) -> None:
        """Note that there may be jobs to claim for any of the pools."""
        for each in self._pools:
            each.expects_jobs = True

    def submit(self, spec: JobSpec, claimed: float) -> None:
        """Run one job in the pool of its queue."""
        self._pool_for(spec).submit([spec], claimed)

    def can_begin(self, spec: JobSpec) -> bool:
        """Whether the job would start at once in the pool of its queue."""
        return self._pool_for(spec).pool.idle() > 0

    def has_own_process(self, spec: JobSpec) -> bool:
        """Whether the job runs in a child process, which runs one job at a time."""
        return self._pool_for(spec).route.kind.forks

    def timed_out(self) -> set[Key]:
        """Jobs that still hold a thread or child process after their timeout."""
        overdue = (job for each in self._pools for job in each.pool.overdue())
        return {job.spec.key for job in overdue if job.interruption is JobTimeout}

    def unstarted(self) -> int:
        """Number of submitted jobs that have not started."""
        return sum(each.pool.unstarted() for each in self._pools)

    def running(self) -> int:
        """Number of jobs that hold a thread or child process."""
        return sum(each.pool.running() for each in self._pools)

    def take_unstarted(self) -> list[JobSpec]:
        """Remove the jobs that have not started from the pools, and return them."""
        return [spec for each in self._pools for spec in each.take_unstarted()]

    def running_specs(self) -> list[JobSpec]:
        """The running jobs."""
        return [spec for each in self._pools for spec in each.pool.running_specs()]

    def unstarted_specs(self) -> list[JobSpec]:
        """The submitted jobs that have not started."""
        return [spec for each in self._pools for spec in each.pool.unstarted_specs()]

    def reports(self) -> dict[tuple[int, int], Report]:
        """Progress and log lines of running jobs since the last call, by job id and attempt."""
        reports = (each.pool.reports().items() for each in self._pools)
        return dict(itertools.chain.from_iterable(reports))

    def cancel(self, spec: JobSpec) -> None:
        """Stop a job's code; a job that waits in its pool ends as cancelled without having run."""
        for each in self._pools:
            each.pool.cancel(spec)

    def close(self) -> None:
        """Let threads end as soon as they are idle, and end child processes."""
        for each in self._pools:
            each.pool.close()

    def _pool_for(self, spec: JobSpec) -> RoutedPool:
        found = next((each for each in self._pools if each.route.serves(spec.queue)), None)
        return found or self._pools[0]


def routes(
    default: str,
    queue_pools: Mapping[str, str],
    queues: Sequence[str] | None,
    size_of: Callable[[str], int],
) -> list[Route]:
    """The routes of a worker, starting with the route of the default pool, if it serves a queue.

    :param default: the pool of queues that have no entry in ``queue_pools``.
    :param queue_pools: pools by queue name.
    :param queues: the queues that the worker serves, in strict order; ``None``: all.
    :param size_of: gives the number of jobs that a pool runs at once.
    """
    served: dict[str, list[str]] = {default: []}
    for name in queue_pools if queues is None else queues:
        served.setdefault(queue_pools.get(name, default), []).append(name)
    in_default = served.pop(default)
    found = []
    if queues is None or in_default:
        excluded = frozenset(itertools.chain.from_iterable(served.values()))
        default_queues = None if queues is None else tuple(in_default)
        found.append(Route(default, size_of(default), default_queues, excluded))
    found += [Route(pool, size_of(pool), tuple(names)) for pool, names in served.items()]
    return found
