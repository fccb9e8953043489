"""Write the roll-up: add the attempts that a worker has settled to the data of the charts."""

from __future__ import annotations

import math
import time

from sqlalchemy.exc import DBAPIError

from ..job.records import Settled
from ..job.rollup import RollupCounts
from ..store import Store
from ..system.safe_logging import logger as _logger

INTERVAL_SECONDS = 5.0
"""How often counts are written, at most."""


class RollupWriter:
    """Counts settled attempts, and writes the counts every five seconds.

    :param worker: the worker's name, for the log.
    """

    def __init__(self, store: Store, worker: str) -> None:
        self._store = store
        self._worker = worker
        self._counts = RollupCounts()
        self._written_at = -math.inf
        self._is_denied = False

    def note(self, settled: Settled) -> None:
        """Count a settled attempt."""
        self._counts.note(settled)

    def write(self, *, at_once: bool = False) -> None:
        """Write the counts if it is time, or ``at_once``.

        :raises DBAPIError: when the database is not usable. The counts are kept.
        """
        now = time.monotonic()
        if not self._counts or (not at_once and now - self._written_at < INTERVAL_SECONDS):
            return
        self._written_at = now
        try:
            self._store.add_to_rollup(self._counts.cells())
        except DBAPIError as error:
            if not self._store.is_denied(error):
                raise
            if not self._is_denied:
                _logger.warning(
                    "Charts not drawn | Worker: %s | Grant SELECT, INSERT, UPDATE and DELETE "
                    "on bgjobs_rollup to its database user | Error: %s",
                    self._worker,
                    error.orig,
                )
            self._is_denied = True
        self._counts.clear()
