"""Limits: the seats of jobs, on each database."""

from __future__ import annotations

import collections
import json
import random
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs import InvalidJob, Job, Limit, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_all
from flask_bgjobs.job.limits import key_id, limit_id, uses_from_json
from flask_bgjobs.job.records import JobSpec, Outcome, Settled
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import LimitKey, LimitRow, Notice, Seat, SeatState, Worker
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Cursors
from flask_bgjobs.testing import drain, inline
from flask_bgjobs.worker.registration import register
from tests.conftest import stored
from tests.integration.test_store import analyze, plans, scans

pytestmark = pytest.mark.usefixtures("worker")

ECHO = "tests.jobs.echo"
ONE = Limit("one", concurrency=1)
PER_VALUE = Limit("value", concurrency=1, key="{value}")
FINISHED = {"completed", "failed", "cancelled"}


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


def enqueue(value: Any = 0, limits: Any = ONE, **options: Any) -> Job:
    return run_background_job(ECHO, parameters={"value": value}, limits=limits, **options)


def admit(state: AppState) -> int:
    """Admit jobs until there is nothing more to do.

    :returns: their number.
    """
    number = 0
    for _ in range(1_000):
        step = state.store.admit()
        number += step.jobs
        if not step.more:
            return number
    raise AssertionError("admit() finds more to do each time")


def settle(
    state: AppState,
    worker: int,
    spec: JobSpec,
    kind: OutcomeKind = OutcomeKind.COMPLETED,
    **more: Any,
) -> Settled:
    values = {"wait_seconds": 0.0, **more}
    if kind is OutcomeKind.COMPLETED:
        entry = (spec, Outcome(spec.id, spec.attempt, kind, **values))
        (settled,) = state.store.complete(worker, [entry])
    else:
        entry = (spec, Outcome(spec.id, spec.attempt, kind, error="x", **values))
        (settled,) = state.store.settle(worker, "one", [entry])
    return settled


def rows(state: AppState, model: Any) -> list[Any]:
    with state.store.read() as connection:
        return list(connection.execute(sa.select(model.__table__)))


def execute(state: AppState, statement: Any) -> None:
    state.store.transaction(lambda connection: connection.execute(statement))


def statuses(state: AppState) -> dict[str, int]:
    return dict(collections.Counter(row.status for row in rows(state, Job)))


def check_seats(state: AppState) -> None:
    """Check that each job has the seats that its status needs, and that no limit is exceeded."""
    compare_seats(rows(state, Job), rows(state, Seat))


def compare_seats(jobs: list[Any], all_seats: list[Any]) -> None:
    """Do the work of :func:`check_seats` for rows that have been read."""
    seats = collections.defaultdict(list)
    held: collections.Counter[int] = collections.Counter()
    for seat in all_seats:
        seats[seat.job_id].append((seat.position, SeatState(seat.state), seat.key_id))
        held[seat.key_id] += seat.state == SeatState.HOLDS
    for job in jobs:
        found = sorted(seats.pop(job.id, []))
        keys = [use.key_id for use in uses_from_json(job.limits)]
        for use in uses_from_json(job.limits):
            if use.rule.concurrency is not None:
                assert held[use.key_id] <= use.rule.concurrency, (use, held)
        if job.status in ("pending", "running"):
            assert found == [(n, SeatState.HOLDS, k) for n, k in enumerate(keys)], job.id
        elif job.waits_for == "limit":
            *earlier, last = found
            assert earlier == [(n, SeatState.HOLDS, keys[n]) for n in range(len(earlier))], job.id
            assert last == (len(earlier), SeatState.WAITS, keys[len(earlier)]), job.id
        elif job.waits_for == "queue":
            assert found == [(0, SeatState.PARKED, keys[0])], job.id
        else:
            assert found == [], (job.id, job.status)
    assert not seats, f"seats of jobs that do not exist: {dict(seats)}"


