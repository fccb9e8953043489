"""Recurring jobs on each database: registration, ticks, overrides, and changes by people."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import (
    BgJobs,
    InvalidJob,
    Job,
    JobNotAllowed,
    JobStatus,
    ScheduleNotFound,
    run_background_job,
    schedule_fired,
    schedule_skipped,
)
from flask_bgjobs.errors import ConfigError
from flask_bgjobs.flow.schedules.manage import Schedules, find
from flask_bgjobs.flow.schedules.pages import schedule_page
from flask_bgjobs.flow.schedules.ticker import Ticker
from flask_bgjobs.models import AuditEntry, Schedule, ScheduleTick
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.options import NO_OPTIONS
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import Actor, ScheduleChange
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.worker import Worker
from tests.apps import new_database
from tests.conftest import count_jobs, wait_until

ADA = Actor("ada", "dashboard")
ECHO = {"job": "tests.jobs.echo", "parameters": ["hello"]}
SECOND = dt.timedelta(seconds=1)
PERIOD = dt.timedelta(days=100)
"""So long that no tick comes by itself during a test."""
SOME_TIME = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)


def ticker_of(app: Flask) -> Ticker:
    """The ticker of a new worker, with its schedules registered."""
    state = state_of(app)
    ticker = Ticker(state, state.store)
    register(state, "w", schedules=ticker.names)
    ticker.register()
    return ticker


def now_of(state: AppState) -> dt.datetime:
    now, _ = state.store.schedules()
    return now


def row_of(state: AppState, name: str = "s") -> Schedule:
    _, (row,) = state.store.schedules(name)
    return row


def set_row(state: AppState, name: str = "s", **values: Any) -> None:
    """Change a row behind the back of all workers."""
    state.store.transaction(
        lambda c: c.execute(sa.update(Schedule).where(Schedule.name == name).values(**values))
    )


def make_due(state: AppState, seconds: float = 0, name: str = "s") -> dt.datetime:
    """Move the next tick to so many seconds ago."""
    tick = now_of(state) - dt.timedelta(seconds=seconds)
    set_row(state, name, next_tick_at=tick, due_at=tick)
    return tick


def pass_periods(state: AppState, number: int) -> dt.datetime:
    """Move the next tick into the past by so many periods, so that as many ticks are due.

    :returns: the first of them.
    """
    tick = row_of(state).next_tick_at - number * PERIOD
    set_row(state, next_tick_at=tick, due_at=tick)
    return tick


def ticks_of(state: AppState, name: str = "s") -> list[ScheduleTick]:
    """The ticks of a schedule, oldest first."""
    schedule_id = row_of(state, name).id
    return state.store.last_ticks([schedule_id], 1_000)[schedule_id][::-1]


def outcomes(state: AppState, name: str = "s") -> list[tuple[str, int]]:
    return [(tick.outcome, tick.missed) for tick in ticks_of(state, name)]


@pytest.fixture
def make(make_app: Callable[..., Flask]) -> Iterator[Callable[..., Flask]]:
    """Makes an app, in whose context the test then runs, with a schedule ``s``. Its interval is
    ``PERIOD`` unless the test says otherwise."""
    with contextlib.ExitStack() as contexts:

        def make(**entry: Any) -> Flask:
            timing = {} if "cron" in entry else {"every": PERIOD}
            app = make_app(BGJOBS_SCHEDULE={"s": {**ECHO, **timing, **entry}})
            contexts.enter_context(app.app_context())
            return app

        yield make


class TestTicks:
    def test_first_tick_comes_after_the_registration(self, make: Callable[..., Flask]) -> None:
        """A fresh schedule first runs at its next tick."""
        app = make(cron="0 3 * * *", timezone="Europe/Berlin")
        ticker = ticker_of(app)
        row = row_of(state_of(app))
        assert row.next_tick_at == row.due_at > now_of(state_of(app))
        assert row.next_tick_at.minute == 0
        assert ticker.fire() is False
        assert count_jobs(app) == 0

    def test_due_tick_enqueues_one_job(self, make: Callable[..., Flask]) -> None:
        """A due tick enqueues its job with the options of the schedule, and moves to the next."""
        app = make(queue="mail", retries=7, priority="high", tags=["nightly"])
        state = state_of(app)
        ticker = ticker_of(app)
        tick = pass_periods(state, 1)
        assert ticker.fire() is True
        assert ticker.fire() is False
        (entry,) = ticks_of(state)
        assert (entry.tick_at, entry.outcome, entry.missed) == (tick, "fired", 0)
        row = row_of(state)
        assert row.next_tick_at == row.due_at == tick + PERIOD
        assert (row.last_tick_at, row.last_job_id) == (tick, entry.job_id)
        job = Job.get(entry.job_id or 0)
        assert job is not None
        assert (job.queue, job.retries, job.priority, job.tags) == ("mail", 7, 3, ["nightly"])
        assert (job.parameters, job.status) == (["hello"], JobStatus.PENDING)
        assert job.meta == {"schedule": "s", "tick": tick.replace(tzinfo=dt.UTC)}
        (outcome,) = drain(app)
        assert outcome.result == "hello"

    def test_two_workers_enqueue_one_job(self, make: Callable[..., Flask]) -> None:
        """However many workers look at a due tick at the same moment, it has one job."""
        app = make()
        state = state_of(app)
        tickers = [ticker_of(app) for _ in range(4)]
        for round_number in range(1, 6):
            make_due(state)
            barrier = threading.Barrier(4)

            def fire(ticker: Ticker, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                with app.app_context():
                    ticker.fire()

            threads = [threading.Thread(target=fire, args=(each,)) for each in tickers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            drain(app)
            assert count_jobs(app) == round_number

    def test_worker_runs_it_every_second(self, make: Callable[..., Flask], tmp_path: Path) -> None:
        """A running worker enqueues and runs a job at each tick."""
        journal = tmp_path / "journal"
        app = make(job="tests.jobs.record", parameters=[str(journal), "x"], every=1)
        worker = Worker(state_of(app), WorkerOptions())
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            wait_until(lambda: journal.exists() and len(journal.read_text().split()) >= 3)
        finally:
            worker.stop()
            thread.join()
        ticks = ticks_of(state_of(app))
        assert {(tick.tick_at.microsecond, tick.outcome) for tick in ticks} == {(0, "fired")}
        assert len({tick.tick_at for tick in ticks}) == len(ticks)

    def test_backlog_does_not_hold_ticks_back(
        self, make: Callable[..., Flask], tmp_path: Path
    ) -> None:
        """While other jobs wait for a free thread, ticks are enqueued on time."""
        app = make(every=1, overlap="allow")
        gate = tmp_path / "gate"
        for _ in range(2):
            run_background_job("tests.jobs.wait_for_file", parameters=[str(gate)])
        worker = Worker(state_of(app), WorkerOptions(concurrency=1))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            wait_until(lambda: state_of(app).store.schedules()[1], "the registration")
            wait_until(lambda: len(ticks_of(state_of(app))) >= 2, "two ticks", 20)
        finally:
            gate.touch()
            worker.stop()
            thread.join()

    def test_worker_without_scheduler_runs_none(self, make: Callable[..., Flask]) -> None:
        """With ``--no-scheduler``, a worker neither registers schedules nor fires them."""
        app = make(every=1)
        Worker(state_of(app), WorkerOptions(scheduler=False, burst=True)).run()
        assert state_of(app).store.schedules()[1] == []
        assert state_of(app).store.live_schedule_names() == set()

    def test_nothing_is_enqueued_if_the_commit_fails(
        self, make: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tick, its job and the next tick are one transaction."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        tick = make_due(state, 0)
        record = state.store._record_ticks

        def fail(*arguments: Any) -> None:
            record(*arguments)
            raise ZeroDivisionError

        monkeypatch.setattr(state.store, "_record_ticks", fail)
        with pytest.raises(ZeroDivisionError):
            ticker.fire()
        assert (count_jobs(app), ticks_of(state)) == (0, [])
        assert row_of(state).next_tick_at == tick
        monkeypatch.undo()
        ticker.fire()
        assert count_jobs(app) == 1

    def test_signals_and_log_lines(
        self, make: Callable[..., Flask], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each tick sends a signal and writes a line, which for a skipped one has the reason."""
        app = make()
        ticker = ticker_of(app)
        seen: list[Any] = []

        def on_fired(_app: Flask, **values: Any) -> None:
            seen.append(values)

        def on_skipped(_app: Flask, **values: Any) -> None:
            seen.append(values)

        first = make_due(state_of(app))
        with (
            caplog.at_level(logging.INFO, "flask_bgjobs"),
            schedule_fired.connected_to(on_fired, app),
            schedule_skipped.connected_to(on_skipped, app),
        ):
            ticker.fire()
            second = make_due(state_of(app))
            ticker.fire()
        fired, skipped = seen
        assert fired["schedule"] == skipped["schedule"] == "s"
        assert fired["tick"] == first.replace(tzinfo=dt.UTC)
        assert skipped["tick"] == second.replace(tzinfo=dt.UTC)
        assert skipped["reason"] == f"job {fired['job'].id} is not finished"
        lines = [line for line in caplog.messages if line.startswith("Schedule ")]
        assert lines[0].startswith(
            f"Schedule fired | Schedule: s | Tick: {first:%Y-%m-%d %H:%M:%S}+00:00 | Job: "
        )
        assert f"| Reason: job {fired['job'].id} is not finished |" in lines[1]


