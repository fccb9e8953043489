"""The life of a job as a state machine: no order of events breaks a promise.

Hypothesis runs two workers, an operator and a clock on the real store, in random order. A model
says which rows the tables must contain after each step. It implements "The life of a job" in the
documentation independently of the source.

A run that never reaches the critical states proves nothing. So the tests count which states each
run reaches, and check that the run fails on a store without its fence.

``BGJOBS_STATE_EXAMPLES=2000`` runs more examples than the usual 100; on servers, a quarter of that
number.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flask_bgjobs import Limit, run_background_job
from flask_bgjobs.job.records import JobSpec, Key, Outcome
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import Attempt, Base, Job, Queue, Seat, Worker
from flask_bgjobs.state import AppState
from flask_bgjobs.store.transitions import MOVES, Move
from flask_bgjobs.worker.registration import register
from tests.integration.test_limits import admit, compare_seats

pytestmark = pytest.mark.slow

_EXAMPLES = int(os.environ.get("BGJOBS_STATE_EXAMPLES", "100"))
_FEWER_ON_SERVERS = 4
"""Divisor for servers, where a step takes several times as long."""
_STEPS = 50
_CANARY_EXAMPLES = 300
"""The missing fence is usually detected by one of the first examples."""
_LONG = 3600.0
"""Seconds. A job with this delay becomes due only if a test changes its time."""
_MAX_CRASHES = 3
_AT_ONCE = 2
_LIMIT = Limit("two", concurrency=_AT_ONCE)

_REACHED_PER_EXAMPLE = {
    "claims that took jobs": 1.0,
    "outcomes recorded": 0.3,
    "late outcomes refused": 0.5,
    "late outcomes refused while the same worker ran the job again": 0.02,
    "late outcomes in doubt refused": 0.02,
    "late starts refused": 0.02,
    "unstarted suspects rescued": 0.02,
    "started suspects rescued": 0.02,
    "unstarted suspects given back": 0.02,
    "orphans freed": 0.02,
    "claims given back unseen": 0.02,
    "jobs with a key ended": 0.02,
    "waiting jobs freed": 0.02,
    "jobs admitted": 0.3,
    "seats handed over": 0.02,
    "jobs withdrawn": 0.02,
    "jobs parked": 0.02,
    "turns given": 0.3,
    "pauses that held jobs back": 0.02,
    "lost among in a rescue": 0.02,
}
"""How often an example must reach each state on average; usually it is several times as often."""

_ACTIVE = {"scheduled", "waiting", "pending", "running", "retrying"}
_WITH_A_TIME = {"scheduled", "retrying"}
_WAITING = _ACTIVE - {"running"}
_WITHOUT_A_ROW = {"completed", "given back", "unknown", "snoozed", "expired"}
"""Outcomes of attempts that leave no row."""

_QUEUES = ("a", "b")
_names = st.sampled_from(_QUEUES)
_workers = st.integers(0, 1)
_picks = st.integers(0, 1_000)
"""Picks an element of a list; Hypothesis shrinks it to the first."""
_WITHOUT_START = (OutcomeKind.GIVEN_BACK, OutcomeKind.UNKNOWN)
_ends = st.sampled_from(["silent", "silent", "deleted", "deleted", "stopped"])
_kinds = st.sampled_from([*OutcomeKind, *[OutcomeKind.GIVEN_BACK] * 3, OutcomeKind.UNKNOWN])
_new_jobs = st.fixed_dictionaries(
    {
        "queue": _names,
        "priority": st.sampled_from([0, 0, -1, 2]),
        "retries": st.integers(0, 2),
        "unique_key": st.sampled_from([None, "k", "l"]),
        "delay": st.sampled_from([None, None, _LONG]),
        "limits": st.sampled_from([None, None, _LIMIT]),
        "fair": st.sampled_from([None, None, "x", "y"]),
    }
)
_PLAIN_JOB = {
    "queue": "a",
    "priority": 2,
    "retries": 0,
    "unique_key": None,
    "delay": None,
    "limits": None,
    "fair": None,
}
_SCENES = [
    *("none", "none", "unknown code", "no reply", "a pause", "a handover", "two deaths"),
    "two early deaths",
]
"""Courses of events that random steps rarely follow."""
_turns = st.fixed_dictionaries(
    {
        "which": _workers,
        "kinds": st.lists(_kinds, min_size=1, max_size=3),
        "limit": st.integers(1, 4),
        "queues": st.sampled_from([None, None, ("a",), ("b", "a")]),
        "seen": st.sampled_from([True, True, False]),
        "start": st.sampled_from([True, True, False]),
    }
)


@dataclasses.dataclass
class _Job:
    """The model of a job."""

    id: int
    queue: str
    priority: int
    retries: int
    key: str | None
    status: str
    due: bool
    has_limit: bool
    takes_turns: bool
    waits_for: str | None = None
    """What it waits for; unused unless the status is ``waiting``."""
    attempt: int = 0
    retry_count: int = 0
    crash_count: int = 0
    suspect: bool = False
    cancelling: bool = False
    worker: int | None = None
    """The id of the worker that claimed it last."""
    started: bool = False
    """Whether the start of the running attempt was committed."""
    had_turn: bool = False
    """Whether it was ever given a turn."""

    def is_run_by(self, worker_id: int, attempt: int) -> bool:
        return (self.status, self.worker, self.attempt) == ("running", worker_id, attempt)

    @property
    def waits_for_code(self) -> bool:
        return (self.status, self.waits_for) == ("waiting", "code")

    def be_ready(self) -> None:
        """It may run from now on, after its turn if it takes turns."""
        if self.takes_turns:
            self.status, self.due = "scheduled", True
        else:
            self.be_promoted()

    def be_promoted(self) -> None:
        """It may run from now on, if its limit allows."""
        self.status = "waiting" if self.has_limit else "pending"
        self.waits_for = "limit"
        self.had_turn = self.takes_turns

    def end(self, kind: str) -> None:
        """Apply the outcome of an attempt."""
        was_suspect, self.suspect = self.suspect, False
        if kind == "completed":
            self.status = "completed"
        elif self.cancelling or kind in ("cancelled", "expired"):
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
        elif kind in ("given back", "unknown"):
            self.status = "pending" if kind == "given back" else "waiting"
            self.waits_for = "code"
            self.suspect = was_suspect and not self.started
        elif kind in ("lost", "lost among"):
            self.status, self.suspect = "pending", True
        elif kind == "crashed":
            self.crash_count += 1
            quarantined = self.crash_count == _MAX_CRASHES
            self.status, self.suspect = ("failed", False) if quarantined else ("pending", True)


@dataclasses.dataclass
class _Worker:
    """The model of a live worker."""

    id: int
    beats: int = 0
    unseen: set[int] = dataclasses.field(default_factory=set)
    """The jobs that it claimed by a commit without a reply."""


class LifeOfJobs(RuleBasedStateMachine):
    """All operations on jobs, in random order."""

    def __init__(self, state: AppState, reached: collections.Counter[str]) -> None:
        super().__init__()
        self.state, self.store, self.reached = state, state.store, reached
        self.store.transaction(_empty)
        self.jobs: dict[int, _Job] = {}
        self.last_id = 0
        self.paused: set[str] = set()
        self.claims: list[tuple[int, JobSpec]] = []
        """Worker and spec of every claim with a reply, including claims of earlier attempts."""
        self.ended: list[tuple[int, int, str]] = []
        """Job, attempt and outcome of the attempts that have a row."""
        self.rows: dict[int, str] = {}
        """The status of every worker, by id."""
        self.workers = [self._new_worker(), self._new_worker()]

    @initialize(
        jobs=st.lists(_new_jobs, min_size=3, max_size=6),
        before=st.lists(_turns, min_size=2, max_size=3),
        after=st.lists(_turns, min_size=1, max_size=3),
        ends=st.tuples(_ends, _ends),
        pause=st.sampled_from([None, None, "a"]),
        scene=st.sampled_from(_SCENES),
    )
    def begin(
        self,
        jobs: list[dict[str, Any]],
        before: list[dict[str, Any]],
        after: list[dict[str, Any]],
        ends: tuple[str, str],
        pause: str | None,
        scene: str,
    ) -> None:
        """Start with running jobs, dead workers and possibly a paused queue.

        :param scene: one of :data:`_SCENES`.
        """
        for job in jobs:
            self._enqueue(**job)
        for turns, end in zip((before, after), ends, strict=True):
            for turn in turns:
                self._promote()
                self._admit()
                self._turn(**turn)
            self._die(turns[0]["which"], end)
            if pause is not None:
                self._pause_or_resume(pause, pause not in self.paused)
        self._play(scene)

    def _play(self, scene: str) -> None:
        if scene == "none":
            return
        for name in sorted(self.paused):
            self._pause_or_resume(name, pause=False)
        limits = _LIMIT if scene in ("a pause", "a handover") else None
        for _ in range(_AT_ONCE + 1 if scene == "a handover" else 2):
            self._enqueue(**{**_PLAIN_JOB, "limits": limits})
        self._admit()
        if scene == "unknown code":
            for _ in range(2):
                self._take([OutcomeKind.UNKNOWN] * 4)
            self._free(4)
        elif scene == "no reply":
            self._take([OutcomeKind.COMPLETED], seen=False)
            self._release_unseen()
        elif scene == "a handover":
            for _ in range(2):
                self._take([OutcomeKind.COMPLETED] * 4)
        elif scene == "a pause":
            self._pause_or_resume(_PLAIN_JOB["queue"], pause=True)
            self._admit()
        else:
            for _ in range(2):
                self._take([OutcomeKind.COMPLETED], start=scene == "two deaths")
                self._die(0, "silent")
            for _ in range(2):
                self._take([OutcomeKind.GIVEN_BACK] * 4, start=False)

    def _take(self, kinds: list[OutcomeKind], *, seen: bool = True, start: bool = True) -> None:
        self._turn(which=0, kinds=kinds, limit=4, queues=None, seen=seen, start=start)

    # Enqueue

    @rule(job=_new_jobs)
    def enqueue(self, job: dict[str, Any]) -> None:
        self._enqueue(**job)

    # Work

    @rule(turn=_turns)
    def turn(self, turn: dict[str, Any]) -> None:
        self._turn(**turn)

    @precondition(lambda self: self.claims)
    @rule(pick=_picks)
    def mark_started(self, pick: int) -> None:
        """Mark any claimed job as started, also one of an earlier attempt."""
        worker_id, spec = self.claims[-1 - pick % len(self.claims)]
        self._mark_started(worker_id, [spec])

    @precondition(lambda self: self._late())
    @rule(pick=_picks, kind=_kinds, in_doubt=st.booleans())
    def settle_late(self, pick: int, kind: OutcomeKind, in_doubt: bool) -> None:
        """Settle an earlier attempt, preferably of a job that runs again, where recording it would
        do harm."""
        late = self._late()
        candidates = [each for each in late if self._runs_again(*each)] or late
        self._settle_late(*candidates[pick % len(candidates)], kind, in_doubt)

    @precondition(lambda self: any(worker.unseen for worker in self.workers))
    @rule()
    def release_unseen(self) -> None:
        """Claims without a reply are found and released, and no other job is."""
        self._release_unseen()

    def _release_unseen(self) -> None:
        for worker in self.workers:
            known = {spec.key for owner, spec in self.claims if owner == worker.id}
            unseen = [s for s in self.store.held_by(worker.id) if s.key not in known]
            assert {spec.id for spec in unseen} == worker.unseen
            outcomes = [(spec, _outcome(spec, OutcomeKind.GIVEN_BACK)) for spec in unseen]
            expected = [self._expected_status(worker.id, spec, "given back") for spec in unseen]
            settled = self.store.settle(worker.id, "one", outcomes)
            assert [each.status for each in settled] == expected
            worker.unseen.clear()
            self.claims += [(worker.id, spec) for spec in unseen]
            self._reach("claims given back unseen", bool(unseen))

    # Live and die

    @rule(which=_workers)
    def live(self, which: int) -> None:
        """A worker renews its lease and observes its own jobs; a rescue based on an older heartbeat
        fails."""
        worker = self.workers[which]
        assert self.store.beat(worker.id)
        worker.beats += 1
        assert self.store.rescue(worker.id, worker.beats - 1) is None
        running = {job.id: job for job in self._held(worker.id)}
        view = self.store.observe(worker.id, {})
        assert view.attempts == {job_id: job.attempt for job_id, job in running.items()}
        assert view.cancelling == {job_id for job_id, job in running.items() if job.cancelling}
        assert [spec.id for spec in self.store.held_by(worker.id)] == sorted(running)

    @rule(which=_workers, end=_ends)
    def die(self, which: int, end: str) -> None:
        self._die(which, end)

    @precondition(lambda self: len(self.rows) > len(self.workers))
    @rule(pick=_picks)
    def come_back(self, pick: int) -> None:
        """A dead or stopped worker can neither renew its lease nor claim, and is not rescued
        again."""
        gone = [worker_id for worker_id, status in self.rows.items() if status != "alive"]
        worker_id = gone[pick % len(gone)]
        (beats,) = (row.beats for row in self._rows(Worker) if row.id == worker_id)
        assert not self.store.beat(worker_id)
        assert self.store.claim(worker_id, 10) == []
        assert self.store.rescue(worker_id, beats) is None

    # Operate

    @precondition(lambda self: self.jobs)
    @rule(pick=_picks, act=st.sampled_from(["pause", "resume", "cancel", "retry", "delete"]))
    def operate(self, pick: int, act: str) -> None:
        job = list(self.jobs.values())[pick % len(self.jobs)]
        acts = {"cancel": self._cancel, "retry": self._retry, "delete": self._delete}
        if act in acts:
            acts[act](job)
        else:
            self._pause_or_resume(job.queue, act == "pause")

    # The clock

    @precondition(lambda self: self._any(*_WITH_A_TIME))
    @rule(pick=_picks, promote=st.sampled_from([True, True, False]))
    def time_passes(self, pick: int, promote: bool) -> None:
        """A waiting job becomes due."""
        waiting = [job for job in self.jobs.values() if job.status in _WITH_A_TIME]
        job = waiting[pick % len(waiting)]
        due = self.store.after(sa.literal(-1.0))
        self._execute(sa.update(Job).where(Job.id == job.id).values(run_at=due))
        job.due = True
        if promote:
            self._promote()

    @precondition(lambda self: any(job.waits_for_code for job in self.jobs.values()))
    @rule(limit=st.integers(1, 3))
    def free(self, limit: int) -> None:
        """A worker that has the code of waiting jobs frees some of them."""
        self._free(limit)

    def _free(self, limit: int) -> None:
        for wait in self.store.code_waits():
            waiting = [
                job for job in self.jobs.values() if job.waits_for_code and job.queue == wait.queue
            ]
            before = {row.id: row.waits_for for row in self._rows(Job)}
            assert self.store.free(wait, limit) == min(limit, len(waiting))
            for row in self._rows(Job):
                if row.waits_for != before[row.id]:
                    self.jobs[row.id].be_ready()
                    self._reach("waiting jobs freed")

    @precondition(lambda self: any(job.has_limit for job in self.jobs.values()))
    @rule()
    def admit(self) -> None:
        """A worker lets jobs run where the limit has room."""
        self._admit()

    # Invariants

    @invariant()
    def tables_match_the_model(self) -> None:
        jobs, attempts, workers, seats = self._tables(Job, Attempt, Worker, Seat)
        assert {row.id: _actual(row) for row in jobs} == {
            job.id: _expected(job) for job in self.jobs.values()
        }
        assert sorted((row.job_id, row.attempt, row.outcome) for row in attempts) == sorted(
            self.ended
        ), "each attempt has one outcome"
        assert {row.id: row.status for row in workers} == self.rows
        live = {worker.id for worker in self.workers}
        assert {row.worker_id for row in jobs if row.status == "running"} <= live
        compare_seats(jobs, seats)
        for row in jobs:
            job = self.jobs[row.id]
            assert row.claim_rank >> 32 == -job.priority
            assert job.had_turn or not row.claim_rank % 2**32

    def teardown(self) -> None:
        """With a worker and enough time, every job finishes, whatever happened before."""
        for name in self.paused:
            self.store.resume(name)
        for worker in self.workers:
            self.store.rescue(worker.id, worker.beats)
        self._execute(sa.update(Job).values(run_at=self.store.after(sa.literal(-1.0))))
        for wait in self.store.code_waits():
            self.store.free(wait, len(self.jobs))
        worker = self._new_worker()
        while specs := self._claim_after_promotion(worker):
            done = [(spec, _outcome(spec, OutcomeKind.COMPLETED)) for spec in specs]
            self._record(worker.id, done)
        assert not {row.status for row in self._rows(Job)} & _ACTIVE
        assert self._rows(Seat) == []

    # Steps

    def _enqueue(self, **options: Any) -> None:
        job = run_background_job("tests.jobs.echo", retry_delay=_LONG, **options)
        key, delay = options["unique_key"], options["delay"]
        holder = next((j for j in self.jobs.values() if j.key == key and j.status in _ACTIVE), None)
        if key is not None and holder is not None:
            assert (job.id, job.deduplicated) == (holder.id, True)
            return
        assert job.id > self.last_id, "an id was reused"
        self.last_id = job.id
        self.jobs[job.id] = _Job(
            job.id,
            options["queue"],
            options["priority"],
            options["retries"],
            key,
            status="scheduled",
            due=delay is None,
            has_limit=options["limits"] is not None,
            takes_turns=options["fair"] is not None,
        )
        if delay is None:
            self.jobs[job.id].be_ready()

    def _turn(
        self,
        which: int,
        kinds: list[OutcomeKind],
        limit: int,
        queues: Sequence[str] | None,
        seen: bool,
        start: bool,
    ) -> None:
        """One turn of a worker: settle some running jobs, claim, and start the claimed jobs.

        Code that could not be stopped may still end while the same worker runs its job again.
        """
        worker = self.workers[which]
        running = [
            spec
            for owner, spec in self.claims
            if self._is_current(worker.id, spec) and owner == worker.id
        ]
        ending = running[: len(kinds)]
        all_completed = set(kinds[: len(ending)]) == {OutcomeKind.COMPLETED}
        if all_completed and any(spec.limits_json for spec in ending):
            specs = self._hand_over(worker, ending, limit, queues)
        else:
            self._settle(worker, ending, kinds)
            specs = self._claim(worker, limit, queues)
        if not seen:
            # The commit got no reply.
            worker.unseen |= {spec.id for spec in specs}
            return
        self.claims += [(worker.id, spec) for spec in specs]
        if start and specs:
            self._mark_started(worker.id, specs)
        for spec in [s for s in running if self._runs_again(worker.id, s, worker.id)]:
            self._mark_started(worker.id, [spec])
            self._settle_late(worker.id, spec, kinds[0])

    def _settle(
        self, worker: _Worker, specs: Sequence[JobSpec], kinds: Sequence[OutcomeKind]
    ) -> None:
        """Settle twice, as after a commit without a reply: both calls return the same outcomes."""
        batch = [
            (spec, self._possible(spec, kind)) for spec, kind in zip(specs, kinds, strict=False)
        ]
        outcomes = [(spec, _outcome(spec, kind)) for spec, kind in batch]
        expected = [self._expected_status(worker.id, spec, kind.value) for spec, kind in batch]
        for in_doubt in (set(), {spec.key for spec in specs}):
            assert self._record(worker.id, outcomes, in_doubt) == expected
        self.reached["outcomes recorded"] += len(batch)

    def _hand_over(
        self, worker: _Worker, ending: Sequence[JobSpec], limit: int, queues: Sequence[str] | None
    ) -> list[JobSpec]:
        """Settle, admit and claim in one transaction."""
        kind = OutcomeKind.COMPLETED
        done = [(spec, _outcome(spec, kind)) for spec in ending]
        expected = [self._expected_status(worker.id, spec, kind.value) for spec in ending]
        handed = self.store.hand_over(worker.id, done, limit, queues)
        statuses = {each.spec.key: each.status for each in handed.settled}
        assert [statuses[spec.key] for spec in ending] == expected
        assert self._record(worker.id, done, {spec.key for spec in ending}) == expected
        assert handed.specs is not None
        for spec in handed.specs:
            job = self.jobs[spec.id]
            assert (job.status, job.waits_for) == ("waiting", "limit") or job.status == "pending"
            self._reach("seats handed over", job.status == "waiting")
            self._assign(job, worker)
        self._note_admissions()
        self._check_order(handed.specs, limit, queues)
        return handed.specs

    def _check_order(
        self, specs: Sequence[JobSpec], limit: int, queues: Sequence[str] | None
    ) -> None:
        """No pending job is better than those that were claimed."""
        ranks = {row.id: (row.claim_rank, row.run_at, row.id) for row in self._rows(Job)}

        def order(job_id: int) -> tuple[Any, ...]:
            queue = self.jobs[job_id].queue
            return (0 if queues is None else queues.index(queue), ranks[job_id])

        claimed = [order(spec.id) for spec in specs]
        left = [order(job.id) for job in self._claimable(queues, self.paused)]
        assert claimed == sorted(claimed)
        assert len(specs) == limit or not left
        assert not claimed or not left or max(claimed) < min(left)

    def _record(
        self,
        worker_id: int,
        outcomes: Sequence[tuple[JobSpec, Outcome]],
        in_doubt: Collection[Key] = (),
    ) -> list[JobStatus | None]:
        """The new statuses, recorded as a worker does it: in bulk if all jobs completed."""
        if in_doubt or any(outcome.kind is not OutcomeKind.COMPLETED for _, outcome in outcomes):
            settled = self.store.settle(worker_id, "one", outcomes, in_doubt)
        else:
            settled = self.store.complete(worker_id, outcomes)
        statuses = {each.spec.key: each.status for each in settled}
        return [statuses[spec.key] for spec, _ in outcomes]

    def _settle_late(
        self, worker_id: int, spec: JobSpec, kind: OutcomeKind, in_doubt: bool = False
    ) -> None:
        # An outcome in doubt of a live worker would be one that it has recorded itself.
        doubts = {spec.key} if in_doubt and self.rows.get(worker_id) != "alive" else set()
        (status,) = self._record(worker_id, [(spec, _outcome(spec, kind))], doubts)
        assert status is None, "a late outcome was recorded"
        self._reach("late outcomes refused")
        self._reach("late outcomes in doubt refused", bool(doubts))
        self._reach(
            "late outcomes refused while the same worker ran the job again",
            self._runs_again(worker_id, spec, worker_id),
        )

    def _claim(self, worker: _Worker, limit: int, queues: Sequence[str] | None) -> list[JobSpec]:
        expected = self._claimable(queues, self.paused)[:limit]
        without_pauses = self._claimable(queues, paused=())[:limit]
        specs = self.store.claim(worker.id, limit, queues)
        assert [spec.id for spec in specs] == [job.id for job in expected]
        for spec, job in zip(specs, expected, strict=True):
            self._assign(job, worker)
            assert (spec.attempt, spec.suspect) == (job.attempt, job.suspect)
        self._reach("pauses that held jobs back", without_pauses != expected)
        self._reach("claims that took jobs", bool(specs))
        return specs

    def _assign(self, job: _Job, worker: _Worker) -> None:
        job.status, job.worker, job.started = "running", worker.id, False
        job.attempt += 1

    def _mark_started(self, worker_id: int, specs: Sequence[JobSpec]) -> None:
        ours = {spec.id for spec in specs if self._is_current(worker_id, spec)}
        assert self.store.mark_started(worker_id, specs).ours == ours
        for job_id in ours:
            self.jobs[job_id].started = True
        late = [spec for spec in specs if spec.id not in ours]
        self._reach("late starts refused", any(self._runs_again(worker_id, s) for s in late))

    def _die(self, which: int, end: str) -> None:
        """A worker dies, and a new one replaces it."""
        worker = self.workers[which]
        ends = {"silent": self._rescue, "deleted": self._lose_row, "stopped": self._stop}
        if ends[end](worker):
            self.workers[which] = self._new_worker()

    def _rescue(self, worker: _Worker) -> bool:
        self._check_rescued(self._held(worker.id), self.store.rescue(worker.id, worker.beats) or [])
        self.rows[worker.id] = "dead"
        return True

    def _lose_row(self, worker: _Worker) -> bool:
        """A worker's row is deleted, and its jobs are rescued as orphans."""
        held = self._held(worker.id)
        self._execute(sa.delete(Worker).where(Worker.id == worker.id))
        self._check_rescued(held, self.store.rescue_orphans())
        self._reach("orphans freed", bool(held))
        del self.rows[worker.id]
        return True

    def _stop(self, worker: _Worker) -> bool:
        """A worker without jobs stops; a worker with jobs keeps its row, to be rescued later."""
        self.store.stop_worker(worker.id)
        if self._held(worker.id):
            return False
        self.rows[worker.id] = "stopped"
        return True

    def _check_rescued(self, held: Iterable[_Job], settled: Iterable[Any]) -> None:
        assert {each.job_id for each in settled} == {job.id for job in held}
        held = list(held)
        started = [job for job in held if job.suspect and job.started]
        for job in held:
            self._reach("started suspects rescued", job.suspect and job.started)
            self._reach("unstarted suspects rescued", job.suspect and not job.started)
            kind = "lost"
            if job in started:
                kind = "crashed" if len(started) == 1 else "lost among"
            self._reach(f"{kind} in a rescue")
            self._end(job, kind)

    def _cancel(self, job: _Job) -> None:
        result = self.store.cancel([job.id])
        assert (result.done == [job.id]) == (job.status in _WAITING)
        assert (result.requested == [job.id]) == (job.status == "running")
        if job.status in _WAITING:
            job.status = "cancelled"
        elif job.status == "running":
            job.cancelling = True

    def _retry(self, job: _Job) -> None:
        others = [j for j in self.jobs.values() if j is not job and j.status in _ACTIVE]
        key_is_taken = job.key is not None and job.key in [other.key for other in others]
        may = job.status in ("failed", "cancelled", "retrying") and not key_is_taken
        assert (self.store.retry([job.id]).done == [job.id]) == may
        if may:
            job.be_ready()
            job.retry_count = job.crash_count = 0
            job.suspect = job.cancelling = False

    def _delete(self, job: _Job) -> None:
        assert (self.store.delete([job.id]).done == [job.id]) == (job.status != "running")
        if job.status != "running":
            del self.jobs[job.id]
            self.ended = [each for each in self.ended if each[0] != job.id]

    def _pause_or_resume(self, queue: str, pause: bool) -> None:
        changes = pause != (queue in self.paused)
        assert (self.store.pause if pause else self.store.resume)(queue) == changes
        (self.paused.add if pause else self.paused.discard)(queue)

    def _promote(self) -> None:
        due = [j for j in self.jobs.values() if j.due and j.status in _WITH_A_TIME]
        assert self.store.promote() == len(due)
        for job in due:
            job.be_promoted()
            self._reach("turns given", job.takes_turns)

    def _admit(self) -> None:
        admit(self.state)
        # A sweep takes seats from jobs that were given back to a paused queue.
        self.store.balance_queues()
        admit(self.state)
        self._note_admissions()
        rank = {row.id: row.claim_rank for row in self._rows(Job)}
        limited = [job for job in self.jobs.values() if job.has_limit]
        waiting = [j for j in limited if (j.status, j.waits_for) == ("waiting", "limit")]
        pending = [j for j in limited if j.status == "pending"]
        assert all(job.queue not in self.paused for job in pending)
        if waiting:
            running = sum(job.status == "running" for job in limited)
            assert len(pending) + running >= _AT_ONCE, "jobs wait although the limit has room"
            best = min(rank[job.id] for job in waiting)
            new = [job for job in pending if job.attempt == 0]
            assert all(rank[job.id] <= best for job in new), "a worse job has the seat"

    def _note_admissions(self) -> None:
        for row in self._rows(Job):
            job = self.jobs[row.id]
            before = job.waits_for if job.status == "waiting" else job.status
            after = row.waits_for or row.status
            if before != after:
                assert job.has_limit
                assert {before, after} <= {"limit", "queue", "pending"}
                job.status, job.waits_for = row.status, row.waits_for
                self._reach("jobs admitted", after == "pending")
                self._reach("jobs parked", after == "queue")
                self._reach("jobs withdrawn", before == "pending")

    def _claim_after_promotion(self, worker: _Worker) -> list[JobSpec]:
        self.store.promote()
        admit(self.state)
        return self.store.claim(worker.id, 10)

    # Helpers

    def _new_worker(self) -> _Worker:
        worker = _Worker(register(self.state, "one"))
        self.rows[worker.id] = "alive"
        return worker

    def _any(self, *statuses: str) -> bool:
        return any(job.status in statuses for job in self.jobs.values())

    def _held(self, worker_id: int) -> list[_Job]:
        return [job for job in self.jobs.values() if job.is_run_by(worker_id, job.attempt)]

    def _is_current(self, worker_id: int, spec: JobSpec) -> bool:
        job = self.jobs.get(spec.id)
        return job is not None and job.is_run_by(worker_id, spec.attempt)

    def _runs_again(self, worker_id: int, spec: JobSpec, by: int | None = None) -> bool:
        job = self.jobs.get(spec.id)
        if job is None or job.status != "running" or by not in (None, job.worker):
            return False
        return not self._is_current(worker_id, spec)

    def _late(self) -> list[tuple[int, JobSpec]]:
        return [each for each in self.claims if not self._is_current(*each)]

    def _possible(self, spec: JobSpec, kind: OutcomeKind) -> OutcomeKind:
        """``kind``, but ``COMPLETED`` for the release of a started suspect: whether such a suspect
        can be blamed later is not specified."""
        job = self.jobs[spec.id]
        is_open = job.suspect and job.started and kind in _WITHOUT_START
        return OutcomeKind.COMPLETED if is_open else kind

    def _claimable(self, queues: Sequence[str] | None, paused: Collection[str]) -> list[_Job]:
        order = {row.id: (row.claim_rank, row.run_at, row.id) for row in self._rows(Job)}
        pending = [
            job for job in self.jobs.values() if job.status == "pending" and job.queue not in paused
        ]
        pending.sort(key=lambda job: order[job.id])
        if queues is None:
            return pending
        return [job for queue in queues for job in pending if job.queue == queue]

    def _expected_status(self, worker_id: int, spec: JobSpec, kind: str) -> str:
        """The status to which a settle of this attempt must lead."""
        job = self.jobs[spec.id]
        assert self._is_current(worker_id, spec)
        is_given_back = kind == "given back" and job.suspect and not job.cancelling
        self._reach("unstarted suspects given back", is_given_back)
        self._end(job, kind)
        return job.status

    def _end(self, job: _Job, kind: str) -> None:
        if kind not in _WITHOUT_A_ROW:
            self.ended.append((job.id, job.attempt, kind))
        job.end(kind)
        self._reach("jobs with a key ended", job.key is not None and job.status not in _ACTIVE)

    def _reach(self, what: str, reached: bool = True) -> None:
        self.reached[what] += reached

    def _rows(self, model: Any) -> list[Any]:
        return self._tables(model)[0]

    def _tables(self, *models: Any) -> list[list[Any]]:
        with self.store.read() as connection:
            return [list(connection.execute(sa.select(m.__table__))) for m in models]

    def _execute(self, statement: Any) -> None:
        self.store.transaction(lambda connection: connection.execute(statement))


