"""Unique, debounced and throttled jobs on each database, also compared with a model."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from flask_bgjobs import (
    BgJobs,
    ConfigError,
    InvalidJob,
    Job,
    UniqueKeyTaken,
    run_background_job,
)
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_all
from flask_bgjobs.job.records import JobSpec, Outcome
from flask_bgjobs.job.statuses import FINAL, JobStatus, OutcomeKind
from flask_bgjobs.models import Base
from flask_bgjobs.options import NO_OPTIONS, options_from
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.state import AppState
from flask_bgjobs.store import database
from flask_bgjobs.store.statements import unique
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.registration import register
from tests.conftest import count_jobs, stored

_TIMES = (
    *("run_at", "created_at", "finished_at", "deadline_at", "waiting_since"),
    *("unique_expires_at", "debounce_until"),
)


def enqueue(*parameters: Any, **options: Any) -> Job:
    return run_background_job("tests.jobs.echo", parameters=parameters, **options)


def pass_time(state: AppState, seconds: float) -> None:
    """Move the times of all jobs into the past, as if so many seconds had passed."""
    table = Job.__table__
    columns = [table.c[name] for name in _TIMES]
    step = dt.timedelta(seconds=seconds)

    def work(connection: sa.Connection) -> None:
        for row in connection.execute(sa.select(table.c.id, *columns)).all():
            earlier = {n: v - step for n, v in row._mapping.items() if n != "id" and v is not None}
            connection.execute(sa.update(table).where(table.c.id == row.id).values(earlier))

    state.store.transaction(work)


def claim(state: AppState, limit: int = 1) -> list[JobSpec]:
    """Claim jobs that are due, as a worker does."""
    state.store.promote()
    return state.store.claim(worker_of(state), limit)


def worker_of(state: AppState) -> int:
    workers = state.store.living_workers()
    return workers[0].id if workers else register(state, "w")


def settle(state: AppState, spec: JobSpec, kind: OutcomeKind) -> None:
    """Record the outcome of an attempt."""
    outcome = Outcome(spec.id, spec.attempt, kind)
    state.store.settle(worker_of(state), "w", [(spec, outcome)])


def allow(state: AppState, function: Callable[..., Any], **options: Any) -> None:
    """Allow a function as the job ``f``, as ``@bgjobs.job(name="f")`` does."""
    decorated = {"f": Decorated(function, options_from(options))}
    state.registry = Registry(state.config.allowed_jobs, decorated)


def bulk(state: AppState, parameter_sets: list[list[Any]]) -> list[Job]:
    """Enqueue jobs of the function ``f`` at once, with its own options."""
    return enqueue_all(state, "f", None, parameter_sets, NO_OPTIONS)


def _statements_of(state: AppState, seen: list[str]) -> tuple[Any, ...]:
    """Record the statements of the store's own connections."""

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    listen = state.store.engine, "before_cursor_execute", note
    sa.event.listen(*listen)
    return listen


def _lock_settings(session: Any) -> Any:
    """The time for which the session's transaction waits for a lock."""
    is_mysql = session.get_bind().dialect.name in ("mysql", "mariadb")
    name = "@@SESSION.innodb_lock_wait_timeout" if is_mysql else "current_setting('lock_timeout')"
    return session.scalar(sa.text(f"SELECT {name}"))


