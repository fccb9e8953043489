"""How failed attempts are reported: to Sentry, to failure hooks and in the log."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs.operations.queries import job_detail
from flask_bgjobs.state import AppState, state_of
from tests.acceptance.helpers import beats, descendants, enqueue, lines
from tests.conftest import DEADLINE_SECONDS, wait_until

Start = Callable[..., Any]
pytestmark = pytest.mark.on("sqlite")


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(path)]


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_sentry_gets_one_event_for_each_failure(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """The event names the exception and only the job's own code, has the tags of the documented
    receiver, and is grouped with similar events. A retried attempt sends no event."""
    path = tmp_path / "events"
    worker = start_worker(
        "-P", pool, "-c", "2", TEST_SET_UP="sentry", TEST_MARKER=str(path), BGJOBS_APP="host"
    )
    failed = [enqueue("fail", "no such order", retries=0) for _ in range(2)]
    failed.append(enqueue("fail", "at last", retries=1))
    for job in failed:
        job.wait(DEADLINE_SECONDS)
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: len(events(path)) >= 3, "the events")
    found = {event["tags"]["job.id"]: event for event in events(path)}
    assert len(events(path)) == 3
    assert set(found) == {job.id for job in failed}
    for job in failed:
        event = found[job.id]
        assert event["level"] == "error"
        (raised,) = event["exception"]["values"]
        assert (raised["type"], raised["mechanism"]["handled"]) == ("ValueError", True)
        frames = [(frame["module"], frame["function"]) for frame in raised["stacktrace"]["frames"]]
        assert frames == [("tests.jobs", "fail")]
        assert event["tags"]["job.name"] == "tests.jobs.fail"
        assert event["tags"]["job.queue"] == "default"
        assert event["tags"]["job.attempt"] == job.attempt
        assert event["extra"]["bgjobs_job"] == job.id
    assert len({event["logentry"]["message"] for event in found.values()}) == 1
    assert worker.log.read_text().count("Job failed |") == 3


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_failure_hook_runs_where_the_attempt_ran(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """It runs once for each attempt, with ``final`` for the last; the log has both tracebacks."""
    path = tmp_path / "failures"
    worker = start_worker(
        "-P",
        pool,
        "-c",
        "1",
        TEST_SET_UP="failures_are_recorded",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    job = enqueue("fail", "no such order", retries=1).wait(DEADLINE_SECONDS)
    (first, *pid), (last, *_) = (line.rsplit(" ", 1) for line in lines(path))
    assert first == f"{job.id} 1 ValueError False"
    assert last == f"{job.id} 2 ValueError True"
    ran_in = [worker.pid] if pool == "thread" else descendants(worker.pid)
    assert int(*pid) in ran_in
    wait_until(lambda: "Job failed |" in worker.log.read_text(), "the line")
    log = worker.log.read_text()
    assert log.count("Traceback (most recent call last):") == 2
    assert log.count("raise ValueError(message)") == 2


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_failure_hook_that_hangs_changes_no_outcome(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """The outcome is recorded first, the job's timeout does not apply to the hook, and a stopping
    worker does not release the job."""
    path = tmp_path / "failures"
    worker = start_worker(
        *("-P", pool, "-c", "1", "--shutdown-timeout", "5"),
        TEST_SET_UP="failure_hook_hangs",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    job = enqueue("fail", "no such order", retries=0, timeout=1).wait(DEADLINE_SECONDS)
    wait_until(lambda: lines(path), "the call")
    # Longer than the time limit, and another job of the same thread or child meanwhile.
    assert enqueue("hold", str(tmp_path / "held"), 1.5).wait(DEADLINE_SECONDS).status == "completed"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert (job.refresh().status, job.error) == ("failed", "ValueError: no such order")
    assert [line.split()[:4] for line in lines(path)] == [[str(job.id), "1", "ValueError", "True"]]
    log = worker.log.read_text()
    assert log.count("Job failed |") == 1
    assert "released" not in log


def test_failure_hook_that_hangs_does_not_stop_the_worker(
    app: Flask, start_worker: Start, state: AppState, tmp_path: Path
) -> None:
    """This holds even if the worker itself calls the hook, for a child that died."""
    path = tmp_path / "failures"
    start_worker(
        *("-P", "process", "-c", "1"),
        TEST_SET_UP="failure_hook_hangs",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
        BGJOBS_MAX_CRASHES=1,
    )
    enqueue("exit_quietly", 9, retries=0).wait(DEADLINE_SECONDS)
    wait_until(lambda: lines(path), "the call")
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    seen = sum(beats(state).values())
    wait_until(lambda: sum(beats(state).values()) > seen + 2, "further heartbeats")


def test_slow_failure_hook_finishes(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """A slow hook finishes even in a child that ends because its job was stopped."""
    path = tmp_path / "failures"
    worker = start_worker(
        *("-P", "process", "-c", "1"),
        TEST_SET_UP="failure_hook_is_slow",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    overdue = [
        enqueue("hold", str(tmp_path / "held"), 60, retries=0, timeout=0.5) for _ in range(2)
    ]
    for job in overdue:
        assert job.wait(DEADLINE_SECONDS).error_type == "JobTimeout"
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: len(lines(path)) == 2, "the calls")
    assert [line.split()[:4] for line in lines(path)] == [
        [str(job.id), "1", "JobTimeout", "True"] for job in overdue
    ]
    assert "still running at the end" not in worker.log.read_text()


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_last_failure_is_reported_before_the_worker_ends(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """A slow log handler does not prevent the report."""
    path = tmp_path / "failures"
    job = enqueue("fail", "no such order", retries=0)
    worker = start_worker(
        *("-P", pool, "-c", "1", "--burst"),
        TEST_SET_UP="failure_log_is_slow",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert [line.split()[:4] for line in lines(path)] == [[str(job.id), "1", "ValueError", "True"]]


def test_log_handler_that_hangs_does_not_stop_jobs(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """The child is killed, and the worker reports the failure while other jobs run."""
    worker = start_worker(
        *("-P", "process", "-c", "1", "--shutdown-timeout", "5"),
        TEST_SET_UP="failure_log_hangs_everywhere",
        TEST_MARKER=str(tmp_path / "failures"),
        BGJOBS_APP="host",
    )
    assert enqueue("fail", "no such order", retries=0).wait(DEADLINE_SECONDS).status == "failed"
    for number in range(3):
        assert enqueue("echo", number).wait(DEADLINE_SECONDS).result == number
    worker.send_signal(signal.SIGTERM)
    # The worker forces the exit: Python would wait for the blocked handler when it closes it.
    worker.wait(DEADLINE_SECONDS)
    assert "stopped after" in worker.log.read_text()
    assert "3 completed" in worker.log.read_text()


def test_failure_hooks_finish_in_children_at_their_limit(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """Each hook finishes although the child has received more jobs than its limit allows."""
    path = tmp_path / "failures"
    jobs = [enqueue("fail", str(number), retries=0) for number in range(6)]
    start_worker(
        *("-P", "process", "-c", "1", "--max-jobs", "2"),
        TEST_SET_UP="failure_hook_is_slow",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    wait_until(lambda: len(lines(path)) == len(jobs), "the calls")
    assert {int(line.split()[0]) for line in lines(path)} == {job.id for job in jobs}


@pytest.mark.parametrize("set_up", ["failure_log_ends_the_child", "failure_log_hangs_in_child"])
def test_worker_reports_failures_that_a_child_did_not_report(
    app: Flask, start_worker: Start, tmp_path: Path, set_up: str
) -> None:
    """The child recorded the outcome, then died or hung in a log handler: the worker reports the
    failure once, and the next job runs."""
    path = tmp_path / "failures"
    worker = start_worker(
        *("-P", "process", "-c", "1"),
        TEST_SET_UP=set_up,
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    job = enqueue("fail", "no such order", retries=0).wait(DEADLINE_SECONDS)
    assert job.error == "ValueError: no such order"
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: lines(path), "the call")
    assert [line.split() for line in lines(path)] == [
        [str(job.id), "1", "AttemptFailed", "True", str(worker.pid)]
    ]
    log = worker.log.read_text()
    assert log.count("Job failed |") == log.count("Failure reported late | ") == 1


@pytest.mark.parametrize("pool", ["thread", "process"])
@pytest.mark.parametrize("name", ["hold", "async_hold"])
def test_timeout_shows_where_the_code_was(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str, name: str
) -> None:
    """The traceback shows the frames of the job's own function or coroutine and none of ours."""
    start_worker("-P", pool, "-c", "1", BGJOBS_APP="host")
    job = enqueue(name, str(tmp_path / "journal"), retries=0, timeout=0.5)
    assert job.wait(DEADLINE_SECONDS).error == "JobTimeout: it ran longer than 0.5 s"
    (attempt,) = job_detail(state_of(app), job).attempts
    assert attempt.traceback is not None
    assert f"in {name}" in attempt.traceback
    for module in ("interrupt.py", "child.py", "execute.py"):
        assert module not in attempt.traceback


def test_worker_reports_failures_of_a_dead_child(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """The worker calls the failure hook for a child killed at its timeout and for a crashed one."""
    path = tmp_path / "failures"
    worker = start_worker(
        "-P",
        "process",
        "-c",
        "1",
        TEST_SET_UP="failures_are_recorded",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
        BGJOBS_MAX_CRASHES=1,
    )
    stuck = enqueue("ignore_term", str(tmp_path / "stuck"), retries=0, timeout=0.5)
    stuck.wait(DEADLINE_SECONDS)
    crashed = enqueue("exit_quietly", 9, retries=0).wait(DEADLINE_SECONDS)
    assert (stuck.status, crashed.status) == ("failed", "failed")
    wait_until(lambda: len(lines(path)) == 2, "both failures")
    assert [line.rsplit(" ", 1) for line in lines(path)] == [
        [f"{stuck.id} 1 JobTimeout True", str(worker.pid)],
        [f"{crashed.id} {crashed.attempt} AttemptFailed True", str(worker.pid)],
    ]
