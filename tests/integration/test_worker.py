"""The worker in this process, on a real database: run, retry, cancel, time out, stop."""

from __future__ import annotations

import datetime as dt
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import DisconnectionError, OperationalError

from flask_bgjobs import (
    BgJobsError,
    ConfigError,
    Job,
    current_job,
    job_cancelled,
    job_completed,
    job_failed,
    job_rescued,
    job_retrying,
    job_started,
    run_background_job,
)
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_sets
from flask_bgjobs.models import Attempt, JobLog
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.options import NO_OPTIONS
from flask_bgjobs.registry import Registry
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.worker.worker import Worker, WorkerOptions, register
from tests.conftest import DEADLINE_SECONDS, stored, wait_until


@contextmanager
def working(app: Flask, **options: Any) -> Iterator[Worker]:
    """A worker in a thread; it must end cleanly when the block does."""
    worker = Worker(state_of(app), WorkerOptions(**options))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker
    finally:
        if not worker._stops:
            worker.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert failures == []


def enqueue(name: str, *parameters: Any, **options: Any) -> Job:
    return run_background_job(f"tests.jobs.{name}", parameters=parameters, **options)


def _expect_quick_jobs(worker: Worker) -> None:
    """Let a worker claim more than it has threads, as after many jobs of a moment each.

    Real ones could take long for once, on a machine that is busy.
    """
    (routed,) = wait_until(lambda: list(worker._pools), "its pool")
    routed._pace.note(0.0001)


