"""The heartbeat: a thread of its own, so that no job and no slow claim delays it."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy.exc import DBAPIError

from .store import Store

_logger = logging.getLogger("flask_bgjobs")


class Heart:
    """Shows, every ``interval`` seconds, that a worker lives.

    :param interval: seconds.
    """

    def __init__(self, store: Store, worker_id: int, interval: float) -> None:
        self._lost_id: int | None = None
        self._store = store
        self._worker_id = worker_id
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="bgjobs-heart", daemon=True)
        self._thread.start()

    @property
    def lease_lost(self) -> bool:
        """Whether the worker's row was marked dead by another worker."""
        return self._lost_id == self._worker_id

    def beat_for(self, worker_id: int) -> None:
        """Go on for the new row of a worker that started over."""
        self._worker_id = worker_id

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._interval):
            if (late := time.monotonic() - last - self._interval) > self._interval:
                _logger.warning("Heartbeat late by %.1f s; a job may be holding the GIL", late)
            last = time.monotonic()
            worker_id = self._worker_id
            try:
                alive = self._store.beat(worker_id)
            except DBAPIError as error:
                _logger.warning("Heartbeat not recorded: %s", error.orig)
                continue
            except Exception:
                # Such as a host's own way to connect that fails: a worker whose heart stops
                # would lose its lease and never learn of it.
                _logger.exception("Heartbeat not recorded")
                continue
            if not alive:
                # Of that row: the worker may have started over meanwhile.
                self._lost_id = worker_id
