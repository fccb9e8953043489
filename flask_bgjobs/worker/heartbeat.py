"""The heartbeat. It has its own thread, so that no job and no slow claim delays it.

It beats only while the worker's loop makes progress. A loop that stands still neither claims nor
settles jobs, so other workers must be able to take over its jobs.
"""

from __future__ import annotations

import threading
import time

from sqlalchemy.exc import DBAPIError

from .. import signals
from ..store import Store
from ..system.safe_logging import logger as _logger
from ..system.threads import WorkerThread, position_of

_CHECK_SECONDS = 0.5
"""Interval for checking the loop's progress."""
_SLOW_RECEIVER_SECONDS = 1.0
"""Time in one signal receiver after which a warning is logged."""
_MIN_STANDSTILL_SECONDS = 10.0
"""Longer than one database call can wait: SQLite waits five seconds for its lock."""


class LoopProgress:
    """When the worker's loop last made progress. The loop writes it, the heartbeat reads it.

    :param lease: seconds without progress after which the loop stands still; less than ten seconds
        count as ten.
    """

    def __init__(self, lease: float) -> None:
        self.allowed_seconds = max(lease, _MIN_STANDSTILL_SECONDS)
        self.thread_id = threading.get_ident()
        # Measured from here on, because a receiver of ``worker_started`` may hang as well.
        self.note()

    def note(self, wait_seconds: float = 0.0) -> None:
        """Note progress.

        :param wait_seconds: how long the loop is about to wait on purpose.
        """
        self._noted = time.monotonic()
        self._expected_by = self._noted + wait_seconds + self.allowed_seconds

    def note_if_own_thread(self) -> None:
        """Note progress if the calling thread is the loop's. Called before each transaction try."""
        if threading.get_ident() == self.thread_id:
            self.note()

    @property
    def stands_still(self) -> bool:
        """Whether the loop has made no progress for longer than allowed."""
        return time.monotonic() > self._expected_by

    @property
    def seconds_since(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._noted


class Heartbeat:
    """Records regularly that a worker is alive.

    :param interval: seconds between two heartbeats.
    :param progress: the progress of the worker's loop.
    """

    def __init__(
        self, store: Store, worker_id: int, interval: float, progress: LoopProgress
    ) -> None:
        self._lost_id: int | None = None
        self._store = store
        self._worker_id = worker_id
        self._interval = interval
        self._progress = progress
        self._warned_emission: signals.Emission | None = None
        self._stood_still = False
        self._stopped = threading.Event()
        self.thread = WorkerThread(self._run, "bgjobs-heartbeat")
        self.thread.start()

    @property
    def lease_lost(self) -> bool:
        """Whether another worker has marked this worker's row dead."""
        return self._lost_id == self._worker_id

    def switch_to(self, worker_id: int) -> None:
        """Beat for another row, after the worker has started over.

        :param worker_id: the id of the new row.
        """
        self._worker_id = worker_id

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self.thread.join()

    def _run(self) -> None:
        last_beat = checked = time.monotonic()
        check_seconds = min(self._interval, _CHECK_SECONDS)
        while not self._stopped.wait(check_seconds):
            now = time.monotonic()
            if (late := now - checked - check_seconds) > self._interval:
                _logger.warning("Heartbeat late by %.1f s; a job may be holding the GIL", late)
            checked = now
            self._warn_of_slow_receiver()
            if now - last_beat >= self._interval and not self._loop_stands_still():
                last_beat = now
                self._beat()
                checked = time.monotonic()

    def _beat(self) -> None:
        worker_id = self._worker_id
        try:
            alive = self._store.beat(worker_id)
        except DBAPIError as error:
            _logger.warning("Heartbeat not recorded: %s", error.orig)
        except Exception:
            # For example from a function of the host that opens connections. If the exception
            # ended this thread, the worker would lose its lease and never notice it.
            _logger.exception("Heartbeat not recorded")
        else:
            if not alive:
                # The id of that row, because the worker may have started over in the meantime.
                self._lost_id = worker_id

    def _loop_stands_still(self) -> bool:
        if not self._progress.stands_still:
            self._stood_still = False
            return False
        if not self._stood_still:
            self._stood_still = True
            _logger.error(
                "Worker stands still | For: %.0f s | In: %s | Its heartbeat stops, so that other "
                "workers can take over its jobs",
                self._progress.seconds_since,
                position_of(self._progress.thread_id),
            )
        return True

    def _warn_of_slow_receiver(self) -> None:
        emission = signals.emission_in(self._progress.thread_id)
        if emission is None or emission is self._warned_emission:
            return
        seconds = time.monotonic() - emission.began
        if seconds >= _SLOW_RECEIVER_SECONDS:
            self._warned_emission = emission
            _logger.warning(
                "Slow receiver | Signal: %s | Receiver: %s | For: %.1f s | It blocks the worker; "
                "a receiver should enqueue a job for anything slow",
                emission.signal_name,
                signals.receiver_in(self._progress.thread_id),
                seconds,
            )
