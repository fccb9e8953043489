"""Failed attempts, as the tools of people see them."""

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
    """It names the exception and the job's own code, has the tags of the documented receiver, and
    is grouped with others like it; an attempt that is retried makes no event."""
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
def test_each_failed_attempt_is_told_where_it_ran(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """Once for each attempt, with ``final`` at the last; the traceback stands in the log."""
    path = tmp_path / "failures"
    worker = start_worker(
        "-P",
        pool,
        "-c",
        "1",
        TEST_SET_UP="failures_are_noted",
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
    said = worker.log.read_text()
    assert said.count("Traceback (most recent call last):") == 2
    assert said.count("raise ValueError(message)") == 2


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_a_function_that_hangs_changes_no_outcome(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """The outcome is recorded first, the time limit of the job does not count any more, and a stop
    of the worker gives nothing back that was reported."""
    path = tmp_path / "failures"
    worker = start_worker(
        *("-P", pool, "-c", "1", "--shutdown-timeout", "5"),
        TEST_SET_UP="failures_take_long",
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
    said = worker.log.read_text()
    assert said.count("Job failed |") == 1
    assert "released" not in said


def test_a_function_that_hangs_stops_no_worker(
    app: Flask, start_worker: Start, state: AppState, tmp_path: Path
) -> None:
    """Also where the worker itself calls it, for a child that died."""
    path = tmp_path / "failures"
    start_worker(
        *("-P", "process", "-c", "1"),
        TEST_SET_UP="failures_take_long",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
        BGJOBS_MAX_CRASHES=1,
    )
    enqueue("exit_quietly", 9, retries=0).wait(DEADLINE_SECONDS)
    wait_until(lambda: lines(path), "the call")
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    seen = sum(beats(state).values())
    wait_until(lambda: sum(beats(state).values()) > seen + 2, "further heartbeats")


def test_a_function_that_takes_seconds_comes_to_its_end(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """Also in a child that ends because a job was stopped there, while another one works."""
    path = tmp_path / "failures"
    worker = start_worker(
        *("-P", "process", "-c", "1"),
        TEST_SET_UP="failures_take_seconds",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    late = [enqueue("hold", str(tmp_path / "held"), 60, retries=0, timeout=0.5) for _ in range(2)]
    for job in late:
        assert job.wait(DEADLINE_SECONDS).error_type == "JobTimeout"
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: len(lines(path)) == 2, "the calls")
    assert [line.split()[:4] for line in lines(path)] == [
        [str(job.id), "1", "JobTimeout", "True"] for job in late
    ]
    assert "still running at the end" not in worker.log.read_text()


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_the_last_failure_is_reported_before_the_worker_ends(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str
) -> None:
    """However long a handler of the log takes for it."""
    path = tmp_path / "failures"
    job = enqueue("fail", "no such order", retries=0)
    worker = start_worker(
        *("-P", pool, "-c", "1", "--burst"),
        TEST_SET_UP="failures_are_logged_slowly",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert [line.split()[:4] for line in lines(path)] == [[str(job.id), "1", "ValueError", "True"]]


def test_a_log_that_hangs_everywhere_holds_no_job(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """The child is killed, and the worker reports for it beside its own work."""
    worker = start_worker(
        *("-P", "process", "-c", "1", "--shutdown-timeout", "5"),
        TEST_SET_UP="failures_are_logged_nowhere",
        TEST_MARKER=str(tmp_path / "failures"),
        BGJOBS_APP="host",
    )
    assert enqueue("fail", "no such order", retries=0).wait(DEADLINE_SECONDS).status == "failed"
    for number in range(3):
        assert enqueue("echo", number).wait(DEADLINE_SECONDS).result == number
    worker.send_signal(signal.SIGTERM)
    # Its end is forced: Python waits for the handler when it closes all of them.
    worker.wait(DEADLINE_SECONDS)
    assert "stopped after" in worker.log.read_text()
    assert "3 completed" in worker.log.read_text()


def test_functions_come_to_their_end_in_children_that_retire(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """Also in one that has been handed more jobs than it may run."""
    path = tmp_path / "failures"
    jobs = [enqueue("fail", str(number), retries=0) for number in range(6)]
    start_worker(
        *("-P", "process", "-c", "1", "--max-jobs", "2"),
        TEST_SET_UP="failures_take_seconds",
        TEST_MARKER=str(path),
        BGJOBS_APP="host",
    )
    wait_until(lambda: len(lines(path)) == len(jobs), "the calls")
    assert {int(line.split()[0]) for line in lines(path)} == {job.id for job in jobs}


@pytest.mark.parametrize("set_up", ["failures_end_the_process", "failures_are_never_logged"])
def test_the_worker_reports_what_a_child_has_not_reported(
    app: Flask, start_worker: Start, tmp_path: Path, set_up: str
) -> None:
    """Its outcome was recorded before the child died, or hung in a handler of the log; the next
    job runs."""
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
    said = worker.log.read_text()
    assert said.count("Job failed |") == said.count("Failure reported late | ") == 1


@pytest.mark.parametrize("pool", ["thread", "process"])
@pytest.mark.parametrize("name", ["hold", "async_hold"])
def test_a_timeout_tells_where_the_code_stood(
    app: Flask, start_worker: Start, tmp_path: Path, pool: str, name: str
) -> None:
    """The last frame is the job's own, also of a coroutine and where a signal has stopped it."""
    start_worker("-P", pool, "-c", "1", BGJOBS_APP="host")
    job = enqueue(name, str(tmp_path / "journal"), retries=0, timeout=0.5)
    assert job.wait(DEADLINE_SECONDS).error == "JobTimeout: it ran longer than 0.5 s"
    (attempt,) = job_detail(state_of(app), job).attempts
    assert attempt.traceback is not None
    assert f"in {name}" in attempt.traceback
    for own in ("interrupt.py", "child.py", "execute.py"):
        assert own not in attempt.traceback


def test_a_dead_child_is_told_by_the_worker(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """A child that had to be killed for its job's timeout, and one that crashed too often."""
    path = tmp_path / "failures"
    worker = start_worker(
        "-P",
        "process",
        "-c",
        "1",
        TEST_SET_UP="failures_are_noted",
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
