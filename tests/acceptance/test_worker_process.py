"""The worker command in a real process that is stopped, interrupted and killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import beats, enqueue, lines, stop_between_transactions
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]


def test_worker_runs_an_enqueued_job(app: Flask, start_worker: Start) -> None:
    """A worker process runs a job that this process enqueued, and logs its completion."""
    worker = start_worker()
    job = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"], retries=3)
    assert job.wait(DEADLINE_SECONDS).result == "executed: Hello"
    wait_until(
        lambda: "Job completed successfully | Class: tests.jobs.SampleJob" in worker.log.read_text()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signal_stops_gracefully(
    app: Flask, start_worker: Start, journal: Path, number: signal.Signals
) -> None:
    """After SIGTERM or Ctrl-C the running job finishes, no other job starts; exit code 0."""
    worker = start_worker("-c", "1")
    running = enqueue("hold", str(journal), 3.0)
    wait_until(lambda: lines(journal), "the start")
    waiting = [enqueue("echo", n) for n in range(20)]
    worker.send_signal(number)
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert running.refresh().status == "completed"
    assert {job.refresh().status for job in waiting} == {"pending"}
    assert re.search(r"stopped after .* s: 1 completed", worker.log.read_text())


def test_second_signal_ends_the_grace_period(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """A second signal ends the grace period: the job is stopped and released; exit code 0."""
    worker = start_worker("--shutdown-timeout", "600")
    job = enqueue("hold", str(journal), 600)
    wait_until(lambda: lines(journal), "the start")
    worker.send_signal(signal.SIGTERM)
    wait_until(lambda: "Worker stopping" in worker.log.read_text(), "the stop")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    job.refresh()
    assert (job.status, job.retry_count) == ("pending", 0)


def test_threads_of_a_job_do_not_keep_the_process_alive(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """After the grace period the process exits with code 0 even if a job's thread still runs."""
    worker = start_worker("--shutdown-timeout", "0.2")
    job = enqueue("in_a_thread", str(journal), 600)
    wait_until(lambda: lines(journal), "the start")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert (job.refresh().status, job.retry_count) == ("pending", 0)


