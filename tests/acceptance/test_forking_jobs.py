"""Jobs that fork: the copy of the process ends with the job's code and does not act as a worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import Job, run_background_job
from tests.acceptance.helpers import descendants, is_alive, lines
from tests.conftest import DEADLINE_SECONDS, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]

POOLS = pytest.mark.parametrize("pool", ["thread", "process"])
RUNS = 100
"""How many jobs with helpers run: a lost lock or signal shows only in some of them."""
RUNS_SECONDS = 240.0
COPIES = 200


@pytest.fixture
def start(start_worker: Start) -> Iterator[Start]:
    """Starts workers, and kills the processes that their jobs left."""
    started: list[Any] = []

    def start_one(*options: str, **config: Any) -> Any:
        started.append(start_worker(*options, **config))
        return started[-1]

    yield start_one
    below = [pid for worker in started for pid in descendants(worker.pid)]
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def enqueue(name: str, *parameters: Any, **options: Any) -> Job:
    """Enqueue a job of ``tests.process_jobs``."""
    return run_background_job(f"tests.process_jobs.{name}", parameters=parameters, **options)


def stop(worker: Any) -> None:
    """Stop a worker with SIGTERM, as a service manager does."""
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0


@POOLS
@pytest.mark.parametrize("name", ["fork_copy", "fork_copy_async"])
def test_forked_copy_ends_with_the_job_code(app: Flask, start: Start, pool: str, name: str) -> None:
    """A copy that returns from the job, exits or raises ends as a program would. The job has one
    attempt and its own outcome, and the worker and its children continue."""
    worker = start("-P", pool, "-c", "1")
    codes = {"return": 0, "exit": 7, "message": 1, "raise": 1}
    jobs = {how: enqueue(name, how, retries=0) for how in codes}
    for how, job in jobs.items():
        job.wait(DEADLINE_SECONDS)
        assert (how, job.status, job.result) == (how, "completed", codes[how])
        assert job.attempt == 1
    log = worker.log.read_text()
    assert "ValueError: raised in the copy" in log
    assert "the copy gives up" in log
    below = descendants(worker.pid)
    assert len(below) == (0 if pool == "thread" else 2)
    stop(worker)
    wait_until(lambda: not any(map(is_alive, below)), "the end of all processes")


@POOLS
def test_copy_forked_in_a_thread_of_the_job_ends(app: Flask, start: Start, pool: str) -> None:
    """A copy that was forked in a thread of the job ends with that thread."""
    worker = start("-P", pool, "-c", "1")
    for how in ("return", "exit", "raise"):
        job = enqueue("fork_copy_in_thread", how, retries=0).wait(DEADLINE_SECONDS)
        assert (job.status, job.attempt) == ("completed", 1)
    assert len(descendants(worker.pid)) == (0 if pool == "thread" else 2)
    stop(worker)


def framed(message: Any) -> bytes:
    text = json.dumps(message).encode()
    return struct.pack("!I", len(text)) + text


UNKNOWN = [
    ["outcome", 1_000_000, []],
    ["outcome", 1, []],
    ["outcome", [], None],
    ["report", 1, [1]],
    ["report", 1_000_000, []],
    [],
    5,
    {"outcome": 1},
    ["broken", None],
]


def test_unknown_messages_are_ignored(app: Flask, start: Start) -> None:
    """An unknown message from a child, or a message about an unknown job, changes nothing: the
    child's jobs keep their own outcome."""
    worker = start("-P", "process", "-c", "1")
    for message in UNKNOWN:
        data = framed(message).hex()
        job = enqueue("write_to_worker", data, retries=0).wait(DEADLINE_SECONDS)
        assert (message, job.status, job.attempt) == (message, "completed", 1)
    assert enqueue("fork_copy", "return").wait(DEADLINE_SECONDS).result == 0
    stop(worker)


INVALID = [b"Hello, world", b"\0\0\0\5Hello", b"\0\0\0\2\xff\xfe"]


