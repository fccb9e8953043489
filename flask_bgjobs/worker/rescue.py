"""Rescue: freeing the jobs of workers that died."""

from __future__ import annotations

import dataclasses
import time

from ..job.records import Settled
from ..store import Store
from ..system.identity import is_gone
from ..system.safe_logging import logger as _logger


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
