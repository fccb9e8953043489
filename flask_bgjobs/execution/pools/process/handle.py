"""The handle of a child process: its state and its tasks, as the pool knows them."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import NamedTuple

from ....job.records import JobSpec, Outcome, Report
from ....job.statuses import OutcomeKind
from .channel import ParentEnd
from .tickets import Marks, Tickets

PREFETCH_SECONDS = 0.01
"""How much work a child gets in advance, as run time of average jobs. When its current job runs
longer, the jobs behind it are taken back."""
REPORT_SECONDS = 10.0
"""How long a child may take to report a failure before it is killed."""


@dataclasses.dataclass(slots=True, eq=False)
class Task:
    """A submitted job."""

    spec: JobSpec
    claimed: float
    report: Report | None = None
    """Progress and log lines that :meth:`take_report` has not returned yet."""

    def add_report(self, report: Report) -> None:
        """Add progress and log lines of the running job."""
        self.report = report if self.report is None else self.report.followed_by(report)

    def take_report(self) -> Report | None:
        """The progress and log lines since the last call, or ``None``."""
        report, self.report = self.report, None
        return report


class UnreportedFailure(NamedTuple):
    """A failed job whose child has not written the failure to the log yet."""

    spec: JobSpec
    outcome: Outcome
    since: float
    """When the outcome arrived, by ``time.monotonic()``."""


@dataclasses.dataclass(slots=True, eq=False)
class ChildHandle:
    """The state of one child process, as the pool knows it."""

    slot: int
    channel: ParentEnd
    tickets: Tickets
    marks: Marks
    pid: int | None = None
    is_ready: bool = False
    """Whether it has built the app."""
    is_ending: bool = False
    """Whether it gets no more jobs, and another child may take its place."""
    assigned: dict[int, Task] = dataclasses.field(default_factory=dict)
    """The tasks that it has been given and has not finished, by number, in order."""
    stopping: int = 0
    """Number of the job that it was told to stop; 0: none."""
    unreported: dict[int, UnreportedFailure] = dataclasses.field(default_factory=dict)
    """The failures that it has not reported yet, by number."""
    killed_at: float = math.inf
    """When SIGKILL was sent, or is due as soon as the pid is known; infinity: not killed."""
    kill_at: float = math.inf
    """When to kill it, unless it becomes ready, stops its job or ends before; infinity: never."""
    failure: str = ""
    """The error with which building the app failed."""
    failed_start_recorded: bool = False
    """Whether its failed start was recorded before its process ended."""

    def running(self) -> tuple[int, Task] | None:
        """Number and task of the running job, according to the marks; ``None`` if no job runs."""
        number = self.marks.started
        task = self.assigned.get(number)
        return None if task is None or self.marks.finished == number else (number, task)

    @property
    def reporting_since(self) -> float:
        """When the oldest unreported failure arrived; infinity: there is none, or it was killed."""
        since = (failure.since for failure in self.unreported.values())
        return min(since, default=math.inf) if self.killed_at == math.inf else math.inf

    @property
    def is_busy(self) -> bool:
        """Whether it has a job, or is reporting a failure."""
        return bool(self.assigned or self.unreported)

    def run_seconds_at(self, now: float) -> float:
        """Seconds since the running job started; 0 if no job runs."""
        return 0.0 if self.running() is None else now - self.marks.started_at

    def number_of(self, spec: JobSpec) -> int:
        """The number of a job in this child; 0 if the child does not have the job."""
        return next((number for number, task in self.assigned.items() if task.spec is spec), 0)

    def next_check_at(self, now: float) -> float:
        """When the pool has to check the child again, unless a message arrives before."""
        at = min(self.kill_at, self.reporting_since + REPORT_SECONDS)
        if len(self.assigned) > 1 or (self.assigned and self.unreported):
            at = min(at, now + PREFETCH_SECONDS)
        if self.stopping:
            return at
        running = self.running()
        for number, task in self.assigned.items():
            if task.spec.timeout is not None:
                # The time limit of a job that has not started begins now at the earliest.
                is_running = running is not None and running[0] == number
                started_at = self.marks.started_at if is_running else now
                at = min(at, started_at + task.spec.timeout)
        return at

    def crash_outcome(self, task: Task, exit_text: str) -> Outcome:
        """The outcome of a job whose process has ended.

        :param exit_text: how it ended, as :func:`flask_bgjobs.system.exits.describe_exit` says it.
        """
        spec, started_at = task.spec, self.marks.started_at
        kind, error_type = OutcomeKind.CRASHED, "Crashed"
        error = f"Crashed: the process that ran it {exit_text}"
        if self.stopping:
            if self.marks.stop_for_timeout:
                kind, error_type = OutcomeKind.TIMEOUT, "JobTimeout"
                error = (
                    f"JobTimeout: it ran longer than {spec.timeout} s and its process {exit_text}"
                )
            else:
                kind, error_type = OutcomeKind.CANCELLED, "JobCancelled"
                error = f"JobCancelled: its process {exit_text}"
        return Outcome(
            spec.id,
            spec.attempt,
            kind,
            error_type=error_type,
            error=error,
            wait_seconds=started_at - task.claimed,
            run_seconds=time.monotonic() - started_at,
        )