class TestKeys:
    def test_all_parameters(self, app: Flask, state: AppState) -> None:
        """With ``unique=True``, jobs with equal parameters are the same, however they are
        passed."""
        allow(state, lambda a, b=2: None, unique=True)
        first = run_background_job("f", parameters=[1])
        same = [
            run_background_job("f", parameters=each)
            for each in ([1, 2], {"a": 1}, {"b": 2, "a": 1})
        ]
        assert [(job.id, job.deduplicated) for job in same] == [(first.id, True)] * 3
        others = [
            run_background_job("f", parameters=each) for each in ([2], ["1"], {"a": 1, "b": 3})
        ]
        assert len({job.id for job in others}) == 3
        assert count_jobs(app) == 4

    def test_values_of_any_type(self, app: Flask, state: AppState) -> None:
        """Equal containers have equal keys, whatever the order of their keys."""
        allow(state, lambda value: None, unique=True)
        first = run_background_job("f", parameters=[{"x": [1, {"y": 2}], "z": dt.date(2026, 1, 2)}])
        same = run_background_job("f", parameters=[{"z": dt.date(2026, 1, 2), "x": [1, {"y": 2}]}])
        assert same.id == first.id
        assert run_background_job("f", parameters=[{"x": [1, {"y": 3}]}]).id != first.id

    def test_format(self, app: Flask, state: AppState) -> None:
        """A format names the parameters that count, and the key can be read."""
        allow(state, lambda order_id, note="": None, unique="{order_id}")
        first = run_background_job("f", parameters=[7, "a"])
        assert run_background_job("f", parameters={"order_id": 7, "note": "b"}).id == first.id
        assert run_background_job("f", parameters=[8, "a"]).id != first.id
        assert first.unique_key == "f:7"

    def test_function(self, app: Flask, state: AppState) -> None:
        """A function of the parameters returns the key."""
        allow(state, lambda address: None, unique=lambda address: address.lower())
        first = run_background_job("f", parameters=["A@x.org"])
        assert run_background_job("f", parameters={"address": "a@X.org"}).id == first.id

    def test_name_of_the_job_is_part_of_the_key(self, app: Flask) -> None:
        """The same parameters of another job are no duplicate; a ``unique_key`` is shared."""
        names = ("tests.jobs.echo", "tests.jobs.fail")
        jobs = [run_background_job(name, parameters=["x"], unique=True) for name in names]
        assert jobs[0].id != jobs[1].id
        jobs = [run_background_job(name, parameters=["x"], unique_key="k") for name in names]
        assert jobs[0].id == jobs[1].id

    def test_secrets_are_not_in_the_key(self, app: Flask, state: AppState) -> None:
        """A key that is made from a secret cannot be read."""
        for key in (True, "{password}"):
            allow(state, lambda password: None, unique=key)
            job = run_background_job("f", parameters=["hunter2"])
            assert "hunter2" not in str(job.unique_key)
            assert run_background_job("f", parameters=["hunter2"]).id == job.id

    def test_long_keys(self, app: Flask, state: AppState) -> None:
        """Keys that differ only at their end are different."""
        allow(state, lambda text: None, unique="{text}")
        first = run_background_job("f", parameters=["x" * 1_000 + "a"])
        second = run_background_job("f", parameters=["x" * 1_000 + "b"])
        assert first.id != second.id
        assert len(stored(app, first).unique_key) == 255
        assert run_background_job("f", parameters=["x" * 1_000 + "a"]).id == first.id

    def test_many_at_once(self, app: Flask, state: AppState) -> None:
        """In one call, each job has its own key, and the first of several equal ones is kept."""
        bgjobs = BgJobs()
        function = bgjobs.job(name="f", unique="{a}")(lambda a, b: None)
        state.registry = Registry({}, bgjobs._decorated)
        before = function.enqueue(2, "old")
        jobs = bgjobs.enqueue_many(function, [(1, "x"), (2, "x"), (3, "x"), (1, "y")])
        assert jobs[1].id == before.id
        assert jobs[3].id == jobs[0].id
        assert [job.deduplicated for job in jobs] == [False, True, False, True]
        assert count_jobs(app) == 3
        assert stored(app, jobs[0]).parameters == [1, "x"]

    def test_many_take_few_statements(self, app: Flask, state: AppState) -> None:
        """Jobs with free keys are inserted together, in order; jobs with taken ones are found."""
        allow(state, lambda n: None, unique=True)
        held = run_background_job("f", parameters=[500])
        statements: list[str] = []
        listen = _statements_of(state, statements)
        with app.app_context():
            jobs = bulk(state, [[n] for n in (*range(1_000), 3, 3)])
        sa.event.remove(*listen)
        assert len(statements) < 30
        assert [job.parameters for job in jobs] == [[n] for n in (*range(1_000), 3, 3)]
        assert [job.id for job in jobs if job.deduplicated] == [held.id, jobs[3].id, jobs[3].id]
        ids = [job.id for job in jobs[:1_000] if job.id != held.id]
        assert ids == sorted(set(ids))
        with state.store.read() as connection:
            rows = connection.execute(sa.select(Job.id, Job.unique_key, Job.unique_hash)).all()
        assert len(rows) == 1_000
        assert {row.id: unique.unique_hash(row.unique_key) for row in rows} == {
            row.id: row.unique_hash for row in rows
        }

    def test_many_with_other_options(self, app: Flask, state: AppState) -> None:
        """``replace``, ``debounce`` and ``raise`` apply to each of many jobs."""
        allow(state, lambda n, m=0: None, unique="{n}", on_duplicate="replace", tags=["new"])
        held = run_background_job("f", parameters=[1, 1], tags=["old"])
        jobs = bulk(state, [[1, 2], [2, 1], [2, 2]])
        assert [job.id for job in jobs] == [held.id, jobs[1].id, jobs[1].id]
        assert [stored(app, jobs[n]).parameters for n in (0, 1)] == [[1, 2], [2, 2]]
        assert stored(app, held).tags == ["new"]
        allow(state, lambda n, m=0: None, unique="{n}", debounce=60)
        (job, again) = bulk(state, [[7, 1], [7, 2]])
        assert (again.id, stored(app, job).status) == (job.id, "scheduled")
        assert stored(app, job).parameters == [7, 2]
        allow(state, lambda n, m=0: None, unique="{n}", on_duplicate="raise")
        with pytest.raises(UniqueKeyTaken):
            bulk(state, [[8], [8]])
        assert count_jobs(app) == 3

    def test_joined_transaction(self, app: Flask) -> None:
        """A unique job joins a transaction, and a duplicate does not abort it."""
        db = app.extensions["sqlalchemy"]
        first = enqueue(1, unique=True, session=db.session)
        assert enqueue(1, unique=True, session=db.session).id == first.id
        db.session.rollback()
        assert count_jobs(app) == 0
        kept = enqueue(1, unique=True)
        replaced = enqueue(1, unique=True, on_duplicate="replace", tags=["new"], session=db.session)
        moved = enqueue(2, debounce=60, unique="{value}", session=db.session)
        db.session.commit()
        assert (replaced.id, stored(app, kept).tags) == (kept.id, ["new"])
        assert stored(app, moved).status == JobStatus.SCHEDULED

    def test_cancelled_job_of_the_next_window(self, app: Flask, state: AppState) -> None:
        """If the job of the next window was cancelled, the next enqueue is due in its place; if
        the first one was cancelled before it ran, at once."""
        first = enqueue(1, throttle=60)
        state.cancel([enqueue(2, throttle=60).id])
        second = enqueue(3, throttle=60)
        assert (stored(app, second).status, stored(app, second).parameters) == ("scheduled", [3])
        waits = stored(app, second).run_at - stored(app, first).run_at
        assert abs(waits.total_seconds() - 60) < 5
        state.cancel([first.id, second.id])
        assert enqueue(4, throttle=60).status == "pending"

    @pytest.mark.on("postgresql", "mysql")
    @pytest.mark.parametrize("options", [{"unique": True}, {"debounce": 60}], ids=str)
    def test_long_transaction_of_another_enqueue(
        self, app: Flask, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        """An enqueue does not wait long for the transaction of another one with the same key. It
        raises, and its own transaction can be used further."""
        monkeypatch.setattr(unique, "_LOCK_SECONDS", 1.0)
        monkeypatch.setattr(database, "_REDO_SECONDS", 2.0)
        db = app.extensions["sqlalchemy"]
        before = _lock_settings(db.session)
        with Session(db.engine) as other:
            kept = enqueue(1, session=other, **options)
            assert _lock_settings(other) == before
            for session in (db.session, None):
                began = time.monotonic()
                with pytest.raises(UniqueKeyTaken, match="and is still open: commit soon "):
                    enqueue(1, session=session, **options)
                assert time.monotonic() - began < 10
            assert _lock_settings(db.session) == before
            joined = enqueue(2, session=db.session)
            db.session.commit()
            assert (stored(app, joined).status, count_jobs(app)) == ("pending", 1)
            other.commit()
        assert enqueue(1, session=db.session, **options).id == kept.id
        db.session.rollback()
        assert count_jobs(app) == 2

    @pytest.mark.on("postgresql")
    def test_session_in_autocommit_mode(self, app: Flask) -> None:
        """A unique job can join a session without transactions, and holds its key at once."""
        db = app.extensions["sqlalchemy"]
        engine = db.engine.execution_options(isolation_level="AUTOCOMMIT")
        with Session(engine) as session:
            job = enqueue(1, unique=True, session=session)
            assert enqueue(1, unique=True, session=None).id == job.id

    @pytest.mark.on("postgresql")
    def test_shorter_lock_timeout_of_the_host(self, app: Flask) -> None:
        """A shorter lock timeout of the host's transaction applies, and is kept."""
        db = app.extensions["sqlalchemy"]
        with Session(db.engine) as other:
            enqueue(1, unique=True, session=other)
            db.session.execute(sa.text("SET LOCAL lock_timeout = '150ms'"))
            began = time.monotonic()
            with pytest.raises(UniqueKeyTaken):
                enqueue(1, unique=True, session=db.session)
            assert time.monotonic() - began < 4
            assert _lock_settings(db.session) == "150ms"
            db.session.rollback()

    def test_switched_off_for_one_enqueue(self, app: Flask, state: AppState) -> None:
        """``unique=False`` overrides the decorator."""
        allow(state, lambda: None, unique=True)
        first = run_background_job("f")
        assert run_background_job("f", unique=False).id != first.id

    def test_key_of_a_schedule(self, make_app: Callable[..., Flask]) -> None:
        """The jobs of a schedule can be unique as well."""
        entry = {"job": "tests.jobs.echo", "parameters": [1], "every": 100, "unique": True}
        app = make_app(BGJOBS_SCHEDULE={"s": entry})
        with app.app_context():
            from flask_bgjobs.flow.schedules.manage import find
            from flask_bgjobs.state import state_of

            first = find(state_of(app), "s").run_now()
            assert find(state_of(app), "s").run_now().id == first.id
            assert enqueue(1, unique=True).id == first.id


class TestUntil:
    def test_started(self, app: Flask, state: AppState) -> None:
        """With ``unique_until="started"``, the key is free when the job is claimed, and a retry
        beside a newer job does not conflict."""
        first = enqueue(1, unique=True, unique_until="started", retry_delay=0)
        assert enqueue(1, unique=True, unique_until="started").id == first.id
        (spec,) = claim(state)
        second = enqueue(1, unique=True, unique_until="started")
        assert second.id != first.id
        settle(state, spec, OutcomeKind.FAILED)
        state.store.promote()
        assert stored(app, first).status == JobStatus.PENDING
        assert {spec.id for spec in claim(state, 9)} == {first.id, second.id}

    def test_started_and_retried_by_hand(self, app: Flask, state: AppState) -> None:
        """A retry by hand does not need the key either."""
        first = enqueue(1, unique=True, unique_until="started", retries=0)
        (spec,) = claim(state)
        settle(state, spec, OutcomeKind.FAILED)
        second = enqueue(1, unique=True, unique_until="started")
        assert state.store.retry([first.id]).done == [first.id]
        assert stored(app, second).unique_hash is not None

    @pytest.mark.parametrize("until", ["finished", "started"])
    def test_for_a_time(self, app: Flask, state: AppState, until: str) -> None:
        """With ``unique_for``, the key stays taken after the end, and then the next enqueue takes
        it."""
        options = {"unique": True, "unique_for": 3600, "unique_until": until}
        first = enqueue(1, **options)
        (spec,) = claim(state)
        settle(state, spec, OutcomeKind.COMPLETED)
        pass_time(state, 3000)
        assert enqueue(1, **options).id == first.id
        pass_time(state, 700)
        second = enqueue(1, **options)
        assert second.id != first.id
        assert stored(app, first).unique_hash is None
        assert enqueue(1, **options).id == second.id

    def test_for_a_time_with_a_long_job(self, app: Flask, state: AppState) -> None:
        """A job that runs for longer than ``unique_for`` keeps its key until it has finished."""
        first = enqueue(1, unique=True, unique_for=60)
        (spec,) = claim(state)
        pass_time(state, 100)
        assert enqueue(1, unique=True, unique_for=60).id == first.id
        settle(state, spec, OutcomeKind.COMPLETED)
        assert enqueue(1, unique=True, unique_for=60).id != first.id

    def test_prune_leaves_keys_that_are_taken(self, app: Flask, state: AppState) -> None:
        """A finished job is not pruned while it keeps its key taken."""
        enqueue(1, unique=True, unique_for=3600)
        settle(state, *claim(state), OutcomeKind.COMPLETED)
        retention = dict.fromkeys(FINAL, 0.0)
        assert state.store.prune(retention, 10, None).deleted == 0
        pass_time(state, 3700)
        assert state.store.prune(retention, 10, None).deleted == 1


class TestOnDuplicate:
    def test_replace(self, app: Flask, state: AppState) -> None:
        """A job that has not started gets the new parameters and options."""
        first = enqueue(1, unique_key="k", queue="a", delay=60, retries=1)
        again = enqueue(
            2, unique_key="k", on_duplicate="replace", queue="b", priority="high", tags=["t"]
        )
        assert (again.id, again.deduplicated) == (first.id, True)
        job = stored(app, first)
        assert (job.parameters, job.queue, job.priority) == ([2], "b", 3)
        assert (job.tags, job.retries, job.status) == (["t"], 3, JobStatus.PENDING)
        assert job.created_at == first.created_at
        assert [spec.id for spec in claim(state)] == [first.id]

    def test_replace_moves_the_time(self, app: Flask, state: AppState) -> None:
        """The time of the newest enqueue counts."""
        first = enqueue(1, unique_key="k")
        enqueue(2, unique_key="k", on_duplicate="replace", delay=3600)
        job = stored(app, first)
        assert job.status == JobStatus.SCHEDULED
        assert (job.run_at - first.created_at).total_seconds() > 3500
        later = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        enqueue(2, unique_key="k", on_duplicate="replace", run_at=later)
        assert stored(app, first).run_at == later.replace(tzinfo=None)

    def test_replace_leaves_a_running_job(self, app: Flask, state: AppState) -> None:
        """A job that runs, or waits for its retry, is returned as it is."""
        first = enqueue(1, unique_key="k", retry_delay=3600)
        (spec,) = claim(state)
        for kind in (None, OutcomeKind.FAILED):
            if kind is not None:
                settle(state, spec, kind)
            again = enqueue(2, unique_key="k", on_duplicate="replace")
            assert (again.id, again.parameters) == (first.id, [1])

    @pytest.mark.parametrize("kind", [OutcomeKind.GIVEN_BACK, OutcomeKind.FAILED])
    def test_replace_leaves_a_job_that_was_claimed(
        self, app: Flask, state: AppState, kind: OutcomeKind
    ) -> None:
        """A job that is pending again after an attempt is returned as it is."""
        first = enqueue(1, unique_key="k", retry_delay=0)
        settle(state, *claim(state), kind)
        state.store.promote()
        assert stored(app, first).status == JobStatus.PENDING
        assert enqueue(2, unique_key="k", on_duplicate="replace").parameters == [1]

    def test_raise(self, app: Flask) -> None:
        """With ``raise``, the error names the job and its status."""
        first = enqueue(1, unique_key="k", on_duplicate="raise")
        with pytest.raises(
            UniqueKeyTaken, match=rf"job {first.id} holds the unique key 'k'; .*ing"
        ):
            enqueue(2, unique_key="k", on_duplicate="raise")
        assert count_jobs(app) == 1


class TestDebounce:
    def test_last_call_wins(self, app: Flask, state: AppState) -> None:
        """Each call moves the job on, and the last parameters are used."""
        first = enqueue(1, debounce=60, debounce_max=150)
        assert stored(app, first).status == JobStatus.SCHEDULED
        for number in (2, 3):
            pass_time(state, 50)
            assert enqueue(number, debounce=60, debounce_max=150).id == first.id
            assert claim(state) == []
        assert seconds_until(state, first) == pytest.approx(50, abs=5), "at most 150 s in all"
        pass_time(state, 51)
        (outcome,) = drain(app)
        assert outcome.result == 3

    def test_job_that_has_started_is_not_changed(self, app: Flask, state: AppState) -> None:
        """A call after the start makes a new job."""
        first = enqueue(1, debounce=60)
        pass_time(state, 61)
        (spec,) = claim(state)
        second = enqueue(2, debounce=60)
        assert (spec.id, spec.parameters) == (first.id, [1])
        assert second.id != first.id

    def test_due_job_is_moved_on_unless_it_has_waited_long_enough(
        self, app: Flask, state: AppState
    ) -> None:
        """A job that is due but not claimed is moved on, up to the maximum."""
        for longest, status in ((None, JobStatus.SCHEDULED), (100, JobStatus.PENDING)):
            first = enqueue(1, debounce=60, debounce_max=longest, unique_key=f"k{longest}")
            pass_time(state, 120)
            state.store.promote()
            enqueue(2, debounce=60, debounce_max=longest, unique_key=f"k{longest}")
            job = stored(app, first)
            assert (job.status, job.parameters) == (status, [2])

    def test_keys(self, app: Flask) -> None:
        """Without a key, all jobs of a function count as the same; with one, those of the key."""
        assert enqueue(1, debounce=60).id == enqueue(2, debounce=60).id
        jobs = [enqueue(n, debounce=60, unique="{value}") for n in (1, 2, 1)]
        assert jobs[0].id == jobs[2].id != jobs[1].id


class TestThrottle:
    def test_first_at_once_and_newest_of_the_others_later(
        self, app: Flask, state: AppState
    ) -> None:
        """The first runs now, the newest of the others at the end of the window, and so on."""
        assert enqueue(1, throttle=60).status == JobStatus.PENDING
        assert [outcome.result for outcome in drain(app)] == [1]
        waiting = [enqueue(n, throttle=60) for n in (2, 3, 4)]
        assert len({job.id for job in waiting}) == 1
        assert [job.deduplicated for job in waiting] == [False, True, True]
        assert drain(app) == []
        assert seconds_until(state, waiting[0]) == pytest.approx(60, abs=5)
        pass_time(state, 61)
        assert [outcome.result for outcome in drain(app)] == [4]
        # Its own window has begun.
        enqueue(5, throttle=60)
        assert drain(app) == []
        pass_time(state, 60)
        assert [outcome.result for outcome in drain(app)] == [5]
        pass_time(state, 61)
        assert enqueue(6, throttle=60).status == JobStatus.PENDING

    def test_concurrent_calls(self, app: Flask, state: AppState) -> None:
        """Calls at the same moment make one job for now and one for later."""
        assert call_at_once(app, lambda number: enqueue(number, throttle=3600)) == []
        assert count_jobs(app) == 2
        assert len(drain(app)) == 1


@pytest.mark.parametrize("options", [{}, {"on_duplicate": "replace"}, {"debounce": 60}], ids=str)
def test_concurrent_enqueues_make_one_job(app: Flask, options: Any) -> None:
    """However many processes enqueue at the same moment, there is one job."""
    for round_number in range(3):
        key = f"k{round_number}"
        assert call_at_once(app, lambda n, key=key: enqueue(n, unique_key=key, **options)) == []
        assert count_jobs(app) == round_number + 1


def test_concurrent_bulk_enqueues_make_one_job_each(app: Flask, state: AppState) -> None:
    """The same holds for many jobs at once, whatever their order."""
    allow(state, lambda n: None, unique=True)
    numbers = [[n] for n in range(60)]

    def call(number: int) -> None:
        jobs = bulk(state, numbers if number % 2 else numbers[::-1])
        assert len({job.id for job in jobs}) == len(numbers)

    for round_number in range(3):
        assert call_at_once(app, call) == []
        assert count_jobs(app) == len(numbers) * (round_number + 1)
        numbers = [[n + 1_000] for (n,) in numbers]


def call_at_once(app: Flask, call: Callable[[int], object]) -> list[BaseException]:
    """Call a function in four threads at the same moment.

    :returns: the exceptions that it raised.
    """
    barrier, failures = threading.Barrier(4), []

    def run(number: int) -> None:
        try:
            with app.app_context():
                barrier.wait()
                call(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.on("sqlite")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique": True, "unique_key": "k"}, "not both"),
        ({"unique": "{x}"}, "names the parameter 'x'; the parameters are value"),
        ({"unique": "{value.real}"}, "must name parameters"),
        ({"unique": "{"}, "not a valid format"),
        ({"unique": 7}, "unique must be True, a format"),
        ({"unique": lambda value=0: 7}, "must return a str, not 7"),
        ({"unique": lambda: "x"}, "raised TypeError"),
        ({"unique_until": "started"}, "unique_until needs unique or unique_key"),
        ({"unique": True, "unique_until": "ended"}, "one of finished, started, not 'ended'"),
        ({"unique_for": 60}, "unique_for needs unique"),
        ({"unique": True, "unique_for": 0}, "unique_for must be more than 0 s"),
        ({"unique": True, "on_duplicate": "drop"}, "one of keep, replace, raise"),
        ({"debounce": 0}, "debounce must be more than 0 s"),
        ({"debounce": 60, "delay": 5}, "debounce cannot be combined with delay"),
        ({"debounce": 60, "throttle": 60}, "debounce cannot be combined with throttle"),
        ({"debounce": 60, "debounce_max": 30}, "at least as long"),
        ({"debounce_max": 30}, "debounce_max needs debounce"),
        ({"throttle": 60, "unique_for": 5}, "throttle cannot be combined with unique_for"),
    ],
    ids=itertools.count(),
)
def test_invalid_options(app: Flask, options: Any, message: str) -> None:
    """Options that are not valid, or cannot be combined, are refused with the reason."""
    with pytest.raises(InvalidJob) as refusal:
        enqueue(1, **options)
    assert message in str(refusal.value)
    assert count_jobs(app) == 0


