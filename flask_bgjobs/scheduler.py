"""The clock: APScheduler wakes the worker at each poll and when a job is due.

It never stores or runs jobs of its own: rows are the truth, and the triggers are rebuilt
from them. This is the only file that imports APScheduler.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import time
from collections.abc import Callable, Iterable

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

STEP_SECONDS = 0.05
"""Due times are rounded up to this, so that ten thousand retries cost a few triggers."""
_DRIFT_SECONDS = 1.0


class Clock:
    """Calls ``wake`` every ``poll_interval`` seconds, and at each due time it is told.

    :param wake: called in a thread of the scheduler's; must be quick.
    :param poll_interval: seconds.
    """

    def __init__(self, wake: Callable[[], object], poll_interval: float) -> None:
        self._wake = wake
        self._poll_interval = poll_interval
        self._triggers: dict[int, str] = {}
        self._offset = _wall_minus_monotonic()
        self._scheduler = BackgroundScheduler(
            daemon=True,
            timezone=dt.UTC,
            executors={"default": {"type": "threadpool", "max_workers": 1}},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def start(self) -> None:
        """Begin to call."""
        self._scheduler.add_job(self._wake, "interval", seconds=self._poll_interval, id="poll")
        self._scheduler.start()

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Also call ``call`` every so many seconds; it must be quick."""
        self._scheduler.add_job(call, "interval", seconds=seconds)

    def stop(self) -> None:
        """Stop calling; a call under way ends first."""
        # Paused and emptied first: APScheduler breaks when it is shut down while its thread
        # removes a trigger that has just fired.
        self._scheduler.pause()
        self._scheduler.remove_all_jobs()
        self._scheduler.shutdown(wait=True)

    def wake_in(self, delays: Iterable[float]) -> None:
        """Call once after each of these delays, in seconds, as one-off ``date`` triggers."""
        now = time.time()
        for delay in delays:
            step = math.ceil((now + delay) / STEP_SECONDS)
            if step not in self._triggers:
                self._triggers[step] = self._add_trigger(step)

    def drifted(self) -> bool:
        """Whether the wall clock jumped; then all one-off triggers are dropped, to be set anew."""
        offset = _wall_minus_monotonic()
        if abs(offset - self._offset) <= _DRIFT_SECONDS:
            return False
        self._offset = offset
        triggers, self._triggers = dict(self._triggers), {}
        for job_id in triggers.values():
            # One that fires at this moment is already gone.
            with contextlib.suppress(JobLookupError):
                self._scheduler.remove_job(job_id)
        return True

    def _add_trigger(self, step: int) -> str:
        run_at = dt.datetime.fromtimestamp(step * STEP_SECONDS, dt.UTC)
        job = self._scheduler.add_job(self._ring, "date", run_date=run_at, args=[step])
        return str(job.id)

    def _ring(self, step: int) -> None:
        self._triggers.pop(step, None)
        self._wake()


def _wall_minus_monotonic() -> float:
    return time.time() - time.monotonic()
