"""The clock: APScheduler wakes the worker at the poll interval and when a job is due.

APScheduler stores and runs no jobs. The database has the due times, and the triggers are rebuilt
from it. This is the only file that imports APScheduler.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from apscheduler.executors.base import BaseExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from ..system.safe_logging import SafeLogger
from ..system.safe_logging import logger as _logger
from ..system.threads import WorkerThread

STEP_SECONDS = 0.05
"""Due times are rounded up to a multiple of this. Ten thousand retries then need few triggers."""
_DRIFT_SECONDS = 1.0
_STOP_SECONDS = 2.0
"""How long to wait for the scheduler to stop: if it hangs, the worker must still end."""


class Clock:
    """Calls a function at the poll interval and at due times.

    :param wake: the function; called in the scheduler's thread, must be quick.
    :param poll_interval: seconds between two calls.
    """

    def __init__(self, wake: Callable[[], object], poll_interval: float) -> None:
        self.hangs = False
        """Whether :meth:`stop` has failed. Python would then wait forever for a thread at exit."""
        self._wake = wake
        self._poll_interval = poll_interval
        self._triggers: dict[int, str] = {}
        self._offset = _wall_minus_monotonic()
        self._executor = _SingleThreadExecutor()
        self._scheduler = BackgroundScheduler(
            daemon=True,
            # At INFO, APScheduler logs each trigger that is added or removed.
            logger=SafeLogger(
                logging.getLogger("apscheduler.scheduler"), least_level=logging.WARNING
            ),
            timezone=dt.UTC,
            executors={"default": self._executor},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live while the clock runs."""
        return [self._executor.thread, self._scheduler._thread]

    @property
    def pending_calls(self) -> list[float]:
        """When the next calls are due, earliest first, in seconds since the epoch.

        One entry for each regular call and for each one-off call; empty before :meth:`start`.
        """
        due = (getattr(job, "next_run_time", None) for job in self._scheduler.get_jobs())
        return sorted(each.timestamp() for each in due if each)

    def start(self) -> None:
        """Start calling."""
        self.every(self._poll_interval, self._wake)
        self._scheduler.start()

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Call another function regularly.

        :param seconds: time between two calls.
        :param call: the function; must be quick.
        """
        self._scheduler.add_job(call, Every(seconds))

    def stop(self) -> None:
        """Stop calling, and wait up to two seconds for a call in progress."""
        stopping = threading.Thread(target=self._shut_down, name="bgjobs-clock-stop", daemon=True)
        stopping.start()
        stopping.join(_STOP_SECONDS)
        self.hangs = stopping.is_alive()
        if self.hangs:
            _logger.warning("The scheduler did not stop in time; its thread is still running")

    def _shut_down(self) -> None:
        # Pause and remove all triggers first: APScheduler fails if it is shut down while its
        # thread removes a trigger that has just fired.
        self._scheduler.pause()
        self._scheduler.remove_all_jobs()
        self._scheduler.shutdown(wait=True)

    def wake_in(self, delays: Iterable[float]) -> None:
        """Call once after each of these delays.

        :param delays: seconds from now; rounded up, with one ``date`` trigger per step.
        """
        now = time.time()
        for delay in delays:
            step = math.ceil((now + delay) / STEP_SECONDS)
            if step not in self._triggers:
                self._triggers[step] = self._add_trigger(step)

    def drifted(self) -> bool:
        """Whether the wall clock has jumped by more than a second since the last call.

        If so, all one-off triggers are removed, and the caller has to set them again. Regular calls
        are made at once, and continue from then on.
        """
        offset = _wall_minus_monotonic()
        if abs(offset - self._offset) <= _DRIFT_SECONDS:
            return False
        self._offset = offset
        triggers, self._triggers = dict(self._triggers), {}
        for job_id in triggers.values():
            # A trigger that fires at this moment is already removed.
            with contextlib.suppress(JobLookupError):
                self._scheduler.remove_job(job_id)
        for job in self._scheduler.get_jobs():
            if isinstance(job.trigger, Every):
                # After a jump back, its next call would be late by the size of the jump.
                job.modify(next_run_time=dt.datetime.now(dt.UTC))
        return True

    def _add_trigger(self, step: int) -> str:
        run_at = dt.datetime.fromtimestamp(step * STEP_SECONDS, dt.UTC)
        job = self._scheduler.add_job(self._fire, "date", run_date=run_at, args=[step])
        return str(job.id)

    def _fire(self, step: int) -> None:
        self._triggers.pop(step, None)
        self._wake()


class Every(BaseTrigger):  # type: ignore[misc]  # APScheduler ships no types
    """Fires a fixed number of seconds after it last fired.

    After a jump of the clock, APScheduler's interval trigger lists all fire times that were missed.
    If the clock of a machine jumps from 1970 to today, this list does not fit into memory.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = dt.timedelta(seconds=seconds)

    def get_next_fire_time(self, _previous: dt.datetime | None, now: dt.datetime) -> dt.datetime:
        return now + self._pause


class _SingleThreadExecutor(BaseExecutor):  # type: ignore[misc]  # APScheduler ships no types
    """Makes the calls in one daemon thread, and logs only errors.

    It replaces APScheduler's thread pool, which rejects calls as soon as the interpreter begins to
    exit, before the clock is stopped, and whose threads delay the exit. APScheduler's ``run_job``
    also logs two lines for each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = WorkerThread(self._work, "bgjobs-clock")

    def start(self, scheduler: Any, alias: str) -> None:
        super().start(scheduler, alias)
        self.thread.start()

    def shutdown(self, wait: bool = True) -> None:
        self._calls.put(None)
        if wait:
            self.thread.join()

    def submit_job(self, job: Any, run_times: Any) -> None:
        # One waiting call is enough. APScheduler would log a warning for each further call.
        if self._instances[job.id] < job.max_instances:
            super().submit_job(job, run_times)

    def _do_submit_job(self, job: Any, _run_times: Any) -> None:
        self._calls.put(job)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            try:
                job.func(*job.args, **job.kwargs)
            except Exception:
                _logger.exception("A scheduled call failed")
            self._run_job_success(job.id, [])


def _wall_minus_monotonic() -> float:
    return time.time() - time.monotonic()
