"""Rescue: finding workers that died, and freeing the jobs that they held."""

from __future__ import annotations

import dataclasses
import logging
import time

from .identity import is_gone
from .spec import Settled
from .store import Store

_logger = logging.getLogger("flask_bgjobs")


@dataclasses.dataclass(slots=True)
class _Sighting:
    beats: int
    since: float


class Sweeper:
    """Watches the heartbeats of all workers by a monotonic clock of its own.

    :param lease: seconds without a heartbeat after which a worker is dead.
    """

    def __init__(self, store: Store, lease: float) -> None:
        self._store = store
        self._lease = lease
        self._sightings: dict[int, _Sighting] = {}

    def sweep(self, own_id: int) -> list[Settled]:
        """Rescue the jobs of silent workers.

        :param own_id: the worker that sweeps, which is not judged by itself.
        :returns: one per job that was freed.
        """
        now = time.monotonic()
        rescued: list[Settled] = []
        workers = [worker for worker in self._store.living_workers() if worker.id != own_id]
        for worker in workers:
            sighting = self._sightings.get(worker.id)
            if sighting is None or sighting.beats != worker.beats:
                sighting = self._sightings[worker.id] = _Sighting(worker.beats, now)
            gone = is_gone(worker.process)
            if gone or now - sighting.since >= self._lease:
                freed = self._store.rescue(worker.id, worker.beats)
                reason = "its process is gone" if gone else "its lease ran out"
                _logger.warning(
                    "Worker dead | Worker: %s | Reason: %s | Rescued: %d",
                    worker.name,
                    reason,
                    len(freed),
                )
                rescued += freed
        living = {worker.id for worker in workers}
        self._sightings = {k: seen for k, seen in self._sightings.items() if k in living}
        return rescued