@pytest.mark.on("sqlite")
def test_decorator_refuses_a_wrong_format() -> None:
    """A format with a wrong name is refused when the function is decorated."""
    with pytest.raises(ConfigError, match=r"@bgjobs\.job of f: .* the parameters are order_id"):
        BgJobs().job(name="f", unique="{order}")(lambda order_id: None)


def seconds_until(state: AppState, job: Job) -> float:
    """Seconds from now to the due time of a job."""
    now: dt.datetime = state.store.clock()
    found = state.store.get(job.id)
    assert found is not None
    return (found.run_at - now).total_seconds()


# A model of unique jobs. Times are seconds; the real time that passes is too short to matter.

CONFIGURATIONS: Mapping[str, dict[str, Any]] = {
    "keep": {},
    "started": {"unique_until": "started"},
    "for": {"unique_for": 20_000},
    "for, started": {"unique_for": 20_000, "unique_until": "started"},
    "replace": {"on_duplicate": "replace"},
    "replace, started": {"on_duplicate": "replace", "unique_until": "started"},
    "replace, for": {"on_duplicate": "replace", "unique_for": 20_000},
    "debounce": {"debounce": 10_000},
    "debounce, max": {"debounce": 10_000, "debounce_max": 25_000},
    "throttle": {"throttle": 10_000},
}


