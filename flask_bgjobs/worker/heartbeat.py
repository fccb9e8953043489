"""The heartbeat: a thread of its own, so that no job and no slow claim delays it.

It beats only while the worker's loop makes progress. A loop that stands still settles nothing and
claims nothing, so other workers must be able to take over its jobs.
"""

from __future__ import annotations

import threading
import time

from sqlalchemy.exc import DBAPIError

from .. import signals
from ..store import Store
from ..system.safe_logging import logger as _logger
from ..system.threads import WorkerThread, position_of

_LOOK_SECONDS = 0.5
"""How often the loop's progress is looked at."""
_SLOW_RECEIVER_SECONDS = 1.0
"""After so long in one signal receiver a warning is logged."""
_MIN_STANDSTILL_SECONDS = 10.0
"""Longer than the longest wait of one database call: SQLite waits five seconds for its lock."""


class LoopProgress:
    """When the worker's loop last made progress; noted by the loop, read by the heartbeat.

    :param lease: seconds; a loop may stand still for so long, and for ten seconds at least.
    """

    def __init__(self, lease: float) -> None:
        self.allowed_seconds = max(lease, _MIN_STANDSTILL_SECONDS)
        self.thread_id = threading.get_ident()
        # The time counts from here: a receiver of ``worker_started`` may hang as well.
        self.note()

    def note(self, wait_seconds: float = 0.0) -> None:
        """Note progress.

        :param wait_seconds: for how long the loop is going to wait on purpose.
        """
        self._noted = time.monotonic()
        self._expected_by = self._noted + wait_seconds + self.allowed_seconds

    def note_if_own_thread(self) -> None:
        """Note progress when called by the loop's thread, as before each try of a transaction."""
        if threading.get_ident() == self.thread_id:
            self.note()

    @property
    def stands_still(self) -> bool:
        """Whether there was no progress for longer than is allowed."""
        return time.monotonic() > self._expected_by

    @property
    def seconds_since(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._noted


class Heartbeat:
    """Shows, every ``interval`` seconds, that a worker lives.

    :param interval: seconds.
    :param progress: of the worker's loop.
    """

    def __init__(
        self, store: Store, worker_id: int, interval: float, progress: LoopProgress
    ) -> None:
        self._lost_id: int | None = None
        self._store = store
        self._worker_id = worker_id
        self._interval = interval
        self._progress = progress
        self._warned_of: signals.Emission | None = None
        self._stood_still = False
        self._stopped = threading.Event()
        self.thread = WorkerThread(self._run, "bgjobs-heartbeat")
        self.thread.start()

    @property
    def lease_lost(self) -> bool:
        """Whether the worker's row was marked dead by another worker."""
        return self._lost_id == self._worker_id

    def switch_to(self, worker_id: int) -> None:
        """Go on for the new row of a worker that started over."""
        self._worker_id = worker_id

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self.thread.join()

    def _run(self) -> None:
        last = looked = time.monotonic()
        look_seconds = min(self._interval, _LOOK_SECONDS)
        while not self._stopped.wait(look_seconds):
            now = time.monotonic()
            if (late := now - looked - look_seconds) > self._interval:
                _logger.warning("Heartbeat late by %.1f s; a job may be holding the GIL", late)
            looked = now
            self._warn_of_slow_receiver()
            if now - last >= self._interval and not self._loop_stands_still():
                last = now
                self._beat()
                looked = time.monotonic()

    def _beat(self) -> None:
        worker_id = self._worker_id
        try:
            alive = self._store.beat(worker_id)
        except DBAPIError as error:
            _logger.warning("Heartbeat not recorded: %s", error.orig)
        except Exception:
            # Such as a host's own way to connect that fails: without heartbeats the worker would
            # lose its lease and never learn of it.
            _logger.exception("Heartbeat not recorded")
        else:
            if not alive:
                # Of that row: the worker may have started over meanwhile.
                self._lost_id = worker_id

    def _loop_stands_still(self) -> bool:
        if not self._progress.stands_still:
            self._stood_still = False
            return False
        if not self._stood_still:
            self._stood_still = True
            _logger.error(
                "Worker stands still | For: %.0f s | In: %s | Its heartbeat stops, so that other "
                "workers run its jobs",
                self._progress.seconds_since,
                position_of(self._progress.thread_id),
            )
        return True

    def _warn_of_slow_receiver(self) -> None:
        emission = signals.emission_in(self._progress.thread_id)
        if emission is None or emission is self._warned_of:
            return
        seconds = time.monotonic() - emission.began
        if seconds >= _SLOW_RECEIVER_SECONDS:
            self._warned_of = emission
            _logger.warning(
                "Slow receiver | Signal: %s | Receiver: %s | For: %.1f s | The worker does nothing "
                "else meanwhile; a receiver should enqueue a job for anything slow",
                emission.signal_name,
                signals.receiver_in(self._progress.thread_id),
                seconds,
            )
