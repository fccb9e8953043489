"""Outages: the log lines and the backoff of a worker whose database is not usable."""

from __future__ import annotations

import random
import time

from sqlalchemy.exc import SQLAlchemyError

from ..job.text import one_line
from ..system.safe_logging import logger as _logger

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 30.0


class Outage:
    """Whether, and since when, a worker's database is not usable.

    :param worker: the worker's name, for the log.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._since: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    def record_failure(self, error: SQLAlchemyError, outcomes_kept: int) -> float:
        """Log the error, and return how many seconds to wait before the next try.

        The pause grows from 0.1 s to 30 s, with jitter, so that workers do not all retry at once.

        :param outcomes_kept: number of outcomes that wait to be recorded, for the log.
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
        """Note that the database has just been usable; log it if this ends an outage."""
        if self._since is None:
            return
        _logger.warning(
            "Database usable again | Worker: %s | After: %.1f s",
            self._worker,
            time.monotonic() - self._since,
        )
        self._since = None
        self._pause = _FIRST_PAUSE_SECONDS
