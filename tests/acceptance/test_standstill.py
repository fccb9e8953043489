"""Workers that cannot go on: each says so, gives back what it can, and others run its jobs."""

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
def test_a_loop_that_stands_still_loses_its_jobs(
    app: Flask, state: AppState, start_worker: Start, journal: Path, tmp_path: Path, set_up: str
) -> None:
    """Where a signal receiver or a log handler never returns, the heartbeat stops, and another
    worker runs the jobs. The process still ends after SIGTERM."""
    marker = tmp_path / "marker"
    config = {"TEST_SET_UP": set_up, "TEST_MARKER": str(marker), **SHORT_LEASE}
    stuck = start_worker("-c", "2", "--shutdown-timeout", "0", **config)
    held = enqueue("hold_at_first", str(journal))
    wait_until(lambda: stored(app, held).started_at is not None, "the start")
    enqueue("echo", 1)
    wait_until(marker.exists, "the standstill")
    start_worker("-c", "2", **SHORT_LEASE)
    assert held.wait(DEADLINE_SECONDS).result == 2
    assert list(workers(state).values()) == ["dead", "alive"]
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(DEADLINE_SECONDS) == 1


@pytest.mark.on("sqlite")
def test_a_standstill_is_logged(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """The log names the signal and the receiver after a second, and the place of the standstill."""
    marker = tmp_path / "marker"
    worker = start_worker(TEST_SET_UP="receiver_hangs", TEST_MARKER=str(marker), **SHORT_LEASE)
    enqueue("echo", 1)
    wait_until(lambda: "Slow receiver" in worker.log.read_text(), "the warning")
    warning = worker.log.read_text()
    assert "Signal: bgjobs-job-completed | Receiver: tests.hosts.receiver_hangs.<locals>.hang:" in (
        warning
    )
    wait_until(lambda: "Worker stands still" in worker.log.read_text(), "the standstill")


@pytest.mark.on("sqlite")
def test_descriptors_run_out(app: Flask, start_worker: Start, journal: Path) -> None:
    """A child that cannot be replaced while descriptors have run out is replaced afterwards."""
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
def test_processes_run_out(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """A fork server that may not fork goes on, its other children as well."""
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
def test_an_unexpected_exception_is_an_exit_code(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str, set_up: str
) -> None:
    """A worker whose loop or pool fails gives its running jobs back and exits with code 1."""
    worker = start_worker("-P", pool, "-c", "2", TEST_SET_UP=set_up, BGJOBS_APP="host")
    held = enqueue("hold_at_first", str(journal))
    wait_until(lambda: lines(journal), "the start")
    failed = enqueue("fail", "now", retries=0)
    wait_until(lambda: stored(app, failed).status == "failed", "the failure")
    # The pool's thread fails at the next job that it is to hand to a child.
    enqueue("echo", 1)
    assert worker.wait(DEADLINE_SECONDS) == 1
    assert list(workers(state).values()) == ["stopped"]
    assert (stored(app, held).status, stored(app, held).retry_count) == ("pending", 0)
    start_worker("-c", "1")
    assert held.wait(DEADLINE_SECONDS).result == 2


@pytest.mark.on("sqlite")
def test_a_pool_that_fails_in_a_stop_gives_its_jobs_back(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """A job that ran in the pool is not lost with it while the worker waits for its end."""
    worker = start_worker(
        "-P", "process", "-c", "1", TEST_SET_UP="pool_fails_in_a_stop", BGJOBS_APP="host"
    )
    held = enqueue("hold_at_first", str(journal))
    wait_until(lambda: lines(journal), "the start")
    worker.terminate()
    worker.wait(DEADLINE_SECONDS)
    assert "The thread bgjobs-children failed" in worker.log.read_text()
    assert list(workers(state).values()) == ["stopped"]
    assert (stored(app, held).status, stored(app, held).retry_count) == ("pending", 0)


def test_a_worker_without_a_free_thread_ends(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """A worker all of whose threads are held by jobs that cannot be stopped exits with code 1.
    The jobs have timed out, and another worker runs what waits."""
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
def test_a_fork_server_that_cannot_start_holds_no_jobs(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """One that ends at each start is tried again after pauses; jobs are given back meanwhile."""
    refuse = tmp_path / "refuse"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if os.path.exists({str(refuse)!r}) and 'forkserver' in ' '.join(sys.orig_argv):\n"
        "    os._exit(1)\n"
    )
    worker = start_worker("-P", "process", "-c", "1")
    child = enqueue("process_id").wait(DEADLINE_SECONDS).result
    refuse.touch()
    fork_server = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(fork_server, signal.SIGKILL)
    failed = "could not start: the fork server has ended"
    wait_until(lambda: worker.log.read_text().count(failed) >= 3, "the failed starts")
    waiting = enqueue("echo", 1)
    wait_until(lambda: worker.log.read_text().count(failed) >= 4, "another one")
    assert stored(app, waiting).status == "pending"
    assert worker.log.read_text().count(failed) < 10
    refuse.unlink()
    assert waiting.wait(DEADLINE_SECONDS).result == 1


@pytest.mark.on("sqlite")
def test_no_child_process_is_free_for_good(
    app: Flask, tmp_path: Path, start_worker: Start, journal: Path
) -> None:
    """A child that SIGKILL does not end, as where it waits within the kernel, is named in the log;
    a worker that has no other exits with code 1."""
    (tmp_path / "sitecustomize.py").write_text(
        "from flask_bgjobs.worker import worker\n"
        "from flask_bgjobs.execution.pools.process.forkserver import ForkServer\n"
        "worker._FIRST_OVERDUE_SECONDS = 2.0\n"
        "ForkServer.signal_group = lambda *_: None\n"
    )
    worker = start_worker("-P", "process", "-c", "1", BGJOBS_LEASE=6, BGJOBS_HEARTBEAT_INTERVAL=1)
    job = enqueue("ignore_term", str(journal), timeout=0.5)
    assert worker.wait(DEADLINE_SECONDS) == 1
    said = worker.log.read_text()
    assert f"Job cannot be stopped | Job: {job.id} | " in said
    assert "Reason: JobTimeout" in said
    assert "It holds a child process until that ends" in said
    assert "Error: no child process is free: 1 jobs cannot be stopped" in said


@pytest.mark.on("sqlite")
def test_nobody_reads_stdout(app: Flask, database_url: str, tmp_path: Path) -> None:
    """A worker whose stdout is closed on the other side works, and exits with code 0."""
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