class TestMissedTicks:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [("fired", 9)]),
            ({"missed": "all"}, [("fired", 0)] * 10),
            ({"missed": "skip"}, [("skipped", 9)]),
            ({"grace": 3 * PERIOD}, [("skipped", 6), ("fired", 2)]),
            ({"missed": "skip", "grace": 3 * PERIOD}, [("skipped", 6), ("fired", 2)]),
            ({"missed": "all", "grace": 3 * PERIOD}, [("skipped", 6), *[("fired", 0)] * 3]),
        ],
        ids=str,
    )
    def test_policies(
        self, make: Callable[..., Flask], options: Any, expected: list[tuple[str, int]]
    ) -> None:
        """Ticks that no worker ran are made up for as ``missed`` and ``grace`` say."""
        app = make(**options)
        state = state_of(app)
        ticker = ticker_of(app)
        first = pass_periods(state, 10)
        ticker.fire()
        assert outcomes(state) == expected
        assert row_of(state).next_tick_at == first + 10 * PERIOD

    @pytest.mark.parametrize(("seconds", "outcome"), [(40, "fired"), (120, "skipped")])
    def test_skip_allows_a_minute(
        self, make: Callable[..., Flask], seconds: float, outcome: str
    ) -> None:
        """With ``missed="skip"``, a nightly job runs after a restart, but not at noon."""
        state = state_of(make(missed="skip"))
        ticker = ticker_of(state.app)
        make_due(state, seconds)
        ticker.fire()
        (tick,) = ticks_of(state)
        assert tick.outcome == outcome
        assert tick.reason == (None if outcome == "fired" else "no worker ran it in time")

    def test_catch_up_is_limited(self, make: Callable[..., Flask]) -> None:
        """After a long outage, ``missed="all"`` runs the newest 100 ticks."""
        app = make(missed="all", every=1)
        state = state_of(app)
        ticker = ticker_of(app)
        make_due(state, 86_400)
        ticker.fire()
        assert count_jobs(app) == 100
        oldest, *rest = ticks_of(state)
        assert (oldest.outcome, oldest.reason) == ("skipped", "only the newest 100 ticks are kept")
        assert [tick.outcome for tick in rest] == ["fired"] * 100
        assert rest[-1].tick_at - rest[0].tick_at == 99 * SECOND

    def test_ticks_are_made_up_for_after_a_restart(self, make: Callable[..., Flask]) -> None:
        """A worker that starts after a missed tick runs it at once, also at a deploy that changes
        the time."""
        app = make()
        state = state_of(app)
        ticker_of(app)
        make_due(state, 30)
        changed = make(cron="0 0 1 1 *")
        ticker_of(changed).fire()
        assert len(ticks_of(state)) == 1
        assert count_jobs(app) == 1
        assert row_of(state).next_tick_at.month == 1


