"""Several worker processes under one supervisor: they are started, stopped and killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from flask import Flask

from flask_bgjobs.state import AppState
from tests.acceptance.helpers import beats, descendants, enqueue, is_alive, lines, starts
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.databases import KINDS

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]

START_SECONDS = 4 * DEADLINE_SECONDS
"""Deadline for several processes that start at the same time."""


@pytest.fixture
def start(state: AppState, start_worker: Start) -> Start:
    """Starts a supervisor, and waits until all its workers are alive."""

    def start_all(processes: int, *options: str, **config: Any) -> Any:
        supervisor = start_worker("--processes", str(processes), *options, **config)
        wait_until(lambda: len(beats(state)) == processes, "the workers", START_SECONDS)
        return supervisor

    return start_all


def children(supervisor: Any) -> set[int]:
    """The process ids of the supervisor's workers."""
    return set(
        map(int, Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split())
    )


def count_in_log(process: Any, text: str) -> int:
    """How often the log contains ``text``."""
    return int(process.log.read_text().count(text))


def process_of_each_job(journal: Path) -> dict[str, str]:
    """The id of the process that ran each job, by job id; asserts that no job ran twice."""
    runs = [line.split() for line in lines(journal)]
    assert len(runs) == len({job for job, _ in runs})
    return dict(runs)


@pytest.mark.on(*KINDS)
def test_workers_share_the_jobs(app: Flask, state: AppState, start: Start, journal: Path) -> None:
    """The workers have numbered names, each is a separate process that runs jobs, no job runs
    twice, and the supervisor itself has no database connection."""
    supervisor = start(2, "-n", "mail", "-c", "2")
    assert sorted(beats(state)) == ["mail-1", "mail-2"]
    assert len(children(supervisor)) == 2
    jobs = [enqueue("note_process", str(journal), 0.1) for _ in range(40)]
    for job in jobs:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert process_of_each_job(journal).keys() == {str(job.id) for job in jobs}
    assert set(map(int, process_of_each_job(journal).values())) == children(supervisor)
    files = [os.readlink(file) for file in Path(f"/proc/{supervisor.pid}/fd").iterdir()]
    assert not [file for file in files if "test.db" in file]
    assert _connections(supervisor.pid) == 0
    assert (
        count_in_log(
            supervisor, f"supervisor {supervisor.pid} for the app shop, worker processes: 2"
        )
        == 1
    )


