"""The faults: processes are killed, stalled and stopped, and the database fails."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from flask_bgjobs.job.statuses import JobStatus
from flask_bgjobs.state import state_of

from .app import LEASE_SECONDS, MAX_CRASHES, table
from .crew import Crew, WorkerProcess
from .database import Database

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 0.8
_CHILD, _WORKER, _STALL, _TERM = (
    "children killed",
    "workers killed",
    "workers stalled",
    "workers terminated",
)
_DECK = {_CHILD: 10, _WORKER: 4, _TERM: 2, _STALL: 4}
"""Faults are drawn like cards from a deck, so that even a short run has each of them."""
_MOST_STALLED = 2
"""The largest number of stalled workers; there are four, and some must run jobs."""
_LEAST_PAST_LEASE_SECONDS, _MOST_PAST_LEASE_SECONDS = 2.0, 6.0
"""A worker detects a silent worker only after it has itself run for a whole lease."""
_MOST_BLAMED = MAX_CRASHES - 3
"""A suspect that is killed from outside looks like a poison job, so chaos must not kill an innocent
job so often that it fails as crashed."""
_LONGEST_DATABASE_PAUSE_SECONDS = 20.0
_SECONDS_PER_KILL = 15.0
"""A run needs one kill of a worker and one of a child for each such period."""


class Faults:
    """Injects faults in two threads until it is stopped.

    :param seconds: the length of the run: a short run has database faults more often, and a longer
        run needs more kills.
    """

    def __init__(
        self, app: Flask, crew: Crew, database: Database, seed: int, seconds: float
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter(
            dict.fromkeys([*_DECK, *database.faults], 0)
        )
        kills = max(1, int(seconds / _SECONDS_PER_KILL))
        self._seconds = seconds
        self._least = dict.fromkeys(self.counts, 1) | {_CHILD: kills, _WORKER: kills}
        self.errors: list[BaseException] = []
        """Exceptions that ended a thread of the harness."""
        self._app = app
        self._crew = crew
        self._database = database
        self._random = random.Random(f"faults {seed}")
        self._database_random = random.Random(f"database {seed}")
        # Each fault needs its time, and some time must be left without faults.
        pause = seconds / (len(database.faults) + 2)
        self._database_pause = min(_LONGEST_DATABASE_PAUSE_SECONDS, pause)
        self._stalled: list[tuple[float, WorkerProcess]] = []
        self._stopping = threading.Event()
        self._worker_thread, self._database_thread = (
            threading.Thread(target=self._run, args=[work], name=name, daemon=True)
            for name, work in (
                ("faults", self._break_workers),
                ("database faults", self._break_database),
            )
        )

    def too_few(self) -> list[str]:
        """One sentence for each fault that was injected too seldom to prove anything."""
        return [
            f"{fault}: {self.counts[fault]}, needs at least {least}"
            for fault, least in self._least.items()
            if self.counts[fault] < least
        ]

    def start(self) -> None:
        """Start both threads."""
        self._planned_end = time.monotonic() + self._seconds
        self._worker_thread.start()
        self._database_thread.start()

    def stop(self) -> None:
        """End both threads; stalled workers resume, and the database works again."""
        self._stopping.set()
        self._join(self._worker_thread)
        # Resume first: the database thread may wait for a lock that a stalled worker holds.
        self._resume(until=float("inf"))
        self._join(self._database_thread)

    def _join(self, thread: threading.Thread) -> None:
        if thread.ident is not None:
            thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)

    # Workers

    def _break_workers(self) -> None:
        deck: list[str] = []
        while not self._stopping.wait(
            self._random.uniform(_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        ):
            self._resume(until=time.monotonic())
            if time.monotonic() >= self._planned_end:
                # The run was extended, so only the missing faults are injected: others could keep
                # slow workers from starting their children.
                deck = [fault for fault in _DECK if self.counts[fault] < self._least[fault]]
            if not deck:
                deck = [fault for fault, times in _DECK.items() for _ in range(times)]
                self._random.shuffle(deck)
            fault = deck.pop()
            ready = [worker for worker in self._crew.workers() if worker.is_ready]
            self._random.shuffle(ready)
            if any(self._inject(fault, worker) for worker in ready):
                self.counts[fault] += 1
            else:
                deck.insert(0, fault)

    def _inject(self, fault: str, worker: WorkerProcess) -> bool:
        """Inject the fault into this worker; returns whether that was possible."""
        if fault == _TERM:
            worker.terminate()
            return True
        if fault == _STALL and len(self._stalled) >= _MOST_STALLED:
            return False
        if self._holds_a_blamed_job(worker):
            return False
        if fault == _CHILD:
            return self._kill_child(worker)
        if fault == _WORKER:
            worker.signal(signal.SIGKILL)
        else:
            self._stall(worker)
        return True

    def _kill_child(self, worker: WorkerProcess) -> bool:
        # One of these is the fork server, and all children end with it. A fork server without
        # children is starting: a worker exits with code 1 if none can start for a whole lease.
        below = worker.descendants()
        if worker.pool == "process" and len(below) == 1:
            return False
        if below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(below), signal.SIGKILL)
        return bool(below)

    def _holds_a_blamed_job(self, worker: WorkerProcess) -> bool:
        jobs, workers = table(self._app, "bgjobs_job"), table(self._app, "bgjobs_worker")
        blamed = (
            sa.select(jobs.c.id)
            .join_from(jobs, workers, workers.c.id == jobs.c.worker_id)
            .where(
                workers.c.name == worker.name,
                jobs.c.status == JobStatus.RUNNING.value,
                jobs.c.crash_count >= _MOST_BLAMED,
                jobs.c.target != "tests.chaos.jobs.poison",
            )
        )
        try:
            with state_of(self._app).store.host_engine.connect() as connection:
                return connection.execute(blamed).first() is not None
        except SQLAlchemyError:
            return False

    def _stall(self, worker: WorkerProcess) -> None:
        seconds = LEASE_SECONDS + self._random.uniform(
            _LEAST_PAST_LEASE_SECONDS, _MOST_PAST_LEASE_SECONDS
        )
        worker.is_stalled = True
        worker.signal(signal.SIGSTOP)
        self._stalled.append((time.monotonic() + seconds, worker))

    def _resume(self, until: float) -> None:
        for entry in list(self._stalled):
            due, worker = entry
            if due <= until:
                worker.signal(signal.SIGCONT)
                worker.is_stalled = False
                self._stalled.remove(entry)

    # The database

    def _break_database(self) -> None:
        faults = list(self._database.faults.items())
        self._database_random.shuffle(faults)
        for name, inject in itertools.cycle(faults):
            pause = self._database_pause * self._database_random.uniform(0.5, 1)
            if self._stopping.wait(pause):
                return
            inject(self._database_random)
            self.counts[name] += 1