class TestOverlap:
    def test_skip(self, make: Callable[..., Flask]) -> None:
        """By default, a tick is skipped while the last job is not finished."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        for _ in range(2):
            make_due(state)
            ticker.fire()
        fired, skipped = ticks_of(state)
        assert skipped.reason == f"job {fired.job_id} is not finished"
        assert (skipped.outcome, skipped.job_id) == ("skipped", fired.job_id)
        assert count_jobs(app) == 1

    def test_allow(self, make: Callable[..., Flask]) -> None:
        """With ``overlap="allow"``, each tick has a job."""
        app = make(overlap="allow")
        state = state_of(app)
        ticker = ticker_of(app)
        for _ in range(2):
            make_due(state)
            ticker.fire()
        assert count_jobs(app) == 2

    @pytest.mark.parametrize("missed", ["once", "all"])
    def test_queue(self, make: Callable[..., Flask], missed: str) -> None:
        """With ``overlap="queue"``, ticks run one after another, and none is lost."""
        app = make(overlap="queue", missed=missed)
        state = state_of(app)
        ticker = ticker_of(app)
        first = pass_periods(state, 4)
        set_row(state, held_at=now_of(state))
        ticker.fire()
        assert row_of(state).next_tick_at == first + PERIOD
        for number in range(1, 4):
            assert count_jobs(app) == number
            set_row(state, due_at=now_of(state) - SECOND)
            ticker.fire()
            assert count_jobs(app) == number
            assert row_of(state).held_at is not None
            drain(app)
            set_row(state, due_at=now_of(state) - SECOND)
            ticker.fire()
        assert [tick.tick_at for tick in ticks_of(state)] == [first + n * PERIOD for n in range(4)]
        assert {tick.outcome for tick in ticks_of(state)} == {"fired"}

    def test_queue_checks_again_within_seconds(self, make: Callable[..., Flask]) -> None:
        """A queued tick is due again a second later, by the database's clock."""
        app = make(overlap="queue")
        state = state_of(app)
        ticker = ticker_of(app)
        for _ in range(2):
            make_due(state)
            ticker.fire()
        row = row_of(state)
        assert row.due_at is not None
        assert SECOND / 2 < row.due_at - now_of(state) <= SECOND
        assert row.next_tick_at < now_of(state)

    def test_missed_ticks_stay_one_job_while_they_are_queued(
        self, make: Callable[..., Flask]
    ) -> None:
        """Ticks that were missed before a queued one stay one job."""
        app = make(overlap="queue")
        state = state_of(app)
        ticker = ticker_of(app)
        bgjobs_job = find(state, "s").run_now()
        pass_periods(state, 3)
        ticker.fire()
        assert count_jobs(app) == 1
        drain(app)
        set_row(state, due_at=now_of(state) - SECOND)
        ticker.fire()
        assert count_jobs(app) == 2
        assert row_of(state).next_tick_at > now_of(state)
        assert bgjobs_job.refresh().status == JobStatus.COMPLETED

    def test_job_run_by_hand_counts(self, make: Callable[..., Flask]) -> None:
        """A job that a person has run does not overlap with that of a tick."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        job = find(state, "s").run_now()
        make_due(state, 0)
        ticker.fire()
        assert [tick.reason for tick in ticks_of(state) if tick.outcome == "skipped"] == [
            f"job {job.id} is not finished"
        ]

    def test_unique_key_of_another_job(self, make: Callable[..., Flask]) -> None:
        """A tick whose job has a ``unique_key`` that is taken is skipped with that reason."""
        app = make(unique_key="k", overlap="allow")
        state = state_of(app)
        ticker = ticker_of(app)
        for _ in range(2):
            make_due(state)
            ticker.fire()
        fired, skipped = ticks_of(state)
        assert skipped.reason == f"job {fired.job_id} holds its unique_key"

    def test_unique_key_with_an_error(self, make: Callable[..., Flask]) -> None:
        """Also with ``on_duplicate="raise"``, a tick is skipped, and the worker goes on."""
        app = make(unique_key="k", overlap="allow", on_duplicate="raise")
        state = state_of(app)
        ticker = ticker_of(app)
        for _ in range(2):
            make_due(state)
            ticker.fire()
        fired, skipped = ticks_of(state)
        assert str(skipped.reason).startswith(f"job {fired.job_id} holds the unique key 'k'")


class TestCode:
    def test_newest_worker_decides(self, make: Callable[..., Flask]) -> None:
        """Two releases side by side use the definition of the worker that started last."""
        old, new = make(parameters=["old"]), make(parameters=["new"])
        tickers = [ticker_of(old), ticker_of(new)]
        state = state_of(old)
        make_due(state)
        tickers[0].fire()
        assert [outcome.result for outcome in drain(old)] == ["new"]
        tickers.append(ticker_of(old))
        make_due(state)
        tickers[1].fire()
        assert [outcome.result for outcome in drain(old)] == ["old"]

    def test_worker_that_starts_over_changes_no_definition(
        self, make: Callable[..., Flask]
    ) -> None:
        """An older worker that had lost its lease does not bring its definition back."""
        old, new = make(parameters=["old"]), make(parameters=["new"])
        ticker = ticker_of(old)
        ticker_of(new)
        before = row_of(state_of(old)).definition
        ticker.take_back()
        assert row_of(state_of(old)).definition == before

    def test_changed_time_moves_the_next_tick(self, make: Callable[..., Flask]) -> None:
        """A deploy that changes the time takes effect at once."""
        state = state_of(make(cron="0 0 1 1 *"))
        ticker_of(state.app)
        ticker_of(make(every=60))
        row = row_of(state)
        assert row.next_tick_at == row.due_at <= now_of(state) + 60 * SECOND

    def test_definition_of_another_version(self, make: Callable[..., Flask]) -> None:
        """A definition that a newer version of flask-bgjobs has written still runs."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        definition = json.loads(row_of(state).definition)
        definition |= {"added": 1, "recurrence": {**definition["recurrence"], "added": 2}}
        del definition["unique"]
        set_row(state, definition=json.dumps(definition))
        make_due(state)
        ticker.fire()
        assert count_jobs(app) == 1

    def test_unchanged_definition_keeps_the_row(self, make: Callable[..., Flask]) -> None:
        """A restart writes nothing."""
        app = make(cron="0 0 1 1 *")
        ticker_of(app)
        ticker_of(app)
        assert row_of(state_of(app)).revision == 0

    def test_schedule_without_code_stops_and_comes_back(
        self, make: Callable[..., Flask], make_app: Callable[..., Flask]
    ) -> None:
        """A schedule that the code of no live worker has does not run. When the code is back, its
        missed ticks are made up for."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        other = make_app(BGJOBS_SCHEDULE={"other": {**ECHO, "cron": "0 0 29 2 *"}})
        other_ticker = ticker_of(other)
        tick = make_due(state, 20)
        other_ticker.fire()
        assert row_of(state).retired_at is None, "a live worker has it"
        mine = sa.update(WorkerRow).where(WorkerRow.schedules == '["s"]')
        state.store.transaction(lambda c: c.execute(mine.values(status="stopped")))
        other_ticker.fire()
        row = row_of(state)
        assert (row.retired_at is not None, row.due_at, row.next_tick_at) == (True, None, tick)
        assert count_jobs(app) == 0
        ticker_of(app)
        ticker.fire()
        assert count_jobs(app) == 1

    def test_invalid_row_stops_only_its_schedule(
        self, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nonsense in a row is logged and stops that schedule. A restart of a worker mends it."""
        schedule = {name: {**ECHO, "every": PERIOD} for name in ("bad", "s")}
        app = make_app(BGJOBS_SCHEDULE=schedule)
        state = state_of(app)
        ticker = ticker_of(app)
        for name in schedule:
            make_due(state, 0, name)
        set_row(state, "bad", definition="{")
        with app.app_context():
            ticker.fire()
        assert count_jobs(app) == 1
        assert "Schedule stopped | Schedule: bad | Its row is not valid: JSONDecodeError" in (
            caplog.text
        )
        with app.app_context():
            assert list(Schedules(state)) == ["s"]
            ticker_of(app).fire()
        assert count_jobs(app) == 2

    def test_many_schedules(self, make_app: Callable[..., Flask]) -> None:
        """Hundreds of schedules that are due at once are all handled."""
        app = make_app(BGJOBS_SCHEDULE={f"s{n}": {**ECHO, "every": PERIOD} for n in range(130)})
        state = state_of(app)
        ticker = ticker_of(app)
        tick = now_of(state)
        state.store.transaction(
            lambda c: c.execute(sa.update(Schedule).values(next_tick_at=tick, due_at=tick))
        )
        with app.app_context():
            assert [ticker.fire() for _ in range(8)] == [True] * 7 + [False]
        assert count_jobs(app) == 130