class TestAdmit:
    def test_as_many_as_the_limit_allows(self, state: AppState, worker: int) -> None:
        """With a limit of two, two of five jobs become pending; each end lets another follow."""
        for _ in range(5):
            job = enqueue(limits=Limit("two", concurrency=2))
            assert (job.status, job.waits_for) == ("waiting", "limit")
        assert admit(state) == 2
        assert statuses(state) == {"pending": 2, "waiting": 3}
        specs = state.store.claim(worker, 10)
        assert (len(specs), admit(state)) == (2, 0)
        check_seats(state)
        settle(state, worker, specs[0])
        check_seats(state)
        assert admit(state) == 1
        check_seats(state)

    def test_keys_are_counted_separately(self, state: AppState) -> None:
        """One job of each key becomes pending, in the order of priority and due time."""
        for value in (1, 2, 1, 2, 3):
            enqueue(value, PER_VALUE)
        best = enqueue(2, PER_VALUE, priority=5)
        assert admit(state) == 3
        check_seats(state)
        assert stored(state.app, best).status == "pending"
        names = sorted(row.name for row in rows(state, LimitKey))
        assert names == ["1", "2", "3"]

    def test_jobs_without_limits_leave_no_trace(self, state: AppState) -> None:
        """A job without limits is pending at once."""
        assert enqueue(limits=None).status == "pending"
        assert rows(state, Seat) == rows(state, Notice) == []

    def test_in_bulk(self, state: AppState, worker: int) -> None:
        """Jobs of one statement get their own keys; one notice for each of them."""
        sets = [{"value": n % 3} for n in range(30)]
        jobs = enqueue_all(state, ECHO, None, sets, JobOptions(limits=PER_VALUE))
        assert {job.status for job in jobs} == {"waiting"}
        for job, values in zip(jobs, sets, strict=True):
            fresh = stored(state.app, job)
            assert (fresh.limits_json, fresh.limit_key_id) == (job.limits_json, job.limit_key_id)
            assert fresh.limit_key_id == key_id("value", str(values["value"]))
            assert fresh.parameters == values
        assert len(rows(state, Notice)) == 3
        assert admit(state) == 3
        check_seats(state)

    def test_unique_jobs_in_bulk(self, state: AppState) -> None:
        """Unique jobs have limits as well; a duplicate gets no seat."""
        sets = [{"value": n % 4} for n in range(6)]
        options = JobOptions(limits=PER_VALUE, unique=True)
        jobs = enqueue_all(state, ECHO, None, sets, options)
        assert [job.deduplicated for job in jobs] == [False] * 4 + [True] * 2
        check_seats(state)
        assert admit(state) == 4

    def test_several_limits(self, state: AppState, worker: int) -> None:
        """A job waits at one limit after the other, those with keys first."""
        both = [Limit("all", concurrency=2), PER_VALUE]
        jobs = [enqueue(value, both) for value in (1, 1, 2, 3)]
        assert admit(state) == 2
        check_seats(state)
        waiting = [stored(state.app, job).status for job in jobs]
        assert waiting == ["pending", "waiting", "pending", "waiting"]
        first, second = state.store.claim(worker, 10)
        settle(state, worker, second)
        assert admit(state) == 1
        assert stored(state.app, jobs[3]).status == "pending"
        settle(state, worker, first)
        assert admit(state) == 1
        check_seats(state)

    def test_delayed_jobs_hold_nothing(self, state: AppState, worker: int) -> None:
        """A scheduled or retrying job has no seat; when it is due, it waits for one."""
        delayed = enqueue(delay=3600)
        assert (delayed.status, delayed.waits_for) == ("scheduled", None)
        check_seats(state)
        retried = enqueue(retries=1, retry_delay=3600)
        admit(state)
        (spec,) = state.store.claim(worker, 1)
        assert settle(state, worker, spec, OutcomeKind.FAILED).status is JobStatus.RETRYING
        check_seats(state)
        execute(state, sa.update(Job).values(run_at=state.store.now))
        assert state.store.promote() == 2
        check_seats(state)
        assert statuses(state) == {"waiting": 2}
        assert admit(state) == 1
        assert retried.id != delayed.id

    def test_better_jobs_take_a_free_seat_and_that_of_a_pending_job(self, state: AppState) -> None:
        """If two better jobs arrive together and one seat is free, the other gets the seat of the
        pending job."""
        two = Limit("two", concurrency=2)
        worse = enqueue(limits=two)
        assert admit(state) == 1
        better = [enqueue(limits=two, priority=1) for _ in range(2)]
        admit(state)
        assert {stored(state.app, job).status for job in better} == {"pending"}
        assert stored(state.app, worse).status == "waiting"
        check_seats(state)

    def test_better_job_takes_the_seat_of_a_pending_one(self, state: AppState, worker: int) -> None:
        """A job with a higher priority does not wait for one that has not started."""
        low = enqueue()
        assert admit(state) == 1
        high = enqueue(priority=9)
        assert admit(state) == 1
        check_seats(state)
        assert stored(state.app, low).status == "waiting"
        (spec,) = state.store.claim(worker, 5)
        assert spec.id == high.id
        best = enqueue(priority=10)
        assert admit(state) == 0
        check_seats(state)
        settle(state, worker, spec)
        assert admit(state) == 1
        assert stored(state.app, best).status == "pending"

    @pytest.mark.on("postgresql", "mysql")
    def test_locked_job_lets_others_pass(self, state: AppState) -> None:
        """A job whose row another transaction has locked is skipped, and gets its seat later."""
        first, second = enqueue(), enqueue()
        with state.store.engine.connect() as other, other.begin():
            locked = sa.select(Job.id).where(Job.id == first.id).with_for_update()
            assert other.scalar(locked) == first.id
            assert admit(state) == 1
            assert stored(state.app, second).status == "pending"
        check_seats(state)

    @pytest.mark.on("postgresql", "mysql")
    def test_locked_key_is_left_to_others(self, state: AppState) -> None:
        """While another worker has the row of a key, its notices stay."""
        enqueue()
        admit(state)
        execute(state, sa.delete(Job))
        execute(state, sa.delete(Seat))
        enqueue()
        with state.store.engine.connect() as other, other.begin():
            other.execute(sa.select(LimitKey.id).with_for_update()).all()
            assert admit(state) == 0
        assert len(rows(state, Notice)) == 1
        assert admit(state) == 1

    @pytest.mark.on("postgresql")
    def test_few_of_many_waiting_jobs_are_read(self, state: AppState) -> None:
        """However many jobs wait, only those are read for which there is room."""
        sets = [{"value": n} for n in range(5_000)]
        enqueue_all(state, ECHO, None, sets, JobOptions(limits=[Limit("ten", concurrency=10)]))
        analyze(state.store)
        plan = plans(state.store, state.store.admit)
        assert statuses(state) == {"pending": 10, "waiting": 4_990}
        assert "LockRows" in plan
        assert not scans(plan)
        assert "Hash Join" not in plan
        assert "Merge Join" not in plan

    @pytest.mark.on("postgresql", "mysql")
    @pytest.mark.parametrize("hands_over", [False, True])
    @pytest.mark.parametrize("number", [1, 300])
    def test_open_transactions_hold_nobody_up(
        self, state: AppState, worker: int, number: int, hands_over: bool
    ) -> None:
        """While an app's transaction has enqueued jobs with a limit and is still open, workers
        admit, claim and settle others with the same limit."""
        host = state.db.session()
        limits = [PER_VALUE, Limit("many", concurrency=1_000), Limit("r", rate=10**6, per=1)]
        sets = [{"value": n} for n in range(number)]
        options = JobOptions(limits=limits)
        enqueue_all(state, ECHO, None, sets, options, host)
        jobs = enqueue_all(state, ECHO, None, sets, options, None)
        store = state.store.with_deadline(10)
        store.on_attempt = lambda: attempts.append(1)
        attempts: list[int] = []
        while store.admit().more:
            pass
        specs = store.claim(worker, 2 * number)
        assert {spec.id for spec in specs} == {job.id for job in jobs}
        entries = [
            (spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0))
            for spec in specs
        ]
        if hands_over:
            settled = store.hand_over(worker, entries, number).settled
        else:
            settled = store.complete(worker, entries)
        assert all(each.status for each in settled)
        while store.admit().more:
            pass
        store.cancel([jobs[0].id])
        store.balance_queues()
        store.heal(Cursors())
        transactions = len(attempts)
        host.commit()
        assert admit(state) > 0
        # None of them was redone because of a lock.
        assert transactions <= 40
        check_seats(state)
        store.dispose()

    def test_rescue_and_give_back_keep_the_seat(self, state: AppState, worker: int) -> None:
        """A job of a dead worker keeps its seat, and so does one that was given back."""
        job, other = enqueue(), enqueue()
        admit(state)
        (spec,) = state.store.claim(worker, 1)
        given_back = settle(state, worker, spec, OutcomeKind.GIVEN_BACK, wait_seconds=None)
        assert given_back.status is JobStatus.PENDING
        check_seats(state)
        state.store.claim(worker, 1)
        (lost,) = state.store.rescue(worker, 0) or []
        assert (lost.spec.id, lost.status) == (job.id, JobStatus.PENDING)
        check_seats(state)
        assert admit(state) == 0
        assert stored(state.app, other).status == "waiting"

    def test_waits_for_code_without_a_seat(self, state: AppState, worker: int) -> None:
        """A job that no worker here knows holds no seat, and waits for its limits again later."""
        job, other = enqueue(), enqueue()
        admit(state)
        (spec,) = state.store.claim(worker, 1)
        unknown = settle(state, worker, spec, OutcomeKind.UNKNOWN, wait_seconds=None)
        assert unknown.status is JobStatus.WAITING
        assert stored(state.app, job).waits_for == "code"
        check_seats(state)
        assert admit(state) == 1
        assert stored(state.app, other).status == "pending"
        (wait,) = state.store.code_waits()
        assert state.store.free(wait, 10) == 1
        check_seats(state)
        assert stored(state.app, job).waits_for == "limit"


