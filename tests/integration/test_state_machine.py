"""The life of a job as a state machine: no order of events breaks a promise.

Hypothesis lets two workers, an operator and a clock do things to jobs in any order, against the
real store, and a model says what must be in the tables after each step. The rules of the model are
those of "The life of a job" in the documentation, written anew.

``BGJOBS_STATE_EXAMPLES=2000`` tries more orders than the 25 of a usual run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from flask import Flask
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flask_bgjobs import run_background_job
from flask_bgjobs.app_state import AppState
from flask_bgjobs.models import Attempt, Base, Job, Worker
from flask_bgjobs.spec import JobSpec, Outcome
from flask_bgjobs.states import OutcomeKind
from flask_bgjobs.worker import register

_EXAMPLES = int(os.environ.get("BGJOBS_STATE_EXAMPLES", "25"))
_STEPS = 30
_LONG = 3600.0
"""Seconds: what waits so long becomes due only when the clock is moved."""
_MAX_CRASHES = 3

_ACTIVE = {"scheduled", "pending", "running", "retrying"}
_WAITING = _ACTIVE - {"running"}
_WITHOUT_A_ROW = {"completed", "given back", "snoozed"}
"""Outcomes of attempts of which no row is kept."""

_QUEUES = ("a", "b")
_names = st.sampled_from(_QUEUES)
_workers = st.integers(0, 1)
_picks = st.integers(0, 1_000)
"""Chooses one of what there is; hypothesis shrinks it to the first."""


@dataclasses.dataclass
class _Job:
    """What the model knows of a job."""

    id: int
    queue: str
    priority: int
    retries: int
    key: str | None
    status: str
    due: bool
    attempt: int = 0
    retry_count: int = 0
    crash_count: int = 0
    suspect: bool = False
    cancelling: bool = False
    worker: int | None = None
    """The id of the worker that claimed it last."""
    started: bool = False
    """Whether the start of the running attempt was committed."""

    def is_run_by(self, worker_id: int, attempt: int) -> bool:
        return (self.status, self.worker, self.attempt) == ("running", worker_id, attempt)

    def end(self, kind: str) -> None:
        """What an outcome makes of it."""
        self.suspect = False
        if kind == "completed":
            self.status = "completed"
        elif self.cancelling or kind == "cancelled":
            self.status = "cancelled"
        elif kind in ("failed finally", "refused"):
            self.status = "failed"
        elif kind in ("failed", "timeout", "retry"):
            if self.retry_count == self.retries:
                self.status = "failed"
            else:
                self.retry_count += 1
                self.status, self.due = "retrying", False
        elif kind == "snoozed":
            self.status, self.due = "scheduled", False
        elif kind == "given back":
            self.status = "pending"
        elif kind == "lost":
            self.status, self.suspect = "pending", True
        elif kind == "crashed":
            self.crash_count += 1
            quarantined = self.crash_count == _MAX_CRASHES
            self.status, self.suspect = ("failed", False) if quarantined else ("pending", True)


@dataclasses.dataclass
class _Worker:
    """What the model knows of a worker."""

    id: int
    alive: bool = True
    beats: int = 0


class LifeOfJobs(RuleBasedStateMachine):
    """Everything that can be done to jobs, in any order."""

    def __init__(self, state: AppState) -> None:
        super().__init__()
        self.state, self.store = state, state.store
        self.store.transaction(_empty)
        self.store._known_queues.clear()
        self.jobs: dict[int, _Job] = {}
        self.last_id = 0
        self.paused: set[str] = set()
        self.claims: list[tuple[int, JobSpec]] = []
        """Worker and spec of every claim, also of those that are long over."""
        self.ended: list[tuple[int, int, str]] = []
        """Job, attempt and outcome, of the attempts of which a row is kept."""
        self.workers = [self._new_worker(), self._new_worker()]

    # Who enqueues

    @rule(
        queue=_names,
        priority=st.sampled_from([-1, 0, 2]),
        retries=st.integers(0, 2),
        key=st.sampled_from([None, None, "k", "l"]),
        delay=st.sampled_from([None, _LONG]),
    )
    def enqueue(
        self, queue: str, priority: int, retries: int, key: str | None, delay: float | None
    ) -> None:
        job = run_background_job(
            "tests.jobs.echo",
            queue=queue,
            priority=priority,
            retries=retries,
            retry_delay=_LONG,
            unique_key=key,
            delay=delay,
        )
        holder = next((j for j in self.jobs.values() if j.key == key and j.status in _ACTIVE), None)
        if key is not None and holder is not None:
            assert (job.id, job.deduplicated) == (holder.id, True)
            return
        assert job.id > self.last_id, "an id was used again"
        self.last_id = job.id
        status = "pending" if delay is None else "scheduled"
        self.jobs[job.id] = _Job(job.id, queue, priority, retries, key, status, delay is None)

    # Who works

    @rule(
        which=_workers,
        limit=st.integers(1, 4),
        queues=st.sampled_from([None, ("a",), ("b", "a")]),
    )
    def claim(self, which: int, limit: int, queues: Sequence[str] | None) -> None:
        worker = self.workers[which]
        expected = self._claimable(queues)[:limit] if worker.alive else []
        specs = self.store.claim(worker.id, limit, queues)
        assert [spec.id for spec in specs] == [job.id for job in expected]
        for spec, job in zip(specs, expected, strict=True):
            job.status, job.worker, job.started = "running", worker.id, False
            job.attempt += 1
            assert (spec.attempt, spec.suspect) == (job.attempt, job.suspect)
            self.claims.append((worker.id, spec))

    @precondition(lambda self: self.claims)
    @rule(pick=_picks)
    def mark_started(self, pick: int) -> None:
        worker_id, spec = self._claim(pick)
        job = self.jobs.get(spec.id)
        is_ours = job is not None and job.is_run_by(worker_id, spec.attempt)
        assert self.store.mark_started(worker_id, [spec]) == ({spec.id} if is_ours else set())
        if job is not None and is_ours:
            job.started = True

    @precondition(lambda self: self.claims)
    @rule(picks=st.lists(_picks, min_size=1, max_size=3), kinds=st.data())
    def settle(self, picks: list[int], kinds: Any) -> None:
        """Also late, and twice."""
        worker_id, first = self._claim(picks[0])
        specs = {first.key: first}
        specs |= {s.key: s for w, s in map(self._claim, picks[1:]) if w == worker_id}
        batch = [(s, kinds.draw(st.sampled_from(list(OutcomeKind)))) for s in specs.values()]
        expected = [self._settled(worker_id, spec, kind.value) for spec, kind in batch]
        outcomes = [(spec, _outcome(spec, kind)) for spec, kind in batch]
        settled = self.store.settle(worker_id, "one", outcomes)
        assert [each.status for each in settled] == expected
        is_alive = any(w.id == worker_id and w.alive for w in self.workers)
        if is_alive and None not in expected:
            # Asked again, as after a commit without an answer: what was recorded, once.
            again = self.store.settle(worker_id, "one", outcomes, set(specs))
            assert [each.status for each in again] == expected

    @rule(which=_workers)
    def observe(self, which: int) -> None:
        worker_id = self.workers[which].id
        running = {j.id: j for j in self.jobs.values() if j.is_run_by(worker_id, j.attempt)}
        view = self.store.observe(worker_id, {})
        assert view.attempts == {job_id: job.attempt for job_id, job in running.items()}
        assert view.cancelling == {job_id for job_id, job in running.items() if job.cancelling}
        assert [spec.id for spec in self.store.held_by(worker_id)] == sorted(running)

    # Who lives

    @rule(which=_workers)
    def beat(self, which: int) -> None:
        worker = self.workers[which]
        assert self.store.beat(worker.id) == worker.alive
        worker.beats += worker.alive

    @rule(which=_workers, stale=st.booleans())
    def rescue(self, which: int, stale: bool) -> None:
        """By somebody who saw the newest heartbeat, or only an older one."""
        worker = self.workers[which]
        settled = self.store.rescue(worker.id, worker.beats - stale)
        if stale or not worker.alive:
            assert settled == []
            return
        worker.alive = False
        held = [job for job in self.jobs.values() if job.is_run_by(worker.id, job.attempt)]
        assert {each.job_id for each in settled} == {job.id for job in held}
        for job in held:
            self._end(job, "crashed" if job.suspect and job.started else "lost")

    @rule(which=_workers)
    def start_over(self, which: int) -> None:
        if not self.workers[which].alive:
            self.workers[which] = self._new_worker()

    # Who operates

    @precondition(lambda self: self.jobs)
    @rule(pick=_picks)
    def cancel(self, pick: int) -> None:
        job = self._job(pick)
        result = self.store.cancel([job.id])
        assert (result.done == [job.id]) == (job.status in _WAITING)
        assert (result.requested == [job.id]) == (job.status == "running")
        if job.status in _WAITING:
            job.status = "cancelled"
        elif job.status == "running":
            job.cancelling = True

    @precondition(lambda self: self.jobs)
    @rule(pick=_picks)
    def retry_by_hand(self, pick: int) -> None:
        job = self._job(pick)
        others = [j for j in self.jobs.values() if j is not job and j.status in _ACTIVE]
        key_is_taken = job.key is not None and job.key in [other.key for other in others]
        may = job.status in ("failed", "cancelled", "retrying") and not key_is_taken
        assert (self.store.retry([job.id]).done == [job.id]) == may
        if may:
            job.status, job.retry_count, job.crash_count = "pending", 0, 0
            job.suspect = job.cancelling = False

    @precondition(lambda self: self.jobs)
    @rule(pick=_picks)
    def delete(self, pick: int) -> None:
        job = self._job(pick)
        assert (self.store.delete([job.id]).done == [job.id]) == (job.status != "running")
        if job.status != "running":
            del self.jobs[job.id]
            self.ended = [each for each in self.ended if each[0] != job.id]

    @rule(queue=_names, pause=st.booleans())
    def pause_or_resume(self, queue: str, pause: bool) -> None:
        changes = pause != (queue in self.paused)
        assert (self.store.pause if pause else self.store.resume)(queue) == changes
        (self.paused.add if pause else self.paused.discard)(queue)

    # The clock

    @precondition(lambda self: self.jobs)
    @rule(pick=_picks)
    def time_passes(self, pick: int) -> None:
        """A job that waits for its time has waited for long enough."""
        job = self._job(pick)
        if job.status in ("scheduled", "retrying"):
            due = self.store.after(sa.literal(-1.0))
            self._execute(sa.update(Job).where(Job.id == job.id).values(run_at=due))
            job.due = True

    @rule()
    def promote(self) -> None:
        due = [j for j in self.jobs.values() if j.due and j.status in ("scheduled", "retrying")]
        assert self.store.promote() == len(due)
        for job in due:
            job.status = "pending"

    # What must be true

    @invariant()
    def the_tables_are_as_the_model(self) -> None:
        jobs, attempts, workers = self._tables(Job, Attempt, Worker)
        assert {row.id: _seen(row) for row in jobs} == {
            job.id: _expected(job) for job in self.jobs.values()
        }
        assert sorted((row.job_id, row.attempt, row.outcome) for row in attempts) == sorted(
            self.ended
        ), "each attempt has one outcome"
        living = {row.id for row in workers if row.status == "alive"}
        assert living == {worker.id for worker in self.workers if worker.alive}
        assert {row.worker_id for row in jobs if row.status == "running"} <= living

    def teardown(self) -> None:
        """Whatever has happened: with a worker and time, every job comes to an end."""
        for name in self.paused:
            self.store.resume(name)
        for worker in self.workers:
            self.store.rescue(worker.id, worker.beats)
        self._execute(sa.update(Job).values(run_at=self.store.after(sa.literal(-1.0))))
        self.store.promote()
        worker = self._new_worker()
        while specs := self.store.claim(worker.id, 10):
            done = [(spec, _outcome(spec, OutcomeKind.COMPLETED)) for spec in specs]
            self.store.settle(worker.id, "last", done)
        assert not {row.status for row in self._rows(Job)} & _ACTIVE

    # Help

    def _new_worker(self) -> _Worker:
        return _Worker(register(self.state, "one"))

    def _job(self, pick: int) -> _Job:
        return list(self.jobs.values())[pick % len(self.jobs)]

    def _claim(self, pick: int) -> tuple[int, JobSpec]:
        """One of all claims, the newest first."""
        return self.claims[-1 - pick % len(self.claims)]

    def _claimable(self, queues: Sequence[str] | None) -> list[_Job]:
        run_at = {row.id: row.run_at for row in self._rows(Job)}
        pending = [
            job
            for job in self.jobs.values()
            if job.status == "pending" and job.queue not in self.paused
        ]
        pending.sort(key=lambda job: (-job.priority, run_at[job.id], job.id))
        if queues is None:
            return pending
        return [job for queue in queues for job in pending if job.queue == queue]

    def _settled(self, worker_id: int, spec: JobSpec, kind: str) -> str | None:
        """The status that a settle must lead to; ``None``: the lease is lost."""
        job = self.jobs.get(spec.id)
        if job is None or not job.is_run_by(worker_id, spec.attempt):
            return None
        self._end(job, kind)
        return job.status

    def _end(self, job: _Job, kind: str) -> None:
        if kind not in _WITHOUT_A_ROW:
            self.ended.append((job.id, job.attempt, kind))
        job.end(kind)

    def _rows(self, model: Any) -> list[Any]:
        return self._tables(model)[0]

    def _tables(self, *models: Any) -> list[list[Any]]:
        with self.store.read() as connection:
            return [list(connection.execute(sa.select(m.__table__))) for m in models]

    def _execute(self, statement: Any) -> None:
        self.store.transaction(lambda connection: connection.execute(statement))


def _empty(connection: sa.Connection) -> None:
    for table in Base.metadata.sorted_tables:
        connection.execute(sa.delete(table))


def _outcome(spec: JobSpec, kind: OutcomeKind) -> Outcome:
    delay = _LONG if kind is OutcomeKind.SNOOZED else None
    return Outcome(
        spec.id, spec.attempt, kind, delay_seconds=delay, wait_seconds=0.01, run_seconds=0.01
    )


def _seen(row: Any) -> tuple[Any, ...]:
    """What is compared of a row."""
    return (
        row.status,
        row.attempt,
        row.retry_count,
        row.crash_count,
        bool(row.suspect),
        row.cancel_requested_at is not None,
        row.unique_hash is not None,
        row.worker_id,
        row.status == "running" and row.started_at is not None,
    )


def _expected(job: _Job) -> tuple[Any, ...]:
    return (
        job.status,
        job.attempt,
        job.retry_count,
        job.crash_count,
        job.suspect,
        job.cancelling,
        job.key is not None and job.status in _ACTIVE,
        job.worker,
        job.status == "running" and job.started,
    )


def test_no_order_of_events_breaks_a_promise(app: Flask, state: AppState) -> None:
    """Whatever two workers, an operator and a clock do, the tables hold what is promised."""
    run_state_machine_as_test(
        lambda: LifeOfJobs(state),
        settings=settings(
            max_examples=_EXAMPLES,
            stateful_step_count=_STEPS,
            deadline=None,
            # A step takes as long as its transactions.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
