"""Jobs that fork: their copies end with the job's code, and nothing of the worker lives in them."""

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
"""Of a job with helpers; a lock or a signal that is lost shows in some of them only."""
RUNS_SECONDS = 240.0
COPIES = 200


@pytest.fixture
def start(start_worker: Start) -> Iterator[Start]:
    """Starts a worker, and ends what its jobs have left."""
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
    """A job of ``tests.process_jobs``."""
    return run_background_job(f"tests.process_jobs.{name}", parameters=parameters, **options)


def stop(worker: Any) -> None:
    """Stop a worker as a service manager does."""
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0


@POOLS
@pytest.mark.parametrize("name", ["fork_copy", "fork_copy_async"])
def test_a_copy_ends_with_the_jobs_code(app: Flask, start: Start, pool: str, name: str) -> None:
    """A copy that returns from the job, exits or raises ends as a program would. The job's own
    outcome counts, in one attempt, and the worker and its children go on."""
    worker = start("-P", pool, "-c", "1")
    codes = {"return": 0, "exit": 7, "message": 1, "raise": 1}
    jobs = {how: enqueue(name, how, retries=0) for how in codes}
    for how, job in jobs.items():
        job.wait(DEADLINE_SECONDS)
        assert (how, job.status, job.result) == (how, "completed", codes[how])
        assert job.attempt == 1
    said = worker.log.read_text()
    assert "ValueError: raised in the copy" in said
    assert "the copy gives up" in said
    below = descendants(worker.pid)
    assert len(below) == (0 if pool == "thread" else 2)
    stop(worker)
    wait_until(lambda: not any(map(is_alive, below)), "the end of all processes")


@POOLS
def test_a_copy_made_in_a_thread_of_the_job_ends(app: Flask, start: Start, pool: str) -> None:
    """A copy that a job's own thread has forked ends with that thread."""
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
    """A message of a child that the worker does not know, or that tells of a job that is not
    there, changes nothing: the child's jobs have their own outcome."""
    worker = start("-P", "process", "-c", "1")
    for message in UNKNOWN:
        data = framed(message).hex()
        job = enqueue("write_to_worker", data, retries=0).wait(DEADLINE_SECONDS)
        assert (message, job.status, job.attempt) == (message, "completed", 1)
    assert enqueue("fork_copy", "return").wait(DEADLINE_SECONDS).result == 0
    stop(worker)


NONSENSE = [b"Hello, world", b"\0\0\0\5Hello", b"\0\0\0\2\xff\xfe"]


def test_a_child_that_sends_nonsense_is_replaced(app: Flask, start: Start) -> None:
    """Where a child sent what is no message at all, that child is ended and its job is crashed.
    The worker goes on with another child."""
    worker = start("-P", "process", "-c", "1", BGJOBS_MAX_CRASHES=1)
    for data in NONSENSE:
        job = enqueue("write_to_worker", data.hex(), retries=0).wait(DEADLINE_SECONDS)
        assert (data, job.status, job.error_type) == (data, "failed", "Crashed")
    assert enqueue("fork_copy", "return").wait(DEADLINE_SECONDS).result == 0
    stop(worker)


@pytest.mark.parametrize("name", ["fork_sleeper", "fork_sleeper_in_c"])
def test_children_end_with_a_worker_whose_copy_lives_on(
    app: Flask, start: Start, journal: Path, name: str
) -> None:
    """When a worker with both pools is killed, its children end, also while a copy that a job in a
    thread has forked lives on."""
    worker = start("-c", "1", BGJOBS_QUEUE_POOLS={"images": "process"})
    sleeper = enqueue(name).wait(DEADLINE_SECONDS).result
    run_background_job("tests.jobs.hold", parameters=[str(journal), 600], queue="images")
    wait_until(lambda: lines(journal), "the start")
    below = [pid for pid in descendants(worker.pid) if pid != sleeper]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    try:
        wait_until(lambda: not any(map(is_alive, below)), "the children's end")
        assert is_alive(sleeper)
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_programs_end_with_a_killed_nursery(app: Flask, start: Start, journal: Path) -> None:
    """When the process that starts the children is killed, the programs that their jobs have
    started end as well: the jobs run again elsewhere."""
    worker = start("-P", "process", "-c", "1")
    enqueue("run_program", str(journal))
    wait_until(lambda: lines(journal), "the start")
    program = int(lines(journal)[0])
    (fork_server,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(fork_server), signal.SIGKILL)
    wait_until(lambda: not is_alive(program), "the program's end")


@POOLS
def test_multiprocessing_comes_to_its_end(app: Flask, start: Start, pool: str) -> None:
    """Jobs that use ``multiprocessing`` all complete, and leave no process behind."""
    worker = start("-P", pool, "-c", "2")
    jobs = [enqueue("map_in_processes", 5, retries=0) for _ in range(RUNS)]
    deadline = time.monotonic() + RUNS_SECONDS
    for job in jobs:
        job.wait(max(0.0, deadline - time.monotonic()))
        assert (job.status, job.result, job.attempt) == ("completed", [5, 4, 3, 2, 1], 1)
    # Those that start and run jobs, and with threads none.
    wait_until(lambda: len(descendants(worker.pid)) == (0 if pool == "thread" else 3))
    stop(worker)


@POOLS
def test_helpers_end_with_their_worker(app: Flask, start: Start, journal: Path, pool: str) -> None:
    """The processes that a running job has started with ``multiprocessing`` end when the worker is
    stopped, also where the job itself does not notice."""
    worker = start("-P", pool, "-c", "1", "--shutdown-timeout", "0.1")
    enqueue("hold_in_processes", str(journal))
    wait_until(lambda: len(lines(journal)) == 2, "the helpers")
    helpers = [int(line) for line in lines(journal)]
    stop(worker)
    wait_until(lambda: not any(map(is_alive, helpers)), "the helpers' end")


@POOLS
def test_a_copy_ends_at_sigterm(app: Flask, start: Start, pool: str) -> None:
    """A SIGTERM ends a copy, whatever it means to the worker or its child, and at any time."""
    start("-P", pool, "-c", "1")
    job = enqueue("terminate_copies", COPIES, retries=0).wait(DEADLINE_SECONDS)
    assert (job.status, job.result) == ("completed", [-signal.SIGTERM] * COPIES)
