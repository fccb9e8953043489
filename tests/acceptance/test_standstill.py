"""Workers that cannot continue: each logs why and releases its jobs, and other workers run them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs.state import AppState
from tests.acceptance.helpers import descendants, enqueue, lines, workers
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

SHORT_LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.1}


@pytest.mark.on("sqlite", "postgresql")
@pytest.mark.parametrize("set_up", ["receiver_hangs", "handler_hangs"])
def test_blocked_main_loop_loses_its_jobs(
    app: Flask, state: AppState, start_worker: Start, journal: Path, tmp_path: Path, set_up: str
) -> None:
    """If a signal receiver or a log handler never returns, the heartbeat stops and another worker
    runs the jobs. The process still ends after SIGTERM."""
    marker = tmp_path / "marker"
    config = {"TEST_SET_UP": set_up, "TEST_MARKER": str(marker), **SHORT_LEASE}
    stuck = start_worker("-c", "2", "--shutdown-timeout", "0", **config)
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: stored(app, held).started_at is not None, "the start")
    enqueue("echo", 1)
    wait_until(marker.exists, "the blocked call")
    start_worker("-c", "2", **SHORT_LEASE)
    assert held.wait(DEADLINE_SECONDS).result == 2
    assert list(workers(state).values()) == ["dead", "alive"]
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(DEADLINE_SECONDS) == 1


@pytest.mark.on("sqlite")
def test_blocked_main_loop_is_logged(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """The log names the slow receiver and its signal, then says that the worker stands still."""
    marker = tmp_path / "marker"
    worker = start_worker(TEST_SET_UP="receiver_hangs", TEST_MARKER=str(marker), **SHORT_LEASE)
    enqueue("echo", 1)
    wait_until(lambda: "Slow receiver" in worker.log.read_text(), "the warning")
    warning = worker.log.read_text()
    assert "Signal: bgjobs-job-completed | Receiver: tests.hosts.receiver_hangs.<locals>.hang:" in (
        warning
    )
    wait_until(lambda: "Worker stands still" in worker.log.read_text(), "the log line")


@pytest.mark.on("sqlite")
def test_child_is_replaced_once_descriptors_are_free(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """If file descriptors run out, a dead child is replaced as soon as some are free again."""
    worker = start_worker("-P", "process", "-c", "1", BGJOBS_APP="host")
    pid = enqueue("process_id").wait(DEADLINE_SECONDS).result
    used = max(int(name) for name in os.listdir(f"/proc/{worker.pid}/fd"))
    before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (used, before[1]))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "could not start: OSError" in worker.log.read_text(), "the failed start")
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
    assert enqueue("process_id").wait(DEADLINE_SECONDS).result in descendants(worker.pid)
    assert "The thread" not in worker.log.read_text()


@pytest.mark.on("sqlite")
def test_fork_server_survives_a_failed_fork(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """If a fork fails, the fork server and its other child continue, and a later fork works."""
    program = (
        "import os\n"
        "from flask_bgjobs.execution.pools.process import forkserver\n"
        "fork = os.fork\n"
        "def refuse():\n"
        f"    if os.path.exists({str(tmp_path / 'refuse')!r}):\n"
        "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n"
        "forkserver.os.fork = refuse\n"
    )
    (tmp_path / "sitecustomize.py").write_text(program)
    worker = start_worker("-P", "process", "-c", "2", BGJOBS_APP="host")
    gated = enqueue("wait_for_file", str(tmp_path / "gate"))
    wait_until(lambda: stored(app, gated).started_at is not None, "the start")
    (tmp_path / "refuse").touch()
    pid = enqueue("process_id").wait(DEADLINE_SECONDS).result
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: "could not start: Resource temporarily unavailable" in worker.log.read_text(),
        "the failed start",
    )
    (tmp_path / "gate").touch()
    assert gated.wait(DEADLINE_SECONDS).attempt == 1
    (tmp_path / "refuse").unlink()
    assert enqueue("process_id").wait(DEADLINE_SECONDS).result != pid


@pytest.mark.on("sqlite")
@pytest.mark.parametrize(
    ("pool", "set_up"),
    [("thread", "loop_fails"), ("thread", "loop_exits"), ("process", "pool_fails")],
)
def test_unexpected_exception_exits_with_code_1(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str, set_up: str
) -> None:
    """A worker whose main loop or pool fails releases its running jobs and exits with code 1."""
    worker = start_worker("-P", pool, "-c", "2", TEST_SET_UP=set_up, BGJOBS_APP="host")
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    failed = enqueue("fail", "now", retries=0)
    wait_until(lambda: stored(app, failed).status == "failed", "the failure")
    # The pool's thread fails when it sends the next job to a child.
    enqueue("echo", 1)
    assert worker.wait(DEADLINE_SECONDS) == 1
    assert list(workers(state).values()) == ["stopped"]
    assert (stored(app, held).status, stored(app, held).retry_count) == ("pending", 0)
    start_worker("-c", "1")
    assert held.wait(DEADLINE_SECONDS).result == 2


@pytest.mark.on("sqlite")
def test_pool_that_fails_during_a_stop_releases_its_jobs(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """If the pool fails while the worker waits for its jobs to end, they are released."""
    worker = start_worker(
        "-P", "process", "-c", "1", TEST_SET_UP="pool_fails_during_a_stop", BGJOBS_APP="host"
    )
    held = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    worker.terminate()
    worker.wait(DEADLINE_SECONDS)
    assert "The thread bgjobs-children failed" in worker.log.read_text()
    assert list(workers(state).values()) == ["stopped"]
    assert (stored(app, held).status, stored(app, held).retry_count) == ("pending", 0)


def test_worker_without_a_free_thread_exits(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """A worker exits with code 1 if jobs that cannot be stopped occupy all its threads. The jobs
    fail with a timeout, and another worker runs the next job."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    worker = start_worker("-c", "2", **SHORT_LEASE)
    stuck = [enqueue("read_pipe", str(pipe), timeout=0.3, retries=0) for _ in range(2)]
    assert worker.wait(DEADLINE_SECONDS) == 1
    assert "Error: no thread is free: 2 jobs have not stopped" in worker.log.read_text()
    assert [stored(app, job).status for job in stuck] == ["failed", "failed"]
    assert "could not be stopped" in str(stored(app, stuck[0]).error)
    assert list(workers(state).values()) == ["stopped"]
    start_worker("-c", "2", **SHORT_LEASE)
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1