def rows(state: AppState, model: Any) -> list[Any]:
    with state.store.read() as connection:
        return list(connection.execute(sa.select(model.__table__).order_by(model.id)))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A file outside the database in which jobs note that they ran."""
    return tmp_path / "journal"


class TestOutcomes:
    def test_the_models_job(self, app: Flask) -> None:
        """A class's method runs with its parameters, and its result is stored."""
        job = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"], retries=3)
        with working(app):
            job.wait(30)
        assert (job.status, job.result) == ("completed", "executed: Hello")
        assert job.started_at is not None
        assert job.finished_at is not None
        assert job.finished_at >= job.started_at >= job.created_at

    def test_async_functions(self, app: Flask) -> None:
        """An ``async def`` job runs in an event loop of its own."""
        job = enqueue("async_echo", 7)
        with working(app):
            assert job.wait(30).result == 7

    def test_retries_then_success(self, app: Flask, state: AppState, journal: Path) -> None:
        """A job that fails twice completes on the third attempt, in one row."""
        job = enqueue("fail_times", 2, str(journal), retries=3, retry_delay=0.05)
        with working(app):
            job.wait(30)
        assert (job.status, job.result, job.retry_count, job.attempt) == ("completed", 3, 2, 3)
        assert job.error is None
        assert lines(journal) == [f"{job.id} {n}" for n in (1, 2, 3)]
        attempts = rows(state, Attempt)
        assert [(row.attempt, row.outcome, row.error_type) for row in attempts] == [
            (1, "failed", "RuntimeError"),
            (2, "failed", "RuntimeError"),
        ]
        assert "fail_times" in attempts[0].traceback

    def test_four_runs_at_most(self, app: Flask, journal: Path) -> None:
        """``retries=3`` means four runs at most, and then the job has failed."""
        job = enqueue("fail_times", 99, str(journal), retries=3, retry_delay=0)
        with working(app):
            job.wait(30)
        assert (job.status, job.retry_count, job.attempt) == ("failed", 3, 4)
        assert job.error == "RuntimeError: attempt 4 fails"
        assert len(lines(journal)) == 4

    @pytest.mark.parametrize(
        ("name", "parameters", "status", "error"),
        [
            ("fail_for_good", [], "failed", "Fail: it will never work"),
            ("system_exit", [], "failed", "SystemExit: 3"),
            ("throw", ["NUL and surrogates"], "failed", "ValueError: a\ufffdb\ufffdc"),
        ],
    )
    def test_failures(
        self, app: Flask, name: str, parameters: list[Any], status: str, error: str
    ) -> None:
        """Whatever a job raises, it fails with type and message, made storable, and the worker
        lives."""
        job = enqueue(name, *parameters, retries=0)
        with working(app):
            job.wait(30)
            assert enqueue("echo", 1).wait(30).result == 1
        assert job.status == status
        assert (job.error or "").startswith(error)

    def test_fail_uses_no_retry(self, app: Flask) -> None:
        """``Fail`` ends the job whatever retries are left."""
        job = enqueue("fail_for_good", retries=3)
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt, job.retry_count) == ("failed", 1, 0)

    def test_retry_uses_one(self, app: Flask) -> None:
        """``Retry`` asks for another attempt, and fails when none is left."""
        job = enqueue("ask_retry", 0.01, retries=2, retry_delay=3600)
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt, job.retry_count) == ("failed", 3, 2)

    def test_snooze_uses_none(self, app: Flask) -> None:
        """``Snooze`` runs the job again later without using a retry."""
        job = enqueue("snooze_once", retries=0)
        with working(app):
            job.wait(30)
        assert (job.status, job.result, job.attempt, job.retry_count) == (
            "completed",
            "rested",
            2,
            0,
        )

    def test_progress_meta_and_log(self, app: Flask, state: AppState) -> None:
        """What running code tells is found with the job."""
        job = enqueue("report", 4)
        with working(app):
            job.wait(30)
        assert (job.progress, job.progress_note, job.meta) == (1.0, "4 of 4", {"step": 4})
        assert [row.message for row in rows(state, JobLog)] == [f"step {n}" for n in range(1, 5)]

    def test_lines_survive_an_outage(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What running code told while the database was away is written when it is back."""
        observe, failures = type(state.store).observe, iter(range(3))

        def broken(store: Any, worker_id: int, reports: Any) -> Any:
            if reports and next(failures, None) is not None:
                raise OperationalError("observe", None, Exception("the database is away"))
            return observe(store, worker_id, reports)

        monkeypatch.setattr(type(state.store), "observe", broken)
        job = enqueue("tell_slowly", 20, 0.05)
        with working(app):
            assert job.wait(30).status == "completed"
        assert next(failures, None) is None
        told = [row.message for row in rows(state, JobLog)]
        assert told == [f"line {number}" for number in range(20)]

    def test_a_host_that_cannot_connect_for_a_moment(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error of the host's own way to connect is an outage, and no end of the worker."""
        refusals = iter(range(0))
        dropped = iter(range(0))

        def refuse(*_: object) -> None:
            if next(refusals, None) is not None:
                raise RuntimeError("no token")

        def drop(*_: object) -> None:
            # The pool closes the connection, and makes another one.
            if next(dropped, None) is not None:
                raise DisconnectionError

        # Before the worker starts: SQLAlchemy raises in a thread that connects while another one
        # adds a listener.
        sa.event.listen(state.store.host_engine, "do_connect", refuse)
        sa.event.listen(state.store.host_engine, "checkout", drop)
        with working(app):
            assert enqueue("echo", 1).wait(30).result == 1
            refusals, dropped = iter(range(3)), iter(range(1))
            wait_until(lambda: "no token" in caplog.text, "the outage")
            assert enqueue("echo", 2).wait(30).result == 2

    def test_a_worker_that_allows_nothing_says_so(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It names the keys, and its refusal of a job names the likely cause."""
        job = enqueue("echo", 1)
        state.registry = Registry({}, {})
        with working(app):
            assert job.wait(30).status == "failed"
        assert "No job is allowed | Worker: " in caplog.text
        assert "tests.jobs has no such job function" in (job.error or "")

    def test_a_result_that_is_no_json_fails_at_once(self, app: Flask, state: AppState) -> None:
        """A result that cannot be stored fails the job, names the value, and is not retried."""
        state.registry._decorated["bad_result"] = _decorated(lambda: {"x": object()})  # type: ignore[index]
        job = run_background_job("bad_result", retries=3)
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt) == ("failed", 1)
        assert "result.x" in (job.error or "")


def _decorated(function: Callable[..., Any]) -> Any:
    from flask_bgjobs.options import NO_OPTIONS
    from flask_bgjobs.registry import Decorated

    return Decorated(function, NO_OPTIONS)


class TestTime:
    def test_a_delay_is_kept(self, app: Flask) -> None:
        """A delayed job starts after its time, and soon after it."""
        with working(app):
            job = enqueue("echo", 1, delay=0.5)
            job.wait(30)
        assert job.started_at is not None
        assert job.started_at >= job.run_at

    def test_due_work_is_found_without_a_wake_up(self, make_app: Callable[..., Flask]) -> None:
        """With a long poll interval, the clock's trigger wakes the worker when a retry is due."""
        app = make_app(BGJOBS_POLL_INTERVAL=600)
        with app.app_context():
            job = enqueue("fail_times", 1, retries=1, retry_delay=0.3)
            with working(app):
                job.wait(30)
            assert job.status == "completed"

    def test_an_urgent_job_overtakes_a_flood(self, app: Flask, journal: Path) -> None:
        """Only a little is claimed ahead: a job of a higher priority that comes while thousands
        wait runs before nearly all of them."""
        enqueue_sets(
            state_of(app), "tests.jobs.brief", None, [[str(journal), "flood"]] * 3_000, NO_OPTIONS
        )
        with working(app, concurrency=2):
            wait_until(lambda: len(lines(journal)) > 300, "the flood", 60)
            before = len(lines(journal))
            enqueue("brief", str(journal), "urgent", priority="high")
            wait_until(lambda: "urgent" in lines(journal), "the urgent job", 60)
        # At 2 ms for a job in two threads, 100 ms of work are 100 jobs.
        assert lines(journal).index("urgent") - before < 1_000

    def test_a_timeout_stops_the_code_and_uses_a_retry(
        self, app: Flask, state: AppState, journal: Path
    ) -> None:
        """An attempt that takes too long is stopped; that is a failure and uses a retry."""
        job = enqueue("hold", str(journal), timeout=0.3, retries=1, retry_delay=0)
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt, job.error_type) == ("failed", 2, "JobTimeout")
        assert lines(journal).count(f"stopped {job.id} JobTimeout") == 2
        assert [row.outcome for row in rows(state, Attempt)] == ["timeout", "timeout"]

    def test_an_async_timeout_lets_the_task_clean_up(self, app: Flask, journal: Path) -> None:
        """An async job is stopped through its task, so that its ``finally`` may await."""
        job = enqueue("async_hold", str(journal), timeout=0.3, retries=0)
        with working(app):
            job.wait(30)
        assert (job.status, job.error_type) == ("failed", "JobTimeout")
        assert lines(journal) == ["start", "cleaned up"]

    @pytest.mark.on("sqlite")
    def test_a_thread_that_starts_slowly_has_not_ended(
        self, app: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker goes on while a thread that it needs for the first time is being started."""
        start = threading.Thread.start

        def start_slowly(thread: threading.Thread) -> None:
            if thread.name in ("bgjobs-timeouts", "bgjobs-deadlines"):
                time.sleep(1)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_slowly)
        with working(app):
            job = enqueue("echo", 1, timeout=60)
            assert job.wait(DEADLINE_SECONDS).result == 1


class TestCancel:
    @pytest.mark.parametrize("options", [{}, {"delay": 600}], ids=["pending", "scheduled"])
    def test_a_waiting_job_cancels_itself_at_once(self, app: Flask, options: Any) -> None:
        """``job.cancel()`` cancels what waits at once, sends the signal once, and does nothing the
        second time."""
        told: list[int] = []
        job = enqueue("echo", **options)

        def on_cancelled(_app: Flask, job: Job) -> None:
            told.append(job.id)

        with job_cancelled.connected_to(on_cancelled, app):
            assert job.cancel().status == "cancelled"
            assert job.cancel().status == "cancelled"
        assert told == [job.id]

    def test_a_retrying_job_is_cancelled_at_once(self, app: Flask) -> None:
        """``job.cancel()`` of a job that waits for its retry leaves no attempt to come."""
        job = enqueue("fail", retries=5, retry_delay=600)
        with working(app):
            wait_until(lambda: job.refresh().status == "retrying", "the failure")
            assert job.cancel().status == "cancelled"
        assert job.refresh().attempt == 1

    def test_a_running_job_is_cancelling_first(self, app: Flask, journal: Path) -> None:
        """``job.cancel()`` of a running job asks; asking twice changes nothing; the status tells
        when the code has stopped."""
        with working(app):
            job = enqueue("hold", str(journal))
            wait_until(lambda: lines(journal), "the start")
            for _ in range(2):
                assert job.cancel().is_cancelling or job.is_finished
            assert job.wait(30).status == "cancelled"

    def test_a_finished_job_stays_finished(self, app: Flask) -> None:
        """``job.cancel()`` of a completed job leaves it completed."""
        job = enqueue("echo", 1)
        Worker(state_of(app), WorkerOptions(burst=True)).run()
        assert job.cancel().status == "completed"

    def test_running_code_is_stopped(self, app: Flask, state: AppState, journal: Path) -> None:
        """Cancelling a running job stops its code, and only then is it cancelled."""
        job = enqueue("hold", str(journal))
        with working(app):
            wait_until(lambda: lines(journal), "the start")
            state.store.cancel([job.id])
            assert job.refresh().is_cancelling or job.is_finished
            job.wait(30)
        assert job.status == "cancelled"
        assert lines(journal)[-1] == f"stopped {job.id} JobCancelled"

    def test_async_code_is_stopped(self, app: Flask, state: AppState, journal: Path) -> None:
        """An async job is cancelled through its task."""
        job = enqueue("async_hold", str(journal))
        with working(app):
            wait_until(lambda: lines(journal), "the start")
            state.store.cancel([job.id])
            job.wait(30)
        assert job.status == "cancelled"
        assert lines(journal) == ["start", "cleaned up"]

    def test_a_job_that_ends_in_spite_of_it_is_completed(
        self, app: Flask, state: AppState, tmp_path: Path
    ) -> None:
        """A cancel that comes too late changes nothing: the outcome tells."""
        job = enqueue("echo", 5)
        with working(app):
            job.wait(30)
            assert state.store.cancel([job.id]).skipped
        assert job.refresh().status == "completed"

    def test_claimed_but_unstarted_jobs_are_cancelled_too(
        self, app: Flask, state: AppState, journal: Path
    ) -> None:
        """A job that waits for a thread is cancelled without running."""
        with working(app, concurrency=1) as worker:
            # A pace so quick that the worker claims work ahead.
            wait_until(lambda: list(worker._pools), "the pool")
            (routed,) = worker._pools
            routed._pace.seconds = 0.001
            blocker = enqueue("hold", str(journal))
            waiting = enqueue("record", str(journal), "must not run")
            wait_until(lambda: stored(app, waiting).status == "running", "the prefetch")
            state.store.cancel([waiting.id])
            waiting.wait(30)
            assert waiting.status == "cancelled"
            state.store.cancel([blocker.id])
            blocker.wait(30)
        assert "must not run" not in lines(journal)

    def test_the_next_job_on_the_thread_is_not_hit(self, app: Flask, journal: Path) -> None:
        """After a time-out the thread runs its next jobs undisturbed."""
        with working(app, concurrency=1):
            for _ in range(5):
                enqueue("hold", str(journal), timeout=0.05, retries=0)
            jobs = [enqueue("echo", n) for n in range(20)]
            assert [job.wait(30).result for job in jobs] == list(range(20))


class TestAllowList:
    @pytest.mark.parametrize(
        ("target", "method"), [("os.getcwd", None), ("tests.jobs.SampleJob", "_private")]
    )
    def test_a_row_edited_by_hand_is_refused(
        self,
        app: Flask,
        state: AppState,
        caplog: pytest.LogCaptureFixture,
        target: str,
        method: str | None,
    ) -> None:
        """A name that the allow-list does not hold is a final failure, logged, never run."""
        caplog.set_level(logging.INFO, "flask_bgjobs")
        job = enqueue("echo", retries=3)
        edited = sa.update(Job).values(target=target, method=method, parameters_json="[]")
        state.store.transaction(lambda connection: connection.execute(edited))
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt, job.retry_count) == ("failed", 1, 0)
        assert job.error_type == "JobNotAllowed"
        assert f"Unauthorized or invalid job class/method | Class: {target}" in caplog.text
        assert [row.outcome for row in rows(state, Attempt)] == ["refused"]

    @pytest.mark.parametrize(
        "change",
        [{"meta_json": "[broken"}, {"meta_json": "7"}],
        ids=str,
    )
    def test_a_row_broken_by_hand_harms_no_other(
        self, app: Flask, state: AppState, change: dict[str, str]
    ) -> None:
        """Whatever is edited in a row, the worker and the jobs beside it go on."""
        broken, other = enqueue("fail", retries=1, retry_delay=60), enqueue("echo", 4)
        edited = sa.update(Job).where(Job.id == broken.id).values(**change)
        state.store.transaction(lambda connection: connection.execute(edited))
        with working(app):
            assert other.wait(30).result == 4
            wait_until(lambda: stored(app, broken).status == "retrying", "the retry")

    def test_parameters_that_are_a_number_fail_at_once(self, app: Flask, state: AppState) -> None:
        """Parameters edited into something that is no list and no dict are no case for a retry."""
        job = enqueue("echo", retries=3)
        edited = sa.update(Job).values(parameters_json="3")
        state.store.transaction(lambda connection: connection.execute(edited))
        with working(app):
            job.wait(30)
        assert (job.status, job.attempt) == ("failed", 1)

    def test_parameters_edited_by_hand_fail_the_job(self, app: Flask, state: AppState) -> None:
        """Parameters that cannot be read fail the job for good."""
        job = enqueue("echo")
        edited = sa.update(Job).values(parameters_json="{broken")
        state.store.transaction(lambda connection: connection.execute(edited))
        with working(app):
            assert wait_until(lambda: stored(app, job).status == "failed")


class TestStop:
    def test_running_jobs_get_their_grace(self, app: Flask, journal: Path) -> None:
        """After a stop nothing is claimed, and what runs may finish."""
        job = enqueue("hold", str(journal), 0.5)
        with working(app, concurrency=1, shutdown_timeout=30) as worker:
            wait_until(lambda: lines(journal), "the start")
            worker.stop()
            later = enqueue("echo")
        assert job.refresh().status == "completed"
        assert later.refresh().status == "pending"

    def test_after_the_grace_jobs_are_given_back(
        self, app: Flask, state: AppState, journal: Path
    ) -> None:
        """What still runs after the grace is stopped and given back without using a retry."""
        job = enqueue("hold", str(journal))
        with working(app, concurrency=1, shutdown_timeout=0.1):
            wait_until(lambda: lines(journal), "the start")
        job.refresh()
        assert (job.status, job.retry_count, job.attempt) == ("pending", 0, 1)
        assert f"stopped {job.id} JobCancelled" in lines(journal)
        assert [row.status for row in rows(state, WorkerRow)] == ["stopped"]

    def test_burst_ends_when_nothing_is_left(self, app: Flask) -> None:
        """``burst`` runs what is there and does not wait for what is due later."""
        done, later = enqueue("echo"), enqueue("echo", delay=3600)
        worker = Worker(state_of(app), WorkerOptions(burst=True))
        worker.run()
        assert done.refresh().status == "completed"
        assert later.refresh().status == "scheduled"

    @pytest.mark.on("sqlite")
    def test_a_job_that_cannot_be_stopped_is_logged(
        self,
        app: Flask,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The log names a job that holds a thread after its time was up, and where it stands; the
        other threads go on."""
        monkeypatch.setattr("flask_bgjobs.worker.worker._FIRST_OVERDUE_SECONDS", 0.1)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with working(app, concurrency=2):
            job = enqueue("read_pipe", str(pipe), timeout=0.1, retries=0)
            wait_until(lambda: "Job cannot be stopped" in caplog.text, "the warning")
            (line,) = [r.getMessage() for r in caplog.records if "cannot be" in r.getMessage()][:1]
            assert f"Job: {job.id} | Class: tests.jobs.read_pipe | Reason: JobTimeout" in line
            assert "tests/jobs.py:" in line
            assert enqueue("echo", 1).wait(30).result == 1
            os.close(os.open(pipe, os.O_WRONLY))
            assert job.wait(30).status == "failed"

    @pytest.mark.parametrize("queues", [None, ["a-open", "held"]])
    def test_burst_does_not_wait_for_paused_queues(
        self, app: Flask, state: AppState, queues: list[str] | None
    ) -> None:
        """``burst`` ends while a paused queue holds jobs, which nobody may run."""
        state.store.pause("held")
        held = enqueue("echo", 1, queue="held")
        free = enqueue("echo", 2, queue="a-open")
        with working(app, burst=True, queues=queues):
            wait_until(
                lambda: [row.status for row in rows(state, WorkerRow)] == ["stopped"], "the end"
            )
        assert (stored(app, held).status, stored(app, free).status) == ("pending", "completed")

    def test_burst_runs_retries_that_are_due(self, app: Flask) -> None:
        """A retry without a delay is due now, so that ``burst`` runs it."""
        job = enqueue("fail", retries=2, retry_delay=0)
        Worker(state_of(app), WorkerOptions(burst=True)).run()
        assert (job.refresh().status, job.attempt) == ("failed", 3)

    def test_an_outcome_that_cannot_be_recorded_at_the_end_is_rescued(
        self, app: Flask, state: AppState, journal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker that ends with jobs on its hands leaves its lease to be found."""
        job = enqueue("hold", str(journal), 600)

        def refused(*args: Any) -> Any:
            raise sa.exc.OperationalError("settle", {}, Exception("database is gone"))

        with working(app, shutdown_timeout=0):
            wait_until(lambda: lines(journal), "the start")
            monkeypatch.setattr(type(state.store), "settle", refused)
        monkeypatch.undo()
        assert job.refresh().status == "running"
        (row,) = rows(state, WorkerRow)
        assert row.status == "alive"
        assert [s.status for s in state.store.rescue(row.id, row.beats)] == ["pending"]

    def test_max_jobs_is_exact(self, app: Flask) -> None:
        """``max_jobs`` stops after exactly so many jobs."""
        made = [enqueue("echo") for _ in range(10)]
        worker = Worker(state_of(app), WorkerOptions(max_jobs=4))
        worker.run()
        assert [job.refresh().status for job in made] == ["completed"] * 4 + ["pending"] * 6

    def test_max_time(self, app: Flask) -> None:
        """``max_time`` stops after so many seconds."""
        begin = time.monotonic()
        Worker(state_of(app), WorkerOptions(max_time=0.3)).run()
        assert time.monotonic() - begin >= 0.3

    def test_max_memory(self, app: Flask) -> None:
        """``max_memory`` stops a worker with threads once it holds so many MiB; running jobs end
        and nothing is lost."""
        jobs = [enqueue("echo", n) for n in range(3)]
        Worker(state_of(app), WorkerOptions(max_memory=1)).run()
        assert {job.refresh().status for job in jobs} == {"pending"}
        Worker(state_of(app), WorkerOptions(max_memory=100_000, burst=True)).run()
        assert {job.refresh().status for job in jobs} == {"completed"}

    @pytest.mark.parametrize("scheduler", [True, False])
    def test_old_jobs_are_pruned(self, make_app: Callable[..., Flask], scheduler: bool) -> None:
        """A worker deletes jobs that have outlived ``BGJOBS_RETENTION``, unless it has no
        scheduler."""
        app = make_app(BGJOBS_RETENTION={"completed": 0, "failed": None})
        with app.app_context():
            old, kept = enqueue("echo"), enqueue("fail", retries=0)
            Worker(state_of(app), WorkerOptions(burst=True, scheduler=False)).run()
            assert stored(app, old).status == "completed"
            with working(app, scheduler=scheduler) as worker:
                if scheduler:
                    wait_until(lambda: state_of(app).store.get(old.id) is None, "the pruning")
                else:
                    enqueue("echo", delay=0.3).wait(30)
                    assert stored(app, old).status == "completed"
                assert stored(app, kept).status == "failed"
                assert worker._pruner.held == 0

    def test_queues_are_served_in_strict_order(self, app: Flask, journal: Path) -> None:
        """A worker serves only its queues, the first one first."""
        for queue in ("low", "high", "other"):
            enqueue("record", str(journal), queue, queue=queue)
        Worker(
            state_of(app), WorkerOptions(queues=["high", "low"], concurrency=1, burst=True)
        ).run()
        assert lines(journal) == ["high", "low"]


class TestLease:
    def test_a_lost_lease_stops_the_job_and_starts_over(
        self, app: Flask, state: AppState, journal: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker whose lease was taken stops its job and goes on under a new id."""
        job = enqueue("hold", str(journal))
        with working(app, queues=["default"]):
            wait_until(lambda: lines(journal), "the start")
            (row,) = rows(state, WorkerRow)
            hold = sa.update(Job).values(queue="elsewhere")
            state.store.transaction(lambda connection: connection.execute(hold))
            # As a sweep does: what the worker writes at this moment is locked, and freed after it.
            wait_until(
                lambda: (
                    state.store.rescue(row.id, _beats(state, row.id))
                    or state.store.rescue_orphans()
                ),
                "the rescue",
            )
            wait_until(lambda: f"stopped {job.id} JobCancelled" in lines(journal), "the stop")
            assert enqueue("echo", 3).wait(30).result == 3
        assert [worker.status for worker in rows(state, WorkerRow)] == ["dead", "stopped"]
        assert job.refresh().status == "pending"
        assert "Lease lost" in caplog.text

    def test_an_outage_just_after_a_claim_strands_no_suspect(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was claimed runs, also where the look at the suspects among it fails."""
        look = type(state.store).lost_among_others
        failures = [OperationalError("look", {}, Exception("gone"))]

        def fail_once(store: Any, specs: Any) -> Any:
            if failures:
                raise failures.pop()
            return look(store, specs)

        monkeypatch.setattr(type(state.store), "lost_among_others", fail_once)
        jobs = [_suspect(state, "echo", 1), enqueue("echo", 2)]
        due = sa.update(Job).values(run_at=state.store.now)
        state.store.transaction(lambda connection: connection.execute(due))
        with working(app, concurrency=2):
            assert [job.wait(DEADLINE_SECONDS).result for job in jobs] == [1, 2]
        assert not failures

    def test_suspects_run_one_at_a_time(self, app: Flask, state: AppState, journal: Path) -> None:
        """Suspects run alone, their start committed before their code."""
        jobs = [enqueue("hold", str(journal), 0.05) for _ in range(3)]
        state.store.transaction(lambda c: c.execute(sa.update(Job).values(suspect=True)))
        with working(app, concurrency=3):
            for job in jobs:
                job.wait(30)
        events = [line.split()[0] for line in lines(journal)]
        assert events == ["start", "end"] * 3
        assert not any(job.suspect for job in jobs)

    def test_the_times_of_suspects_are_those_of_their_code(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also of one that has waited for its turn after its claim."""
        monkeypatch.setattr("flask_bgjobs.worker.suspects._PROVING_SECONDS", 1.0)
        jobs = [enqueue("hold", os.devnull, 0.5) for _ in range(2)]
        state.store.transaction(lambda c: c.execute(sa.update(Job).values(suspect=True)))
        with working(app, concurrency=2):
            for job in jobs:
                job.wait(30)
        first, second = jobs
        assert first.claimed_at == second.claimed_at
        assert first.finished_at is not None
        assert second.started_at is not None
        assert second.started_at >= first.finished_at

    def test_suspects_lost_among_others_run_on_all_workers(
        self, app: Flask, state: AppState, tmp_path: Path
    ) -> None:
        """A worker keeps one of them, and its other threads work; a worker without one gets one."""
        gate = tmp_path / "gate"
        suspects = [_suspect(state, "wait_for_file", str(gate)) for _ in range(3)]
        for number in range(2):
            dead = register(state, f"dead{number}", concurrency=3)
            state.store.mark_started(dead, state.store.claim(dead, 3))
            state.store.rescue(dead, 0)

        def started() -> int:
            return sum(stored(app, job).started_at is not None for job in suspects)

        with working(app, concurrency=3):
            wait_until(lambda: started() == 1, "the first suspect")
            assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
            attempts = [stored(app, job).attempt for job in suspects]
            with working(app, concurrency=3) as second:
                wait_until(lambda: started() == 2, "the second suspect")
                beats = _beats(state, second._id)
                wait_until(lambda: _beats(state, second._id) > beats + 2, "time for more claims")
                held = [stored(app, job).status for job in suspects]
                assert sorted(held) == ["pending", "running", "running"]
                # The claims that looked for room are few: neither worker claims them in vain.
                assert sum(stored(app, job).attempt for job in suspects) <= sum(attempts) + 2
                gate.touch()
                assert [job.wait(30).status for job in suspects] == ["completed"] * 3

    def test_a_suspect_that_waits_for_its_turn_is_cancelled_at_once(
        self, app: Flask, state: AppState, journal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancel does not wait for the suspects ahead, and the job's code never begins."""
        monkeypatch.setattr("flask_bgjobs.worker.suspects._PROVING_SECONDS", 600.0)
        with working(app, concurrency=2):
            first, second = (_suspect(state, "hold", str(journal)) for _ in range(2))
            wait_until(lambda: stored(app, second).status == "running", "the claim")
            wait_until(journal.exists, "the start of the first")
            second.cancel()
            assert second.wait(DEADLINE_SECONDS).status == "cancelled"
            assert stored(app, first).status == "running"
            first.cancel()
            assert first.wait(DEADLINE_SECONDS).status == "cancelled"
        assert lines(journal)[0].startswith(f"start {first.id} ")
        assert not any(line.startswith(f"start {second.id} ") for line in lines(journal))

    def test_a_suspect_keeps_its_turn_through_an_outage(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A suspect whose start could not be committed is started when the database is back."""
        mark_started = type(state.store).mark_started
        failures = iter([sa.exc.OperationalError("start", {}, Exception("database is gone"))])

        def fail_once(*arguments: Any) -> set[int]:
            for error in failures:
                raise error
            return mark_started(*arguments)

        monkeypatch.setattr(type(state.store), "mark_started", fail_once)
        job = _suspect(state, "echo", 5)
        with working(app):
            assert job.wait(30).result == 5
        assert next(failures, None) is None

    def test_a_suspect_is_not_started_before_its_code_can_run(
        self, app: Flask, state: AppState, tmp_path: Path
    ) -> None:
        """A suspect for which no thread is free has no start that it could be blamed for."""
        gate = tmp_path / "gate"
        with working(app, concurrency=1) as worker:
            _expect_quick_jobs(worker)
            blocking = enqueue("wait_for_file", str(gate))
            wait_until(lambda: stored(app, blocking).started_at, "the start")
            job = _suspect(state, "echo", 6)
            wait_until(lambda: stored(app, job).status == "running", "the claim")
            beats = _beats(state, worker._id)
            wait_until(
                lambda: _beats(state, worker._id) > beats + 2, "time in which it could start"
            )
            assert stored(app, job).started_at is None
            gate.touch()
            assert job.wait(30).result == 6

    def test_a_suspect_has_the_next_free_place(
        self, app: Flask, state: AppState, tmp_path: Path
    ) -> None:
        """While a suspect waits for a thread nothing is claimed ahead, which would begin before
        it."""
        gate = tmp_path / "gate"
        with working(app, concurrency=1) as worker:
            _expect_quick_jobs(worker)
            blocking = enqueue("wait_for_file", str(gate))
            wait_until(lambda: stored(app, blocking).started_at, "the start")
            suspect = _suspect(state, "echo", 6)
            wait_until(lambda: stored(app, suspect).status == "running", "the claim")
            others = [enqueue("echo", number) for number in range(3)]
            beats = _beats(state, worker._id)
            wait_until(lambda: _beats(state, worker._id) > beats + 2, "time for a claim")
            assert [stored(app, job).status for job in others] == ["pending"] * 3
            gate.touch()
            assert [job.wait(30).result for job in (suspect, *others)] == [6, 0, 1, 2]

    def test_a_suspects_start_is_committed_before_its_code(
        self, app: Flask, state: AppState
    ) -> None:
        """The code of a suspect finds its own start in the database."""

        def look() -> bool:
            with state.store.read() as connection:
                started = sa.select(Job.started_at).where(Job.id == current_job.id)
                return connection.scalar(started) is not None

        state.registry._decorated["look"] = _decorated(look)  # type: ignore[index]
        with working(app):
            for _ in range(10):
                assert _suspect(state, "look").wait(30).result is True

    def test_the_heart_lives_through_any_error(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A heartbeat that fails in a way of the host's own is tried again at the next one."""
        beat = type(state.store).beat
        failures = iter([RuntimeError("no token"), RuntimeError("no token")])

        def fail_twice(*arguments: Any) -> bool:
            for error in failures:
                raise error
            return beat(*arguments)

        monkeypatch.setattr(type(state.store), "beat", fail_twice)
        with working(app) as worker:
            wait_until(lambda: next(iter(rows(state, WorkerRow)), None), "the worker")
            wait_until(lambda: _beats(state, worker._id) > 2, "the beats")
            assert enqueue("echo", 1).wait(30).result == 1
        assert next(failures, None) is None

    def test_another_workers_jobs_are_rescued(self, app: Flask, state: AppState) -> None:
        """A worker finds the jobs of a dead one by itself, and signals it."""
        from flask_bgjobs.worker.worker import register

        dead = register(state, "dead", concurrency=1)
        job = enqueue("echo", 8)
        state.store.claim(dead, 1)
        gone = sa.update(WorkerRow).values(process=sa.func.replace(WorkerRow.process, "/", "/9"))
        state.store.transaction(lambda connection: connection.execute(gone))
        rescued: list[int] = []

        def note(app: Flask, job: Any, settled: Any) -> None:
            rescued.append(job.id)

        with job_rescued.connected_to(note, app), working(app):
            assert job.wait(30).result == 8
        assert rescued == [job.id]
        assert job.attempt == 2


def _suspect(state: AppState, name: str, *parameters: Any) -> Job:
    """A pending job that was taken from a dead worker."""
    target = name if name in state.registry._decorated else f"tests.jobs.{name}"
    job = run_background_job(target, parameters=parameters, delay=600)
    suspect = sa.update(Job).where(Job.id == job.id).values(suspect=True, status="pending")
    state.store.transaction(lambda connection: connection.execute(suspect))
    return job


def _of_a_worker(threads: set[threading.Thread]) -> list[str]:
    """The names of those threads that a worker starts."""
    return [t.name for t in threads if t.name.startswith(("bgjobs", "APScheduler"))]


def _beats(state: AppState, worker_id: int) -> int:
    """Its heartbeats so far; none before it has registered."""
    return next((row.beats for row in rows(state, WorkerRow) if row.id == worker_id), 0)


class TestSignalsAndLogs:
    def test_each_stage_signals_once(self, app: Flask, state: AppState, journal: Path) -> None:
        """Started, retrying, failed, completed and cancelled are each told once."""
        seen: list[tuple[str, int]] = []
        receivers = []
        for name, signal in {
            "started": job_started, "completed": job_completed, "retrying": job_retrying,
            "failed": job_failed, "cancelled": job_cancelled,
        }.items():  # fmt: skip

            def note(app: Flask, job: Any, _name: str = name, **_: Any) -> None:
                seen.append((_name, job.id))

            signal.connect(note, app)
            receivers.append(note)
        good, bad = enqueue("echo"), enqueue("fail", retries=1, retry_delay=0)
        waiting = enqueue("echo", delay=60)
        from flask_bgjobs.operations import actions

        actions.cancel(state, [waiting.id])
        with working(app):
            good.wait(30)
            bad.wait(30)
        assert sorted(seen) == sorted(
            [
                ("started", good.id), ("completed", good.id),
                ("started", bad.id), ("retrying", bad.id), ("started", bad.id), ("failed", bad.id),
                ("cancelled", waiting.id),
            ]
        )  # fmt: skip

    def test_the_lines_of_the_model(self, app: Flask, caplog: pytest.LogCaptureFixture) -> None:
        """Each stage writes the model's line, on one line, whatever the parameters hold."""
        caplog.set_level(logging.INFO, "flask_bgjobs")
        good = run_background_job("tests.jobs.SampleJob", "execute", ["a\nb\x1b\u2028c"])
        bad = enqueue("fail", "no\nway", retries=1, retry_delay=0)
        with working(app):
            good.wait(30)
            bad.wait(30)
        messages = [record.getMessage() for record in caplog.records]
        stages = [message.split(" | ")[0] for message in messages]
        for stage in (
            "Job enqueued",
            "Job running",
            "Job completed successfully",
            "Job failed and will retry",
            "Job failed",
        ):
            assert stage in stages
        assert all("\n" not in message and "\x1b" not in message for message in messages)
        failed = next(message for message in messages if message.startswith("Job failed | "))
        assert "Error: ValueError: no\\nway | Retry: 1/1 | Timestamp: " in failed
        running = next(message for message in messages if "SampleJob" in message)
        assert "Class: tests.jobs.SampleJob | Method: execute | Parameters: [" in running

    def test_secrets_are_masked_also_in_errors(
        self, app: Flask, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A positional password is masked in parameters and in the error's text, which is also
        stored without it."""
        caplog.set_level(logging.DEBUG, "flask_bgjobs")
        job = enqueue("login", "ann", "hunter2!", retries=0)
        with working(app):
            job.wait(30)
        assert "hunter2!" not in caplog.text
        assert "ann could not log in with ***" in caplog.text
        assert job.error == "ValueError: ann could not log in with ***"


class TestCannotWork:
    def test_a_start_that_fails_leaves_nothing_behind(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a worker's last thread cannot start, the others end, and its row says stopped."""

        def fail(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("flask_bgjobs.worker.worker.WakeUps", fail)
        before = set(threading.enumerate())
        with pytest.raises(RuntimeError, match="new thread"):
            Worker(state).run()
        (row,) = rows(state, WorkerRow)
        assert row.status == "stopped"
        wait_until(lambda: not _of_a_worker(set(threading.enumerate()) - before), "their end")

    def test_without_tables_it_says_what_to_run(self, empty_database_url: str) -> None:
        """A worker without tables says which command makes them."""
        from tests.apps import build_app

        app = build_app(empty_database_url)
        with app.app_context(), pytest.raises(BgJobsError, match="flask db upgrade"):
            Worker(state_of(app))
        state_of(app).store.dispose()

    def test_an_in_memory_database_is_refused(self, make_app: Callable[..., Flask]) -> None:
        """A worker cannot share an in-memory database, and says so."""
        app = make_app(database_url="sqlite://")
        with app.app_context(), pytest.raises(ConfigError, match="in-memory"):
            Worker(state_of(app))

    @pytest.mark.parametrize(
        "config", [{"BGJOBS_POOL": "process"}, {"BGJOBS_QUEUE_POOLS": {"images": "process"}}]
    )
    def test_a_process_pool_needs_to_know_the_app(
        self, make_app: Callable[..., Flask], config: dict[str, Any]
    ) -> None:
        """Where child processes could not build the app, the worker says what to set."""
        app = make_app(**config)
        with app.app_context(), pytest.raises(ConfigError, match="BGJOBS_APP = 'shop:create_app'"):
            Worker(state_of(app))

    def test_an_import_that_fails_is_named(self, make_app: Callable[..., Flask]) -> None:
        """A module in ``BGJOBS_IMPORTS`` that cannot be imported is named."""
        app = make_app(BGJOBS_IMPORTS=["no_such_module_here"])
        with app.app_context(), pytest.raises(ConfigError, match="no_such_module_here"):
            Worker(state_of(app)).run()


def test_a_broken_session_does_not_reach_the_next_job(app: Flask, state: AppState) -> None:
    """A job that leaves a transaction open or the session broken is cleaned up after."""

    def break_session() -> None:
        session = state.db.session
        session.execute(sa.text("CREATE TABLE left_open (id INTEGER)"))
        session.execute(sa.text("INSERT INTO left_open VALUES (1)"))

    def look() -> bool:
        return state.db.session().in_transaction()

    state.registry._decorated["break_session"] = _decorated(break_session)  # type: ignore[index]
    state.registry._decorated["look"] = _decorated(look)  # type: ignore[index]
    with working(app, concurrency=1):
        run_background_job("break_session").wait(30)
        assert run_background_job("look").wait(30).result is False


@pytest.mark.parametrize("raises", [True, False])
def test_a_job_lost_with_an_exception_is_no_forgotten_commit(
    app: Flask, state: AppState, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """A job that failed has told why what it enqueued is gone; one that completed has not."""

    def enqueue_without_commit() -> None:
        enqueue("echo", 1, session=state.db.session)
        if raises:
            raise ValueError

    state.registry._decorated["without_commit"] = _decorated(enqueue_without_commit)  # type: ignore[index]
    with working(app, concurrency=1):
        run_background_job("without_commit", retries=0).wait(30)
    assert ("Job lost" in caplog.text) is not raises


def test_long_and_quick_jobs_do_not_wait_for_each_other(app: Flask, journal: Path) -> None:
    """One long job does not keep the quick ones beside it waiting."""
    slow = enqueue("hold", str(journal), 20)
    with working(app, concurrency=2, shutdown_timeout=0):
        wait_until(lambda: lines(journal), "the start")
        for number in range(30):
            assert enqueue("echo", number).wait(15).result == number
        assert slow.refresh().status == "running"


@pytest.mark.on("sqlite")
def test_wal_is_turned_on_and_said(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """The worker turns WAL on and says so; ``BGJOBS_SQLITE_WAL = False`` leaves it."""
    caplog.set_level(logging.INFO, "flask_bgjobs")
    Worker(state_of(app), WorkerOptions(burst=True)).run()
    assert "WAL mode is now on" in caplog.text
    with state_of(app).store.read() as connection:
        # A connection learns of the mode when it reads.
        connection.exec_driver_sql("SELECT 1 FROM bgjobs_job")
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_clock_that_jumps_does_not_stop_the_worker(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A jump of the machine's wall clock rebuilds the triggers, and jobs still run."""
    with working(app):
        job = enqueue("fail_times", 1, retries=1, retry_delay=0.3)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        assert job.wait(30).status == "completed"
        assert enqueue("echo", 1).wait(30).result == 1


def test_started_shows_while_a_job_runs(app: Flask, journal: Path) -> None:
    """A job that runs for more than a moment shows its start and progress meanwhile."""
    job = enqueue("hold", str(journal), 20)
    with working(app, shutdown_timeout=0):
        wait_until(lambda: stored(app, job).started_at is not None, "the start")
        assert dt.datetime.now(dt.UTC).replace(tzinfo=None) >= stored(app, job).started_at