class TestClock:
    def test_interval_goes_on_when_the_clock_is_set_back(self, make: Callable[..., Flask]) -> None:
        """If the database's clock is set back by an hour, an interval does not stop for an hour."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        ahead = make_due(state, -PERIOD.total_seconds() * 3)
        set_row(state, last_tick_at=ahead - PERIOD / 2)
        now = now_of(state)
        ticker.note_time(now + dt.timedelta(hours=1))
        assert row_of(state).next_tick_at == ahead
        ticker.note_time(now)
        row = row_of(state)
        assert row.next_tick_at == row.due_at <= now_of(state) + PERIOD

    def test_nightly_job_does_not_run_twice(self, make: Callable[..., Flask]) -> None:
        """If the clock is set back, a time that has passed already does not come again."""
        app = make(cron="0 3 * * *")
        state = state_of(app)
        ticker = ticker_of(app)
        ahead = make_due(state, -86_400)
        set_row(state, last_tick_at=ahead - dt.timedelta(hours=23))
        now = now_of(state)
        ticker.note_time(now + dt.timedelta(hours=1))
        ticker.note_time(now)
        assert row_of(state).next_tick_at == ahead

    def test_worker_that_starts_after_the_change(self, make: Callable[..., Flask]) -> None:
        """A worker that starts after the clock was set back goes on as well."""
        app = make()
        state = state_of(app)
        ticker_of(app)
        ahead = make_due(state, -PERIOD.total_seconds() * 3)
        set_row(state, last_tick_at=ahead - PERIOD / 2)
        ticker_of(app)
        assert row_of(state).next_tick_at <= now_of(state) + PERIOD

    def test_edited_row_runs_no_tick_twice(self, make: Callable[..., Flask]) -> None:
        """If somebody moves the next tick to one that has run, it does not run again."""
        app = make(overlap="allow")
        state = state_of(app)
        ticker = ticker_of(app)
        tick = make_due(state, 0)
        ticker.fire()
        set_row(state, next_tick_at=tick, due_at=tick)
        ticker.fire()
        assert [each.tick_at for each in ticks_of(state)] == [tick]
        assert row_of(state).next_tick_at > tick


class TestChanges:
    def test_pause_and_resume(self, make: Callable[..., Flask]) -> None:
        """A paused schedule has no ticks, and goes on with the next one."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        make_due(state, 30)
        paused = find(state, "s").pause(ADA)
        assert (paused.paused_by, paused.next_tick_at) == ("ada", None)
        assert paused.paused_at is not None
        ticker.fire()
        assert count_jobs(app) == 0
        resumed = paused.resume(ADA)
        assert resumed.paused_at is None
        assert resumed.next_tick_at is not None
        assert resumed.next_tick_at.replace(tzinfo=None) > now_of(state)
        ticker.fire()
        assert count_jobs(app) == 0
        assert audited(state) == [("pause schedule", "s", "ada"), ("resume schedule", "s", "ada")]

    def test_second_pause_changes_nothing(self, make: Callable[..., Flask]) -> None:
        """Pausing twice keeps who paused first, and leaves one entry in the audit trail."""
        state = state_of(make())
        ticker_of(state.app)
        find(state, "s").pause(ADA)
        assert find(state, "s").pause(Actor("bob", "api")).paused_by == "ada"
        assert len(audited(state)) == 1

    def test_pause_before_any_worker(self, make: Callable[..., Flask]) -> None:
        """A schedule that only the code has can be paused, and stays so when a worker starts."""
        app = make()
        state = state_of(app)
        assert not find(state, "s").is_registered
        find(state, "s").pause()
        ticker_of(app)
        row = row_of(state)
        assert (row.paused_at is not None, row.due_at, row.registered_at is not None) == (
            True,
            None,
            True,
        )

    def test_schedule_changed_before_any_worker_starts_fresh(
        self, make: Callable[..., Flask]
    ) -> None:
        """Ticks before the first worker were not missed."""
        app = make()
        state = state_of(app)
        find(state, "s").override(overlap="allow")
        make_due(state, 100)
        ticker_of(app).fire()
        assert count_jobs(app) == 0
        assert find(state, "s").recurrence.overlap == "allow"

    def test_override_and_reset(self, make: Callable[..., Flask]) -> None:
        """An override replaces options of the code until it is reset, also after a restart."""
        app = make(cron="0 3 * * *", timezone="Europe/Berlin")
        state = state_of(app)
        ticker = ticker_of(app)
        overridden = find(state, "s").override(ADA, cron="0 4 * * *")
        assert overridden.recurrence.cron == "0 4 * * *"
        assert overridden.code.cron == "0 3 * * *"
        assert overridden.overrides == {"cron": "0 4 * * *"}
        assert (overridden.overridden_by, overridden.has_changed_since_override) == ("ada", False)
        assert find(state, "s").override(ADA, every=30).recurrence.cron is None
        assert find(state, "s").override(ADA, overlap="allow").overrides == {
            "every": 30.0,
            "overlap": "allow",
        }
        ticker_of(app)
        assert find(state, "s").recurrence.every == 30
        assert row_of(state).next_tick_at <= now_of(state) + 30 * SECOND
        make_due(state, 0)
        ticker.fire()
        assert count_jobs(app) == 1
        reset = find(state, "s").reset(ADA)
        assert (reset.recurrence, reset.overrides) == (reset.code, {})
        assert reset.recurrence.cron == "0 3 * * *"
        assert row_of(state).next_tick_at > now_of(state) + 30 * SECOND
        assert [action for action, _, _ in audited(state)] == [
            *["edit schedule"] * 3,
            "reset schedule",
        ]

    def test_change_of_the_code_since_the_override(self, make: Callable[..., Flask]) -> None:
        """The schedule says that the code has changed since it was overridden."""
        state = state_of(make(cron="0 3 * * *"))
        ticker_of(state.app)
        find(state, "s").override(cron="0 4 * * *")
        ticker_of(make(cron="0 5 * * *"))
        changed = find(state, "s")
        assert changed.has_changed_since_override
        assert (changed.code.cron, changed.recurrence.cron) == ("0 5 * * *", "0 4 * * *")

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ({"cron": "0 0 31 2 *"}, InvalidJob, "it would never run"),
            ({"cron": "* * * * * * *"}, InvalidJob, "not 7"),
            ({"every": 0}, InvalidJob, "every must be at least 1 s"),
            ({"timezone": "Europe/Berln"}, InvalidJob, "did you mean 'Europe/Berlin'"),
            ({"missed": "twice"}, InvalidJob, "missed must be one of once, skip, all"),
            ({"overlap": "no"}, InvalidJob, "overlap must be one of skip, queue, allow"),
            ({"grace": 0}, InvalidJob, "grace must be more than 0 s"),
            ({"jitter": 0.5}, InvalidJob, "0 or at least 1 s"),
            ({"cron": "@daily", "every": 5}, InvalidJob, "not both"),
            ({"queue": "mail"}, TypeError, "no option queue="),
            ({}, TypeError, "at least one option"),
        ],
        ids=str,
    )
    def test_invalid_override(
        self, make: Callable[..., Flask], values: Any, error: type[Exception], message: str
    ) -> None:
        """An invalid override is refused with the reason, and changes nothing."""
        state = state_of(make())
        ticker_of(state.app)
        with pytest.raises(error, match=message):
            find(state, "s").override(**values)
        assert row_of(state).revision == 0

    def test_unreadable_override_is_ignored(self, make: Callable[..., Flask]) -> None:
        """Nonsense in the column of the override leaves the recurrence of the code."""
        state = state_of(make())
        ticker = ticker_of(state.app)
        for text in ("{", "[]", '{"cron": 7}', '{"x": 1}'):
            set_row(state, override=text)
            assert find(state, "s").recurrence.every == PERIOD.total_seconds()
        make_due(state, 0)
        ticker.fire()
        ticker_of(state.app)
        assert count_jobs(state.app) == 1

    def test_run_now(self, make: Callable[..., Flask]) -> None:
        """A job can be run at once, also of a paused schedule. The ticks stay as they are."""
        app = make(delay=60, jitter=3600, queue="mail")
        state = state_of(app)
        ticker_of(app)
        schedule = find(state, "s").pause()
        before = row_of(state).next_tick_at
        jobs = [schedule.run_now(ADA) for _ in range(2)]
        assert {(job.status, job.queue) for job in jobs} == {(JobStatus.PENDING, "mail")}
        row = row_of(state)
        assert (row.next_tick_at, row.last_tick_at) == (before, None)
        assert row.last_job_id == jobs[1].id
        assert [(t.outcome, t.job_id) for t in ticks_of(state)] == [
            ("by hand", job.id) for job in jobs
        ]
        assert audited(state) == [("run schedule", "s", "ada")] * 2

    def test_run_now_checks_the_allow_list(
        self, make: Callable[..., Flask], make_app: Callable[..., Flask]
    ) -> None:
        """A process that does not allow the job does not enqueue it."""
        ticker_of(make())
        other = make_app(BGJOBS_ALLOWED_JOBS=[])
        with other.app_context(), pytest.raises(JobNotAllowed):
            find(state_of(other), "s").run_now()
        assert count_jobs(other) == 0

    def test_concurrent_changes_are_both_made(self, make: Callable[..., Flask]) -> None:
        """A change that meets another one is made on top of it."""
        app = make()
        state = state_of(app)
        ticker = ticker_of(app)
        stale = find(state, "s")
        make_due(state, 0)
        ticker.fire()
        find(state, "s").override(overlap="allow")
        assert stale.override(missed="all").overrides == {"overlap": "allow", "missed": "all"}

    def test_change_of_a_stale_row_is_refused(self, make: Callable[..., Flask]) -> None:
        """A change that was made for an earlier state of the row changes nothing, and says so."""
        state = state_of(make())
        ticker_of(state.app)
        stale = row_of(state)
        find(state, "s").pause(ADA)
        change = ScheduleChange(stale, {"due_at": stale.next_tick_at})
        assert state.store.change_schedules([change], ADA, "edit schedule") == [change]
        assert row_of(state).due_at is None
        assert len(audited(state)) == 1

    def test_deleted_row(self, make: Callable[..., Flask], make_app: Callable[..., Flask]) -> None:
        """A change of a schedule that is gone says so."""
        state = state_of(make_app())
        ticker_of(make())
        schedule = find(state, "s")
        state.store.transaction(lambda c: c.execute(sa.delete(Schedule)))
        with pytest.raises(ScheduleNotFound, match="'s' \\(any more\\)"):
            schedule.pause()


