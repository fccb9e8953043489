"""The thread pool: runs jobs in threads of the worker's process.

Threads are cheap, but a job can be stopped only between two Python instructions.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ...errors import JobCancelled, JobTimeout
from ...job.records import JobSpec, Key, Outcome, Report
from ...job.statuses import OutcomeKind
from ...state import AppState
from ...system.threads import WorkerThread, position_of
from ..current import CurrentJob
from ..execute import execute
from ..interrupt import InterruptScope
from .trouble import Overdue

_COMPACT_FROM = 1_000
"""Number of deadlines from which those of finished jobs are removed."""


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    spec: JobSpec
    job: CurrentJob
    claimed: float
    scope: InterruptScope = dataclasses.field(default_factory=InterruptScope)
    is_over: bool = False
    """Whether the outcome was handed over. The failure may still be reported at this time."""


class ThreadPool:
    """Runs jobs in threads of this process. Only one other thread may submit and take back jobs.

    :param state: the app whose jobs run.
    :param size: the number of threads.
    :param on_finished: called, in the job's thread, with each job and its outcome.
    """

    stop_seconds = 1.0
    """Time within which cancelled code stops, in seconds, unless it catches the exception."""

    def __init__(
        self, state: AppState, size: int, on_finished: Callable[[JobSpec, Outcome], None]
    ) -> None:
        self.size = size
        self._state = state
        self._on_finished = on_finished
        self._tasks: set[_Task] = set()
        """Submitted tasks that hold a thread or wait for one."""
        self._waiting: deque[_Task] = deque()
        self._wakeups: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """One ``True`` for each submitted task; a ``False`` ends a thread."""
        self._deadlines = _Deadlines()
        self._threads = [WorkerThread(self._run, f"bgjobs-{n + 1}") for n in range(size)]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until the pool is closed."""
        return [*self._threads, *self._deadlines.threads]

    def submit(self, specs: Sequence[JobSpec], claimed: float) -> None:
        """Run jobs in this order, each as soon as a thread is idle.

        :param claimed: time of their claim, by ``time.monotonic()``.
        """
        limit = self._state.config.max_payload
        for spec in specs:
            task = _Task(spec, CurrentJob(spec, max_payload=limit), claimed)
            self._tasks.add(task)
            self._waiting.append(task)
            self._wakeups.put(True)

    def unstarted(self) -> int:
        """Number of submitted jobs that wait for a thread."""
        return len(self._waiting)

    def running(self) -> int:
        """Number of jobs that hold a thread: they run, or their failure is being reported."""
        # In this order, a task that starts in between is counted as running, never missed.
        return len(self._tasks) - len(self._waiting)

    def idle(self) -> int:
        """Number of jobs that would start at once if they were submitted now."""
        return self.size - len(self._tasks)

    def capacity(self) -> int:
        """Number of jobs that can run at the same time."""
        return self.size

    def failing(self) -> None:
        """Always ``None``: when a thread of the pool ends, the worker stops."""
        return

    def take_unstarted(self) -> list[JobSpec]:
        """Remove the jobs that wait for a thread, and return them."""
        taken = []
        while (task := self._pop()) is not None:
            self._tasks.remove(task)
            taken.append(task.spec)
        return taken

    def running_specs(self) -> list[JobSpec]:
        """The running jobs."""
        return [task.spec for task in self._running_tasks()]

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a thread."""
        return [task.spec for task in self._waiting.copy()]

    def reports(self) -> dict[Key, Report]:
        """Progress and log lines of running jobs since the last call, by job id and attempt."""
        reports = ((task.spec.key, task.job.take_report()) for task in self._running_tasks())
        return {key: report for key, report in reports if report is not None}

    def cancel(self, spec: JobSpec) -> None:
        """Stop a running job at its next Python instruction, and a waiting one before it starts."""
        task = next((task for task in self._tasks.copy() if task.spec is spec), None)
        if task is None or task.is_over:
            return
        try:
            self._waiting.remove(task)
        except ValueError:
            task.job.request_cancel()
            task.scope.interrupt(JobCancelled)
        else:
            self._hand_over(task, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))
            self._tasks.remove(task)

    def overdue(self) -> list[Overdue]:
        """Jobs that still hold a thread after they were told to stop, or after their code ended."""
        now = time.monotonic()
        return [
            Overdue(
                task.spec,
                now - since,
                task.scope.interruption,
                position_of(task.scope.thread_id or 0),
            )
            for task in self._started_tasks()
            if (since := task.scope.overdue_since) is not None
        ]

    def close(self) -> None:
        """End each thread after the waiting tasks. No job can be submitted afterwards."""
        for _ in self._threads:
            self._wakeups.put(False)
        self._deadlines.close()

    def _run(self) -> None:
        while self._wakeups.get():
            # The task of this wake-up may have been cancelled or taken back.
            if (task := self._pop()) is not None:
                self._run_task(task)

    def _run_task(self, task: _Task) -> None:
        if task.spec.timeout is not None:
            self._deadlines.add(time.monotonic() + task.spec.timeout, task.scope)
        outcome = execute(self._state, task.spec, task.job, task.scope, task.claimed)
        self._hand_over(task, outcome)
        task.job.report_failure()
        self._tasks.remove(task)

    def _hand_over(self, task: _Task, outcome: Outcome) -> None:
        # In this order, the job is always listed here or in the outbox, for a moment in both.
        self._on_finished(task.spec, outcome)
        task.is_over = True

    def _pop(self) -> _Task | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def _running_tasks(self) -> list[_Task]:
        return [task for task in self._started_tasks() if not task.is_over]

    def _started_tasks(self) -> set[_Task]:
        # In this order, a task that starts in between is not missed.
        tasks = self._tasks.copy()
        return tasks.difference(self._waiting.copy())


class _Deadlines:
    """A thread that interrupts jobs at their timeout; started with the first timeout."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, InterruptScope]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._compact_at = _COMPACT_FROM

    def add(self, deadline: float, scope: InterruptScope) -> None:
        """Interrupt ``scope`` at ``deadline``, by ``time.monotonic()``."""
        with self._changed:
            heapq.heappush(self._heap, (deadline, next(self._order), scope))
            if len(self._heap) > self._compact_at:
                self._compact()
            if self._thread is None:
                thread = WorkerThread(self._watch, "bgjobs-timeouts")
                thread.start()
                # After the start: the worker treats a thread that is not alive as failed.
                self._thread = thread
            self._changed.notify()

    @property
    def threads(self) -> list[threading.Thread]:
        """The thread, if it was started."""
        return [] if self._thread is None else [self._thread]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _compact(self) -> None:
        """Remove finished jobs, which would otherwise stay in memory until their deadline."""
        self._heap = [entry for entry in self._heap if not entry[2].is_closed]
        heapq.heapify(self._heap)
        self._compact_at = max(_COMPACT_FROM, 2 * len(self._heap))

    def _watch(self) -> None:
        while (scope := self._next_overdue()) is not None:
            scope.interrupt(JobTimeout)

    def _next_overdue(self) -> InterruptScope | None:
        with self._changed:
            while not self._closed:
                remaining = self._heap[0][0] - time.monotonic() if self._heap else None
                if remaining is not None and remaining <= 0:
                    return heapq.heappop(self._heap)[2]
                # A longer wait would raise OverflowError.
                self._changed.wait(remaining and min(remaining, threading.TIMEOUT_MAX))
            return None