class TestByHand:
    @pytest.mark.parametrize("status", ["waiting", "pending"])
    def test_cancel_and_delete_free_the_seat(self, state: AppState, status: str) -> None:
        """The next job follows a job that is cancelled or deleted."""
        for act in (state.store.cancel, state.store.delete):
            first, second, third = enqueue(), enqueue(), enqueue()
            admit(state)
            gone = first if status == "pending" else second
            assert act([gone.id]).done == [gone.id]
            check_seats(state)
            admit(state)
            check_seats(state)
            left = [job for job in (first, second, third) if job is not gone]
            assert [stored(state.app, job).status for job in left] == ["pending", "waiting"]
            state.store.delete([job.id for job in left])

    def test_retry_by_hand_waits_again(self, state: AppState, worker: int) -> None:
        """A failed job that a person retries waits for its limit like a new one."""
        failed = enqueue(retries=0)
        admit(state)
        (spec,) = state.store.claim(worker, 1)
        settle(state, worker, spec, OutcomeKind.FAILED)
        other = enqueue()
        admit(state)
        assert state.store.retry([failed.id]).done == [failed.id]
        check_seats(state)
        assert admit(state) == 0
        assert stored(state.app, failed).status == "waiting"
        state.store.cancel([other.id])
        assert admit(state) == 1

    def test_expired_job_frees_the_seat(self, state: AppState) -> None:
        """A job that expires while it waits or is pending leaves its place."""
        pending, waiting = enqueue(expires=3600), enqueue(expires=3600)
        last = enqueue()
        admit(state)
        for job in (pending, waiting):
            execute(
                state, sa.update(Job).where(Job.id == job.id).values(deadline_at=state.store.now)
            )
        assert sorted(state.store.expire(10)) == [pending.id, waiting.id]
        check_seats(state)
        assert admit(state) == 1
        assert stored(state.app, last).status == "pending"

    def test_paused_queue_gives_seats_back(self, state: AppState) -> None:
        """Jobs of a paused queue do not hold a limit that other queues need."""
        paused = enqueue(queue="slow")
        other = enqueue(queue="quick")
        admit(state)
        state.store.pause("slow")
        assert admit(state) == 1
        check_seats(state)
        assert stored(state.app, paused).waits_for == "queue"
        assert stored(state.app, other).status == "pending"
        later = enqueue(queue="slow", priority=9)
        admit(state)
        check_seats(state)
        assert stored(state.app, other).status == "pending"
        state.store.resume("slow")
        admit(state)
        check_seats(state)
        assert stored(state.app, later).status == "pending"

    def test_many_jobs_of_a_paused_queue_are_passed(self, state: AppState) -> None:
        """Jobs of a paused queue that are ahead of all others do not hold them up."""
        sets = [{"value": n} for n in range(300)]
        options = JobOptions(limits=ONE, queue="slow", priority=5)
        enqueue_all(state, ECHO, None, sets, options)
        other = enqueue(queue="quick")
        state.store.pause("slow")
        assert admit(state) == 1
        check_seats(state)
        assert stored(state.app, other).status == "pending"
        state.store.resume("slow")
        admit(state)
        check_seats(state)
        waits = {job.waits_for for job in rows(state, Job) if job.queue == "slow"}
        assert waits == {"limit", None}

    def test_worker_of_a_queue_that_has_just_started(self, state: AppState, worker: int) -> None:
        """Jobs of a queue are not held back because its worker was not there a moment ago."""
        state.store.stop_worker(worker)
        register(state, "one", queues=["a"])
        enqueue(queue="a")
        assert admit(state) == 1
        register(state, "two", queues=["b"])
        job = enqueue(2, PER_VALUE, queue="b")
        assert admit(state) == 1
        assert stored(state.app, job).status == "pending"

    def test_queue_without_a_worker_holds_nothing(self, state: AppState, worker: int) -> None:
        """Jobs of a queue that no live worker serves leave the limit to others, until one does."""
        stuck = enqueue(queue="unserved")
        other = enqueue(queue="served")
        admit(state)
        assert stored(state.app, stuck).status == "pending"
        state.store.stop_worker(worker)
        register(state, "one", queues=["served"])
        assert state.store.balance_queues() == 1
        admit(state)
        check_seats(state)
        assert stored(state.app, other).status == "pending"
        register(state, "two", queues=["unserved"])
        assert state.store.balance_queues() == 1
        check_seats(state)
        state.store.cancel([other.id])
        assert admit(state) == 1
        assert stored(state.app, stuck).status == "pending"

    def test_replaced_job_waits_at_its_new_key(self, state: AppState) -> None:
        """An enqueue that replaces the parameters of a waiting job moves it to its new key."""
        options = {"unique_key": "k", "on_duplicate": "replace"}
        first = enqueue(1, PER_VALUE)
        waiting = enqueue(1, PER_VALUE, **options)
        admit(state)
        replaced = enqueue(2, PER_VALUE, **options)
        assert (replaced.id, replaced.deduplicated) == (waiting.id, True)
        assert admit(state) == 1
        check_seats(state)
        again = enqueue(1, PER_VALUE, **options)
        assert (again.id, again.status) == (waiting.id, "waiting")
        assert admit(state) == 0
        check_seats(state)
        state.store.cancel([first.id])
        assert admit(state) == 1

    def test_debounced_job_takes_its_seat_when_it_is_due(self, state: AppState) -> None:
        """A debounced job is scheduled without a seat."""
        for value in (1, 2):
            job = enqueue(value, PER_VALUE, debounce=3600)
            admit(state)
            check_seats(state)
        execute(state, sa.update(Job).values(run_at=state.store.now))
        state.store.promote()
        check_seats(state)
        assert admit(state) == 1
        assert stored(state.app, job).limit_key_id == key_id("value", "2")


