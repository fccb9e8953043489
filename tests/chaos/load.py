"""The load: enqueues jobs continuously through the public API, and cancels some of them."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from flask_bgjobs import BgJobsError, Job, run_background_job
from flask_bgjobs.job.statuses import FINAL
from flask_bgjobs.state import state_of

from .app import table
from .plan import Plan, Planned

_JOBS_PER_SECOND = 20.0
_MOST_UNFINISHED = 100
"""With more unfinished jobs the enqueuer waits: workers that are often killed run few jobs, and a
long queue would hide how soon a job is claimed again."""
_POLL_SECONDS = 0.5


class Load:
    """Enqueues and cancels jobs in two threads.

    :param seed: seed of the plan and of the pauses between enqueues.
    """

    def __init__(self, app: Flask, seed: int) -> None:
        self.planned: dict[int, Planned] = {}
        """Every job whose enqueue was tried, by token."""
        self.cancels = 0
        """The number of cancels that succeeded."""
        self.errors: list[BaseException] = []
        """Exceptions that ended a thread."""
        self._app = app
        self._plan = Plan(seed)
        self._random = random.Random(f"load {seed}")
        self._stopping = threading.Event()
        self._to_cancel: list[tuple[float, int, Planned, Job]] = []
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=[work], name=name, daemon=True)
            for name, work in (("enqueue", self._enqueue_all), ("cancel", self._cancel_all))
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; pending cancels are dropped."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)

    # Enqueue

    def _enqueue_all(self) -> None:
        checked_at = 0.0
        while not self._stopping.wait(self._random.expovariate(_JOBS_PER_SECOND)):
            if time.monotonic() - checked_at > _POLL_SECONDS:
                while self._has_too_many() and not self._stopping.wait(_POLL_SECONDS):
                    pass
                checked_at = time.monotonic()
            planned = self._plan.draw()
            self.planned[planned.token] = planned
            with self._app.app_context():
                self._try_to_enqueue(planned)

    def _has_too_many(self) -> bool:
        try:
            return unfinished(self._app) > _MOST_UNFINISHED
        except SQLAlchemyError:
            return False

    def _try_to_enqueue(self, planned: Planned) -> None:
        session: Any = self._app.extensions["sqlalchemy"].session
        try:
            job = self._enqueue(planned, session)
        except (SQLAlchemyError, BgJobsError):
            # The job may have been saved or not; the verification checks that.
            try_quietly(session.rollback)
            return
        planned.job_id = job.id
        if planned.how == "joined and rolled back":
            planned.result = "rolled back"
        elif job.deduplicated:
            planned.result = "deduplicated"
        else:
            planned.result = "enqueued"
            self._cancel_later(planned, job)

    def _enqueue(self, planned: Planned, session: Any) -> Job:
        if planned.how == "saved at once":
            return self._run_background_job(planned)
        session.execute(sa.insert(table(self._app, "chaos_order")).values(token=planned.token))
        job = self._run_background_job(planned)
        if planned.how == "joined and committed":
            session.commit()
        else:
            session.rollback()
        return job

    def _run_background_job(self, planned: Planned) -> Job:
        name = f"tests.chaos.jobs.{planned.kind.function}"
        return run_background_job(name, parameters=planned.parameters, **planned.options)

    # Cancel

    def _cancel_later(self, planned: Planned, job: Job) -> None:
        if planned.cancel_after is not None:
            with self._changed:
                due = time.monotonic() + planned.cancel_after
                heapq.heappush(self._to_cancel, (due, planned.token, planned, job))
                self._changed.notify_all()

    def _cancel_all(self) -> None:
        while (entry := self._next_to_cancel()) is not None:
            planned, job = entry
            planned.cancel_asked = True
            with self._app.app_context():
                if try_quietly(job.cancel):
                    self.cancels += 1

    def _next_to_cancel(self) -> tuple[Planned, Job] | None:
        with self._changed:
            while not self._stopping.is_set():
                left = self._to_cancel[0][0] - time.monotonic() if self._to_cancel else None
                if left is not None and left <= 0:
                    _, _, planned, job = heapq.heappop(self._to_cancel)
                    return planned, job
                self._changed.wait(left)
            return None


def unfinished(app: Flask) -> int:
    """The number of jobs without a final status."""
    jobs = table(app, "bgjobs_job")
    count = sa.select(sa.func.count()).where(jobs.c.status.not_in([each.value for each in FINAL]))
    with state_of(app).store.host_engine.connect() as connection:
        return connection.scalar(count) or 0


def try_quietly(act: Any) -> bool:
    """Call ``act``; returns ``False`` if the database does not work."""
    try:
        act()
    except SQLAlchemyError:
        return False
    return True