class TestNames:
    def test_last_part(self, make_app: Callable[..., Flask]) -> None:
        """The last part of a name is enough where it is unambiguous."""
        names = ["shop.jobs.report", "shop.mail.send", "other.mail.send"]
        app = make_app(BGJOBS_SCHEDULE={name: {**ECHO, "every": 10} for name in names})
        with app.app_context():
            schedules = Schedules(state_of(app))
            assert schedules["report"].name == "shop.jobs.report"
            assert "report" in schedules
            assert "nothing" not in schedules
            assert (list(schedules), len(schedules)) == (sorted(names), 3)
            with pytest.raises(ScheduleNotFound, match=r"other\.mail\.send, shop\.mail"):
                schedules["send"]
            with pytest.raises(ScheduleNotFound, match=r"did you mean 'shop\.mail\.send'"):
                schedules["shop.mail.sent"]
            ticker_of(app)
            assert schedules["report"].name == "shop.jobs.report"

    def test_next_ticks(self, make: Callable[..., Flask]) -> None:
        """The next ticks are known, also while the schedule is paused."""
        state = state_of(make())
        ticker_of(state.app)
        schedule = find(state, "s")
        ticks = schedule.next_ticks()
        assert ticks[0] == schedule.next_tick_at
        assert [after - tick for tick, after in itertools.pairwise(ticks)] == [PERIOD] * 4
        assert len(schedule.pause().next_ticks(3)) == 3