def rated(rate: int = 2, per: float = 3600, **more: Any) -> Limit:
    return Limit("rated", rate=rate, per=per, **more)


class TestRates:
    def test_a_burst_and_then_none(self, state: AppState, worker: int) -> None:
        """No more jobs become pending in a period than the rate allows, however they end."""
        for _ in range(5):
            enqueue(limits=rated(burst=2), retries=0)
        assert admit(state) == 2
        first, second = state.store.claim(worker, 5)
        settle(state, worker, first)
        settle(state, worker, second, OutcomeKind.FAILED)
        check_seats(state)
        assert admit(state) == 0
        (key,) = rows(state, LimitKey)
        assert sum(number for _, number in json.loads(key.starts)) == 2
        assert key.due_at > stored(state.app, first.id).finished_at
        look = state.store.look(None, worker)
        assert look.limit_in is not None
        assert 3_000 < look.limit_in <= 3_600

    def test_unstarted_job_keeps_its_admission(self, state: AppState, worker: int) -> None:
        """A job that is given back before it started stays pending; one that started waits."""
        enqueue(limits=rated(rate=1))
        admit(state)
        (spec,) = state.store.claim(worker, 5)
        settle(state, worker, spec, OutcomeKind.GIVEN_BACK, wait_seconds=None)
        assert statuses(state) == {"pending": 1}
        (spec,) = state.store.claim(worker, 5)
        settled = settle(state, worker, spec, OutcomeKind.GIVEN_BACK)
        assert settled.status is JobStatus.WAITING
        check_seats(state)
        assert admit(state) == 0

    def test_each_retry_counts(self, state: AppState, worker: int) -> None:
        """A retry is a start as well."""
        enqueue(limits=rated(rate=1), retry_delay=0)
        admit(state)
        (spec,) = state.store.claim(worker, 5)
        assert settle(state, worker, spec, OutcomeKind.FAILED).status is JobStatus.RETRYING
        state.store.promote()
        assert admit(state) == 0
        check_seats(state)

    def test_rescued_job_needs_another_admission(self, state: AppState, worker: int) -> None:
        """The code of a dead worker's job may have started, so its next start counts again."""
        enqueue(limits=rated(rate=1))
        admit(state)
        state.store.claim(worker, 5)
        (lost,) = state.store.rescue(worker, 0) or []
        assert lost.status is JobStatus.WAITING
        check_seats(state)
        assert admit(state) == 0

    def test_cancelled_job_gives_its_admission_back(self, state: AppState) -> None:
        """A pending job that is cancelled has not started, so the next one may follow it."""
        first, second = enqueue(limits=rated(burst=2)), enqueue(limits=rated(burst=2))
        third = enqueue(limits=rated(burst=2))
        assert admit(state) == 2
        state.store.cancel([first.id])
        admit(state)
        check_seats(state)
        assert statuses(state)["pending"] <= 2
        assert third.id > second.id

    def test_a_swap_admits_no_more(self, state: AppState) -> None:
        """A job with a higher priority takes the admission of a pending one, and no other."""
        lows = [enqueue(limits=rated(burst=2)) for _ in range(3)]
        assert admit(state) == 2
        high = enqueue(limits=rated(burst=2), priority=9)
        admit(state)
        check_seats(state)
        assert stored(state.app, high).status == "pending"
        assert statuses(state) == {"pending": 2, "waiting": 2}
        assert len(lows) == 3

    def test_a_due_rate_is_looked_at(self, state: AppState, worker: int) -> None:
        """When the time of the next start has come, a worker admits the next job without a
        notice."""
        for _ in range(2):
            enqueue(limits=Limit("fast", rate=1, per=0.2))
        admit(state)
        (spec,) = state.store.claim(worker, 5)
        settle(state, worker, spec)
        assert admit(state) == 0
        execute(state, sa.update(LimitKey).values(due_at=state.store.now, starts=None, arrival=1))
        assert rows(state, Notice) == []
        assert admit(state) == 1