@dataclasses.dataclass
class ModelJob:
    value: int
    due: float
    status: str = "waiting"
    has_started: bool = False
    holds: bool = True
    expires: float | None = None
    latest: float | None = None


class Model:
    """What the documentation says about the jobs of one key."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.now = 0.0
        self.jobs: list[ModelJob] = []
        self._options = options

    def enqueue(self, value: int) -> int:
        """:returns: the number of the job."""
        if "throttle" in self._options:
            return self._throttle(value, self._options["throttle"])
        for number, job in enumerate(self.jobs):
            if self._is_taken_by(job):
                if job.status == "waiting" and not job.has_started:
                    self._replace(job, value)
                return number
        for job in self.jobs:
            job.holds = False
        debounce, longest = self._options.get("debounce", 0.0), self._options.get("debounce_max")
        kept = self._options.get("unique_for")
        self.jobs.append(
            ModelJob(
                value,
                self.now + debounce,
                expires=None if kept is None else self.now + kept,
                latest=None if longest is None else self.now + longest,
            )
        )
        return len(self.jobs) - 1

    def _is_taken_by(self, job: ModelJob) -> bool:
        if not job.holds:
            return False
        until_start = "debounce" in self._options or "unique_until" in self._options
        needs_key = job.status in ("waiting", "running", "retrying")
        if until_start:
            needs_key = job.status == "waiting" and not job.has_started
        return needs_key or (job.expires is not None and job.expires > self.now)

    def _replace(self, job: ModelJob, value: int) -> None:
        if "debounce" in self._options:
            later = self.now + self._options["debounce"]
            job.value, job.due = value, later if job.latest is None else min(later, job.latest)
        elif self._options.get("on_duplicate") == "replace":
            job.value, job.due = value, self.now

    def _throttle(self, value: int, window: float) -> int:
        holders = [(n, job) for n, job in enumerate(self.jobs) if job.holds]
        for number, job in holders:
            if job.due > self.now and not job.has_started and job.status == "waiting":
                job.value = value
                return number
        for _, job in holders:
            never_ran = job.status == "cancelled" and not job.has_started
            job.holds = (job.expires or 0.0) > self.now and not never_ran
        begins = max((job.expires or 0.0 for _, job in holders if job.holds), default=self.now)
        self.jobs.append(ModelJob(value, begins, expires=begins + window))
        return len(self.jobs) - 1

    def promote(self) -> None:
        """Make due retries wait for a worker."""
        for job in self.jobs:
            if job.status == "retrying" and job.due <= self.now:
                job.status = "waiting"

    def claimable(self) -> set[int]:
        """The jobs of which one is claimed next; several if they are due at the same time."""
        waiting = [(n, j) for n, j in enumerate(self.jobs) if j.status in ("waiting", "retrying")]
        due = [(number, job) for number, job in waiting if job.due <= self.now]
        first = min((job.due for _, job in due), default=0.0)
        return {number for number, job in due if job.due == first}


STEPS = st.one_of(
    st.just(("enqueue", 0)),
    st.just(("claim", 0)),
    st.tuples(st.sampled_from(["complete", "fail", "retry", "cancel"]), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.sampled_from([3_700, 7_900, 12_100])),
)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_model(app: Flask, state: AppState, configuration: str) -> None:
    """After any sequence of enqueues, claims, outcomes, cancels and passing time, the database has
    the jobs that the model has."""
    reached: set[str] = set()

    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(STEPS, min_size=6, max_size=16))
    def compare(steps: list[tuple[str, int]]) -> None:
        _delete_all(state)
        _run(state, CONFIGURATIONS[configuration], steps, reached)

    compare()
    assert reached >= {"inserted", "deduplicated", "claimed"}


def _run(
    state: AppState,
    options: Mapping[str, Any],
    steps: list[tuple[str, int]],
    reached: set[str],
) -> None:
    model = Model(options)
    key = {} if {"debounce", "throttle"} & set(options) else {"unique_key": "k"}
    ids: list[int] = []
    running: dict[int, JobSpec] = {}
    values = itertools.count(1)
    for step, argument in steps:
        if step == "enqueue":
            value = next(values)
            number = model.enqueue(value)
            job = enqueue(value, **key, **options, retry_delay=5_000, retries=3)
            if number == len(ids):
                ids.append(job.id)
            assert job.id == ids[number]
            reached.add("deduplicated" if job.deduplicated else "inserted")
        elif step == "claim":
            claimable = model.claimable()
            model.promote()
            specs = claim(state)
            assert len(specs) == min(1, len(claimable))
            for spec in specs:
                number = ids.index(spec.id)
                assert number in claimable
                running[number] = spec
                reached.add("claimed")
                _claimed(model.jobs[number], options)
        elif step == "pass":
            model.now += argument
            pass_time(state, argument)
        else:
            _end(state, model, ids, running, step, argument)
        _assert_equal(state, model, ids)


def _claimed(job: ModelJob, options: Mapping[str, Any]) -> None:
    job.status, job.has_started = "running", True
    until_start = "debounce" in options or "unique_until" in options
    if until_start and job.expires is None:
        job.holds = False


def _end(
    state: AppState,
    model: Model,
    ids: list[int],
    running: dict[int, JobSpec],
    step: str,
    argument: int,
) -> None:
    if argument >= len(ids):
        return
    job = model.jobs[argument]
    if step == "cancel":
        if job.status in ("waiting", "retrying"):
            state.store.cancel([ids[argument]])
            _ended(job, "cancelled")
        return
    if argument not in running:
        return
    spec = running.pop(argument)
    if step == "retry":
        settle(state, spec, OutcomeKind.FAILED)
        if spec.retry_count < 3:
            job.status, job.due = "retrying", model.now + 5_000
        else:
            _ended(job, "failed")
    elif step == "fail":
        settle(state, spec, OutcomeKind.FAILED_FINALLY)
        _ended(job, "failed")
    else:
        settle(state, spec, OutcomeKind.COMPLETED)
        _ended(job, "completed")


def _ended(job: ModelJob, status: str) -> None:
    job.status = status
    if job.expires is None:
        job.holds = False


def _assert_equal(state: AppState, model: Model, ids: list[int]) -> None:
    table = Job.__table__
    columns = (table.c.id, table.c.status, table.c.parameters, table.c.unique_hash)
    with state.store.read() as connection:
        rows = connection.execute(sa.select(*columns).order_by(table.c.id)).all()
    words = {"pending": "waiting", "scheduled": "waiting"}
    found = [
        (row.id, words.get(row.status, row.status), json.loads(row.parameters)[0]) for row in rows
    ]
    expected = [(i, job.status, job.value) for i, job in zip(ids, model.jobs, strict=True)]
    assert found == expected
    assert [row.unique_hash is not None for row in rows] == [job.holds for job in model.jobs]


def _delete_all(state: AppState) -> None:
    def work(connection: sa.Connection) -> None:
        for table in Base.metadata.sorted_tables:
            connection.execute(sa.delete(table))

    state.store.transaction(work)
