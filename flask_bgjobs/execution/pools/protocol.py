"""What a worker asks of a pool, whatever its jobs run in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ...job.records import JobSpec, Key, Outcome, Report
from .trouble import Failing, Overdue

Finished = Callable[[JobSpec, Outcome], None]
"""Called with a job and its outcome."""


class Pool(Protocol):
    """Runs jobs. One thread of the worker submits them and takes them back."""

    stop_seconds: float
    """Within which code that was cancelled has stopped, unless it ignores that."""

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until it is closed."""

    def submit(self, specs: Sequence[JobSpec], claimed: float) -> None:
        """Run jobs, in this order, as places become free.

        :param claimed: when they were claimed, by ``time.monotonic()``.
        """

    def unstarted(self) -> int:
        """How many submitted jobs wait for a place."""

    def running(self) -> int:
        """How many jobs hold a place: those that run, and those whose failure is reported."""

    def idle(self) -> int:
        """How many jobs would begin at once, were they submitted now."""

    def capacity(self) -> int:
        """How many jobs could run at once."""

    def failing(self) -> Failing | None:
        """Why no place is left, and none comes; ``None`` while one is there."""

    def take_unstarted(self) -> list[JobSpec]:
        """The jobs that wait for a place; they will not be run here."""

    def running_specs(self) -> list[JobSpec]:
        """The jobs that run."""

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a place."""

    def reports(self) -> dict[Key, Report]:
        """What running jobs told since the last call, by job id and attempt."""

    def cancel(self, spec: JobSpec) -> None:
        """Stop a job's code, or let one that waits end as cancelled without having run."""

    def overdue(self) -> list[Overdue]:
        """The jobs that hold a place although they were asked to stop or their code has ended."""

    def close(self) -> None:
        """End what it has started; nothing more can be submitted."""
