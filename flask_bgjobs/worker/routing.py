"""Lanes: each is a pool and the queues whose jobs run in it.

A worker has one lane as long as no queue names a pool of its own. Lanes never wait for each
other: how much is claimed for one depends on its own pool alone.
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
"""Work claimed ahead: more would keep a new high-priority job waiting."""
_MAX_CLAIM = 1_000


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Which jobs go into which pool."""

    pool: str
    """One of the names of :data:`~flask_bgjobs.execution.pools.kinds.KINDS`."""
    size: int
    """Jobs at once."""
    queues: tuple[str, ...] | None
    """Served in this strict order; ``None``: all but those of the other routes."""
    others: frozenset[str] = frozenset()
    """Queues that have a route of their own."""

    @property
    def kind(self) -> PoolKind:
        """The kind of its pool."""
        return KINDS[self.pool]

    def serves(self, queue: str) -> bool:
        """Whether jobs of ``queue`` go here."""
        return queue not in self.others if self.queues is None else queue in self.queues


class Lane:
    """One pool at work.

    :param make_pool: makes it; is given what to call with each job and its outcome.
    :param on_finished: called with the same.
    """

    def __init__(
        self, route: Route, make_pool: Callable[[Finished], Pool], on_finished: Finished
    ) -> None:
        self.route = route
        self.expects_jobs = True
        """Whether there may be jobs to claim for it."""
        self._on_finished = on_finished
        self._pace = Pace()
        self._throughput = Throughput()
        self.pool = make_pool(self._note)

    def submit(self, specs: Sequence[JobSpec], claimed: float) -> None:
        """Run jobs, in this order, as places become free."""
        self._throughput.submitted(len(specs))
        self.pool.submit(specs, claimed)

    def take_unstarted(self) -> list[JobSpec]:
        """The jobs that wait in the pool; they will not be run here."""
        taken = self.pool.take_unstarted()
        self._throughput.submitted(-len(taken))
        return taken

    def room(self) -> int:
        """How many jobs to claim: as many as the pool can take, and a little work ahead."""
        capacity = self.pool.capacity()
        if capacity == 0:
            return 0
        unstarted, running = self.pool.unstarted(), self.pool.running()
        self._throughput.look(unstarted, running)
        ahead = self._prefetch()
        if unstarted > ahead // 2:
            return 0
        return min(capacity + ahead - running - unstarted, _MAX_CLAIM)

    def _prefetch(self) -> int:
        if self._pace.seconds is None:
            return 0
        # Jobs that wait for each other, as for the GIL, end less often than they take time.
        seconds = max(self._pace.seconds / self.route.size, self._throughput.seconds_per_job)
        return int(_PREFETCH_SECONDS / max(seconds, _PREFETCH_SECONDS / _MAX_CLAIM))

    def _note(self, spec: JobSpec, outcome: Outcome) -> None:
        if outcome.wait_seconds is not None:
            self._pace.note(outcome.run_seconds)
        self._on_finished(spec, outcome)


class Lanes:
    """All lanes of a worker, with the methods of a pool."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    @property
    def stop_seconds(self) -> float:
        """Within which code that was cancelled has stopped, unless it ignores that."""
        return max(lane.pool.stop_seconds for lane in self._lanes)

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until the pools are closed."""
        return [thread for lane in self._lanes for thread in lane.pool.threads]

    def expect_jobs(self) -> None:
        """Note that there may be jobs to claim for any of them."""
        for lane in self._lanes:
            lane.expects_jobs = True

    def submit(self, spec: JobSpec, claimed: float) -> None:
        """Run one job where its queue belongs."""
        self._lane_of(spec).submit([spec], claimed)

    def can_begin(self, spec: JobSpec) -> bool:
        """Whether the job would begin at once where its queue belongs."""
        return self._lane_of(spec).pool.idle() > 0

    def has_own_process(self, spec: JobSpec) -> bool:
        """Whether the job runs in a process that runs nothing else meanwhile."""
        return self._lane_of(spec).route.kind.forks

    def timed_out(self) -> set[Key]:
        """The jobs that hold a thread although their time was up."""
        overdue = (each for lane in self._lanes for each in lane.pool.overdue())
        return {each.spec.key for each in overdue if each.interruption is JobTimeout}

    def unstarted(self) -> int:
        """How many jobs wait in the pools."""
        return sum(lane.pool.unstarted() for lane in self._lanes)

    def running(self) -> int:
        """How many jobs run."""
        return sum(lane.pool.running() for lane in self._lanes)

    def take_unstarted(self) -> list[JobSpec]:
        """The jobs that wait in the pools; they will not be run here."""
        return [spec for lane in self._lanes for spec in lane.take_unstarted()]

    def running_specs(self) -> list[JobSpec]:
        """The jobs that run."""
        return [spec for lane in self._lanes for spec in lane.pool.running_specs()]

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait in the pools."""
        return [spec for lane in self._lanes for spec in lane.pool.unstarted_specs()]

    def reports(self) -> dict[tuple[int, int], Report]:
        """What running jobs told since the last call, by job id and attempt."""
        each = (lane.pool.reports().items() for lane in self._lanes)
        return dict(itertools.chain.from_iterable(each))

    def cancel(self, spec: JobSpec) -> None:
        """Ask a job's code to stop, in the way of its pool."""
        for lane in self._lanes:
            lane.pool.cancel(spec)

    def close(self) -> None:
        """Let threads end when they are idle, and end child processes."""
        for lane in self._lanes:
            lane.pool.close()

    def _lane_of(self, spec: JobSpec) -> Lane:
        lane = next((each for each in self._lanes if each.route.serves(spec.queue)), None)
        return lane or self._lanes[0]


def routes(
    default: str,
    queue_pools: Mapping[str, str],
    queues: Sequence[str] | None,
    size_of: Callable[[str], int],
) -> list[Route]:
    """The routes of a worker, that of the default pool first.

    :param default: the pool of queues that name none.
    :param queue_pools: queue to pool, of those that do.
    :param queues: what the worker serves, in strict order; ``None``: all.
    :param size_of: gives the jobs at once of a pool.
    """
    served: dict[str, list[str]] = {default: []}
    for name in queue_pools if queues is None else queues:
        served.setdefault(queue_pools.get(name, default), []).append(name)
    here = served.pop(default)
    found = []
    if queues is None or here:
        elsewhere = frozenset(itertools.chain.from_iterable(served.values()))
        of_default = None if queues is None else tuple(here)
        found.append(Route(default, size_of(default), of_default, elsewhere))
    found += [Route(pool, size_of(pool), tuple(names)) for pool, names in served.items()]
    return found
