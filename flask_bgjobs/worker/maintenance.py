"""Rescue: freeing the jobs of workers that died. Prune: deleting what is old, step by step."""

from __future__ import annotations

import dataclasses
import time

from sqlalchemy.exc import DBAPIError

from ..job.records import Settled
from ..store import PruneCursor, Retention, Store, database_sentence
from ..system.identity import is_gone
from ..system.safe_logging import logger as _logger

_PRUNED_AT_ONCE = 500
"""Jobs per step: others wait for the write lock meanwhile, and the worker for its turn."""


@dataclasses.dataclass(slots=True)
class _Sighting:
    beats: int
    silent_seconds: float = 0.0


class Sweeper:
    """Watches the heartbeats of all workers by a monotonic clock of its own.

    :param lease: seconds without a heartbeat after which a worker is dead.
    """

    def __init__(self, store: Store, lease: float) -> None:
        self._store = store
        self._lease = lease
        self._sightings: dict[int, _Sighting] = {}
        self._swept = time.monotonic()
        self._own_beats: int | None = None
        self._uncounted = 0.0

    def sweep(self, own_id: int) -> list[Settled]:
        """Rescue the jobs of silent workers.

        :param own_id: the worker that sweeps, which is not judged by itself.
        :returns: one per job that was freed.
        """
        passed = self._passed()
        found = self._store.living_workers()
        counted = self._counted(passed, next((w.beats for w in found if w.id == own_id), None))
        rescued: list[Settled] = []
        workers = [worker for worker in found if worker.id != own_id]
        for worker in workers:
            sighting = self._sightings.get(worker.id)
            if sighting is None or sighting.beats != worker.beats:
                sighting = self._sightings[worker.id] = _Sighting(worker.beats)
            else:
                sighting.silent_seconds += counted
            gone = is_gone(worker.process)
            if gone or sighting.silent_seconds >= self._lease:
                freed = self._store.rescue(worker.id, worker.beats)
                if freed is None:
                    continue
                reason = "its process is gone" if gone else "its lease ran out"
                _logger.warning(
                    "Worker dead | Worker: %s | Reason: %s | Rescued: %d",
                    worker.name,
                    reason,
                    len(freed),
                )
                rescued += freed
        rescued += self._store.rescue_orphans()
        living = {worker.id for worker in workers}
        self._sightings = {k: seen for k, seen in self._sightings.items() if k in living}
        return rescued

    def _passed(self) -> float:
        """Seconds since the last sweep. Where the database cannot be asked then, they are lost."""
        now = time.monotonic()
        passed, self._swept = now - self._swept, now
        return passed

    def _counted(self, passed: float, own_beats: int | None) -> float:
        """How many seconds of silence others are charged with, half a lease at most.

        None as long as this worker itself could not beat: somebody may hold a lock that keeps all
        from it. And a worker that did not sweep for so long has slept itself, the others perhaps
        with it, as when the machine or the container was paused: they get the time to show that
        they live.
        """
        self._uncounted += passed
        if own_beats is not None and own_beats == self._own_beats:
            return 0.0
        self._own_beats = own_beats
        counted, self._uncounted = min(self._uncounted, self._lease / 2), 0.0
        return counted


class Pruner:
    """Deletes finished jobs that are older than their retention, a short step at a time.

    A pass looks at each such job once. It ends with the rows of workers that are long gone, of
    queues that nobody uses, and with numbers and audit entries that nobody needs any more.
    """

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._cursor: PruneCursor | None = None
        self._is_denied = False
        self.deleted = 0
        """Jobs that this pass has deleted."""
        self.held = 0
        """Jobs that this pass had to leave: a row of another table refers to them."""

    def step(self) -> bool:
        """Delete up to 500 jobs. ``False``: the pass is finished, and the next step begins anew."""
        if self._cursor is None:
            self.deleted = self.held = 0
        try:
            pruned = self._store.prune(self._retention, _PRUNED_AT_ONCE, self._cursor)
            self.deleted += pruned.deleted
            self.held += pruned.held
            self._cursor = pruned.cursor
            if self._cursor is None:
                self._prune_the_rest()
        except DBAPIError as error:
            if not self._store.is_denied(error):
                raise
            if not self._is_denied:
                _logger.warning(
                    "Pruning not allowed | Grant SELECT, INSERT, UPDATE and DELETE on all tables "
                    "bgjobs_* to the worker's database user | Error: %s",
                    database_sentence(error),
                )
            self._is_denied = True
            self._cursor = None
        return self._cursor is not None

    def _prune_the_rest(self) -> None:
        self._store.prune_workers(_PRUNED_AT_ONCE)
        self._store.prune_queues(_PRUNED_AT_ONCE)
        self._store.prune_rollup()
        self._store.prune_audits(_PRUNED_AT_ONCE)