def _empty(connection: sa.Connection) -> None:
    for table in Base.metadata.sorted_tables:
        # The store remembers which queues are registered.
        if table is not Queue.__table__:
            connection.execute(sa.delete(table))
    connection.execute(sa.update(Queue).values(paused_at=None))


def _outcome(spec: JobSpec, kind: OutcomeKind) -> Outcome:
    if kind in _WITHOUT_START:
        return Outcome(spec.id, spec.attempt, kind)
    delay = _LONG if kind is OutcomeKind.SNOOZED else None
    return Outcome(
        spec.id, spec.attempt, kind, delay_seconds=delay, wait_seconds=0.01, run_seconds=0.01
    )


def _actual(row: Any) -> tuple[Any, ...]:
    """The values of a row to compare."""
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
        (row.waits_for, row.waiting_on),
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
        _expected_wait(job),
    )


def _expected_wait(job: _Job) -> tuple[str | None, str | None]:
    if job.status != "waiting":
        return None, None
    return job.waits_for, "tests.jobs.echo" if job.waits_for == "code" else None


class MoveRecorder:
    """Records the status changes of jobs by each statement that writes."""

    def __init__(self) -> None:
        self.seen: set[tuple[str | None, str | None]] = set()
        self._before: dict[int, str] = {}
        self._is_reading = False

    def note_before(self, connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if not self._is_reading and _writes_jobs(statement):
            self._before = self._statuses(connection)

    def note_after(self, connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if self._is_reading or not _writes_jobs(statement):
            return
        after = self._statuses(connection)
        for job_id in self._before.keys() | after.keys():
            move = self._before.get(job_id), after.get(job_id)
            if move[0] != move[1]:
                assert move in _MOVES, f"job {job_id} went from {move[0]} to {move[1]}"
                self.seen.add(move)

    def _statuses(self, connection: sa.Connection) -> dict[int, str]:
        self._is_reading = True
        try:
            rows = connection.execute(sa.select(Job.id, Job.status))
            return {row.id: row.status for row in rows}
        finally:
            self._is_reading = False


def _writes_jobs(statement: str) -> bool:
    # The statement that empties the table between two examples has no condition.
    is_empty = "DELETE" in statement and "WHERE" not in statement
    return "bgjobs_job" in statement and not statement.startswith("SELECT") and not is_empty


def _status_pairs(move: Move) -> set[tuple[str | None, str | None]]:
    return set(itertools.product(move.sources or [None], move.targets or [None]))


_MOVES = set().union(*map(_status_pairs, MOVES.values()))


@pytest.fixture
def moves(state: AppState) -> Iterator[MoveRecorder]:
    """Records the status changes of jobs during the test."""
    recorder, engine = MoveRecorder(), state.store.engine
    listeners = {
        "before_cursor_execute": recorder.note_before,
        "after_cursor_execute": recorder.note_after,
    }
    for name, listener in listeners.items():
        sa.event.listen(engine, name, listener)
    yield recorder
    for name, listener in listeners.items():
        sa.event.remove(engine, name, listener)


@pytest.fixture
def run_machine(state: AppState) -> Callable[..., collections.Counter[str]]:
    """Runs the state machine, and returns how often it reached each state."""

    def run_machine(examples: int, **more: Any) -> collections.Counter[str]:
        reached: collections.Counter[str] = collections.Counter()
        # As a worker does. It is also faster.
        state.store.prepare(wal=True)
        run_state_machine_as_test(
            lambda: LifeOfJobs(state, reached),
            settings=settings(
                max_examples=examples,
                stateful_step_count=_STEPS,
                deadline=None,
                # A step takes as long as its transactions.
                suppress_health_check=[HealthCheck.too_slow],
                **more,
            ),
        )
        return reached

    return run_machine


def test_no_order_of_events_breaks_a_promise(
    app: Flask,
    database_kind: str,
    run_machine: Callable[..., collections.Counter[str]],
    moves: MoveRecorder,
) -> None:
    """Whatever two workers, an operator and a clock do, the tables match the model, each critical
    state is reached, and each status change is listed in :mod:`flask_bgjobs.store.transitions`."""
    examples = _EXAMPLES if database_kind == "sqlite" else _EXAMPLES // _FEWER_ON_SERVERS
    reached = run_machine(examples)
    rarely_reached = {
        what: (reached[what], minimum * examples)
        for what, minimum in _REACHED_PER_EXAMPLE.items()
        if reached[what] < math.floor(minimum * examples)
    }
    assert rarely_reached == {}
    unseen = {name for name, move in MOVES.items() if not moves.seen & _status_pairs(move)}
    assert unseen == set()


def test_unlisted_move_is_detected(app: Flask, state: AppState, moves: MoveRecorder) -> None:
    """The recorder detects a status change that is not listed, such as from completed to
    running."""
    job = run_background_job("tests.jobs.echo")
    change = sa.update(Job).where(Job.id == job.id)
    state.store.transaction(lambda c: c.execute(change.values(status="running")))
    state.store.transaction(lambda c: c.execute(change.values(status="completed")))
    with pytest.raises(AssertionError, match="went from completed to running"):
        state.store.transaction(lambda c: c.execute(change.values(status="running")))


def test_store_without_fence_is_detected(
    app: Flask,
    state: AppState,
    run_machine: Callable[..., collections.Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a settle of an earlier attempt is taken for the newest one, the run fails: it can detect a
    missing fence."""
    settle, complete = type(state.store).settle, type(state.store).complete

    def with_newest_attempt(store: Any, worker_id: int, finished: Any) -> Any:
        newest = {spec.id: spec.attempt for spec in store.held_by(worker_id)}
        for spec, outcome in finished:
            attempt = newest.get(spec.id, spec.attempt)
            yield spec._replace(attempt=attempt), outcome._replace(attempt=attempt)

    def unfenced_settle(
        store: Any, worker_id: int, name: str, finished: Any, in_doubt: Any = ()
    ) -> Any:
        settled = settle(
            store, worker_id, name, list(with_newest_attempt(store, worker_id, finished)), in_doubt
        )
        return [each._replace(spec=spec) for each, (spec, _) in zip(settled, finished, strict=True)]

    def unfenced_complete(store: Any, worker_id: int, finished: Any) -> Any:
        finished = sorted(finished, key=lambda each: each[0].id)
        settled = complete(store, worker_id, list(with_newest_attempt(store, worker_id, finished)))
        return [each._replace(spec=spec) for each, (spec, _) in zip(settled, finished, strict=True)]

    monkeypatch.setattr(type(state.store), "settle", unfenced_settle)
    monkeypatch.setattr(type(state.store), "complete", unfenced_complete)
    with pytest.raises(AssertionError, match="a late outcome was recorded"):
        run_machine(_CANARY_EXAMPLES, phases=[Phase.generate], database=None)
