"""A worker in the test process, on a real database: run, retry, cancel, time out, stop."""

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
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_many
from flask_bgjobs.execution.pools.pace import Pace
from flask_bgjobs.models import Attempt, JobLog
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.options import NO_OPTIONS
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.worker import Worker
from tests.conftest import DEADLINE_SECONDS, stored, wait_until


@contextmanager
def running_worker(app: Flask, **options: Any) -> Iterator[Worker]:
    """A worker that runs in a thread. The block fails if the worker raises or does not stop at its
    end."""
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
        worker.stop()
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert failures == []


def enqueue(name: str, *parameters: Any, **options: Any) -> Job:
    return run_background_job(f"tests.jobs.{name}", parameters=parameters, **options)


def _expect_quick_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each worker prefetch jobs from the start, as it does after many jobs of 0.1 ms.

    On a busy machine, real jobs may take too long for that.
    """

    class QuickPace(Pace):
        def __init__(self) -> None:
            super().__init__()
            self.note(0.0001)

    monkeypatch.setattr("flask_bgjobs.worker.routing.Pace", QuickPace)


def allow(state: AppState, **functions: Callable[..., Any]) -> None:
    """Allow functions as jobs, as ``@bgjobs.job(name=...)`` does."""
    decorated = {name: Decorated(each, NO_OPTIONS) for name, each in functions.items()}
    state.registry = Registry(state.config.allowed_jobs, decorated)


def rows(state: AppState, model: Any) -> list[Any]:
    with state.store.read() as connection:
        return list(connection.execute(sa.select(model.__table__).order_by(model.id)))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A file outside the database to which jobs write that they ran."""
    return tmp_path / "journal"


