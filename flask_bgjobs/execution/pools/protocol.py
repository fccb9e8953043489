"""The methods of a pool: the same for threads and child processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ...job.records import JobSpec, Key, Outcome, Report
from .trouble import Failing, Overdue

Finished = Callable[[JobSpec, Outcome], None]
"""A callback for a job and its outcome."""


class Pool(Protocol):
    """Runs jobs. Only one thread of the worker calls its methods.

    In this class, a slot is a thread or a child process.
    """

    stop_seconds: float
    """Time within which cancelled code stops, unless it ignores the cancel."""

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until :meth:`close`."""

    def submit(self, specs: Sequence[JobSpec], claimed: float) -> None:
        """Run jobs in this order, each as soon as a slot is free.

        Returns at once: a worker whose loop waits loses its lease. The pool stops each job at its
        timeout, and reports a job that failed.

        :param claimed: time of their claim, by ``time.monotonic()``.
        """

    def unstarted(self) -> int:
        """Number of submitted jobs that wait for a slot."""

    def running(self) -> int:
        """Number of jobs that hold a slot: they run, or their failure is being reported."""

    def idle(self) -> int:
        """Number of jobs that would start at once if they were submitted now."""

    def capacity(self) -> int:
        """Number of jobs that can run at the same time."""

    def failing(self) -> Failing | None:
        """Why there is no slot and none can be started; ``None`` while there is one."""

    def take_unstarted(self) -> list[JobSpec]:
        """Remove the jobs that wait for a slot, and return them."""

    def running_specs(self) -> list[JobSpec]:
        """The running jobs."""

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a slot."""

    def reports(self) -> dict[Key, Report]:
        """Progress and log lines of running jobs since the last call, by job id and attempt."""

    def cancel(self, spec: JobSpec) -> None:
        """Stop a job's code. A job that waits for a slot ends as cancelled without having run."""

    def overdue(self) -> list[Overdue]:
        """Jobs that still hold a slot after they were asked to stop, or after their code ended."""

    def close(self) -> None:
        """End the pool's threads and child processes. No job can be submitted afterwards."""
