"""Rescue: find dead workers and free their jobs."""

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
    """Measures, by the local monotonic clock, how long the heartbeats of other workers are silent.

    :param lease: seconds without a heartbeat after which a worker counts as dead.
    """

    def __init__(self, store: Store, lease: float) -> None:
        self._store = store
        self._lease = lease
        self._sightings: dict[int, _Sighting] = {}
        self._swept_at = time.monotonic()
        self._own_beats: int | None = None
        self._uncharged_seconds = 0.0

    def sweep(self, own_id: int) -> list[Settled]:
        """Rescue the jobs of silent workers.

        :param own_id: id of the worker that sweeps; it skips itself.
        :returns: the freed jobs.
        """
        elapsed_seconds = self._elapsed_seconds()
        found = self._store.living_workers()
        own_beats = next((w.beats for w in found if w.id == own_id), None)
        charged_seconds = self._charged_seconds(elapsed_seconds, own_beats)
        rescued: list[Settled] = []
        workers = [worker for worker in found if worker.id != own_id]
        for worker in workers:
            sighting = self._sightings.get(worker.id)
            if sighting is None or sighting.beats != worker.beats:
                sighting = self._sightings[worker.id] = _Sighting(worker.beats)
            else:
                sighting.silent_seconds += charged_seconds
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

    def _elapsed_seconds(self) -> float:
        """Seconds since the last sweep. If the query after this fails, they do not count."""
        now = time.monotonic()
        elapsed_seconds, self._swept_at = now - self._swept_at, now
        return elapsed_seconds

    def _charged_seconds(self, elapsed_seconds: float, own_beats: int | None) -> float:
        """Seconds to add to the silence of other workers; at most half a lease.

        The result is 0 while the heartbeat of this worker is not recorded either: a lock may block
        the heartbeats of all workers. The limit of half a lease is for a machine or container that
        was paused between two sweeps: other workers on it get time for a heartbeat.
        """
        self._uncharged_seconds += elapsed_seconds
        if own_beats is not None and own_beats == self._own_beats:
            return 0.0
        self._own_beats = own_beats
        charged_seconds = min(self._uncharged_seconds, self._lease / 2)
        self._uncharged_seconds = 0.0
        return charged_seconds