class TestOutcomes:
    def test_method_of_class(self, app: Flask) -> None:
        """A job runs a method of a class with its parameters, and stores its result."""
        job = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"], retries=3)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.result) == ("completed", "executed: Hello")
        assert job.started_at is not None
        assert job.finished_at is not None
        assert job.finished_at >= job.started_at >= job.created_at

    def test_async_function(self, app: Flask) -> None:
        """An ``async def`` job runs in an event loop of its own."""
        job = enqueue("async_echo", 7)
        with running_worker(app):
            assert job.wait(30).result == 7

    def test_retries_then_success(self, app: Flask, state: AppState, journal: Path) -> None:
        """A job that fails twice completes on the third attempt, in the same row."""
        job = enqueue("fail_times", 2, str(journal), retries=3, retry_delay=0.05)
        with running_worker(app):
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

    def test_three_retries_are_four_runs(self, app: Flask, journal: Path) -> None:
        """With ``retries=3``, a job that always fails runs four times and is then failed."""
        job = enqueue("fail_times", 99, str(journal), retries=3, retry_delay=0)
        with running_worker(app):
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
        """A job that raises any exception fails with its type and storable message, and the worker
        continues."""
        job = enqueue(name, *parameters, retries=0)
        with running_worker(app):
            job.wait(30)
            assert enqueue("echo", 1).wait(30).result == 1
        assert job.status == status
        assert (job.error or "").startswith(error)

    def test_fail_uses_no_retry(self, app: Flask) -> None:
        """``Fail`` ends the job even if it has retries left."""
        job = enqueue("fail_for_good", retries=3)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.attempt, job.retry_count) == ("failed", 1, 0)

    def test_retry_exception_uses_a_retry(self, app: Flask) -> None:
        """``Retry`` asks for another attempt, and the job fails when no retry is left."""
        job = enqueue("ask_retry", 0.01, retries=2, retry_delay=3600)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.attempt, job.retry_count) == ("failed", 3, 2)

    def test_snooze_uses_no_retry(self, app: Flask) -> None:
        """``Snooze`` runs the job again later without using a retry."""
        job = enqueue("snooze_once", retries=0)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.result, job.attempt, job.retry_count) == (
            "completed",
            "rested",
            2,
            0,
        )

    def test_progress_meta_and_log(self, app: Flask, state: AppState) -> None:
        """Progress, meta and log lines that running code reports are stored with the job."""
        job = enqueue("report", 4)
        with running_worker(app):
            job.wait(30)
        assert (job.progress, job.progress_note, job.meta) == (1.0, "4 of 4", {"step": 4})
        assert [row.message for row in rows(state, JobLog)] == [f"step {n}" for n in range(1, 5)]

    def test_log_lines_survive_an_outage(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Log lines written while the database is unavailable are stored when it is available
        again."""
        observe, failures = type(state.store).observe, list(range(3))

        def fail_three_times(store: Any, worker_id: int, reports: Any) -> Any:
            if reports and failures:
                failures.pop()
                raise OperationalError("observe", None, Exception("the database is unavailable"))
            return observe(store, worker_id, reports)

        monkeypatch.setattr(type(state.store), "observe", fail_three_times)
        job = enqueue("tell_until", str(tmp_path / "end"))
        with running_worker(app):
            wait_until(lambda: not failures, "three failures")
            (tmp_path / "end").touch()
            assert job.wait(30).status == "completed"
        messages = [row.message for row in rows(state, JobLog)]
        assert messages == [f"line {number}" for number in range(job.result)]

    def test_connection_errors_of_the_host_are_an_outage(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception from the host's own connect hook counts as an outage and does not stop the
        worker."""
        refusals = iter(range(0))
        dropped = iter(range(0))

        def refuse(*_: object) -> None:
            if next(refusals, None) is not None:
                raise RuntimeError("no token")

        def drop(*_: object) -> None:
            # The pool closes the connection and opens another one.
            if next(dropped, None) is not None:
                raise DisconnectionError

        # Before the worker starts: SQLAlchemy raises in a thread that connects while another thread
        # adds a listener.
        sa.event.listen(state.store.host_engine, "do_connect", refuse)
        sa.event.listen(state.store.host_engine, "checkout", drop)
        with running_worker(app):
            assert enqueue("echo", 1).wait(30).result == 1
            refusals, dropped = iter(range(3)), iter(range(1))
            wait_until(lambda: "no token" in caplog.text, "the outage")
            assert enqueue("echo", 2).wait(30).result == 2

    def test_empty_allow_list_is_logged(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker without allowed jobs logs the configuration keys."""
        state.registry = Registry({}, {})
        with running_worker(app):
            pass
        assert "No job is allowed | Worker: " in caplog.text

    def test_result_that_is_not_json_fails_the_job(self, app: Flask, state: AppState) -> None:
        """A result that cannot be stored fails the job without a retry, and the error names the
        value."""
        allow(state, bad_result=lambda: {"x": object()})
        job = run_background_job("bad_result", retries=3)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.attempt) == ("failed", 1)
        assert "result.x" in (job.error or "")


class TestTime:
    def test_delayed_job_starts_when_due(self, app: Flask) -> None:
        """A delayed job does not start before it is due."""
        with running_worker(app):
            job = enqueue("echo", 1, delay=0.5)
            job.wait(30)
        assert job.started_at is not None
        assert job.started_at >= job.run_at

    def test_clock_wakes_worker_for_retry(self, make_app: Callable[..., Flask]) -> None:
        """With a long poll interval, the clock wakes the worker when a retry is due."""
        app = make_app(BGJOBS_POLL_INTERVAL=600)
        with app.app_context():
            job = enqueue("fail_times", 1, retries=1, retry_delay=0.3)
            with running_worker(app):
                job.wait(30)
            assert job.status == "completed"

    def test_urgent_job_overtakes_backlog(self, app: Flask, journal: Path) -> None:
        """Workers prefetch few jobs: a high-priority job enqueued behind thousands runs before
        nearly all of them."""
        enqueue_many(
            state_of(app), "tests.jobs.brief", None, [[str(journal), "flood"]] * 3_000, NO_OPTIONS
        )
        with running_worker(app, concurrency=2):
            wait_until(lambda: len(lines(journal)) > 300, "the flood", 60)
            before = len(lines(journal))
            enqueue("brief", str(journal), "urgent", priority="high")
            wait_until(lambda: "urgent" in lines(journal), "the urgent job", 60)
        # With jobs of 2 ms in two threads, prefetching 100 ms of work takes 100 jobs.
        assert lines(journal).index("urgent") - before < 1_000

    def test_timeout_stops_code_and_uses_a_retry(
        self, app: Flask, state: AppState, journal: Path
    ) -> None:
        """An attempt that exceeds its timeout is stopped, counts as a failure and uses a retry."""
        job = enqueue("hold", str(journal), timeout=0.3, retries=1, retry_delay=0)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.attempt, job.error_type) == ("failed", 2, "JobTimeout")
        assert lines(journal).count(f"stopped {job.id} JobTimeout") == 2
        assert [row.outcome for row in rows(state, Attempt)] == ["timeout", "timeout"]

    def test_async_timeout_lets_task_clean_up(self, app: Flask, journal: Path) -> None:
        """On a timeout, an async job is stopped through its task, so that its ``finally`` block may
        await."""
        job = enqueue("async_hold", str(journal), timeout=0.3, retries=0)
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.error_type) == ("failed", "JobTimeout")
        assert lines(journal) == ["start", "cleaned up"]

    @pytest.mark.on("sqlite")
    def test_worker_waits_for_slow_thread_start(
        self, app: Flask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker continues while a thread that it needs for the first time is starting
        slowly."""
        start = threading.Thread.start

        def start_slowly(thread: threading.Thread) -> None:
            if thread.name in ("bgjobs-timeouts", "bgjobs-deadlines"):
                time.sleep(1)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_slowly)
        with running_worker(app):
            job = enqueue("echo", 1, timeout=60)
            assert job.wait(DEADLINE_SECONDS).result == 1


class TestCancel:
    @pytest.mark.parametrize("options", [{}, {"delay": 600}], ids=["pending", "scheduled"])
    def test_waiting_job_is_cancelled_at_once(self, app: Flask, options: Any) -> None:
        """``job.cancel()`` cancels a waiting job at once and sends the signal once; a second call
        does nothing."""
        cancelled: list[int] = []
        job = enqueue("echo", **options)

        def on_cancelled(_app: Flask, job: Job) -> None:
            cancelled.append(job.id)

        with job_cancelled.connected_to(on_cancelled, app):
            assert job.cancel().status == "cancelled"
            assert job.cancel().status == "cancelled"
        assert cancelled == [job.id]

    def test_retrying_job_is_cancelled_at_once(self, app: Flask) -> None:
        """``job.cancel()`` cancels a job that waits for its retry, and no further attempt runs."""
        job = enqueue("fail", retries=5, retry_delay=600)
        with running_worker(app):
            wait_until(lambda: job.refresh().status == "retrying", "the failure")
            assert job.cancel().status == "cancelled"
        assert job.refresh().attempt == 1

    def test_running_job_is_cancelling_until_it_stops(self, app: Flask, journal: Path) -> None:
        """``job.cancel()`` of a running job is a request; a second one changes nothing; the status
        changes when the code has stopped."""
        with running_worker(app):
            job = enqueue("hold", str(journal))
            wait_until(lambda: lines(journal), "the start")
            for _ in range(2):
                assert job.cancel().is_cancelling or job.is_finished
            assert job.wait(30).status == "cancelled"

    def test_cancel_leaves_completed_job_completed(self, app: Flask) -> None:
        """``job.cancel()`` of a completed job leaves it completed."""
        job = enqueue("echo", 1)
        Worker(state_of(app), WorkerOptions(burst=True)).run()
        assert job.cancel().status == "completed"

    def test_cancel_stops_running_code(self, app: Flask, state: AppState, journal: Path) -> None:
        """Cancelling a running job stops its code; only after that is the job cancelled."""
        job = enqueue("hold", str(journal))
        with running_worker(app):
            wait_until(lambda: lines(journal), "the start")
            state.store.cancel([job.id])
            assert job.refresh().is_cancelling or job.is_finished
            job.wait(30)
        assert job.status == "cancelled"
        assert lines(journal)[-1] == f"stopped {job.id} JobCancelled"

    def test_cancel_stops_async_code(self, app: Flask, state: AppState, journal: Path) -> None:
        """An async job is cancelled through its task."""
        job = enqueue("async_hold", str(journal))
        with running_worker(app):
            wait_until(lambda: lines(journal), "the start")
            state.store.cancel([job.id])
            job.wait(30)
        assert job.status == "cancelled"
        assert lines(journal) == ["start", "cleaned up"]

    def test_late_cancel_changes_nothing(self, app: Flask, state: AppState, tmp_path: Path) -> None:
        """Cancelling a job that has completed is skipped, and the job stays completed."""
        job = enqueue("echo", 5)
        with running_worker(app):
            job.wait(30)
            assert state.store.cancel([job.id]).skipped
        assert job.refresh().status == "completed"

    def test_prefetched_job_is_cancelled_without_running(
        self, app: Flask, state: AppState, journal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A prefetched job that waits for a thread is cancelled without running."""
        _expect_quick_jobs(monkeypatch)
        with running_worker(app, concurrency=1):
            blocker = enqueue("hold", str(journal))
            waiting = enqueue("record", str(journal), "must not run")
            wait_until(lambda: stored(app, waiting).status == "running", "the prefetch")
            state.store.cancel([waiting.id])
            waiting.wait(30)
            assert waiting.status == "cancelled"
            state.store.cancel([blocker.id])
            blocker.wait(30)
        assert "must not run" not in lines(journal)

    def test_timeout_does_not_affect_next_job(self, app: Flask, journal: Path) -> None:
        """After a timeout, the next jobs in the same thread run normally."""
        with running_worker(app, concurrency=1):
            for _ in range(5):
                enqueue("hold", str(journal), timeout=0.05, retries=0)
            jobs = [enqueue("echo", n) for n in range(20)]
            assert [job.wait(30).result for job in jobs] == list(range(20))


class TestAllowList:
    @pytest.mark.parametrize(
        ("target", "method"), [("os._exit", None), ("tests.jobs.SampleJob", "_private")]
    )
    def test_name_outside_allow_list_is_refused(
        self,
        app: Flask,
        state: AppState,
        caplog: pytest.LogCaptureFixture,
        target: str,
        method: str | None,
    ) -> None:
        """A job whose row names a target outside the allow-list fails without a retry, is logged,
        and never runs."""
        caplog.set_level(logging.INFO, "flask_bgjobs")
        job = enqueue("echo", retries=3)
        edited = sa.update(Job).values(target=target, method=method, parameters_json="[]")
        state.store.transaction(lambda connection: connection.execute(edited))
        with running_worker(app):
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
    def test_broken_row_does_not_affect_other_jobs(
        self, app: Flask, state: AppState, change: dict[str, str]
    ) -> None:
        """A row with broken ``meta_json`` affects neither the worker nor other jobs."""
        broken, other = enqueue("fail", retries=1, retry_delay=60), enqueue("echo", 4)
        edited = sa.update(Job).where(Job.id == broken.id).values(**change)
        state.store.transaction(lambda connection: connection.execute(edited))
        with running_worker(app):
            assert other.wait(30).result == 4
            wait_until(lambda: stored(app, broken).status == "retrying", "the retry")

    def test_numeric_parameters_fail_without_a_retry(self, app: Flask, state: AppState) -> None:
        """Parameters edited into something other than a list or dict fail the job without a
        retry."""
        job = enqueue("echo", retries=3)
        edited = sa.update(Job).values(parameters_json="3")
        state.store.transaction(lambda connection: connection.execute(edited))
        with running_worker(app):
            job.wait(30)
        assert (job.status, job.attempt) == ("failed", 1)

    def test_unreadable_parameters_fail_the_job(self, app: Flask, state: AppState) -> None:
        """Parameters that are not valid JSON fail the job for good."""
        job = enqueue("echo")
        edited = sa.update(Job).values(parameters_json="{broken")
        state.store.transaction(lambda connection: connection.execute(edited))
        with running_worker(app):
            assert wait_until(lambda: stored(app, job).status == "failed")


class TestStop:
    def test_running_jobs_finish_in_grace_period(self, app: Flask, journal: Path) -> None:
        """After a stop request no job is claimed, and running jobs may finish within the grace
        period."""
        job = enqueue("hold", str(journal), 0.5)
        with running_worker(app, concurrency=1, shutdown_timeout=30) as worker:
            wait_until(lambda: lines(journal), "the start")
            worker.stop()
            later = enqueue("echo")
            # A second stop request, at the end of the block, would end the grace period.
            wait_until(lambda: stored(app, job).is_finished, "the end of the job")
        assert job.refresh().status == "completed"
        assert later.refresh().status == "pending"

    def test_jobs_are_released_after_grace_period(
        self, app: Flask, state: AppState, journal: Path
    ) -> None:
        """A job that still runs after the grace period is stopped and released without using a
        retry."""
        job = enqueue("hold", str(journal))
        with running_worker(app, concurrency=1, shutdown_timeout=0.1):
            wait_until(lambda: lines(journal), "the start")
        job.refresh()
        assert (job.status, job.retry_count, job.attempt) == ("pending", 0, 1)
        assert f"stopped {job.id} JobCancelled" in lines(journal)
        assert [row.status for row in rows(state, WorkerRow)] == ["stopped"]

    def test_burst_stops_when_no_job_is_pending(self, app: Flask) -> None:
        """``burst`` runs the pending jobs and does not wait for jobs that are due later."""
        done, later = enqueue("echo"), enqueue("echo", delay=3600)
        worker = Worker(state_of(app), WorkerOptions(burst=True))
        worker.run()
        assert done.refresh().status == "completed"
        assert later.refresh().status == "scheduled"

    @pytest.mark.on("sqlite")
    def test_unstoppable_job_is_logged(
        self,
        app: Flask,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The log names a job that holds a thread after its timeout, and its current line; the
        other threads continue."""
        monkeypatch.setattr("flask_bgjobs.worker.pool_health._FIRST_LOG_SECONDS", 0.1)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with running_worker(app, concurrency=2):
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
        """``burst`` stops although a paused queue still holds jobs."""
        state.store.pause("held")
        held = enqueue("echo", 1, queue="held")
        free = enqueue("echo", 2, queue="a-open")
        with running_worker(app, burst=True, queues=queues):
            wait_until(
                lambda: [row.status for row in rows(state, WorkerRow)] == ["stopped"], "the end"
            )
        assert (stored(app, held).status, stored(app, free).status) == ("pending", "completed")

    def test_burst_runs_due_retries(self, app: Flask) -> None:
        """A retry without a delay is due at once, so ``burst`` runs it."""
        job = enqueue("fail", retries=2, retry_delay=0)
        Worker(state_of(app), WorkerOptions(burst=True)).run()
        assert (job.refresh().status, job.attempt) == ("failed", 3)

    def test_unrecorded_job_is_rescued_after_worker_stops(
        self, app: Flask, state: AppState, journal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker that stops without recording an outcome keeps its lease, so that its job can be
        rescued."""
        job = enqueue("hold", str(journal), 600)

        def refused(*args: Any) -> Any:
            raise sa.exc.OperationalError("settle", {}, Exception("database is gone"))

        with running_worker(app, shutdown_timeout=0):
            wait_until(lambda: lines(journal), "the start")
            monkeypatch.setattr(type(state.store), "settle", refused)
        monkeypatch.undo()
        assert job.refresh().status == "running"
        (row,) = rows(state, WorkerRow)
        assert row.status == "alive"
        assert [s.status for s in state.store.rescue(row.id, row.beats)] == ["pending"]

    def test_max_jobs(self, app: Flask) -> None:
        """``max_jobs`` stops the worker after exactly that many jobs."""
        jobs = [enqueue("echo") for _ in range(10)]
        worker = Worker(state_of(app), WorkerOptions(max_jobs=4))
        worker.run()
        assert [job.refresh().status for job in jobs] == ["completed"] * 4 + ["pending"] * 6

    def test_max_time(self, app: Flask) -> None:
        """``max_time`` stops the worker after that many seconds."""
        begin = time.monotonic()
        Worker(state_of(app), WorkerOptions(max_time=0.3)).run()
        assert time.monotonic() - begin >= 0.3

    def test_max_memory(self, app: Flask) -> None:
        """``max_memory`` stops a worker with threads when it uses that many MiB, and no job is
        lost."""
        jobs = [enqueue("echo", n) for n in range(3)]
        Worker(state_of(app), WorkerOptions(max_memory=1)).run()
        assert {job.refresh().status for job in jobs} == {"pending"}
        Worker(state_of(app), WorkerOptions(max_memory=100_000, burst=True)).run()
        assert {job.refresh().status for job in jobs} == {"completed"}

    @pytest.mark.parametrize("scheduler", [True, False])
    def test_old_jobs_are_pruned(
        self, make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture, scheduler: bool
    ) -> None:
        """A worker deletes jobs older than ``BGJOBS_RETENTION``, unless it runs without its
        scheduler."""
        caplog.set_level(logging.INFO, "flask_bgjobs")
        app = make_app(BGJOBS_RETENTION={"completed": 0, "failed": None})
        with app.app_context():
            old, kept = enqueue("echo"), enqueue("fail", retries=0)
            Worker(state_of(app), WorkerOptions(burst=True, scheduler=False)).run()
            assert stored(app, old).status == "completed"
            with running_worker(app, scheduler=scheduler):
                if scheduler:
                    wait_until(lambda: state_of(app).store.get(old.id) is None, "the pruning")
                    wait_until(lambda: "Jobs pruned" in caplog.text, "the log line")
                    assert "Deleted: 1 | Held by other tables: 0" in caplog.text
                else:
                    enqueue("echo", delay=0.3).wait(30)
                    assert stored(app, old).status == "completed"
                    assert "Jobs pruned" not in caplog.text
                assert stored(app, kept).status == "failed"

    def test_queues_are_served_in_strict_order(self, app: Flask, journal: Path) -> None:
        """A worker serves only its queues, in their order."""
        for queue in ("low", "high", "other"):
            enqueue("record", str(journal), queue, queue=queue)
        Worker(
            state_of(app), WorkerOptions(queues=["high", "low"], concurrency=1, burst=True)
        ).run()
        assert lines(journal) == ["high", "low"]


class TestLease:
    def test_worker_with_lost_lease_starts_over(
        self, app: Flask, state: AppState, journal: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker whose lease was taken stops its job and continues under a new id."""
        job = enqueue("hold", str(journal))
        with running_worker(app, queues=["default"]):
            wait_until(lambda: lines(journal), "the start")
            (row,) = rows(state, WorkerRow)
            hold = sa.update(Job).values(queue="elsewhere")
            state.store.transaction(lambda connection: connection.execute(hold))
            # Like a sweep: a row that the worker has locked is rescued as an orphan, later.
            wait_until(
                lambda: (
                    state.store.rescue(row.id, _beats(state, row.name))
                    or state.store.rescue_orphans()
                ),
                "the rescue",
            )
            wait_until(lambda: f"stopped {job.id} JobCancelled" in lines(journal), "the stop")
            assert enqueue("echo", 3).wait(30).result == 3
        assert [worker.status for worker in rows(state, WorkerRow)] == ["dead", "stopped"]
        assert job.refresh().status == "pending"
        assert "Lease lost" in caplog.text

    def test_outage_after_claim_leaves_no_suspect_unstarted(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Claimed jobs run even if the query for suspects among them fails."""
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
        with running_worker(app, concurrency=2):
            assert [job.wait(DEADLINE_SECONDS).result for job in jobs] == [1, 2]
        assert not failures

    def test_suspects_run_one_at_a_time(self, app: Flask, state: AppState, journal: Path) -> None:
        """Suspects run one at a time, also in a worker with three threads."""
        jobs = [enqueue("hold", str(journal), 0.05) for _ in range(3)]
        state.store.transaction(lambda c: c.execute(sa.update(Job).values(suspect=True)))
        with running_worker(app, concurrency=3):
            for job in jobs:
                job.wait(30)
        events = [line.split()[0] for line in lines(journal)]
        assert events == ["start", "end"] * 3
        assert not any(job.suspect for job in jobs)

    def test_suspect_starts_when_its_code_starts(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``started_at`` of a suspect is the start of its code, even if it waited for its turn
        after the claim."""
        monkeypatch.setattr("flask_bgjobs.worker.suspects._PROVING_SECONDS", 1.0)
        jobs = [enqueue("hold", os.devnull, 0.5) for _ in range(2)]
        state.store.transaction(lambda c: c.execute(sa.update(Job).values(suspect=True)))
        with running_worker(app, concurrency=2):
            for job in jobs:
                job.wait(30)
        first, second = jobs
        assert first.claimed_at == second.claimed_at
        assert first.finished_at is not None
        assert second.started_at is not None
        assert second.started_at >= first.finished_at

    def test_workers_share_suspects(self, app: Flask, state: AppState, tmp_path: Path) -> None:
        """Each worker keeps one suspect and runs other jobs in its other threads; a second worker
        gets the next suspect."""
        gate = tmp_path / "gate"
        suspects = [_suspect(state, "wait_for_file", str(gate)) for _ in range(3)]
        for number in range(2):
            dead = register(state, f"dead{number}", concurrency=3)
            state.store.mark_started(dead, state.store.claim(dead, 3))
            state.store.rescue(dead, 0)

        def started() -> int:
            return sum(stored(app, job).started_at is not None for job in suspects)

        with running_worker(app, concurrency=3):
            wait_until(lambda: started() == 1, "the first suspect")
            assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
            attempts = [stored(app, job).attempt for job in suspects]
            with running_worker(app, name="second", concurrency=3) as second:
                wait_until(lambda: started() == 2, "the second suspect")
                beats = _beats(state, second.name)
                wait_until(lambda: _beats(state, second.name) > beats + 2, "time for more claims")
                held = [stored(app, job).status for job in suspects]
                assert sorted(held) == ["pending", "running", "running"]
                # Few claims release a suspect again: the workers do not claim them over and over.
                assert sum(stored(app, job).attempt for job in suspects) <= sum(attempts) + 2
                gate.touch()
                assert [job.wait(30).status for job in suspects] == ["completed"] * 3

    def test_waiting_suspect_is_cancelled_at_once(
        self, app: Flask, state: AppState, journal: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A suspect that waits for its turn is cancelled at once, and its code never starts."""
        monkeypatch.setattr("flask_bgjobs.worker.suspects._PROVING_SECONDS", 600.0)
        with running_worker(app, concurrency=2):
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

    def test_suspect_starts_after_an_outage(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A suspect whose start could not be committed starts when the database is available
        again."""
        mark_started = type(state.store).mark_started
        failures = iter([sa.exc.OperationalError("start", {}, Exception("database is gone"))])

        def fail_once(*arguments: Any) -> set[int]:
            for error in failures:
                raise error
            return mark_started(*arguments)

        monkeypatch.setattr(type(state.store), "mark_started", fail_once)
        job = _suspect(state, "echo", 5)
        with running_worker(app):
            assert job.wait(30).result == 5
        assert next(failures, None) is None

    def test_suspect_without_a_free_thread_is_not_started(
        self, app: Flask, state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A suspect that waits for a free thread has no recorded start, so it cannot be blamed for
        a crash."""
        gate = tmp_path / "gate"
        _expect_quick_jobs(monkeypatch)
        with running_worker(app, concurrency=1) as worker:
            blocking = enqueue("wait_for_file", str(gate))
            wait_until(lambda: stored(app, blocking).started_at, "the start")
            job = _suspect(state, "echo", 6)
            wait_until(lambda: stored(app, job).status == "running", "the claim")
            beats = _beats(state, worker.name)
            wait_until(lambda: _beats(state, worker.name) > beats + 2, "time for a start")
            assert stored(app, job).started_at is None
            gate.touch()
            assert job.wait(30).result == 6

    def test_suspect_gets_next_free_thread(
        self, app: Flask, state: AppState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While a suspect waits for a thread, the worker prefetches no job, because it would start
        before the suspect."""
        gate = tmp_path / "gate"
        _expect_quick_jobs(monkeypatch)
        with running_worker(app, concurrency=1) as worker:
            blocking = enqueue("wait_for_file", str(gate))
            wait_until(lambda: stored(app, blocking).started_at, "the start")
            suspect = _suspect(state, "echo", 6)
            wait_until(lambda: stored(app, suspect).status == "running", "the claim")
            others = [enqueue("echo", number) for number in range(3)]
            beats = _beats(state, worker.name)
            wait_until(lambda: _beats(state, worker.name) > beats + 2, "time for a claim")
            assert [stored(app, job).status for job in others] == ["pending"] * 3
            gate.touch()
            assert [job.wait(30).result for job in (suspect, *others)] == [6, 0, 1, 2]

    def test_start_of_suspect_is_committed_before_its_code_runs(
        self, app: Flask, state: AppState
    ) -> None:
        """The code of a suspect can read its own start in the database."""

        def look() -> bool:
            with state.store.read() as connection:
                started = sa.select(Job.started_at).where(Job.id == current_job.id)
                return connection.scalar(started) is not None

        allow(state, look=look)
        with running_worker(app):
            for _ in range(10):
                assert _suspect(state, "look").wait(30).result is True

    def test_heartbeat_continues_after_any_error(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A heartbeat that fails with an exception of the host is tried again at the next
        interval."""
        beat = type(state.store).beat
        failures = iter([RuntimeError("no token"), RuntimeError("no token")])

        def fail_twice(*arguments: Any) -> bool:
            for error in failures:
                raise error
            return beat(*arguments)

        monkeypatch.setattr(type(state.store), "beat", fail_twice)
        with running_worker(app) as worker:
            wait_until(lambda: next(iter(rows(state, WorkerRow)), None), "the worker")
            wait_until(lambda: _beats(state, worker.name) > 2, "the heartbeats")
            assert enqueue("echo", 1).wait(30).result == 1
        assert next(failures, None) is None

    def test_jobs_of_dead_worker_are_rescued(self, app: Flask, state: AppState) -> None:
        """A worker rescues the jobs of a dead worker without being asked, and sends
        ``job_rescued``."""
        from flask_bgjobs.worker.registration import register

        dead = register(state, "dead", concurrency=1)
        job = enqueue("echo", 8)
        state.store.claim(dead, 1)
        gone = sa.update(WorkerRow).values(process=sa.func.replace(WorkerRow.process, "/", "/9"))
        state.store.transaction(lambda connection: connection.execute(gone))
        rescued: list[int] = []

        def note(app: Flask, job: Any, settled: Any) -> None:
            rescued.append(job.id)

        with job_rescued.connected_to(note, app), running_worker(app):
            assert job.wait(30).result == 8
        assert rescued == [job.id]
        assert job.attempt == 2


def _suspect(state: AppState, name: str, *parameters: Any) -> Job:
    """A pending job that was rescued from a dead worker."""
    target = name if name in state.registry.names() else f"tests.jobs.{name}"
    job = run_background_job(target, parameters=parameters, delay=600)
    suspect = sa.update(Job).where(Job.id == job.id).values(suspect=True, status="pending")
    state.store.transaction(lambda connection: connection.execute(suspect))
    return job


def _worker_thread_names(threads: set[threading.Thread]) -> list[str]:
    """The names of those threads that belong to a worker."""
    return [t.name for t in threads if t.name.startswith(("bgjobs", "APScheduler"))]


def _beats(state: AppState, name: str) -> int:
    """The heartbeats so far of the newest worker with this name; 0 before it has registered."""
    return max(
        ((row.id, row.beats) for row in rows(state, WorkerRow) if row.name == name),
        default=(0, 0),
    )[1]


class TestSignalsAndLogs:
    def test_each_event_sends_one_signal(self, app: Flask, state: AppState, journal: Path) -> None:
        """Started, retrying, failed, completed and cancelled each send one signal."""
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
        with running_worker(app):
            good.wait(30)
            bad.wait(30)
        assert sorted(seen) == sorted(
            [
                ("started", good.id), ("completed", good.id),
                ("started", bad.id), ("retrying", bad.id), ("started", bad.id), ("failed", bad.id),
                ("cancelled", waiting.id),
            ]
        )  # fmt: skip

    def test_each_event_logs_one_line(self, app: Flask, caplog: pytest.LogCaptureFixture) -> None:
        """Each event of a job logs one line of the documented form, whatever its parameters
        contain."""
        caplog.set_level(logging.INFO, "flask_bgjobs")
        good = run_background_job("tests.jobs.SampleJob", "execute", ["a\nb\x1b\u2028c"])
        bad = enqueue("fail", "no\nway", retries=1, retry_delay=0)
        with running_worker(app):
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

    def test_secrets_are_masked_in_errors(
        self, app: Flask, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A positional password is masked in the logged parameters, in the logged error and in the
        stored error."""
        caplog.set_level(logging.DEBUG, "flask_bgjobs")
        job = enqueue("login", "ann", "hunter2!", retries=0)
        with running_worker(app):
            job.wait(30)
        assert "hunter2!" not in caplog.text
        assert "ann could not log in with ***" in caplog.text
        assert job.error == "ValueError: ann could not log in with ***"


class TestCannotWork:
    def test_failed_start_leaves_no_thread(
        self, app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the worker's last thread cannot start, its other threads end, and its row is
        stopped."""

        def fail(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("flask_bgjobs.worker.worker.WakeUps", fail)
        before = set(threading.enumerate())
        with pytest.raises(RuntimeError, match="new thread"):
            Worker(state).run()
        (row,) = rows(state, WorkerRow)
        assert row.status == "stopped"
        wait_until(
            lambda: not _worker_thread_names(set(threading.enumerate()) - before),
            "the end of the threads",
        )

    def test_missing_tables_name_the_command(self, empty_database_url: str) -> None:
        """Without tables, the worker raises an error that names the command to create them."""
        from tests.apps import build_app

        app = build_app(empty_database_url)
        with app.app_context(), pytest.raises(BgJobsError, match="flask db upgrade"):
            Worker(state_of(app))
        state_of(app).store.dispose()

    def test_in_memory_database_is_refused(self, make_app: Callable[..., Flask]) -> None:
        """A worker refuses to start on an in-memory database."""
        app = make_app(database_url="sqlite://")
        with app.app_context(), pytest.raises(ConfigError, match="in-memory"):
            Worker(state_of(app))

    @pytest.mark.parametrize(
        "config", [{"BGJOBS_POOL": "process"}, {"BGJOBS_QUEUE_POOLS": {"images": "process"}}]
    )
    def test_process_pool_needs_an_import_path(
        self, make_app: Callable[..., Flask], config: dict[str, Any]
    ) -> None:
        """If child processes could not build the app, the error names the key to set."""
        app = make_app(**config)
        with app.app_context(), pytest.raises(ConfigError, match="BGJOBS_APP = 'shop:create_app'"):
            Worker(state_of(app))

    def test_failed_import_is_named(self, make_app: Callable[..., Flask]) -> None:
        """The error names a module in ``BGJOBS_IMPORTS`` that cannot be imported."""
        app = make_app(BGJOBS_IMPORTS=["no_such_module_here"])
        with app.app_context(), pytest.raises(ConfigError, match="no_such_module_here"):
            Worker(state_of(app)).run()


def test_open_transaction_does_not_reach_next_job(app: Flask, state: AppState) -> None:
    """A transaction that a job leaves open is rolled back before the next job runs."""

    def break_session() -> None:
        session = state.db.session
        session.execute(sa.text("CREATE TABLE left_open (id INTEGER)"))
        session.execute(sa.text("INSERT INTO left_open VALUES (1)"))

    def look() -> bool:
        return state.db.session().in_transaction()

    allow(state, break_session=break_session, look=look)
    with running_worker(app, concurrency=1):
        run_background_job("break_session").wait(30)
        assert run_background_job("look").wait(30).result is False


@pytest.mark.parametrize("raises", [True, False])
def test_job_lost_in_failed_job_is_not_reported(
    app: Flask, state: AppState, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """A job enqueued without a commit is logged as lost only if the enqueuing job completed: an
    exception explains the loss."""

    def enqueue_without_commit() -> None:
        enqueue("echo", 1, session=state.db.session)
        if raises:
            raise ValueError

    allow(state, without_commit=enqueue_without_commit)
    with running_worker(app, concurrency=1):
        run_background_job("without_commit", retries=0).wait(30)
    assert ("Job lost" in caplog.text) is not raises


def test_long_job_does_not_delay_short_jobs(app: Flask, journal: Path) -> None:
    """A long job does not delay short jobs in the other thread."""
    slow = enqueue("hold", str(journal), 20)
    with running_worker(app, concurrency=2, shutdown_timeout=0):
        wait_until(lambda: lines(journal), "the start")
        for number in range(30):
            assert enqueue("echo", number).wait(15).result == number
        assert slow.refresh().status == "running"


@pytest.mark.on("sqlite")
def test_worker_turns_wal_on_and_logs_it(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """The worker turns WAL mode on and logs it."""
    caplog.set_level(logging.INFO, "flask_bgjobs")
    Worker(state_of(app), WorkerOptions(burst=True)).run()
    assert "WAL mode is now on" in caplog.text
    with state_of(app).store.read() as connection:
        # A connection notices a changed journal mode when it reads.
        connection.exec_driver_sql("SELECT 1 FROM bgjobs_job")
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_worker_continues_after_wall_clock_jump(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the wall clock jumps forward by an hour, due retries and new jobs still run."""
    with running_worker(app):
        job = enqueue("fail_times", 1, retries=1, retry_delay=0.3)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        assert job.wait(30).status == "completed"
        assert enqueue("echo", 1).wait(30).result == 1


def test_start_is_stored_while_job_runs(app: Flask, journal: Path) -> None:
    """The start of a long job is stored while it runs."""
    job = enqueue("hold", str(journal), 20)
    with running_worker(app, shutdown_timeout=0):
        wait_until(lambda: stored(app, job).started_at is not None, "the start")
        assert dt.datetime.now(dt.UTC).replace(tzinfo=None) >= stored(app, job).started_at