class TestPruning:
    def test_old_ticks(self, make: Callable[..., Flask]) -> None:
        """Ticks are deleted after a week, except the five newest."""
        state = state_of(make())
        ticker_of(state.app)
        schedule_id = row_of(state).id
        now = now_of(state)
        days = [40, 30, 20, 10, 9, 8, 6]
        rows = [
            {
                "schedule_id": schedule_id,
                "tick_at": now - dt.timedelta(days=day),
                "outcome": "fired",
                "missed": 0,
                "created_at": now,
            }
            for day in days
        ]
        state.store.transaction(lambda c: c.execute(sa.insert(ScheduleTick), rows))
        assert state.store.prune_schedules(1) == 1
        assert state.store.prune_schedules(500) == 1
        assert state.store.prune_schedules(500) == 0
        assert [(now - tick.tick_at).days for tick in ticks_of(state)] == days[2:]

    def test_schedule_without_code(self, make: Callable[..., Flask]) -> None:
        """A schedule that the code has not had for 30 days is deleted with its ticks."""
        state = state_of(make())
        ticker = ticker_of(state.app)
        make_due(state, 0)
        ticker.fire()
        schedule_id = row_of(state).id
        for days, expected in ((29, 0), (31, 1)):
            set_row(state, retired_at=now_of(state) - dt.timedelta(days=days))
            assert state.store.prune_schedules(500) == expected
        assert state.store.schedules()[1] == []
        assert state.store.last_ticks([schedule_id], 5) == {schedule_id: []}