def _connections(pid: int) -> int:
    """The number of TCP connections of a process."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(f"socket:[{row.split()[9]}]" in sockets for row in rows)


def test_killed_worker_is_replaced(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """After ``kill -9`` of a worker a new worker starts at once, the job runs again without a
    retry, and the log says how the worker ended."""
    supervisor = start(2)
    before = children(supervisor)
    job = enqueue("crash_once", str(journal))
    assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert (job.attempt, job.retry_count) == (2, 0)
    wait_until(lambda: len(beats(state)) == 2, "the new worker", START_SECONDS)
    assert len(children(supervisor)) == 2
    (killed,) = before - children(supervisor)
    how = rf"Pid: {killed} \| It was killed by SIGKILL \| .* \| Next start: at once$"
    assert len(re.findall(how, supervisor.log.read_text(), re.M)) == 1
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(DEADLINE_SECONDS) == 0
    assert re.search(r"started: 3, of these as replacements: 1$", supervisor.log.read_text(), re.M)


@pytest.fixture(params=["supervisor", "all"])
def signal_them(request: pytest.FixtureRequest) -> Callable[[Any, int], None]:
    """Signals only the supervisor, or its workers too: a terminal signals the process group, and a
    service manager all processes of the service."""

    def send(supervisor: Any, number: int) -> None:
        others = children(supervisor) if request.param == "all" else ()
        for pid in (*others, supervisor.pid):
            os.kill(pid, number)

    return send


def test_one_signal_stops_all_workers_gracefully(
    app: Flask, start: Start, journal: Path, signal_them: Callable[[Any, int], None]
) -> None:
    """After one SIGINT the running jobs of all workers finish, the exit code is 0, and no process
    is left."""
    supervisor = start(2, "-c", "1")
    jobs = [enqueue("hold", str(journal), 2.0) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts")
    all_processes = descendants(supervisor.pid)
    signal_them(supervisor, signal.SIGINT)
    assert supervisor.wait(DEADLINE_SECONDS) == 0
    assert {job.refresh().status for job in jobs} == {"completed"}
    assert not any(map(is_alive, all_processes))
    assert count_in_log(supervisor, "Worker stopping") == 2


def test_second_signal_ends_the_grace_period_of_all_workers(
    app: Flask, start: Start, journal: Path, signal_them: Callable[[Any, int], None]
) -> None:
    """A second signal ends the grace period: all workers release their jobs; exit code 0."""
    supervisor = start(2, "-c", "1", "--shutdown-timeout", "600")
    jobs = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts")
    signal_them(supervisor, signal.SIGTERM)
    for name, times in (("Worker", 2), ("Supervisor", 1)):
        stopping = f"{name} stopping"
        wait_until(lambda s=stopping, n=times: count_in_log(supervisor, s) == n, "the stops")
    signal_them(supervisor, signal.SIGTERM)
    assert supervisor.wait(DEADLINE_SECONDS) == 0
    assert {(job.refresh().status, job.retry_count) for job in jobs} == {("pending", 0)}


def test_stopped_worker_is_replaced(app: Flask, state: AppState, start: Start) -> None:
    """A worker that is stopped with SIGTERM exits with code 0 and is replaced."""
    supervisor = start(1)
    (stopped,) = children(supervisor)
    os.kill(stopped, signal.SIGTERM)
    wait_until(
        lambda: count_in_log(supervisor, "Worker started") == 2, "the new worker", START_SECONDS
    )
    assert count_in_log(supervisor, f"Pid: {stopped} | It exited with code 0") == 1


def test_drained_worker_is_replaced(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """A worker that is drained finishes its job and exits; the supervisor starts another."""
    supervisor = start(1)
    job = enqueue("note_process", str(journal), 2.0)
    wait_until(lambda: job.refresh().started_at, "the start")
    (worker,) = state.store.living_workers()
    assert state.store.drain_worker(worker.id)
    assert not lines(journal)
    wait_until(
        lambda: count_in_log(supervisor, "Worker started") == 2, "the new worker", START_SECONDS
    )
    assert job.refresh().status == "completed"
    assert count_in_log(supervisor, "It exited with code 0") == 1


def test_burst_ends_the_supervisor(
    app: Flask, start_worker: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--burst`` the workers exit when no job is left, and the supervisor exits with code 0.
    An environment variable can set the number of processes."""
    jobs = [enqueue("echo", number) for number in range(10)]
    monkeypatch.setenv("FLASK_BGJOBS_WORKER_PROCESSES", "2")
    supervisor = start_worker("--burst")
    assert supervisor.wait(START_SECONDS) == 0
    assert {job.refresh().status for job in jobs} == {"completed"}
    assert count_in_log(supervisor, "started: 2, of these as replacements: 0") == 1


def test_worker_at_its_limit_is_replaced(app: Flask, start: Start, journal: Path) -> None:
    """A worker that has run ``--max-jobs`` jobs is replaced."""
    start(1, "--max-jobs", "3")
    for _ in range(7):
        job = enqueue("note_process", str(journal)).wait(START_SECONDS)
        assert job.status == "completed"
    assert len(set(process_of_each_job(journal).values())) == 3


def test_workers_stop_when_their_supervisor_is_killed(
    app: Flask, start: Start, journal: Path
) -> None:
    """After ``kill -9`` of the supervisor its workers stop gracefully, and their children end."""
    options = ("-P", "process", "-c", "1", "--shutdown-timeout", "0.2")
    supervisor = start(2, *options, BGJOBS_APP="host")
    jobs = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts", START_SECONDS)
    below = descendants(supervisor.pid)
    assert len(below) >= 6
    supervisor.kill()
    wait_until(lambda: not any(map(is_alive, below)), "the end of all processes")
    assert {(job.refresh().status, job.retry_count) for job in jobs} == {("pending", 0)}
    assert count_in_log(supervisor, "Worker stopped") == 2


def test_supervisor_exits_if_no_worker_can_start(
    app: Flask, tmp_path: Path, start_worker: Start
) -> None:
    """If no worker can start in three tries, the supervisor says so; it exits with their code."""
    supervisor = start_worker(
        "--processes", "2", SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/none.db"
    )
    assert supervisor.wait(START_SECONDS) == 1
    assert count_in_log(supervisor, "Error: the database has no table") == 6
    assert count_in_log(supervisor, "No worker process could start in 3 tries; giving up") == 1
    assert count_in_log(supervisor, "Traceback") == 0


