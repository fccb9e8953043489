"""Threads: cheap, in the worker's own process, stopped only between Python instructions."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..app_state import AppState
from ..context import CurrentJob
from ..errors import JobCancelled, JobTimeout
from ..execute import execute
from ..spec import JobSpec, Outcome, Report
from ..states import OutcomeKind
from ..window import Window

_COMPACT_FROM = 1_000
"""Deadlines kept before those of finished jobs are looked for."""


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    spec: JobSpec
    job: CurrentJob
    claimed: float
    window: Window = dataclasses.field(default_factory=Window)

    @property
    def key(self) -> tuple[int, int]:
        return (self.spec.id, self.spec.attempt)


class ThreadPool:
    """A fixed set of daemon threads.

    :param state: the app whose jobs run.
    :param size: how many.
    :param on_finished: called, in the job's thread, with each job and its outcome.
    """

    stop_seconds = 1.0
    """Within which code that was cancelled has stopped, unless it ignores that."""

    def __init__(
        self, state: AppState, size: int, on_finished: Callable[[JobSpec, Outcome], None]
    ) -> None:
        self.size = size
        self._state = state
        self._on_finished = on_finished
        self._waiting: deque[_Task] = deque()
        self._running: dict[tuple[int, int], _Task] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._deadlines = _Deadlines()
        for number in range(size):
            # Daemons: a job that ignores every request must not keep the process alive.
            threading.Thread(target=self._work, name=f"bgjobs-{number + 1}", daemon=True).start()

    def submit(self, specs: Iterable[JobSpec], claimed: float) -> None:
        """Run jobs, in this order, as threads become free.

        :param claimed: when they were claimed, by ``time.monotonic()``.
        """
        limit = self._state.config.max_payload
        tasks = [_Task(spec, CurrentJob(spec, max_payload=limit), claimed) for spec in specs]
        with self._changed:
            self._waiting.extend(tasks)
            self._changed.notify(len(tasks))

    def unstarted(self) -> int:
        """How many submitted jobs wait for a thread."""
        return len(self._waiting)

    def running(self) -> int:
        """How many jobs run."""
        return len(self._running)

    def idle(self) -> int:
        """How many jobs would begin at once, were they submitted now."""
        with self._changed:
            return self.size - len(self._running) - len(self._waiting)

    def take_unstarted(self) -> list[JobSpec]:
        """The jobs that wait for a thread; they will not be run here."""
        with self._changed:
            taken = [task.spec for task in self._waiting]
            self._waiting.clear()
            return taken

    def running_specs(self) -> list[JobSpec]:
        """The jobs that run."""
        with self._changed:
            return [task.spec for task in self._running.values()]

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a thread."""
        with self._changed:
            return [task.spec for task in self._waiting]

    def reports(self) -> dict[tuple[int, int], Report]:
        """What running jobs told since the last call, by job id and attempt."""
        with self._changed:
            tasks = list(self._running.values())
        reports = ((task.key, task.job.take_report()) for task in tasks)
        return {key: report for key, report in reports if report is not None}

    def cancel(self, spec: JobSpec) -> None:
        """Ask a running job's code to stop at its next Python instruction.

        One that waits for a thread ends as cancelled without having run.
        """
        with self._changed:
            task = self._running.get((spec.id, spec.attempt))
            waiting = next((t for t in self._waiting if t.spec is spec), None)
            if waiting is not None:
                self._waiting.remove(waiting)
        if task is not None:
            task.job.request_cancel()
            task.window.interrupt(JobCancelled)
        elif waiting is not None:
            self._on_finished(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))

    def close(self) -> None:
        """Let threads end when they are idle; nothing more can be submitted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._deadlines.close()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            outcome = execute(self._state, task.spec, task.job, task.window, task.claimed)
            with self._changed:
                del self._running[task.key]
            self._on_finished(task.spec, outcome)

    def _next(self) -> _Task | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            task = self._waiting.popleft()
            self._running[task.key] = task
        if task.spec.timeout is not None:
            self._deadlines.add(time.monotonic() + task.spec.timeout, task.window)
        return task


class _Deadlines:
    """One thread that interrupts windows when their time is up; started when first needed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Window]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._compact_at = _COMPACT_FROM

    def add(self, deadline: float, window: Window) -> None:
        """Interrupt ``window`` at ``deadline``, by ``time.monotonic()``."""
        with self._changed:
            heapq.heappush(self._heap, (deadline, next(self._order), window))
            if len(self._heap) > self._compact_at:
                self._compact()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="bgjobs-timeouts", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _compact(self) -> None:
        """Forget finished jobs, or an hour's timeout would keep an hour's jobs in memory."""
        self._heap = [entry for entry in self._heap if not entry[2].is_closed]
        heapq.heapify(self._heap)
        self._compact_at = max(_COMPACT_FROM, 2 * len(self._heap))

    def _watch(self) -> None:
        while (window := self._next_overdue()) is not None:
            window.interrupt(JobTimeout)

    def _next_overdue(self) -> Window | None:
        with self._changed:
            while not self._closed:
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is not None and left <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(left)
            return None