def test_child_that_sends_invalid_data_is_replaced(app: Flask, start: Start) -> None:
    """A child that sends invalid data is killed and its job counts as crashed. The worker continues
    with another child."""
    worker = start("-P", "process", "-c", "1", BGJOBS_MAX_CRASHES=1)
    for data in INVALID:
        job = enqueue("write_to_worker", data.hex(), retries=0).wait(DEADLINE_SECONDS)
        assert (data, job.status, job.error_type) == (data, "failed", "Crashed")
    assert enqueue("fork_copy", "return").wait(DEADLINE_SECONDS).result == 0
    stop(worker)


@pytest.mark.parametrize("name", ["fork_sleeper", "fork_sleeper_in_c"])
def test_children_end_with_their_worker_despite_a_living_copy(
    app: Flask, start: Start, journal: Path, name: str
) -> None:
    """When a worker with both pools is killed, its children end, even if a copy of the worker that
    a job forked in a thread is still alive."""
    worker = start("-c", "1", BGJOBS_QUEUE_POOLS={"images": "process"})
    sleeper = enqueue(name).wait(DEADLINE_SECONDS).result
    run_background_job("tests.jobs.hold", parameters=[str(journal), 600], queue="images")
    wait_until(lambda: lines(journal), "the start")
    below = [pid for pid in descendants(worker.pid) if pid != sleeper]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    try:
        wait_until(lambda: not any(map(is_alive, below)), "the end of the children")
        assert is_alive(sleeper)
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_programs_end_when_the_fork_server_is_killed(
    app: Flask, start: Start, journal: Path
) -> None:
    """When the fork server is killed, the programs that its jobs started end too, because the jobs
    run again elsewhere."""
    worker = start("-P", "process", "-c", "1")
    enqueue("run_program", str(journal))
    wait_until(lambda: lines(journal), "the start")
    program = int(lines(journal)[0])
    (fork_server,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(fork_server), signal.SIGKILL)
    wait_until(lambda: not is_alive(program), "the end of the program")


@POOLS
def test_multiprocessing_jobs_complete(app: Flask, start: Start, pool: str) -> None:
    """Jobs that use ``multiprocessing`` complete in one attempt and leave no process behind."""
    worker = start("-P", pool, "-c", "2")
    jobs = [enqueue("map_in_processes", 5, retries=0) for _ in range(RUNS)]
    deadline = time.monotonic() + RUNS_SECONDS
    for job in jobs:
        job.wait(max(0.0, deadline - time.monotonic()))
        assert (job.status, job.result, job.attempt) == ("completed", [5, 4, 3, 2, 1], 1)
    # With the process pool: the fork server and two children.
    wait_until(lambda: len(descendants(worker.pid)) == (0 if pool == "thread" else 3))
    stop(worker)


@POOLS
def test_multiprocessing_helpers_end_with_their_worker(
    app: Flask, start: Start, journal: Path, pool: str
) -> None:
    """When the worker stops, the processes that a running job started with ``multiprocessing`` end,
    even if the job ignores the stop."""
    worker = start("-P", pool, "-c", "1", "--shutdown-timeout", "0.1")
    enqueue("hold_in_processes", str(journal))
    wait_until(lambda: len(lines(journal)) == 2, "the helpers")
    helpers = [int(line) for line in lines(journal)]
    stop(worker)
    wait_until(lambda: not any(map(is_alive, helpers)), "the end of the helpers")


@POOLS
def test_sigterm_ends_a_forked_copy(app: Flask, start: Start, pool: str) -> None:
    """SIGTERM ends a forked copy at any time, although the worker and its children handle it."""
    start("-P", pool, "-c", "1")
    job = enqueue("terminate_copies", COPIES, retries=0).wait(DEADLINE_SECONDS)
    assert (job.status, job.result) == ("completed", [-signal.SIGTERM] * COPIES)
