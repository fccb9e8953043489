"""The crew: real worker processes, each replaced as soon as it has ended."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Literal

from tests.acceptance.helpers import descendants
from tests.preloaded import preloaded_interpreter

from .settings import Settings

_SLOTS: tuple[tuple[Literal["thread", "process"], int], ...] = (
    ("thread", 6),
    ("thread", 6),
    ("process", 3),
    ("process", 3),
)
"""The pool and the concurrency of each worker."""
_GRACE_SECONDS = 2.0
_ROOT = Path(__file__).parents[2]
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Death:
    """A worker that was killed, by the harness or by a job."""

    worker: str
    at: float
    """By the machine's clock, in seconds since 1970."""


class WorkerProcess:
    """One ``flask bgjobs worker``."""

    def __init__(self, settings: Settings, name: str, pool: str, size: int) -> None:
        self.name = name
        self.pool = pool
        self.is_stalled = self.is_stopping = False
        self._log = Path(settings.folder) / f"{name}.log"
        self._has_started = False
        command = ["--app", "tests.chaos.app", "bgjobs", "worker"]
        options = ["-n", name, "-P", pool, "-c", str(size)]
        with self._log.open("w") as log:
            # It gets a session of its own: only the harness handles Ctrl-C, and ends all workers.
            self._process = preloaded_interpreter().start_module(
                "flask",
                [*command, *options, "--shutdown-timeout", str(_GRACE_SECONDS)],
                folder=_ROOT,
                environment={**os.environ, **settings.environment(), "PYTHONPATH": str(_ROOT)},
                output=log,
                # A worker with a process pool starts a fork server.
                spares=int(pool == "process"),
            )
        self.pid = self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs, is not stalled and was not asked to stop."""
        return self.has_started and not (self.is_stalled or self.is_stopping or self.has_ended)

    @property
    def has_started(self) -> bool:
        """Whether it ever took jobs: without a database it exits with code 1 before that."""
        if not self._has_started:
            self._has_started = "Worker started" in self._log.read_text()
        return self._has_started

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self._process.poll() == -signal.SIGKILL

    def descendants(self) -> list[int]:
        """The ids of its child processes and of their children."""
        return descendants(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Ask it once to stop; a second signal would end its grace period."""
        # A worker that was started during a database outage has ended by itself.
        if not (self.is_stopping or self.has_ended):
            self.is_stopping = True
            self.signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; ``None`` if it does not end in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class Crew:
    """Workers of both pools."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._slots: list[WorkerProcess | None] = [None] * len(_SLOTS)
        self._started = 0
        self.deaths: list[Death] = []
        self.badly_ended: list[str] = []
        """Workers that did not exit with code 0 after SIGTERM."""

    @property
    def started(self) -> int:
        """The number of workers that were started so far."""
        return self._started

    def count_in_logs(self, words: str) -> int:
        """The number of occurrences of ``words`` in the logs of all workers."""
        logs = Path(self._settings.folder).glob("*.log")
        return sum(log.read_text(errors="replace").count(words) for log in logs)

    def workers(self) -> list[WorkerProcess]:
        """The current workers."""
        with self._lock:
            return [worker for worker in self._slots if worker is not None]

    def replace_dead(self) -> None:
        """Start a worker for each that is missing or has ended."""
        with self._lock:
            for slot, worker in enumerate(self._slots):
                if worker is None or worker.has_ended:
                    if worker is not None:
                        self._record_end(worker)
                    self._slots[slot] = self._start_worker(*_SLOTS[slot])

    def dismiss(self) -> None:
        """Stop all workers gracefully, and wait until they have ended."""
        workers = self.workers()
        for worker in workers:
            # A worker that has not started yet would be killed by the signal.
            while not (worker.is_ready or worker.is_stopping or worker.has_ended):
                time.sleep(_POLL_SECONDS)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(_STOP_SECONDS)
            self._record_end(worker)
        self.end()

    def end(self) -> None:
        """Kill the remaining workers."""
        with self._lock:
            for worker in self._slots:
                if worker is not None:
                    worker.signal(signal.SIGKILL)
                    worker.wait(_STOP_SECONDS)
            self._slots = [None] * len(_SLOTS)

    def _record_end(self, worker: WorkerProcess) -> None:
        if worker.was_killed:
            self.deaths.append(Death(worker.name, time.time()))
        elif worker.is_stopping and worker.has_started and worker.wait(0) != 0:
            self.badly_ended.append(worker.name)

    def _start_worker(self, pool: str, size: int) -> WorkerProcess:
        self._started += 1
        return WorkerProcess(self._settings, f"{pool}-{self._started}", pool, size)
