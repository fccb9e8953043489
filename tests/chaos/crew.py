"""The crew: real worker processes, each replaced as soon as it is gone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from tests.acceptance.helpers import descendants

from .settings import Settings

_POSTS: tuple[tuple[Literal["thread", "process"], int], ...] = (
    ("thread", 6),
    ("thread", 6),
    ("process", 3),
    ("process", 3),
)
"""Pool and jobs at once of each worker."""
_GRACE_SECONDS = 2.0
_ROOT = Path(__file__).parents[2]
_STOP_SECONDS = 60.0
_LOOK_SECONDS = 0.05


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
        command = ["-m", "flask", "--app", "tests.chaos.app", "bgjobs", "worker"]
        options = ["-n", name, "-P", pool, "-c", str(size)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, *options, "--shutdown-timeout", str(_GRACE_SECONDS)],
                cwd=_ROOT,
                env={**os.environ, **settings.environment(), "PYTHONPATH": str(_ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is answered by the harness, which then ends all of them.
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs, and nobody asked it to stop."""
        return self.has_started and not (self.is_stalled or self.is_stopping or self.has_ended)

    @property
    def has_started(self) -> bool:
        """Whether it took jobs at all: without a database it ends before, with exit code 1."""
        if not self._has_started:
            self._has_started = "Worker started" in self._log.read_text()
        return self._has_started

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self._process.poll() is not None

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it."""
        return self._process.poll() == -signal.SIGKILL

    def below(self) -> list[int]:
        """The processes that it has started, and theirs."""
        return descendants(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it is gone."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to stop. Asked twice it would stop at once."""
        # One that was started while the database was away has ended by itself.
        if not (self.is_stopping or self.has_ended):
            self.is_stopping = True
            self.signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; ``None`` when it is not gone in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class Crew:
    """Workers of both pools."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._posts: list[WorkerProcess | None] = [None] * len(_POSTS)
        self._hired = 0
        self.deaths: list[Death] = []
        self.badly_ended: list[str] = []
        """Workers that did not exit with 0 after a SIGTERM."""

    @property
    def hired(self) -> int:
        """How many workers were started so far."""
        return self._hired

    def count_in_logs(self, words: str) -> int:
        """How often the logs of all workers hold these words."""
        logs = Path(self._settings.folder).glob("*.log")
        return sum(log.read_text(errors="replace").count(words) for log in logs)

    def workers(self) -> list[WorkerProcess]:
        """The workers as they are now."""
        with self._lock:
            return [worker for worker in self._posts if worker is not None]

    def replace_dead(self) -> None:
        """Start a worker wherever there is none."""
        with self._lock:
            for post, worker in enumerate(self._posts):
                if worker is None or worker.has_ended:
                    if worker is not None:
                        self._note_end(worker)
                    self._posts[post] = self._hire(*_POSTS[post])

    def dismiss(self) -> None:
        """Stop all workers in order, and wait until they are gone."""
        workers = self.workers()
        for worker in workers:
            # Before it has started, the signal would just kill it.
            while not (worker.is_ready or worker.is_stopping or worker.has_ended):
                time.sleep(_LOOK_SECONDS)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(_STOP_SECONDS)
            self._note_end(worker)
        self.end()

    def end(self) -> None:
        """Kill whoever is left."""
        with self._lock:
            for worker in self._posts:
                if worker is not None:
                    worker.signal(signal.SIGKILL)
                    worker.wait(_STOP_SECONDS)
            self._posts = [None] * len(_POSTS)

    def _note_end(self, worker: WorkerProcess) -> None:
        if worker.was_killed:
            self.deaths.append(Death(worker.name, time.time()))
        elif worker.is_stopping and worker.has_started and worker.wait(0) != 0:
            self.badly_ended.append(worker.name)

    def _hire(self, pool: str, size: int) -> WorkerProcess:
        self._hired += 1
        return WorkerProcess(self._settings, f"{pool}-{self._hired}", pool, size)
