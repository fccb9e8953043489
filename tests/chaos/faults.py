"""The faults: processes killed, stalled and stopped; the database in trouble."""

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
"""Faults are dealt like cards, so that also a short run sees each of them."""
_MOST_STALLED = 2
"""Workers at once, of four: somebody must be left to do the work."""
_LEAST_PAST_LEASE_SECONDS, _MOST_PAST_LEASE_SECONDS = 2.0, 6.0
"""Whoever is to notice the silence must itself have lived for the whole lease."""
_MOST_BLAMED = MAX_CRASHES - 3
"""A suspect that is killed from outside cannot be told from poison, so that chaos may not hit an
innocent job as often as it takes to be quarantined."""
_LONGEST_TROUBLE_PAUSE_SECONDS = 20.0
_SECONDS_PER_KILL = 15.0
"""A run with fewer kills, of workers or of children, proves too little."""


class Faults:
    """Injects faults, in two threads, until it is stopped.

    :param seconds: how long it will go on: in a short run there is trouble more often, and a
        longer one needs more kills.
    """

    def __init__(
        self, app: Flask, crew: Crew, database: Database, seed: int, seconds: float
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter(
            dict.fromkeys([*_DECK, *database.troubles], 0)
        )
        kills = max(1, int(seconds / _SECONDS_PER_KILL))
        self._least = dict.fromkeys(self.counts, 1) | {_CHILD: kills, _WORKER: kills}
        self.errors: list[BaseException] = []
        """Why a thread of the harness itself ended early."""
        self._app = app
        self._crew = crew
        self._database = database
        self._random = random.Random(f"faults {seed}")
        self._trouble_random = random.Random(f"trouble {seed}")
        # There must be time for each, and some for itself.
        pause = seconds / (len(database.troubles) + 2)
        self._trouble_pause = min(_LONGEST_TROUBLE_PAUSE_SECONDS, pause)
        self._stalled: list[tuple[float, WorkerProcess]] = []
        self._stopping = threading.Event()
        self._harming, self._troubling = (
            threading.Thread(target=self._run, args=[work], name=name, daemon=True)
            for name, work in (("faults", self._harm_all), ("trouble", self._trouble_all))
        )

    def too_few(self) -> list[str]:
        """A sentence for each fault that was injected too seldom to prove anything."""
        return [
            f"{fault}: {self.counts[fault]}, at least {least} are needed"
            for fault, least in self._least.items()
            if self.counts[fault] < least
        ]

    def start(self) -> None:
        """Begin."""
        self._harming.start()
        self._troubling.start()

    def stop(self) -> None:
        """End both threads; stalled workers go on, and the database is whole again."""
        self._stopping.set()
        self._join(self._harming)
        # Before the other is awaited: it may want a lock that a stalled worker holds.
        self._resume(until=float("inf"))
        self._join(self._troubling)

    def _join(self, thread: threading.Thread) -> None:
        if thread.ident is not None:
            thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)

    # Workers

    def _harm_all(self) -> None:
        deck: list[str] = []
        while not self._stopping.wait(
            self._random.uniform(_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        ):
            self._resume(until=time.monotonic())
            if not deck:
                deck = [fault for fault, times in _DECK.items() for _ in range(times)]
                self._random.shuffle(deck)
            fault = deck.pop()
            ready = [worker for worker in self._crew.workers() if worker.is_ready]
            self._random.shuffle(ready)
            if any(self._harm(fault, worker) for worker in ready):
                self.counts[fault] += 1
            else:
                deck.insert(0, fault)

    def _harm(self, fault: str, worker: WorkerProcess) -> bool:
        """Whether the fault could be injected into this worker."""
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
        # The process that starts the children is one of these: all of them go with it.
        below = worker.below()
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

    def _trouble_all(self) -> None:
        troubles = list(self._database.troubles.items())
        self._trouble_random.shuffle(troubles)
        for name, trouble in itertools.cycle(troubles):
            pause = self._trouble_pause * self._trouble_random.uniform(0.5, 1)
            if self._stopping.wait(pause):
                return
            trouble(self._trouble_random)
            self.counts[name] += 1