class TestDecorator:
    def test_options(self, database_url: str, make_app: Callable[..., Flask]) -> None:
        """A decorated job recurs under its own name, with the options of the decorator."""
        bgjobs = BgJobs()

        @bgjobs.job(name="shop.nightly", cron="0 3 * * *", queue="reports", jitter=60)
        def nightly() -> None: ...

        @bgjobs.job(name="shop.poll", every=dt.timedelta(minutes=1), timezone="Europe/Berlin")
        def poll(size: int = 3) -> None: ...

        @bgjobs.job(name="shop.send", jitter=0.5)
        def send(to: str) -> None: ...

        make_app()
        app = Flask("other")
        app.config.update(
            SQLALCHEMY_DATABASE_URI=database_url,
            BGJOBS_TIMEZONE="Asia/Tokyo",
            BGJOBS_DASHBOARD=False,
        )
        new_database(app)
        bgjobs.init_app(app)
        with app.app_context():
            ticker_of(app)
            assert list(bgjobs.schedules) == ["shop.nightly", "shop.poll"]
            schedule = bgjobs.schedules["nightly"]
            assert (schedule.recurrence.cron, schedule.recurrence.jitter) == ("0 3 * * *", 60)
            assert (schedule.recurrence.timezone, schedule.queue) == ("Asia/Tokyo", "reports")
            assert bgjobs.schedules["poll"].recurrence.every == 60
            assert bgjobs.schedules["poll"].recurrence.timezone == "Europe/Berlin"
        state_of(app).store.dispose()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"cron": "0 3 * *"}, ConfigError, "@bgjobs.job of shop.f: cron '0 3 \\* \\*': an exp"),
            ({"every": 0}, ConfigError, "every must be at least 1 s"),
            ({"every": 5, "cron": "@daily"}, ConfigError, "not both"),
            ({"every": 5, "timezone": 3}, ConfigError, "a time zone is a name"),
            ({"every": 5, "run_at": SOME_TIME}, ConfigError, "no run_at"),
            ({"missed": "all"}, TypeError, "missed= needs cron= or every="),
        ],
        ids=str,
    )
    @pytest.mark.on("sqlite")
    def test_refused(self, options: Any, error: type[Exception], message: str) -> None:
        """A mistake is refused with the name of the function, and the function stays unknown."""
        bgjobs = BgJobs()
        with pytest.raises(error, match=message):
            bgjobs.job(name="shop.f", **options)(lambda: None)
        assert bgjobs._decorated == {}

    @pytest.mark.on("sqlite")
    def test_function_with_parameters(self) -> None:
        """A function that needs parameters cannot recur by its decorator."""
        with pytest.raises(ConfigError, match=r"missing a required argument: 'to'.*BGJOBS"):

            @BgJobs().job(name="shop.send", every=5)
            def send(to: str) -> None: ...

    @pytest.mark.on("sqlite")
    def test_two_of_one_name(self, make_app: Callable[..., Flask]) -> None:
        """A name in ``BGJOBS_SCHEDULE`` must not be that of a decorated job."""
        app = make_app(BGJOBS_SCHEDULE={"shop.f": {**ECHO, "every": 5}})
        recurring = Decorated(lambda: None, NO_OPTIONS, {"every": 5.0})
        state_of(app).registry = Registry({"tests.jobs.echo": None}, {"shop.f": recurring})
        with pytest.raises(ConfigError, match=r"two schedules are named 'shop\.f'"):
            Worker(state_of(app))

    @pytest.mark.on("sqlite")
    def test_option_of_a_schedule_for_one_job(self) -> None:
        """``using(cron=…)`` says where the option belongs."""
        job = BgJobs().job(name="shop.f")(lambda: None)
        with pytest.raises(TypeError, match=r"cron= is for @bgjobs\.job and"):
            job.using(cron="@daily")  # type: ignore[call-arg]