class TestHeal:
    def heal(self, state: AppState) -> tuple[int, int, int]:
        healed = state.store.heal(Cursors())
        admit(state)
        check_seats(state)
        return healed.seats, healed.jobs, healed.keys

    def test_nothing_to_heal(self, state: AppState, worker: int) -> None:
        """While all seats match, nothing is changed."""
        for value in (1, 1, 2):
            enqueue(value, [PER_VALUE, ONE])
        enqueue(delay=3600)
        assert self.heal(state) == (0, 0, 0)
        state.store.claim(worker, 1)
        assert self.heal(state) == (0, 0, 0)
        state.store.pause("default")
        assert self.heal(state) == (0, 0, 0)

    @pytest.mark.parametrize("change", [sa.delete(Job), sa.update(Job).values(status="completed")])
    def test_seat_without_a_job(self, state: AppState, change: Any) -> None:
        """A seat whose job was deleted or ended by hand is free again."""
        first = enqueue()
        admit(state)
        second = enqueue()
        execute(state, change.where(Job.id == first.id))
        assert self.heal(state) == (1, 0, 0)
        assert stored(state.app, second).status == "pending"

    def test_waiting_seat_without_a_job(self, state: AppState) -> None:
        """The place of a deleted job that waited does not hold others up, and is removed."""
        first, second, third = enqueue(), enqueue(), enqueue()
        admit(state)
        execute(state, sa.delete(Job).where(Job.id == second.id))
        state.store.cancel([first.id])
        admit(state)
        assert stored(state.app, third).status == "pending"
        self.heal(state)

    @pytest.mark.parametrize("status", ["waiting", "pending", "running"])
    def test_job_without_a_seat(self, state: AppState, worker: int, status: str) -> None:
        """A job whose seat was deleted gets one again."""
        job = enqueue(limits=[ONE, PER_VALUE])
        if status != "waiting":
            admit(state)
        if status == "running":
            state.store.claim(worker, 1)
        execute(state, sa.delete(Seat))
        execute(state, sa.delete(Notice))
        assert self.heal(state) == (0, 1, 0)
        wanted = "running" if status == "running" else "pending"
        assert stored(state.app, job).status == wanted

    def test_limits_in_opposite_order(self, state: AppState) -> None:
        """Two jobs whose releases order their limits differently do not wait for each other."""
        a, x = Limit("a", concurrency=1), Limit("x", concurrency=1)
        rated = Limit("x", concurrency=1, rate=1000, per=1, burst=1000)
        first = enqueue(limits=a)
        other = enqueue(limits=x)
        admit(state)
        old, new = enqueue(limits=[a, x]), enqueue(limits=[a, rated], priority=5)
        order = [use.name for use in uses_from_json(new.limits_json)]
        assert order == ["x", "a"]
        state.store.cancel([first.id])
        admit(state)
        state.store.cancel([other.id])
        admit(state)
        assert statuses(state) == {"waiting": 2, "cancelled": 2}
        assert state.store.heal(Cursors()).orders == 1
        admit(state)
        check_seats(state)
        pending = [job for job in (old, new) if stored(state.app, job).status == "pending"]
        assert len(pending) == 1
        state.store.cancel([pending[0].id])
        assert admit(state) == 1

    def test_lost_notice(self, state: AppState) -> None:
        """A key with room whose notice is gone is looked at again."""
        enqueue()
        admit(state)
        state.store.cancel([row.id for row in rows(state, Job)])
        admit(state)
        job = enqueue()
        execute(state, sa.delete(Notice))
        assert self.heal(state) == (0, 0, 1)
        assert stored(state.app, job).status == "pending"

    def test_edited_limits(self, state: AppState) -> None:
        """A job whose limits somebody has edited runs without them, and does not wait forever."""
        for number, values in enumerate(({"limits": "{]"}, {"limit_key_id": 7}, {"limits": None})):
            job = enqueue(number, Limit(f"l{number}", concurrency=1))
            execute(state, sa.update(Job.__table__).where(Job.id == job.id).values(values))
            execute(state, sa.delete(Seat))
            execute(state, sa.delete(Notice))
            state.store.heal(Cursors())
            admit(state)
            assert stored(state.app, job).status == "pending", values

    def test_unreadable_limit(self, state: AppState) -> None:
        """With an edited definition, one job runs at a time."""
        enqueue()
        enqueue()
        execute(
            state,
            sa.insert(LimitRow).values(
                id=limit_id("one"), name="one", definition="{]", defined_at=state.store.now
            ),
        )
        assert admit(state) == 1


