"""The clock: APScheduler wakes the worker at each poll and when a job is due.

It never stores or runs jobs of its own: rows are the truth, and the triggers are rebuilt
from them. This is the only file that imports APScheduler.
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
"""Due times are rounded up to this, so that ten thousand retries cost a few triggers."""
_DRIFT_SECONDS = 1.0
_STOP_SECONDS = 2.0
"""For the scheduler to stop; the worker's end must not hang with it."""


class Clock:
    """Calls ``wake`` every ``poll_interval`` seconds, and at each due time it is told.

    :param wake: called in a thread of the scheduler's; must be quick.
    :param poll_interval: seconds.
    """

    def __init__(self, wake: Callable[[], object], poll_interval: float) -> None:
        self.hangs = False
        """Whether it could not be stopped: Python would wait for its threads for ever."""
        self._wake = wake
        self._poll_interval = poll_interval
        self._triggers: dict[int, str] = {}
        self._offset = _wall_minus_monotonic()
        self._executor = _OneThread()
        self._scheduler = BackgroundScheduler(
            daemon=True,
            # At INFO it would log each trigger that comes and goes.
            logger=SafeLogger(
                logging.getLogger("apscheduler.scheduler"), least_level=logging.WARNING
            ),
            timezone=dt.UTC,
            executors={"default": self._executor},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live while it runs."""
        return [self._executor.thread, self._scheduler._thread]

    def start(self) -> None:
        """Begin to call."""
        self.every(self._poll_interval, self._wake)
        self._scheduler.start()

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Also call ``call`` every so many seconds; it must be quick."""
        self._scheduler.add_job(call, _Every(seconds))

    def stop(self) -> None:
        """Stop calling; a call under way ends first, unless it takes longer than two seconds."""
        stopping = threading.Thread(target=self._shut_down, name="bgjobs-clock-stop", daemon=True)
        stopping.start()
        stopping.join(_STOP_SECONDS)
        self.hangs = stopping.is_alive()
        if self.hangs:
            _logger.warning("The scheduler did not stop in time; its thread still runs")

    def _shut_down(self) -> None:
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
        """Whether the wall clock jumped; then all one-off triggers are dropped, to be set anew.

        What is called every so many seconds is called now, and from now on.
        """
        offset = _wall_minus_monotonic()
        if abs(offset - self._offset) <= _DRIFT_SECONDS:
            return False
        self._offset = offset
        triggers, self._triggers = dict(self._triggers), {}
        for job_id in triggers.values():
            # One that fires at this moment is already gone.
            with contextlib.suppress(JobLookupError):
                self._scheduler.remove_job(job_id)
        for job in self._scheduler.get_jobs():
            if isinstance(job.trigger, _Every):
                # After a jump back its next time would not come for as long as the jump was.
                job.modify(next_run_time=dt.datetime.now(dt.UTC))
        return True

    def _add_trigger(self, step: int) -> str:
        run_at = dt.datetime.fromtimestamp(step * STEP_SECONDS, dt.UTC)
        job = self._scheduler.add_job(self._ring, "date", run_date=run_at, args=[step])
        return str(job.id)

    def _ring(self, step: int) -> None:
        self._triggers.pop(step, None)
        self._wake()


class _Every(BaseTrigger):  # type: ignore[misc]  # APScheduler ships no types
    """Fires so many seconds after it last fired.

    APScheduler's own interval trigger goes through all the times that a jump of the clock left
    out. When a machine that woke up in 1970 is told the date, those are more than memory holds.
    """

    def __init__(self, seconds: float) -> None:
        self._pause = dt.timedelta(seconds=seconds)

    def get_next_fire_time(self, _previous: dt.datetime | None, now: dt.datetime) -> dt.datetime:
        return now + self._pause


class _OneThread(BaseExecutor):  # type: ignore[misc]  # APScheduler ships no types
    """Calls in one daemon thread, and logs nothing but errors.

    The end of the interpreter turns APScheduler's own thread pool away before this is stopped, and
    waits for its threads. Its ``run_job`` logs two lines for each call.
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
        # One call that waits is enough; APScheduler would log that as a warning.
        if self._instances[job.id] < job.max_instances:
            super().submit_job(job, run_times)

    def _do_submit_job(self, job: Any, _run_times: Any) -> None:
        self._calls.put(job)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            try:
                job.func(*job.args, **job.kwargs)
            except Exception:
                _logger.exception("A call of the scheduler failed")
            self._run_job_success(job.id, [])


def _wall_minus_monotonic() -> float:
    return time.time() - time.monotonic()
