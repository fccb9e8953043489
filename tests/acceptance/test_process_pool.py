"""The process pool in a real worker: children that crash, hang, are killed and are replaced."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.config import Config
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_sets
from flask_bgjobs.models import Attempt
from flask_bgjobs.options import JobOptions
from flask_bgjobs.registry import Registry
from flask_bgjobs.state import AppState
from tests import jobs
from tests.acceptance.helpers import (
    descendants,
    enqueue,
    is_alive,
    lines,
    processor_seconds,
    stop_between_transactions,
    workers,
)
from tests.conftest import DEADLINE_SECONDS, stored, wait_until
from tests.databases import KINDS

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]

LONG_LEASE_SECONDS = 600
"""Ten times the deadline of a test: a lease that ran out cannot explain what the test sees."""
KILLS = 15
ALL_JOBS_SECONDS = 120.0
"""Deadline for 3,000 jobs, including the time to start replacement processes."""


@pytest.fixture
def start(start_worker: Start) -> Iterator[Start]:
    """Starts workers with two children; kills all their processes after the test."""
    started: list[Any] = []

    def start_one(*options: str, **config: Any) -> Any:
        started.append(start_worker("-P", "process", "-c", "2", *options, **config))
        return started[-1]

    yield start_one
    for worker in started:
        below = descendants(worker.pid)
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
        worker.wait(DEADLINE_SECONDS)
        wait_until(lambda below=below: not any(map(is_alive, below)), "the end of the children")


@pytest.mark.on(*KINDS)
def test_jobs_run_in_children(app: Flask, start: Start) -> None:
    """Jobs run in child processes of the worker, with results, retries and async code."""
    worker = start()
    by_pid = enqueue("process_id").wait(DEADLINE_SECONDS)
    assert by_pid.result in descendants(worker.pid)
    sample = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"])
    assert sample.wait(DEADLINE_SECONDS).result == "executed: Hello"
    assert enqueue("async_echo", 5).wait(DEADLINE_SECONDS).result == 5
    flaky = enqueue("fail_times", 2, retry_delay=0.05).wait(DEADLINE_SECONDS)
    assert (flaky.status, flaky.result, flaky.retry_count) == ("completed", 3, 2)
    large = enqueue("echo", "x" * 900_000).wait(DEADLINE_SECONDS)
    assert large.result == "x" * 900_000


@pytest.mark.parametrize(
    ("name", "parameters", "how"),
    [
        ("crash_worker", ["{journal}"], "was killed by SIGKILL"),
        ("exit_quietly", [0], "exited with code 0"),
        ("exit_quietly", [7], "exited with code 7"),
    ],
)
@pytest.mark.on(*KINDS)
def test_crash_affects_only_its_own_job(
    app: Flask, state: AppState, start: Start, journal: Path, name: str, parameters: Any, how: str
) -> None:
    """A job that ends its process fails as crashed after three crashes and uses no retry; the
    other jobs run once. An exit with code 0 counts as a crash, too."""
    worker = start()
    parameters = [str(journal) if p == "{journal}" else p for p in parameters]
    others = [enqueue("record", str(journal), f"other {n}") for n in range(50)]
    crashing = enqueue(name, *parameters, retries=5, priority=1)
    others += [enqueue("record", str(journal), f"other {n}") for n in range(50, 100)]
    crashing.wait(DEADLINE_SECONDS)
    assert (crashing.status, crashing.crash_count, crashing.retry_count) == ("failed", 3, 0)
    assert (crashing.attempt, crashing.error_type) == (3, "Crashed")
    assert how in (crashing.error or "")
    for job in others:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
    ran = [line for line in lines(journal) if line.startswith("other")]
    assert sorted(ran) == sorted(f"other {n}" for n in range(100))
    assert worker.poll() is None


def test_killed_child_is_detected_before_the_lease_ends(
    app: Flask, state: AppState, start: Start, journal: Path, tmp_path: Path
) -> None:
    """The worker detects the death of a child long before the lease ends: it records the attempt
    as crashed and runs the job again in a new child. The job in the other child continues."""
    start(BGJOBS_LEASE=LONG_LEASE_SECONDS)
    blocker = enqueue("hold", str(journal), 600)
    victims = tmp_path / "victims"
    victim = enqueue("record_pid_and_hold_first_attempt", str(victims), retries=0)
    wait_until(lambda: lines(victims), "the start")
    (pid,) = map(int, lines(victims))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: _outcomes(state) == ["crashed"], "the crashed attempt")
    after = enqueue("process_id").wait(DEADLINE_SECONDS)
    assert (after.status, after.result == pid) == ("completed", False)
    assert victim.wait(DEADLINE_SECONDS).result not in (None, pid)
    assert (victim.attempt, victim.crash_count, victim.retry_count) == (2, 1, 0)
    assert (blocker.refresh().status, blocker.attempt) == ("running", 1)


def _outcomes(state: AppState) -> list[str]:
    with state.store.read() as connection:
        return list(connection.scalars(sa.select(Attempt.outcome).order_by(Attempt.id)))


def test_job_that_crashes_once_completes_without_a_retry(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """A job whose child is killed once runs again, completes and uses no retry."""
    start()
    job = enqueue("crash_once", str(journal), retries=0).wait(DEADLINE_SECONDS)
    assert (job.status, job.result, job.retry_count, job.crash_count) == ("completed", 2, 0, 1)
    assert lines(journal) == [f"{job.id} 1", f"{job.id} 2"]


def test_memory_error_is_an_ordinary_failure(app: Flask, start: Start) -> None:
    """A job that exceeds its memory limit fails with MemoryError, and the next job runs."""
    start("--max-jobs", "1")
    job = enqueue("too_much_memory", retries=0).wait(DEADLINE_SECONDS)
    assert (job.status, job.error_type) == ("failed", "MemoryError")
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1


@pytest.mark.parametrize("name", ["hold", "ignore_term", "stuck_in_c", "with_subprocess"])
def test_cancel_stops_the_code(app: Flask, start: Start, journal: Path, name: str) -> None:
    """A cancel ends the job's code and the programs that it started, even if the code ignores
    SIGTERM or is stuck in C. The row says cancelling until then, and the child's slot is free
    afterwards."""
    worker = start()
    job = enqueue(name, str(journal), retries=3)
    wait_until(lambda: lines(journal), "the start")
    children = descendants(worker.pid)
    state = app.extensions["bgjobs"]
    state.store.cancel([job.id])
    # `hold` may have ended before the row is read.
    assert name == "hold" or job.refresh().is_cancelling
    job.wait(DEADLINE_SECONDS)
    assert job.status == "cancelled"
    assert f"end {job.id}" not in lines(journal)
    if name == "with_subprocess":
        program = int(lines(journal)[0])
        assert program in children
        wait_until(lambda: not is_alive(program), "the end of the program")
    after = [enqueue("echo", n) for n in range(4)]
    assert [j.wait(DEADLINE_SECONDS).result for j in after] == [0, 1, 2, 3]


def test_timeout_runs_finally_blocks(app: Flask, start: Start, journal: Path) -> None:
    """Code that exceeds its timeout runs its ``finally`` blocks, in functions and coroutines."""
    start()
    jobs = [
        enqueue("hold", str(journal), 600, timeout=0.3, retries=0),
        enqueue("async_hold", str(journal), timeout=0.3, retries=0),
    ]
    for job in jobs:
        job.wait(DEADLINE_SECONDS)
        assert (job.status, job.error_type) == ("failed", "JobTimeout")
        assert "ran longer than 0.3 s" in (job.error or "")
    assert f"stopped {jobs[0].id} JobTimeout" in lines(journal)
    assert "cleaned up" in lines(journal)


def test_timeout_of_code_that_ignores_sigterm_uses_a_retry(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """Code that ignores SIGTERM is killed at its timeout; that is a failure and not a crash."""
    start()
    job = enqueue("ignore_term", str(journal), timeout=0.2, retries=1, retry_delay=0.01)
    job.wait(DEADLINE_SECONDS)
    assert (job.status, job.retry_count, job.crash_count) == ("failed", 1, 0)
    assert len(lines(journal)) == 2
    with state.store.read() as connection:
        outcomes = connection.execute(Attempt.__table__.select()).all()
    assert [row.outcome for row in outcomes] == ["timeout", "timeout"]


def test_job_that_ignores_a_cancel_completes(app: Flask, start: Start, journal: Path) -> None:
    """A job that ignores a cancel and returns is completed, with its result."""
    start()
    job = enqueue("swallow", str(journal))
    wait_until(lambda: lines(journal), "the start")
    app.extensions["bgjobs"].store.cancel([job.id])
    job.wait(DEADLINE_SECONDS)
    assert (job.status, job.result) == ("completed", "finished despite the request")


@pytest.mark.on(*KINDS)
def test_progress_and_meta_are_stored_while_the_job_runs(
    app: Flask, start: Start, journal: Path
) -> None:
    """The progress and the meta of a job in a child are stored while its code still runs."""
    start()
    job = enqueue("report_and_hold", str(journal), retries=0)
    wait_until(lambda: job.refresh().progress_note == "half", "the progress")
    assert job.meta == {"half": True}
    app.extensions["bgjobs"].store.cancel([job.id])
    assert job.wait(DEADLINE_SECONDS).status == "cancelled"


def test_long_job_does_not_delay_short_jobs(app: Flask, start: Start, journal: Path) -> None:
    """Jobs that were sent to a child in advance are taken back if the job before them is long."""
    start()
    for n in range(300):
        enqueue("echo", n)
    blocker = enqueue("hold", str(journal), 600)
    quick = [enqueue("echo", n) for n in range(300)]
    for job in quick:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert blocker.refresh().status == "running"


def test_children_end_when_their_worker_is_killed(app: Flask, start: Start, journal: Path) -> None:
    """When the worker is killed with SIGKILL, its children end, even one that is stuck in C."""
    worker = start()
    enqueue("stuck_in_c", str(journal))
    enqueue("hold", str(journal), 600)
    wait_until(lambda: len(lines(journal)) == 2, "the starts")
    wait_until(
        lambda: len(descendants(worker.pid)) == 3, "the end of the program that wrote the journal"
    )
    below = descendants(worker.pid)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_until(lambda: not any(map(is_alive, below)), "the end of the children")


@pytest.mark.on(*KINDS)
def test_no_orphan_finishes_a_job_of_another_worker(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """When a worker is killed with SIGKILL, another worker runs its jobs again, and the code in
    the children of the killed worker never finishes."""
    killed, other = start(), start()
    stop_between_transactions(other, state)
    jobs = [enqueue("hold", str(journal), 4.0, retries=0) for _ in range(2)]
    wait_until(lambda: len(lines(journal)) == 2, "the starts")
    other.send_signal(signal.SIGCONT)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for job in jobs:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert (job.attempt, job.retry_count, job.crash_count) == (2, 0, 0)
        events = [line for line in lines(journal) if line.split()[1] == str(job.id)]
        assert events == [f"start {job.id} 1", f"start {job.id} 2", f"end {job.id}"]


def test_killed_fork_server_is_replaced(app: Flask, start: Start, journal: Path) -> None:
    """When the fork server is killed, its jobs run again in new children, without a crash or a
    retry on their record."""
    worker = start()
    job = enqueue("fail_times", 0, str(journal))
    job.wait(DEADLINE_SECONDS)
    held = enqueue("hold", str(journal), 1.0, retries=0)
    wait_until(lambda: any(line.startswith("start") for line in lines(journal)), "the start")
    (fork_server,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(fork_server), signal.SIGKILL)
    held.wait(DEADLINE_SECONDS)
    assert (held.status, held.crash_count, held.retry_count) == ("completed", 0, 0)
    assert held.attempt == 2


@pytest.mark.parametrize("option", ["--max-jobs", "--max-time", "--max-memory"])
def test_child_at_its_limit_is_replaced(app: Flask, start: Start, option: str) -> None:
    """A child that reached a limit is replaced between two jobs, and the worker continues."""
    value = {"--max-jobs": "2", "--max-time": "0.2", "--max-memory": "150"}[option]
    worker = start(option, value)
    pids = set()
    for _ in range(8):
        job = enqueue("grow", 60 if option == "--max-memory" else 1)
        pids.add(job.wait(DEADLINE_SECONDS).result)
        if option == "--max-time":
            enqueue("fail_times", 0).wait(DEADLINE_SECONDS)
            time.sleep(0.1)
    assert len(pids) >= 3
    assert worker.poll() is None


@pytest.mark.on(*KINDS)
def test_stop_releases_running_jobs(app: Flask, start: Start, journal: Path) -> None:
    """After the grace period the jobs in the children are stopped and released; exit code 0."""
    worker = start("--shutdown-timeout", "0.3")
    jobs = [enqueue("ignore_term", str(journal)), enqueue("hold", str(journal), 600)]
    waiting = [enqueue("echo", n) for n in range(20)]
    wait_until(lambda: len(lines(journal)) == 2, "the starts")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    for job in [*jobs, *waiting]:
        assert (job.refresh().status, job.retry_count) == ("pending", 0)


def test_signal_to_all_processes_stops_gracefully(app: Flask, start: Start, journal: Path) -> None:
    """If a service manager sends SIGTERM to every process, the worker still stops gracefully:
    the running job finishes within the grace period."""
    worker = start()
    job = enqueue("hold", str(journal), 1.0)
    wait_until(lambda: lines(journal), "the start")
    for pid in [*descendants(worker.pid), worker.pid]:
        os.kill(pid, signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0
    assert job.refresh().status == "completed"


def test_cancelled_claimed_job_never_starts(app: Flask, start: Start, journal: Path) -> None:
    """A claimed job that has not started is cancelled and never runs."""
    start()
    for _ in range(200):
        enqueue("echo")
    blockers = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: len(lines(journal)) == 2, "the blocking jobs")
    waiting = [enqueue("record", str(journal), "must not run") for _ in range(20)]
    wait_until(lambda: waiting[0].refresh().status == "running", "the claim in advance")
    state = app.extensions["bgjobs"]
    state.store.cancel([job.id for job in waiting])
    for job in waiting:
        assert job.wait(DEADLINE_SECONDS).status == "cancelled"
    state.store.cancel([job.id for job in blockers])
    assert [stored(app, b.wait(DEADLINE_SECONDS)).status for b in blockers] == ["cancelled"] * 2
    assert "must not run" not in lines(journal)


def test_app_that_children_cannot_build_ends_the_worker(
    app: Flask, tmp_path: Path, start_worker: Start
) -> None:
    """A worker whose children cannot build the app reports it in one sentence; exit code 1."""
    (tmp_path / "host.py").write_text(
        "from flask_bgjobs.execution.pools import is_child\n"
        "if is_child():\n    raise RuntimeError('no such thing in a child')\n"
        + (tmp_path / "host.py").read_text()
    )
    worker = start_worker("-P", "process")
    assert worker.wait(DEADLINE_SECONDS) == 1
    log = worker.log.read_text()
    assert "a child process could not build the app from 'host'" in log
    assert "no such thing in a child" in log
    assert "Traceback" not in log


def test_jobs_are_released_when_children_cannot_start(
    app: Flask, state: AppState, tmp_path: Path, start_worker: Start
) -> None:
    """If a deployment breaks the app, the worker releases its jobs, claims no others, and exits
    after one lease unless a child starts."""
    broken = tmp_path / "broken"
    host = (tmp_path / "host.py").read_text()
    check = (
        f"import os\nif os.path.exists({str(broken)!r}):\n    raise RuntimeError('half a deploy')\n"
    )
    (tmp_path / "host.py").write_text(check + host)
    short = {"BGJOBS_LEASE": 6, "BGJOBS_HEARTBEAT_INTERVAL": 1}
    worker = start_worker("-P", "process", "-c", "1", "--max-jobs", "1", **short)
    broken.touch()
    jobs = [enqueue("echo", number) for number in range(3)]
    jobs[0].wait(DEADLINE_SECONDS)
    read_log = worker.log.read_text
    wait_until(lambda: "half a deploy" in read_log(), "the failed start")
    wait_until(
        lambda: [stored(app, job).status for job in jobs[1:]] == ["pending"] * 2, "the release"
    )
    broken.unlink()
    assert [job.wait(DEADLINE_SECONDS).result for job in jobs[1:]] == [1, 2]
    broken.touch()
    # Up to two children may have started already, and each of them runs one job.
    left = [enqueue("echo", number) for number in range(3)]
    assert worker.wait(DEADLINE_SECONDS) == 1
    assert "no child process could start for" in read_log()
    assert stored(app, left[2]).status == "pending"
    assert list(workers(state).values()) == ["stopped"]


def test_child_that_hangs_at_start_is_replaced(
    app: Flask, tmp_path: Path, start_worker: Start
) -> None:
    """A child that hangs while it builds the app is killed at the start deadline, here 10 s."""
    hang = tmp_path / "hang"
    host = (tmp_path / "host.py").read_text()
    check = f"import os, time\nwhile os.path.exists({str(hang)!r}):\n    time.sleep(0.1)\n"
    (tmp_path / "host.py").write_text(check + host)
    # The first child must start within this deadline even on a busy machine.
    (tmp_path / "sitecustomize.py").write_text(
        "from flask_bgjobs.execution.pools.process import pool\npool._START_SECONDS = 10.0\n"
    )
    worker = start_worker("-P", "process", "-c", "1", "--max-jobs", "1")
    hang.touch()
    enqueue("echo", 1).wait(DEADLINE_SECONDS)
    wait_until(
        lambda: "could not start: it took longer than 10 s" in worker.log.read_text(), "the kill"
    )
    hang.unlink()
    assert enqueue("echo", 2).wait(DEADLINE_SECONDS).result == 2


def test_child_that_closes_its_connection_is_replaced(app: Flask, start_worker: Start) -> None:
    """The child is killed, and the worker uses almost no processor time until then."""
    worker = start_worker("-P", "process", "-c", "1")
    enqueue("echo", 1).wait(DEADLINE_SECONDS)
    before = processor_seconds(worker.pid)
    job = enqueue("close_descriptors", retries=0)
    wait_until(lambda: stored(app, job).crash_count, "the crash")
    assert processor_seconds(worker.pid) - before < 1.0
    job.cancel()
    assert enqueue("echo", 2).wait(DEADLINE_SECONDS).result == 2


def test_queue_can_have_its_own_pool(app: Flask, start_worker: Start, journal: Path) -> None:
    """The jobs of a queue with its own pool run in that pool. Its crashes do not affect the jobs of
    other queues, and long jobs of other queues do not delay it."""
    worker = start_worker("-c", "2", BGJOBS_QUEUE_POOLS={"images": "process"})
    here = enqueue("process_id")
    there = enqueue("process_id", queue="images")
    assert here.wait(DEADLINE_SECONDS).result == worker.pid
    assert there.wait(DEADLINE_SECONDS).result in descendants(worker.pid)
    blockers = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: len(lines(journal)) == 2, "the blocking jobs")
    crashed = enqueue("exit_quietly", queue="images").wait(DEADLINE_SECONDS)
    assert (crashed.status, crashed.crash_count) == ("failed", 3)
    assert enqueue("echo", 1, queue="images").wait(DEADLINE_SECONDS).result == 1
    assert [job.refresh().status for job in blockers] == ["running", "running"]
    assert "2 threads, " in worker.log.read_text()
    assert "child processes for images" in worker.log.read_text()


@pytest.mark.parametrize(
    ("queues", "text"), [("images", "child processes\n"), ("mail", "10 threads\n")]
)
def test_worker_starts_only_the_pools_of_its_queues(
    app: Flask, start_worker: Start, queues: str, text: str
) -> None:
    """A worker starts a pool only if one of its queues uses it."""
    worker = start_worker("-q", queues, BGJOBS_QUEUE_POOLS={"images": "process"})
    job = enqueue("process_id", queue=queues).wait(DEADLINE_SECONDS)
    assert (job.result == worker.pid) == (queues == "mail")
    assert text in worker.log.read_text()


def test_random_kills_affect_only_running_jobs(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """Thousands of short jobs all complete while children and the fork server are killed at
    random. Only jobs that were running in a killed child run a second time."""
    sets = [[str(journal), str(number)] for number in range(3_000)]
    enqueue_sets(state, "tests.jobs.record", None, sets, JobOptions())
    worker = start("--burst")
    random_ = random.Random(7)
    for _ in range(KILLS):
        # A job must have run since the last kill: new processes take time to start.
        before = len(lines(journal))
        wait_until(lambda n=before: worker.poll() is not None or len(lines(journal)) > n, "a job")
        below = descendants(worker.pid)
        if not below:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(random_.choice(below), signal.SIGKILL)
        # This sleep sets the pace of the kills; it waits for nothing.
        time.sleep(random_.uniform(0.2, 0.6))
    assert worker.wait(ALL_JOBS_SECONDS) == 0
    runs = collections.Counter(map(int, lines(journal)))
    assert set(runs) == set(range(3_000))
    with state.store.read() as connection:
        attempts = connection.execute(Attempt.__table__.select()).all()
        statuses = set(connection.execute(sa.select(Job.status)).scalars())
    assert statuses == {"completed"}
    assert {attempt.outcome for attempt in attempts} <= {"crashed", "lost"}
    assert sum(runs.values()) - len(runs) <= len(attempts)


FRAGILE = """
import os, sys
from flask_bgjobs.execution.pools import is_child
if {where}:
    os._exit(9)
