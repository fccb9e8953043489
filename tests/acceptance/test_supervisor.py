"""Several worker processes under one supervisor, as an operator starts, stops and kills them."""

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
"""For several fresh processes that start at the same moment."""


@pytest.fixture
def start(state: AppState, start_worker: Start) -> Start:
    """Starts a supervisor, and waits until its children take jobs."""

    def start_all(processes: int, *options: str, **config: Any) -> Any:
        supervisor = start_worker("--processes", str(processes), *options, **config)
        wait_until(lambda: len(beats(state)) == processes, "the workers", START_SECONDS)
        return supervisor

    return start_all


def children(supervisor: Any) -> set[int]:
    """The process ids of the workers themselves."""
    return set(
        map(int, Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split())
    )


def said(process: Any, words: str) -> int:
    """How often the log has some words."""
    return int(process.log.read_text().count(words))


def ran(journal: Path) -> dict[str, str]:
    """The process that ran each job; none ran twice."""
    runs = [line.split() for line in lines(journal)]
    assert len(runs) == len({job for job, _ in runs})
    return dict(runs)


@pytest.mark.on(*KINDS)
def test_workers_share_the_work(app: Flask, state: AppState, start: Start, journal: Path) -> None:
    """The workers have names with numbers, each is a process of its own that runs jobs, no job
    runs twice, and the supervisor itself opens no database."""
    supervisor = start(2, "-n", "mail", "-c", "2")
    assert sorted(beats(state)) == ["mail-1", "mail-2"]
    assert len(children(supervisor)) == 2
    jobs = [enqueue("note_process", str(journal), 0.1) for _ in range(40)]
    for job in jobs:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert ran(journal).keys() == {str(job.id) for job in jobs}
    assert set(map(int, ran(journal).values())) == children(supervisor)
    files = [os.readlink(file) for file in Path(f"/proc/{supervisor.pid}/fd").iterdir()]
    assert not [file for file in files if "test.db" in file]
    assert _connections(supervisor.pid) == 0
    assert (
        said(supervisor, f"supervisor {supervisor.pid} for the app shop, worker processes: 2") == 1
    )


def _connections(pid: int) -> int:
    """How many TCP connections a process has."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(f"socket:[{row.split()[9]}]" in sockets for row in rows)


def test_a_killed_child_is_replaced(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """After ``kill -9`` of one worker another takes its place at once, its job runs again, no
    retry is used, and the log says how it ended."""
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
    """Signals the supervisor alone, or its children as well: a terminal signals the whole group,
    and a service manager all that belongs to the service."""

    def send(supervisor: Any, number: int) -> None:
        others = children(supervisor) if request.param == "all" else ()
        for pid in (*others, supervisor.pid):
            os.kill(pid, number)

    return send


def test_one_signal_drains_all(
    app: Flask, start: Start, journal: Path, signal_them: Callable[[Any, int], None]
) -> None:
    """After one signal the running jobs of all workers finish, the exit code is 0, and no process
    is left."""
    supervisor = start(2, "-c", "1")
    jobs = [enqueue("hold", str(journal), 2.0) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts")
    all_processes = descendants(supervisor.pid)
    signal_them(supervisor, signal.SIGINT)
    assert supervisor.wait(DEADLINE_SECONDS) == 0
    assert {job.refresh().status for job in jobs} == {"completed"}
    assert not any(map(is_alive, all_processes))
    assert said(supervisor, "Worker stopping") == 2


def test_a_second_signal_stops_all_at_once(
    app: Flask, start: Start, journal: Path, signal_them: Callable[[Any, int], None]
) -> None:
    """The second signal ends the grace in all workers: their jobs are given back, exit code 0."""
    supervisor = start(2, "-c", "1", "--shutdown-timeout", "600")
    jobs = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts")
    signal_them(supervisor, signal.SIGTERM)
    for who, times in (("Worker", 2), ("Supervisor", 1)):
        wait_until(lambda who=who, n=times: said(supervisor, f"{who} stopping") == n, "the stops")
    signal_them(supervisor, signal.SIGTERM)
    assert supervisor.wait(DEADLINE_SECONDS) == 0
    assert {(job.refresh().status, job.retry_count) for job in jobs} == {("pending", 0)}


def test_a_child_that_is_told_to_stop_is_replaced(
    app: Flask, state: AppState, start: Start
) -> None:
    """An operator may stop a single worker in order; the supervisor starts another."""
    supervisor = start(1)
    (stopped,) = children(supervisor)
    os.kill(stopped, signal.SIGTERM)
    wait_until(lambda: said(supervisor, "Worker started") == 2, "the new worker", START_SECONDS)
    assert said(supervisor, f"Pid: {stopped} | It exited with code 0") == 1


def test_a_drained_child_is_replaced(
    app: Flask, state: AppState, start: Start, journal: Path
) -> None:
    """A worker that was asked to end by the dashboard finishes its job; another takes its place."""
    supervisor = start(1)
    job = enqueue("note_process", str(journal), 2.0)
    wait_until(lambda: job.refresh().started_at, "its start")
    (worker,) = state.store.living_workers()
    assert state.store.drain_worker(worker.id)
    assert not lines(journal)
    wait_until(lambda: said(supervisor, "Worker started") == 2, "the new worker", START_SECONDS)
    assert job.refresh().status == "completed"
    assert said(supervisor, "It exited with code 0") == 1


def test_burst_ends_by_itself(
    app: Flask, start_worker: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--burst`` a worker that has nothing left is done, and all of them end the supervisor
    with exit code 0; also where the environment says how many."""
    jobs = [enqueue("echo", number) for number in range(10)]
    monkeypatch.setenv("FLASK_BGJOBS_WORKER_PROCESSES", "2")
    supervisor = start_worker("--burst")
    assert supervisor.wait(START_SECONDS) == 0
    assert {job.refresh().status for job in jobs} == {"completed"}
    assert said(supervisor, "started: 2, of these as replacements: 0") == 1