OPTIONS: list[dict[str, Any]] = [
    {"limits": ONE},
    {"limits": PER_VALUE},
    {"limits": [Limit("three", concurrency=3), PER_VALUE]},
    {"limits": [Limit("rated", rate=1000, per=0.01, burst=1000), ONE]},
    {"limits": [Limit("two", concurrency=2, key="{value}"), ONE, Limit("five", concurrency=5)]},
    {"limits": PER_VALUE, "delay": 3600},
    {"limits": PER_VALUE, "unique_key": "u", "on_duplicate": "replace"},
    {},
]
ENDS: list[tuple[OutcomeKind, dict[str, Any]]] = [
    (OutcomeKind.COMPLETED, {}),
    (OutcomeKind.FAILED, {}),
    (OutcomeKind.FAILED_FINALLY, {}),
    (OutcomeKind.SNOOZED, {"delay_seconds": 3600.0}),
    (OutcomeKind.CANCELLED, {}),
    (OutcomeKind.GIVEN_BACK, {"wait_seconds": None}),
    (OutcomeKind.GIVEN_BACK, {}),
    (OutcomeKind.UNKNOWN, {"wait_seconds": None}),
]


class Play:
    """Random changes of jobs with limits, as the app, people and a worker make them."""

    def __init__(self, state: AppState, seed: int) -> None:
        self.state = state
        self.store = state.store
        self.chance = random.Random(seed)
        self.worker = register(state, "one")
        self.running: list[JobSpec] = []

    def ids(self, *statuses: str) -> list[int]:
        return [job.id for job in rows(self.state, Job) if job.status in statuses or not statuses]

    def some(self, *statuses: str) -> list[int]:
        ids = self.ids(*statuses)
        return self.chance.sample(ids, min(len(ids), 2))

    def enqueue(self) -> None:
        options = self.chance.choice(OPTIONS)
        enqueue(
            self.chance.randrange(4),
            **{"limits": None, **options},
            retry_delay=3600,
            priority=self.chance.choice([0, 0, 3]),
            queue=self.chance.choice(["a", "b"]),
        )

    def claim(self) -> None:
        self.running += self.store.claim(self.worker, self.chance.choice([1, 5]))

    def settle(self) -> None:
        if self.running:
            spec = self.running.pop(self.chance.randrange(len(self.running)))
            kind, more = self.chance.choice(ENDS)
            settle(self.state, self.worker, spec, kind, **more)

    def die(self) -> None:
        beats = next(w.beats for w in rows(self.state, Worker) if w.id == self.worker)
        assert self.store.rescue(self.worker, beats) is not None
        self.running.clear()
        self.worker = register(self.state, "one")

    def change_by_hand(self) -> None:
        act = self.chance.choice([self.store.cancel, self.store.retry, self.store.delete])
        act(self.some())

    def promote(self) -> None:
        due = sa.update(Job).where(Job.id.in_(self.some("scheduled", "retrying")))
        execute(self.state, due.values(run_at=self.store.now))
        self.store.promote()

    def pause(self) -> None:
        self.store.pause(self.chance.choice(["a", "b"]))

    def resume(self) -> None:
        self.store.resume(self.chance.choice(["a", "b"]))

    def free(self) -> None:
        for wait in self.store.code_waits():
            self.store.free(wait, 5)

    def admit(self) -> None:
        admit(self.state)

    def end(self) -> None:
        """Run all that is left."""
        self.store.resume("a")
        self.store.resume("b")
        for _ in range(300):
            execute(
                self.state,
                sa.update(Job)
                .where(Job.status.in_(["scheduled", "retrying"]))
                .values(run_at=self.store.now),
            )
            self.store.promote()
            self.free()
            admit(self.state)
            self.claim()
            for spec in self.running:
                settle(self.state, self.worker, spec)
            self.running.clear()
            if not self.ids(*(status.value for status in JobStatus if not status.is_final)):
                return
        raise AssertionError(f"jobs are stuck: {statuses(self.state)}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_changes(state: AppState, seed: int) -> None:
    """Whatever happens to jobs, their seats match their statuses, no limit is exceeded, and in the
    end all of them have run and no seat is left."""
    play = Play(state, seed)
    acts = [play.enqueue] * 6 + [play.claim] * 4 + [play.settle] * 5 + [play.admit] * 5
    acts += [play.change_by_hand] * 2 + [play.promote, play.free, play.pause, play.resume, play.die]
    for _ in range(150):
        play.chance.choice(acts)()
        check_changed(state)
    play.end()
    check_seats(state)
    assert rows(state, Seat) == []
    healed = state.store.heal(Cursors())
    assert not healed, healed


def check_changed(state: AppState) -> None:
    """Check the seats, unless jobs wait for a worker to line them up after their limits changed."""
    if all(notice.job_id is None for notice in rows(state, Notice)):
        check_seats(state)


class TestTesting:
    def test_drain(self, state: AppState) -> None:
        """``drain`` runs jobs one by one as their limits allow, and leaves the others waiting."""
        for _ in range(3):
            enqueue()
        late = [enqueue(limits=rated(rate=1)) for _ in range(2)]
        assert len(drain(state.app)) == 4
        assert [stored(state.app, job).status for job in late] == ["completed", "waiting"]
        check_seats(state)

    def test_inline(self, state: AppState) -> None:
        """``inline`` runs a job at once if its limits allow it; delays are ignored."""
        with inline(state.app):
            assert enqueue(delay=3600).status == "completed"
            assert enqueue(limits=rated(rate=1)).status == "completed"
            waiting = enqueue(limits=rated(rate=1))
            assert waiting.status == "waiting"
        check_seats(state)

    def test_inline_runs_a_job_when_another_has_ended(self, state: AppState) -> None:
        """A job that was enqueued by one with the same limit runs after it."""
        with inline(state.app):
            outer = run_background_job("tests.jobs.enqueue_limited", parameters=[3], limits=ONE)
        assert outer.status == "completed"
        assert statuses(state) == {"completed": 4}
        check_seats(state)


class TestOptions:
    def test_names(self, state: AppState) -> None:
        """A limit without a name belongs to its job; those with the same name are shared."""
        job = enqueue(limits=[Limit(concurrency=2), Limit(concurrency=1, key="{value}"), ONE])
        names = [use.name for use in uses_from_json(job.limits_json)]
        assert names == [f"{ECHO}:2", "one", ECHO]

    def test_key_of_a_secret_is_hashed(self, state: AppState) -> None:
        """The value of a parameter that looks like a secret is not stored as a key."""
        run_background_job(
            "tests.jobs.login",
            parameters=["ada", "hunter2"],
            limits=Limit("login", concurrency=1, key="{password}"),
        )
        admit(state)
        (key,) = rows(state, LimitKey)
        assert len(key.name) == 64

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (7, "limits must be a Limit"),
            (["mail"], "BGJOBS_LIMITS has no limit 'mail'"),
            ([ONE, ONE], "have the name 'one'"),
            (Limit(concurrency=1, key="{nobody}"), "names the parameter 'nobody'"),
            (Limit(concurrency=1, key="{0}"), "must name parameters"),
            (Limit(concurrency=1, key=lambda value: 1 / 0), "raised ZeroDivisionError"),
            ([Limit(str(n), concurrency=1) for n in range(11)], "at most 10"),
        ],
    )
    def test_invalid_limits_of_a_job(self, state: AppState, limits: Any, message: str) -> None:
        """Limits that are not valid are refused with the reason, and leave no row."""
        with pytest.raises(InvalidJob, match=message.replace("[", r"\[")):
            enqueue(limits=limits)
        assert rows(state, Job) == []