def login(user, password):
    raise ValueError(f"{{user}} could not log in with {{password}}")
"""


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("where", ["'worker' in sys.argv", "is_child()"])
def test_module_that_crashes_at_import_affects_only_its_own_job(
    app: Flask,
    state: AppState,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """A module that crashes at import fails only its own job: the worker does not import it, not
    even to write a log line. Secrets in that line are masked."""
    (tmp_path / "fragile.py").write_text(FRAGILE.format(where=where))
    monkeypatch.syspath_prepend(str(tmp_path))
    allowed = [*jobs.NAMES, "fragile.login"]
    state.registry = Registry(
        Config.from_mapping({"BGJOBS_ALLOWED_JOBS": allowed}).allowed_jobs, {}
    )
    worker = start(BGJOBS_ALLOWED_JOBS=allowed)
    job = run_background_job("fragile.login", parameters=["ann", "hunter2-and-more"], retries=0)
    sys.modules.pop("fragile")
    job.wait(DEADLINE_SECONDS)
    in_child = where == "is_child()"
    assert (job.status, job.error_type) == ("failed", "Crashed" if in_child else "ValueError")
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    assert worker.poll() is None
    wait_until(lambda: "Job failed" in worker.log.read_text(), "the log line")
    log = worker.log.read_text()
    assert "hunter2" not in log
    shown = '["***","***"]' if in_child else '["ann","***"]'
    (line,) = re.findall("Job failed .*", log)
    assert f"Parameters: {shown}" in line