def test_kill_9_loses_no_job(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """After ``kill -9`` a new worker on this machine runs the jobs again, and no retry is used."""
    worker = start_worker("-c", "3")
    jobs = [enqueue("hold", str(journal), 1.5) for _ in range(3)]
    wait_until(lambda: len(lines(journal)) >= 3, "the starts")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    start_worker("-c", "3")
    for job in jobs:
        job.wait(DEADLINE_SECONDS)
        assert (job.status, job.retry_count, job.crash_count, job.attempt) == ("completed", 0, 0, 2)


def test_only_the_poison_job_fails_as_crashed(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """A job that kills its worker every time fails as crashed; the other jobs complete."""
    poison = enqueue("crash_worker", str(journal), retries=10)
    neighbours = [enqueue("hold", str(journal), 0.3) for _ in range(5)]
    for _ in range(4):
        worker = start_worker("-c", "6")
        assert worker.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    start_worker("-c", "6")
    for job in neighbours:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert job.crash_count == 0
    assert poison.wait(DEADLINE_SECONDS).status == "failed"
    assert (poison.crash_count, poison.error_type, poison.retry_count) == (3, "Crashed", 0)
    assert lines(journal).count(str(poison.id)) == 4


def test_resumed_worker_changes_no_outcome(
    app: Flask, state: AppState, start_worker: Start, journal: Path, tmp_path: Path
) -> None:
    """A worker that resumes after its lease ended logs the loss, and the newer outcome stands."""
    gate = tmp_path / "gate"
    stalled = start_worker("-n", "stalled")
    job = enqueue("wait_for_file", str(gate))
    wait_until(lambda: stored(app, job).started_at is not None, "the start")
    stop_between_transactions(stalled, state)
    start_worker("-n", "second")
    wait_until(lambda: stored(app, job).attempt == 2, "the rescue")
    gate.touch()
    assert job.wait(DEADLINE_SECONDS).status == "completed"
    settled = stored(app, job)
    stalled.send_signal(signal.SIGCONT)
    wait_until(lambda: "ease lost" in stalled.log.read_text(), "the notice")
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    again = stored(app, job)
    assert (again.attempt, again.worker_id, again.finished_at) == (
        2,
        settled.worker_id,
        settled.finished_at,
    )


def test_unstarted_jobs_of_a_killed_worker_are_not_blamed(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """Jobs that a killed worker had claimed but not started run once and are not blamed."""
    worker = start_worker("-c", "1")
    for number in range(30):
        enqueue("echo", number).wait(DEADLINE_SECONDS)
    holder = enqueue("hold", str(journal), 3.0)
    others = [enqueue("record", str(journal), f"other {n}") for n in range(50)]
    wait_until(lambda: lines(journal), "the start")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    start_worker("-c", "4")
    for job in [holder, *others]:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert job.crash_count == 0
    for number in range(50):
        assert lines(journal).count(f"other {number}") == 1


def test_cancel_from_another_process(app: Flask, start_worker: Start, journal: Path) -> None:
    """``flask bgjobs cancel`` stops the code of a job that another process runs."""
    start_worker()
    job = enqueue("hold", str(journal), 600)
    wait_until(lambda: lines(journal), "the start")
    result = app.test_cli_runner().invoke(args=["bgjobs", "cancel", str(job.id)])
    assert "was asked to stop" in result.output
    assert job.wait(DEADLINE_SECONDS).status == "cancelled"
    assert f"stopped {job.id} JobCancelled" in lines(journal)


def test_burst_and_max_jobs_end_the_worker(app: Flask, start_worker: Start) -> None:
    """With ``--burst`` or ``--max-jobs`` the worker ends by itself with exit code 0."""
    jobs = [enqueue("echo", n) for n in range(10)]
    assert start_worker("--max-jobs", "4").wait(DEADLINE_SECONDS) == 0
    assert sorted(job.refresh().status for job in jobs) == ["completed"] * 4 + ["pending"] * 6
    assert start_worker("--burst").wait(DEADLINE_SECONDS) == 0
    assert {job.refresh().status for job in jobs} == {"completed"}


def test_failed_start_is_reported_in_one_sentence(tmp_path: Path) -> None:
    """A worker that cannot run says why in one sentence and exits with code 1."""
    (tmp_path / "empty.py").write_text(
        "from tests.apps import build_app\n"
        f"def create_app(): return build_app('sqlite:///{tmp_path}/none.db')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "empty", "bgjobs", "worker"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the database has no table")
    assert "Traceback" not in done.stderr


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("pool", ["thread", "process"])
@pytest.mark.parametrize("set_up", ["dict_config", "alembic_config"])
def test_job_lines_are_logged_if_the_host_disables_loggers(
    app: Flask, start_worker: Start, set_up: str, pool: str
) -> None:
    """``dictConfig`` and ``fileConfig`` disable the loggers that they do not name, but the host's
    handlers still write the worker's lines."""
    worker = start_worker("-P", pool, "-c", "1", TEST_SET_UP=set_up, BGJOBS_APP="host")
    assert enqueue("fail", "now", retries=0).wait(DEADLINE_SECONDS).status == "failed"
    wait_until(lambda: "host: Job failed | " in worker.log.read_text(), "the line")
    assert "host: Worker started | " in worker.log.read_text()


@pytest.mark.on("sqlite")
def test_idle_worker_logs_nothing(app: Flask, start_worker: Start, state: AppState) -> None:
    """If the app logs everything from INFO on, the polls and timers of a worker add no line."""
    worker = start_worker("-c", "1", TEST_SET_UP="basic_config", BGJOBS_POLL_INTERVAL=0.05)
    assert enqueue("echo", 1, delay=0.2).wait(DEADLINE_SECONDS).result == 1
    log = worker.log.read_text()
    seen = sum(beats(state).values())
    wait_until(lambda: sum(beats(state).values()) > seen + 2, "time for many polls")
    assert worker.log.read_text() == log
    assert "apscheduler" not in log