@pytest.mark.on("sqlite")
def test_jobs_are_released_when_the_fork_server_cannot_start(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """A fork server that exits at start is started again after pauses; its jobs are released."""
    refuse = tmp_path / "refuse"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if os.path.exists({str(refuse)!r}) and 'forkserver' in ' '.join(sys.orig_argv):\n"
        "    os._exit(1)\n"
    )
    # A worker gives up once no child could start for the time of a lease.
    worker = start_worker("-P", "process", "-c", "1", BGJOBS_LEASE=DEADLINE_SECONDS)
    child = enqueue("process_id").wait(DEADLINE_SECONDS).result
    refuse.touch()
    fork_server = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(fork_server, signal.SIGKILL)
    failed = "could not start: the fork server has ended"
    wait_until(lambda: worker.log.read_text().count(failed) >= 3, "the failed starts")
    waiting = enqueue("echo", 1)
    wait_until(lambda: worker.log.read_text().count(failed) >= 4, "another failed start")
    assert stored(app, waiting).status == "pending"
    assert worker.log.read_text().count(failed) < 10
    refuse.unlink()
    assert waiting.wait(DEADLINE_SECONDS).result == 1


@pytest.mark.on("sqlite")
def test_worker_without_a_free_child_process_exits(
    app: Flask, tmp_path: Path, start_worker: Start, journal: Path
) -> None:
    """A job whose child cannot be killed, as in a kernel call, is named in the log. A worker that
    has no other child exits with code 1."""
    (tmp_path / "sitecustomize.py").write_text(
        "from flask_bgjobs.worker import pool_health\n"
        "from flask_bgjobs.execution.pools.process.forkserver import ForkServer\n"
        "pool_health._FIRST_LOG_SECONDS = 2.0\n"
        "ForkServer.signal_group = lambda *_: None\n"
    )
    worker = start_worker("-P", "process", "-c", "1", BGJOBS_LEASE=6, BGJOBS_HEARTBEAT_INTERVAL=1)
    job = enqueue("ignore_term", str(journal), timeout=0.5)
    assert worker.wait(DEADLINE_SECONDS) == 1
    log = worker.log.read_text()
    assert f"Job cannot be stopped | Job: {job.id} | " in log
    assert "Reason: JobTimeout" in log
    assert "It holds a child process until that ends" in log
    assert "Error: no child process is free: 1 jobs have not stopped" in log


@pytest.mark.on("sqlite")
def test_closed_stdout_does_not_stop_a_worker(
    app: Flask, database_url: str, tmp_path: Path
) -> None:
    """A worker whose stdout is a pipe without a reader runs its jobs and exits with code 0."""
    reading, writing = os.pipe()
    os.close(reading)
    host = tmp_path / "quiet.py"
    host.write_text(f"from tests.apps import build_app\napp = build_app({database_url!r})\n")
    job = enqueue("echo", 1)
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "quiet", "bgjobs", "worker", "--burst"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr
    assert stored(app, job).status == "completed"
