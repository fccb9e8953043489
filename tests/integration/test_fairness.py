"""Fairness: jobs of different keys take turns, on each database."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import ConfigError, InvalidJob, Job, Limit, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_all
from flask_bgjobs.job.records import JobSpec
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.job.turns import claim_rank
from flask_bgjobs.models import FairKey, FairQueue, Weight
from flask_bgjobs.operations.actions import retry
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.testing import drain, inline
from flask_bgjobs.worker.registration import register
from tests.apps import build_app
from tests.conftest import stored
from tests.integration.test_limits import admit, check_seats, execute, rows, settle

ECHO = "tests.jobs.echo"
BY_VALUE = "{value}"


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


def add(state: AppState, key: str, jobs: int = 1, **options: Any) -> list[Job]:
    chosen = JobOptions(**{"fair": BY_VALUE, **options})
    return enqueue_all(state, ECHO, None, [{"value": key}] * jobs, chosen)


def claim(state: AppState, worker: int, jobs: int = 1, **options: Any) -> list[JobSpec]:
    state.store.promote(state.config.weights)
    return state.store.claim(worker, jobs, **options)


def take(state: AppState, worker: int, jobs: int, **options: Any) -> str:
    """Run jobs, and return their keys."""
    specs = claim(state, worker, jobs, **options)
    for spec in specs:
        settle(state, worker, spec)
    return keys(specs)


def keys(specs: list[JobSpec]) -> str:
    return "".join(str(spec.parameters_json)[-3] for spec in specs)


class TestTurns:
    def test_status(self, state: AppState, worker: int) -> None:
        """A job with a key is scheduled for now, and pending with a turn when it is promoted."""
        (job,) = add(state, "a", priority=2)
        assert (job.status, job.waits_for, job.fair_key) == ("scheduled", None, "a")
        assert state.store.promote() == 1
        found = stored(state.app, job)
        assert (found.status, found.claim_rank) == ("pending", claim_rank(2, 1))

    def test_few_before_many(self, state: AppState, worker: int) -> None:
        """Jobs of a second key run beside the first ones of a key that came before with many."""
        add(state, "a", 50)
        assert take(state, worker, 10) == "a" * 10
        add(state, "b", 3)
        assert collections.Counter(take(state, worker, 7)) == {"a": 4, "b": 3}

    def test_alternate(self, state: AppState, worker: int) -> None:
        """Three keys run one job each in each turn, the longest due first."""
        for key in "abc":
            add(state, key, 4)
        assert take(state, worker, 9) == "abcabcabc"
        assert take(state, worker, 9) == "abc"

    def test_across_several_promotions(self, state: AppState, worker: int) -> None:
        """A key whose jobs come one by one has no more turns than one with a bulk enqueue."""
        add(state, "a", 30)
        claim(state, worker)
        for _ in range(5):
            add(state, "b")
            state.store.promote()
        taken = take(state, worker, 10)
        assert taken.count("b") == 5

    def test_priorities_and_queues(self, state: AppState, worker: int) -> None:
        """Turns are within a priority and a queue. The priority comes first."""
        add(state, "a", 3, priority=1)
        add(state, "b", 1)
        add(state, "c", 1, queue="mail", priority=1)
        taken = take(state, worker, 5)
        assert sorted(taken[:2]) == ["a", "c"]
        assert taken.index("b") == 4
        assert len(rows(state, FairQueue)) == 3

    def test_queues_of_one_worker(self, state: AppState, worker: int) -> None:
        """A queue that had no jobs does not get ahead of one whose turns are far, nor fall behind
        one whose turns have begun anew."""
        add(state, "a", 200, queue="one")
        assert take(state, worker, 150) == "a" * 150
        add(state, "b", 60, queue="two")
        assert take(state, worker, 20).count("b") == 10
        take(state, worker, 200)
        add(state, "b", 20, queue="two")
        assert take(state, worker, 10) == "b" * 10
        add(state, "a", 20, queue="one")
        assert take(state, worker, 10).count("a") == 5

    def test_jobs_without_key_come_first(self, state: AppState, worker: int) -> None:
        """Within a priority, jobs that take no turns run before those that do."""
        add(state, "a", 3)
        state.store.promote()
        add(state, "x", fair=None)
        assert take(state, worker, 4) == "xaaa"

    def test_claims_from_one_queue(self, state: AppState, worker: int) -> None:
        """Turns are kept by workers with a list of queues."""
        add(state, "a", 5)
        add(state, "b", 2)
        assert take(state, worker, 4, queues=["default"]) == "abab"

    def test_retry_takes_another_turn(self, state: AppState, worker: int) -> None:
        """A job that is retried takes its turn behind the other jobs of its key."""
        add(state, "a", 3, retries=1, retry_delay=0)
        (first,) = claim(state, worker)
        settle(state, worker, first, OutcomeKind.FAILED)
        specs = claim(state, worker, 3)
        assert [spec.id for spec in specs] == [first.id + 1, first.id + 2, first.id]

    def test_retry_by_hand_takes_another_turn(self, state: AppState, worker: int) -> None:
        """Jobs that a person retries do not get ahead of another key with their old turns."""
        add(state, "a", 20, retries=0)
        failed = claim(state, worker, 20)
        for spec in failed:
            settle(state, worker, spec, OutcomeKind.FAILED)
        add(state, "b", 5)
        state.store.promote()
        result = retry(state, [spec.id for spec in failed])
        assert len(result.done) == 20
        assert {job.status for job in state.store.get_many(result.done)} == {"scheduled"}
        assert take(state, worker, 10).count("b") == 5

    def test_given_back_job_keeps_its_turn(self, state: AppState, worker: int) -> None:
        """A job that a worker gives back runs next."""
        add(state, "a", 3)
        (first,) = claim(state, worker)
        settle(state, worker, first, OutcomeKind.GIVEN_BACK, wait_seconds=None)
        (again,) = claim(state, worker)
        assert again.id == first.id

    def test_delayed_job_takes_its_turn_when_it_is_due(self, state: AppState, worker: int) -> None:
        """The turn of a delayed job is that of the time at which it is due."""
        (job,) = add(state, "a", delay=3_600)
        assert state.store.promote() == 0
        past = state.store.clock()
        execute(state, sa.update(Job).where(Job.id == job.id).values(run_at=past))
        assert take(state, worker, 5) == "a"

    def test_many_keys_in_one_promotion(self, state: AppState, worker: int) -> None:
        """Thousands of jobs with many keys are promoted in a few steps, each with its turn."""
        sets = [{"value": f"k{n % 300}"} for n in range(2_500)]
        enqueue_all(state, ECHO, None, sets, JobOptions(fair=BY_VALUE))
        assert state.store.promote() == 2_500
        first = claim(state, worker, 300)
        assert len({spec.parameters_json for spec in first}) == 300
        assert len(rows(state, FairKey)) == 300

    def test_key_behind_a_backlog_that_is_not_promoted(self, state: AppState, worker: int) -> None:
        """While thousands of jobs of one key wait for their turns, a few of another that came later
        get theirs at once."""
        add(state, "a", 3_500)
        add(state, "b", 3)
        assert state.store.promote(seconds=0) == 1_500
        assert collections.Counter(take(state, worker, 6)) == {"a": 3, "b": 3}

    def test_workers_promote_at_once(self, state: AppState) -> None:
        """No two jobs of a key have the same turn, however many workers promote."""
        add(state, "a", 4_000)
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(lambda _: state.store.promote(), range(4))) == 4_000
        ranks = [row.claim_rank for row in rows(state, Job)]
        assert sorted(ranks) == [claim_rank(0, n) for n in range(1, 4_001)]


class TestWeights:
    def test_configured(self, make_app: Callable[..., Flask]) -> None:
        """``BGJOBS_WEIGHTS`` says how many jobs a key runs in each turn."""
        app = make_app(BGJOBS_WEIGHTS={"a": 3})
        with app.app_context():
            state = state_of(app)
            worker = register(state, "one")
            add(state, "a", 12)
            add(state, "b", 12)
            assert take(state, worker, 8) == "aaabaaab"


class TestWithOtherOptions:
    def test_limits(self, state: AppState, worker: int) -> None:
        """Jobs that wait for a limit get its seats in the order of their turns."""
        limit = Limit("two", concurrency=2)
        add(state, "a", 20, limits=limit)
        state.store.promote()
        admit(state)
        taken = take(state, worker, 2)
        add(state, "b", 2, limits=limit)
        for _ in range(5):
            state.store.promote()
            admit(state)
            check_seats(state)
            taken += take(state, worker, 2)
        assert taken[:2] == "aa"
        assert taken[2:8].count("b") == 2

    def test_replaced_while_it_waits_for_a_limit(self, state: AppState, worker: int) -> None:
        """A waiting job that is replaced takes another turn, and has one seat in the end."""
        limit = Limit("one", concurrency=1)
        options = {"limits": limit, "unique": True, "on_duplicate": "replace"}
        (job,) = add(state, "a", **options)
        state.store.promote()
        for _ in range(3):
            (again,) = add(state, "a", **options)
            assert (again.id, again.status) == (job.id, "scheduled")
            state.store.promote()
        admit(state)
        check_seats(state)
        assert take(state, worker, 2) == "a"

    def test_debounced(self, state: AppState, worker: int) -> None:
        """A debounced job with a key is scheduled, also when it must not be moved any more."""
        options = {"debounce": 0.01, "debounce_max": 0.01}
        (job,) = add(state, "a", **options)
        (again,) = add(state, "a", **options)
        assert (again.id, again.status) == (job.id, "scheduled")

    def test_throttled(self, state: AppState, worker: int) -> None:
        """The first job of a throttle with a key is scheduled for now."""
        (job,) = add(state, "a", throttle=60)
        assert job.status == "scheduled"
        assert take(state, worker, 2) == "a"

    def test_bulk_is_one_statement(self, state: AppState) -> None:
        """A bulk enqueue with different keys inserts all jobs in one statement."""
        statements: list[str] = []

        def note(*arguments: Any) -> None:
            statements.append(arguments[2])

        sa.event.listen(state.store.engine, "before_cursor_execute", note)
        jobs = enqueue_all(
            state, ECHO, None, [{"value": f"k{n}"} for n in range(100)], JobOptions(fair=BY_VALUE)
        )
        sa.event.remove(state.store.engine, "before_cursor_execute", note)
        assert [job.fair_key for job in jobs] == [f"k{n}" for n in range(100)]
        assert sum("INSERT" in each for each in statements) == 1

    def test_inline(self, app: Flask, state: AppState) -> None:
        """``inline`` runs a job with a key at once."""
        with inline(app):
            (job,) = add(state, "a")
        assert stored(app, job).status == "completed"

    def test_drain(self, app: Flask, state: AppState) -> None:
        """``drain`` runs jobs in the order of their turns."""
        add(state, "a", 3)
        add(state, "b", 2)
        assert keys([each.spec for each in drain(app)]) == "ababa"


class TestOption:
    def test_function(self, state: AppState) -> None:
        """The key may come from a function of the parameters."""
        job = run_background_job(ECHO, parameters=["x"], fair=lambda value: f"t-{value}")
        assert job.fair_key == "t-x"

    def test_long_key(self, state: AppState) -> None:
        """A long key is shortened, so that different ones stay different."""
        a, b = (run_background_job(ECHO, parameters=["x" * 300 + c], fair=BY_VALUE) for c in "ab")
        assert a.fair_key != b.fair_key
        assert len(a.fair_key) == 255

    @pytest.mark.parametrize(
        ("fair", "message"),
        [
            ("{tenant}", "fair='{tenant}' names the parameter 'tenant'; the parameters are value"),
            ("{", "is not a valid format"),
            (True, "fair must be False, a format such as"),
            (5, "fair must be False, a format such as"),
            (lambda value: None, "must return a str"),
        ],
    )
    def test_wrong(self, state: AppState, fair: Any, message: str) -> None:
        """A key that cannot be made is refused, with the reason."""
        with pytest.raises(InvalidJob, match=message.replace("{", r"\{")):
            run_background_job(ECHO, parameters=["x"], fair=fair)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (5, "BGJOBS_WEIGHTS = 5: must be a dict of key to number"),
            ({5: 1}, "5 is not a key of fair"),
            ({"a": 0}, "a weight is a number from 0.01 to 1,000, not 0"),
        ],
    )
    def test_wrong_weights(self, weights: Any, message: str) -> None:
        """Weights that are not valid are refused at the start."""
        with pytest.raises(ConfigError, match=message):
            build_app("sqlite:///:memory:", BGJOBS_WEIGHTS=weights)


def test_unused_keys_are_deleted(state: AppState, worker: int) -> None:
    """The row of a key that no job has used for a day is deleted."""
    add(state, "a")
    add(state, "b")
    state.store.promote()
    old = state.store.clock().replace(year=2020)
    execute(state, sa.update(FairKey).where(FairKey.name == "a").values(used_at=old))
    assert state.store.prune_fair_keys(100) == 1
    assert [row.name for row in rows(state, FairKey)] == ["b"]
    assert rows(state, Weight) == []