def test_a_worker_at_its_limit_is_replaced(app: Flask, start: Start, journal: Path) -> None:
    """A worker that has run ``--max-jobs`` is followed by a fresh one."""
    start(1, "--max-jobs", "3")
    for _ in range(7):
        job = enqueue("note_process", str(journal)).wait(START_SECONDS)
        assert job.status == "completed"
    assert len(set(ran(journal).values())) == 3


def test_children_do_not_outlive_their_supervisor(app: Flask, start: Start, journal: Path) -> None:
    """After ``kill -9`` of the supervisor the workers stop in order, and their own children end."""
    options = ("-P", "process", "-c", "1", "--shutdown-timeout", "0.2")
    supervisor = start(2, *options, BGJOBS_APP="host")
    jobs = [enqueue("hold", str(journal), 600) for _ in range(2)]
    wait_until(lambda: starts(journal) == 2, "the starts", START_SECONDS)
    below = descendants(supervisor.pid)
    assert len(below) >= 6
    supervisor.kill()
    wait_until(lambda: not any(map(is_alive, below)), "the end of all")
    assert {(job.refresh().status, job.retry_count) for job in jobs} == {("pending", 0)}
    assert said(supervisor, "Worker stopped") == 2


def test_a_broken_app_is_given_up(app: Flask, tmp_path: Path, start_worker: Start) -> None:
    """When no worker can start, after a few tries the supervisor says so and exits as they do."""
    supervisor = start_worker(
        "--processes", "2", SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/none.db"
    )
    assert supervisor.wait(START_SECONDS) == 1
    assert said(supervisor, "Error: the database has no table") == 6
    assert said(supervisor, "No worker process could start in 3 tries; giving up") == 1
    assert said(supervisor, "Traceback") == 0


def test_a_service_that_once_ran_is_not_given_up(app: Flask, start: Start, tmp_path: Path) -> None:
    """What keeps workers from starting for a while, such as a database that is away, ends no
    supervisor whose workers have run before."""
    supervisor = start(1)
    host = (tmp_path / "host.py").read_text()
    (tmp_path / "host.py").write_text("raise SystemExit(1)")
    for pid in children(supervisor):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: said(supervisor, "exited with code 1") == 4, "four tries", START_SECONDS)
    (tmp_path / "host.py").write_text(host)
    assert enqueue("echo", 5).wait(START_SECONDS).result == 5
    assert said(supervisor, "giving up") == 0


def test_systemd_is_told_by_the_supervisor(
    app: Flask, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd hears once that all workers take jobs and once that they stop, and from nobody
    else."""
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


def test_a_change_of_code_starts_all_workers_anew(app: Flask, start: Start, tmp_path: Path) -> None:
    """``--reload`` goes round the supervisor: a changed file starts it and its workers anew."""
    reloader = start(2, "--reload")
    old = set(descendants(reloader.pid))
    host = tmp_path / "host.py"
    host.write_text(f"{host.read_text()}\n")
    wait_until(lambda: said(reloader, "Worker started") == 4, "new workers", START_SECONDS)
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
"""A supervisor of two of any command, that has little patience."""

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
"""A child that takes jobs until it is told to stop; it outlives no test by long."""


@contextlib.contextmanager
def supervise(*command: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A supervisor and its output, and that of its children."""
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
    ("then", "says"),
    [
        ("signal.pause()", "It did not stop in time"),
        ("os._exit(3)", "It exited with code 3"),
        ("os.abort()", "It was killed by SIGABRT"),
    ],
)
def test_a_stop_that_is_not_clean_shows(then: str, says: str) -> None:
    """A worker that does not end in its time is killed; as with one that ends in another way than
    it should, the exit code is 1."""
    with supervise(sys.executable, "-c", CHILD.format(then=then)) as (supervisor, output):
        assert [output.readline() for _ in range(2)] == ["started\n"] * 2
        supervisor.terminate()
        told = output.read()
    assert told.count(says) == 2
    assert told.endswith("\n1\n")


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ([sys.executable, "-c", "raise SystemExit(2)"], 2, "It exited with code 2"),
        ([sys.executable, "-c", "import os; os.abort()"], 1, "It was killed by SIGABRT"),
        ([sys.executable, "-c", "pass"], 1, "It exited with code 0"),
        (["/no/such/python"], 1, "Worker process not started"),
    ],
)
def test_what_cannot_start_is_given_up(command: list[str], code: int, says: str) -> None:
    """Whatever keeps all workers from taking jobs, each has three tries, with pauses; the exit
    code is theirs."""
    with supervise(*command) as (_, output):
        told = output.read()
    assert told.count(says) == 6
    assert told.endswith(f"giving up\n{code}\n")