def test_supervisor_keeps_trying_after_a_worker_has_run(
    app: Flask, start: Start, tmp_path: Path
) -> None:
    """A supervisor whose workers have run before does not exit if workers cannot start for a while,
    for example during a database outage."""
    supervisor = start(1)
    host = (tmp_path / "host.py").read_text()
    (tmp_path / "host.py").write_text("raise SystemExit(1)")
    for pid in children(supervisor):
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: count_in_log(supervisor, "exited with code 1") == 4, "four tries", START_SECONDS
    )
    (tmp_path / "host.py").write_text(host)
    assert enqueue("echo", 5).wait(START_SECONDS).result == 5
    assert count_in_log(supervisor, "giving up") == 0


def test_supervisor_notifies_systemd(
    app: Flask, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor notifies systemd once when all workers take jobs and once when they stop; the
    workers send nothing."""
    name = f"bgjobs-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(DEADLINE_SECONDS)
        supervisor = start(2)
        assert systemd.recv(4096) == b"READY=1\nSTATUS=2 worker processes take jobs"
        supervisor.send_signal(signal.SIGTERM)
        assert systemd.recv(4096).startswith(b"STOPPING=1\n")
        assert supervisor.wait(DEADLINE_SECONDS) == 0
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            systemd.recv(4096)


def test_reload_restarts_supervisor_and_workers(app: Flask, start: Start, tmp_path: Path) -> None:
    """With ``--reload`` a changed file restarts the supervisor and its workers."""
    reloader = start(2, "--reload")
    old = set(descendants(reloader.pid))
    host = tmp_path / "host.py"
    host.write_text(f"{host.read_text()}\n")
    wait_until(
        lambda: count_in_log(reloader, "Worker started") == 4, "the new workers", START_SECONDS
    )
    assert not any(map(is_alive, old))
    reloader.send_signal(signal.SIGINT)
    assert reloader.wait(DEADLINE_SECONDS) == 0


SUPERVISOR = """
import logging, sys
from flask_bgjobs.worker.supervisor import supervisor

logging.basicConfig()
supervisor.END_SECONDS = 0.2
command = sys.argv[1:]
print(supervisor.Supervisor([command, command], burst=False, grace_seconds=0.2).run())
"""
"""A script: a supervisor of two processes of any command, with short deadlines."""

CHILD = """
import os, signal, socket, sys
supervisor = socket.socket(fileno=int(sys.argv[-1]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.alarm(60)
os.write(1, b"started\\n")
supervisor.send(b"j")
supervisor.recv(1)
{then}
"""
"""A script: a child that reports that it takes jobs, waits for the stop, and then runs ``then``."""


@contextlib.contextmanager
def supervise(*command: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Start a supervisor; yields it, and the output of it and its children."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with supervisor:
        assert supervisor.stdout is not None
        try:
            yield supervisor, supervisor.stdout
        finally:
            supervisor.kill()


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("signal.pause()", "It did not stop in time"),
        ("os._exit(3)", "It exited with code 3"),
        ("os.abort()", "It was killed by SIGABRT"),
    ],
)
def test_unclean_stop_exits_with_code_1(then: str, text: str) -> None:
    """If a worker is killed because it does not stop in time, exits with an error or crashes during
    the stop, the exit code is 1."""
    with supervise(sys.executable, "-c", CHILD.format(then=then)) as (supervisor, output):
        assert [output.readline() for _ in range(2)] == ["started\n"] * 2
        supervisor.terminate()
        log = output.read()
    assert log.count(text) == 2
    assert log.endswith("\n1\n")


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        ([sys.executable, "-c", "raise SystemExit(2)"], 2, "It exited with code 2"),
        ([sys.executable, "-c", "import os; os.abort()"], 1, "It was killed by SIGABRT"),
        ([sys.executable, "-c", "pass"], 1, "It exited with code 0"),
        (["/no/such/python"], 1, "Worker process not started"),
    ],
)
def test_supervisor_exits_after_three_failed_starts(
    command: list[str], code: int, text: str
) -> None:
    """If no worker can start, for whatever reason, each has three tries, and the supervisor exits
    with their exit code."""
    with supervise(*command) as (_, output):
        log = output.read()
    assert log.count(text) == 6
    assert log.endswith(f"giving up\n{code}\n")
