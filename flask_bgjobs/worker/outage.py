"""Outages: what a worker says while its database is not usable, and how long it waits."""

from __future__ import annotations

import random
import time

from sqlalchemy.exc import SQLAlchemyError

from ..job.text import one_line
from ..system.safe_logging import logger as _logger

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 30.0


class Outage:
    """The outage of a worker's database, if there is one."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._since: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    def record_failure(self, error: SQLAlchemyError, outcomes_kept: int) -> float:
        """Say what is wrong; the seconds to wait before the database is asked again.

        They grow from 0.1 s to 30 s, with jitter, so that workers do not come all at once.
        """
        now = time.monotonic()
        self._since = self._since or now
        _logger.error(
            "Database not usable | Worker: %s | For: %.1f s | Outcomes kept: %d | Error: %s",
            self._worker,
            now - self._since,
            outcomes_kept,
            one_line(str(getattr(error, "orig", None) or error).strip()),
        )
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(self._pause * 2, _LAST_PAUSE_SECONDS)
        return pause

    def record_success(self) -> None:
        """Note that the database was usable just now."""
        if self._since is None:
            return
        _logger.warning(
            "Database usable again | Worker: %s | After: %.1f s",
            self._worker,
            time.monotonic() - self._since,
        )
        self._since = None
        self._pause = _FIRST_PAUSE_SECONDS