class TestDefinitions:
    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"every": 5}, "'job' must be the dotted name"),
            (ECHO, "it needs 'cron'"),
            ({**ECHO, "every": 5, "cron": "@daily"}, "not both"),
            ({**ECHO, "cron": "0 0 31 2 *"}, "it would never run, because no such date exists"),
            ({**ECHO, "cron": "61 * * * *"}, "'61' is not a minute"),
            ({**ECHO, "every": 5, "paramters": []}, "did you mean 'parameters'"),
            ({**ECHO, "every": 5, "parameters": [1, 2]}, "the parameters do not fit"),
            ({**ECHO, "every": 5, "parameters": "x"}, "parameters must be a list"),
            ({**ECHO, "every": 5, "retries": -1}, "retries must be a whole number"),
            ({**ECHO, "every": 5, "timezone": "Mars"}, "there is no time zone 'Mars'"),
            ({"job": "os.system", "every": 5}, "not allowed to run as a job"),
            ({"job": "tests.jobs.ecco", "every": 5}, "Did you mean 'tests.jobs.echo'"),
            ({"job": "nowhere.jobs.report", "every": 5}, "not allowed to run as a job"),
            ({"job": "tests.jobs.SampleJob", "every": 5}, "name the method to call"),
            (
                {"job": "tests.jobs.SampleJob", "method": "_private", "every": 5},
                "not the name of a public method",
            ),
            (
                {**ECHO, "every": 5, "run_at": SOME_TIME},
                "a recurring job has no run_at",
            ),
        ],
        ids=str,
    )
    @pytest.mark.on("sqlite")
    def test_refused(self, make_app: Callable[..., Flask], entry: Any, message: str) -> None:
        """A mistake in ``BGJOBS_SCHEDULE`` stops ``init_app``, with the name of the schedule."""
        with pytest.raises(ConfigError, match=r"BGJOBS_SCHEDULE\['x'\]: ") as refusal:
            make_app(BGJOBS_SCHEDULE={"x": entry})
        assert message in str(refusal.value)

    @pytest.mark.on("sqlite")
    def test_job_decorated_later(self, make_app: Callable[..., Flask]) -> None:
        """A job that may be decorated later is left to the workers, which refuse to start."""
        app = make_app(BGJOBS_SCHEDULE={"x": {"job": "report", "every": 5}})
        with pytest.raises(ConfigError, match=r"BGJOBS_SCHEDULE\['x'\]: 'report' is not allowed"):
            Worker(state_of(app))
        decorated = {"report": Decorated(lambda: "done", NO_OPTIONS)}
        state_of(app).registry = Registry({}, decorated)
        ticker = ticker_of(app)
        make_due(state_of(app), 0, "x")
        with app.app_context():
            ticker.fire()
        assert [outcome.result for outcome in drain(app)] == ["done"]


class TestPages:
    NAMES = ("Zeta", "a-1", "a_2", "a%3", "alpha", "beta", "\u00e9t\u00e9", "\U0001f600")

    @pytest.fixture
    def state(self, make_app: Callable[..., Flask]) -> Iterator[AppState]:
        """An app whose schedules a worker has registered, except every third."""
        every = {name: {**ECHO, "every": PERIOD} for name in self.NAMES}
        some = make_app(BGJOBS_SCHEDULE={n: e for i, (n, e) in enumerate(every.items()) if i % 3})
        with some.app_context():
            ticker_of(some)
        app = make_app(BGJOBS_SCHEDULE=every)
        with app.app_context():
            yield state_of(app)

    @pytest.mark.parametrize("limit", [1, 3, 8, 100])
    def test_every_schedule_is_on_one_page(self, state: AppState, limit: int) -> None:
        """Pages have the schedules in the order of Python's strings on each database, whether or
        not they are in the database."""
        names: list[str] = []
        after: str | None = ""
        while after is not None:
            page = schedule_page(state, after=after, limit=limit)
            assert len(page.schedules) <= limit
            names += [each.name for each in page.schedules]
            after = page.following
        assert names == sorted(self.NAMES)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("A", ["Zeta", "a%3", "a-1", "a_2", "alpha", "beta"]),
            ("_", ["a_2"]),
            ("%", ["a%3"]),
            ("ET", ["Zeta", "beta"]),
            ("\u00e9t", ["\u00e9t\u00e9"]),
            ("/", []),
        ],
    )
    def test_search(self, state: AppState, text: str, expected: list[str]) -> None:
        """A part of a name is found in any case, without wildcards."""
        page = schedule_page(state, contains=text, limit=100)
        assert [each.name for each in page.schedules] == expected

    def test_last_ticks_of_many_schedules(self, state: AppState) -> None:
        """The newest ticks of any number of schedules are read, newest first."""
        now = now_of(state)
        values = {"outcome": "fired", "missed": 0, "created_at": now}
        ticks = [
            {**values, "schedule_id": number, "tick_at": now - minute * 60 * SECOND}
            for number in range(1, 251)
            for minute in (2, 0, 1)
        ]
        state.store.transaction(lambda c: c.execute(sa.insert(ScheduleTick), ticks))
        found = state.store.last_ticks([*range(1, 252)], 2)
        assert found.pop(251) == []
        assert len(found) == 250
        for newest in found.values():
            assert [tick.tick_at for tick in newest] == [now, now - 60 * SECOND]

    def test_unreadable_row_is_named(self, state: AppState) -> None:
        """A row that cannot be read is left out of its page, which names it, and is not found."""
        set_row(state, "a-1", definition="nonsense")
        page = schedule_page(state, limit=100)
        assert page.unreadable == ["a-1"]
        assert "a-1" not in [each.name for each in page.schedules]
        with pytest.raises(ScheduleNotFound, match="cannot be read"):
            find(state, "a-1")


def audited(state: AppState) -> list[tuple[str, str | None, str]]:
    """Action, subject and actor of the entries of the audit trail, oldest first."""
    entries = sa.select(AuditEntry.action, AuditEntry.subject, AuditEntry.actor)
    with state.store.read() as connection:
        return [tuple(row) for row in connection.execute(entries.order_by(AuditEntry.id))]


def test_catch_up_jobs_know_their_ticks(make: Callable[..., Flask]) -> None:
    """A job learns from ``current_job.meta`` for which tick it runs."""
    app = make(job="tests.jobs.tick", parameters=[], missed="all", overlap="allow")
    state = state_of(app)
    ticker = ticker_of(app)
    pass_periods(state, 3)
    ticker.fire()
    results = [outcome.result for outcome in drain(app)]
    assert results == [f"{tick.tick_at}+00:00" for tick in ticks_of(state)]
    assert len(results) == 3
