"""Handovers: outcomes, admissions and claims of jobs with limits in one transaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import OperationalError

from flask_bgjobs import Job, Limit
from flask_bgjobs.flow.limits.manage import Limits
from flask_bgjobs.job.limits import key_id
from flask_bgjobs.job.records import JobSpec, Outcome
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import LimitKey, LimitRow, Notice, Seat, Worker
from flask_bgjobs.state import AppState
from flask_bgjobs.store import CommitInDoubt, HandedOver, Store
from flask_bgjobs.worker.registration import register
from tests.conftest import stored, wait_until
from tests.integration.test_limits import (
    ONE,
    PER_VALUE,
    admit,
    check_seats,
    enqueue,
    execute,
    rows,
    statuses,
)
from tests.integration.test_worker import running_worker

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


def claim(state: AppState, worker: int, jobs: int = 1) -> list[JobSpec]:
    admit(state)
    return state.store.claim(worker, jobs)


def hand_over(
    state: AppState, worker: int, specs: Sequence[JobSpec], jobs: int = 10, **options: Any
) -> HandedOver:
    done = [
        (spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0))
        for spec in specs
    ]
    return state.store.hand_over(worker, done, jobs, **options)


def ids(handed: HandedOver) -> list[int]:
    assert handed.specs is not None
    return [spec.id for spec in handed.specs]


class TestHandOver:
    def test_next_jobs_take_the_seats(self, state: AppState, worker: int) -> None:
        """The jobs that follow at the limits of the finished ones are admitted and claimed."""
        jobs = [enqueue(value, PER_VALUE) for value in (1, 2, 1, 2, 1)]
        specs = claim(state, worker, 10)
        handed = hand_over(state, worker, specs)
        assert [each.status for each in handed.settled] == [JobStatus.COMPLETED] * 2
        assert ids(handed) == [jobs[2].id, jobs[3].id]
        assert not handed.more
        assert rows(state, Notice) == []
        check_seats(state)

    def test_best_pending_jobs_are_claimed(self, state: AppState, worker: int) -> None:
        """The claim takes the best pending jobs, whether they have limits or not."""
        enqueue()
        specs = claim(state, worker)
        follower = enqueue()
        better = enqueue(limits=None, priority=5)
        assert ids(hand_over(state, worker, specs, 1)) == [better.id]
        assert stored(state.app, follower).status == "pending"
        check_seats(state)

    def test_next_limit(self, state: AppState, worker: int) -> None:
        """A job that follows at one limit and has another one waits there."""
        both = [Limit("a", concurrency=1), Limit("b", concurrency=1)]
        enqueue(limits=both[:1])
        specs = claim(state, worker)
        follower = enqueue(limits=both)
        handed = hand_over(state, worker, specs)
        assert (ids(handed), handed.more) == ([], True)
        check_seats(state)
        assert claim(state, worker)[0].id == follower.id

    def test_rate(self, state: AppState, worker: int) -> None:
        """Starts of jobs with a rate are noticed, and counted by the next admission."""
        rate = Limit("rate", rate=2, per=3_600, burst=2)
        for _ in range(3):
            enqueue(limits=rate)
        handed = hand_over(state, worker, claim(state, worker, 10))
        assert (ids(handed), handed.more) == ([], True)
        assert admit(state) == 0
        check_seats(state)

    def test_rate_without_its_limit(self, state: AppState, worker: int) -> None:
        """If the row of the limit of a rate is gone, its starts count nevertheless."""
        rate = Limit("rate", rate=1, per=3_600)
        for _ in range(2):
            enqueue(limits=rate)
        specs = claim(state, worker, 10)
        execute(state, sa.delete(LimitRow))
        handed = hand_over(state, worker, specs)
        assert (ids(handed), handed.more) == ([], True)
        assert admit(state) == 0

    def test_swap(self, state: AppState, worker: int) -> None:
        """A better job that waits gets the seat of one that is pending."""
        two = Limit("two", concurrency=2)
        enqueue(limits=two)
        specs = claim(state, worker)
        pending = enqueue(limits=two)
        admit(state)
        best = [enqueue(limits=two, priority=5) for _ in range(2)]
        assert ids(hand_over(state, worker, specs)) == [job.id for job in best]
        assert stored(state.app, pending).status == "waiting"
        check_seats(state)

    def test_lower_override(self, state: AppState, worker: int) -> None:
        """After an override with a lower number, no job follows until enough have ended."""
        three = Limit("three", concurrency=3)
        for _ in range(5):
            enqueue(limits=three)
        first, *others = claim(state, worker, 10)
        Limits(state)["three"].override(concurrency=1)
        assert ids(hand_over(state, worker, [first])) == []
        assert len(ids(hand_over(state, worker, others))) == 1
        check_seats(state)

    def test_paused_queue(self, state: AppState, worker: int) -> None:
        """Jobs of a paused queue do not follow."""
        enqueue()
        specs = claim(state, worker)
        enqueue(queue="slow")
        state.store.pause("slow")
        assert ids(hand_over(state, worker, specs)) == []
        check_seats(state)

    @pytest.mark.on("postgresql", "mysql")
    def test_locked_key(self, state: AppState, worker: int) -> None:
        """Jobs follow although another worker has locked their key. Only seats that nobody takes
        are left to a later admission."""
        two = Limit("two", concurrency=2)
        for _ in range(2):
            enqueue(limits=two)
        specs = claim(state, worker, 2)
        follower = enqueue(limits=two)
        admit(state)
        store = state.store.with_deadline(10)
        row = sa.select(LimitKey.id).where(LimitKey.id == key_id("two", "")).with_for_update()
        with store.engine.begin() as connection:
            assert connection.execute(row).all()
            handed = hand_over(state, worker, specs)
        store.dispose()
        assert [each.status for each in handed.settled] == [JobStatus.COMPLETED] * 2
        assert (ids(handed), handed.more) == ([follower.id], True)
        assert len(rows(state, Notice)) == 1
        check_seats(state)

    # MariaDB reads, and so locks, all rows of a table with so few.
    @pytest.mark.on("postgresql")
    def test_handovers_at_the_same_time(
        self, state: AppState, worker: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers that hand over seats of one key do not wait for each other."""
        two = Limit("two", concurrency=2)
        jobs = [enqueue(limits=two) for _ in range(5)]
        first, second = claim(state, worker, 2)
        slow = state.store.with_deadline(10)
        has_passed, may_go_on = threading.Event(), threading.Event()
        claim_for = Store.claim_for

        def wait(store: Store, *args: Any) -> list[JobSpec]:
            if store is slow:
                has_passed.set()
                assert may_go_on.wait(10)
            return claim_for(store, *args)

        monkeypatch.setattr(Store, "claim_for", wait)
        done = [(first, Outcome(first.id, first.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0))]
        with ThreadPoolExecutor() as threads:
            handed = threads.submit(slow.hand_over, worker, done, 1)
            assert has_passed.wait(10)
            try:
                assert ids(hand_over(state, worker, [second])) == [jobs[3].id]
            finally:
                may_go_on.set()
            assert ids(handed.result()) == [jobs[2].id]
        slow.dispose()
        assert statuses(state) == {"completed": 2, "running": 2, "waiting": 1}
        check_seats(state)

    @pytest.mark.on("postgresql", "mysql")
    def test_job_that_has_moved_on(self, state: AppState, worker: int) -> None:
        """A job that another worker has meanwhile let wait at its next limit is left alone."""
        first, second = Limit("a", concurrency=2), Limit("b", concurrency=1)
        enqueue(limits=second)
        (holder,) = claim(state, worker)
        enqueue(limits=[first, second])
        store = state.store
        keys = store.transaction(lambda c: store.unlocked_keys(c, [key_id("a", "")]))
        assert keys == {}  # no worker has looked at it yet
        store.transaction(lambda c: store.lock_keys(c, [key_id("a", "")]))

        def read(connection: sa.Connection) -> list[Any]:
            keys = store.unlocked_keys(connection, [key_id("a", "")])
            keys[key_id("a", "")].room = 1
            return store.first_waiting(connection, list(keys.values()))

        stale = store.transaction(read)
        assert len(stale) == 1
        admit(state)  # It gets its seat at a, and waits at b.

        def give(connection: sa.Connection) -> Any:
            return store.give(connection, store.still_waiting(connection, stale), {stale[0].id})

        assert store.transaction(give) == set()
        check_seats(state)
        assert len(ids(hand_over(state, worker, [holder]))) == 1

    def test_pause_during_a_handover(
        self, state: AppState, worker: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A job that got a seat and was not claimed gives it back if its limit was paused
        meanwhile."""
        enqueue()
        specs = claim(state, worker)
        follower = enqueue()
        admit(state)
        monkeypatch.setattr(Store, "claim_for", lambda *_: [])
        assert ids(hand_over(state, worker, specs)) == []
        assert stored(state.app, follower).status == "pending"
        # The notice makes a worker look at the key, whatever has happened meanwhile.
        assert [notice.key_id for notice in rows(state, Notice)] == [key_id("one", "")]

    def test_lost_lease(self, state: AppState, worker: int) -> None:
        """If one of the attempts is lost, outcomes are recorded one by one, and no job is
        claimed."""
        enqueue(1, PER_VALUE)
        enqueue(2, PER_VALUE)
        specs = claim(state, worker, 10)
        enqueue(1, PER_VALUE)
        execute(state, sa.update(Job).where(Job.id == specs[0].id).values(attempt=7))
        handed = hand_over(state, worker, specs)
        assert (handed.specs, handed.more) == (None, True)
        assert {each.spec.id: each.status for each in handed.settled} == {
            specs[0].id: None,
            specs[1].id: JobStatus.COMPLETED,
        }

    def test_dead_worker_claims_nothing(self, state: AppState, worker: int) -> None:
        """A worker that was marked dead claims no job."""
        enqueue()
        specs = claim(state, worker)
        enqueue()
        execute(state, sa.update(Worker).where(Worker.id == worker).values(status="dead"))
        assert ids(hand_over(state, worker, specs)) == []
        assert statuses(state) == {"completed": 1, "pending": 1}
        check_seats(state)

    def test_edited_row_of_a_key(self, state: AppState, worker: int) -> None:
        """A key whose row was deleted gets a notice, and its row is made anew."""
        enqueue()
        specs = claim(state, worker)
        follower = enqueue()
        execute(state, sa.delete(LimitKey))
        assert ids(hand_over(state, worker, specs)) == []
        assert claim(state, worker)[0].id == follower.id


@pytest.fixture
def handovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HandedOver]]:
    """The results of all handovers."""
    made: list[HandedOver] = []
    original = Store.hand_over

    def record(*args: Any, **kwargs: Any) -> HandedOver:
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Store, "hand_over", record)
    return made


class TestWorker:
    def test_chain_of_jobs(self, app: Flask, state: AppState, handovers: list[HandedOver]) -> None:
        """A worker hands the seat of each job to the next one."""
        jobs = [enqueue(n, ONE) for n in range(20)]
        with running_worker(app):
            for job in jobs:
                assert job.wait(30).result is not None
        assert sum(len(each.specs or ()) for each in handovers) >= 15
        assert rows(state, Seat) == []

    def test_errors_do_not_hold_outcomes_back(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If handovers fail, outcomes are recorded without them."""
        tries: list[int] = []

        def fail(*args: Any, **kwargs: Any) -> None:
            tries.append(1)
            raise OperationalError("SELECT", None, Exception("cannot hand over"))

        monkeypatch.setattr(Store, "hand_over", fail)
        jobs = [enqueue(n, ONE) for n in range(5)]
        with running_worker(app):
            for job in jobs:
                job.wait(30)
        assert len(tries) == 1
        assert statuses(state) == {"completed": 5}

    def test_unseen_claim_is_given_back(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the connection is lost after the commit of a handover, its claim is given back, and
        its outcomes are not recorded again."""
        original = Store.hand_over
        lost: list[HandedOver] = []

        def lose_reply(store: Store, *args: Any, **kwargs: Any) -> HandedOver:
            handed = original(store, *args, **kwargs)
            if not lost:
                lost.append(handed)
                raise CommitInDoubt("COMMIT", None, Exception("lost"), connection_invalidated=True)
            return handed

        monkeypatch.setattr(Store, "hand_over", lose_reply)
        first, second, third = (enqueue(n, ONE) for n in range(3))
        with running_worker(app) as running:
            third.wait(30)
            wait_until(lambda: running.counts[JobStatus.COMPLETED] == 3)
        assert ids(lost[0]) == [second.id]
        assert [stored(app, job).attempt for job in (first, second, third)] == [1, 2, 1]
        assert statuses(state) == {"completed": 3}
