"""Forks and reloaders: no shared connection, no lost job, and one worker per process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs.models import Job, Worker
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import lines
from tests.conftest import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.acceptance

START = """
import json, os, sys
from flask_bgjobs import run_background_job
from flask_bgjobs.state import state_of
from tests.apps import build_app
from tests.databases import number_of

app = build_app(sys.argv[1])
app.app_context().push()
store = state_of(app).store

def enqueue(value):
    run_background_job("tests.jobs.echo", parameters=[value])

store.prepare(wal=True)
enqueue("before")
child = os.fork()
"""
"""The start of a script: it uses its database connections, then forks."""

DAEMON = f"""{START}
if child == 0:
    for line in sys.stdin:
        enqueue(line.strip())
        print("enqueued", flush=True)
os._exit(0)
"""
"""The parent exits; the child enqueues the values that it reads from its standard input."""

PAIR = f"""{START}
files = [os.path.realpath(f"/proc/self/fd/{{number}}") for number in os.listdir("/proc/self/fd")]
role = "parent" if child else "child"
for number in range(40):
    enqueue(f"{{role}} {{number}}")
with store.read() as connection:
    backend = number_of(connection)
if child:
    os.waitpid(child, 0)
    enqueue("after")
print(json.dumps({{"role": role, "files": files, "backend": backend}}), flush=True)
os._exit(0)
"""
"""Parent and child enqueue at the same time; each prints its connection and its open files."""

SITE = """
import itertools, os, threading
import sqlalchemy as sa
from flask_bgjobs import BgJobs, run_background_job
from flask_bgjobs.state import state_of
from tests.apps import build_app
from tests.databases import number_of

numbers = itertools.count()

def backend(app):
    with state_of(app).store.read() as connection:
        return number_of(connection)

def create_app():
    app = build_app({url!r})
    db = app.extensions["sqlalchemy"]

    def record(line):
        run_background_job("tests.jobs.record", parameters=[{journal!r}, line])

    with app.app_context():
        db.session.execute(sa.text("SELECT count(*) FROM bgjobs_job"))
        db.session.remove()
        record(f"{{os.getpid()}} factory")
        factory = {{"pid": os.getpid(), "backend": backend(app)}}
    BgJobs().start_worker(app)

    @app.get("/")
    def serve():
        for number in range(10):
            record(f"{{os.getpid()}} {{next(numbers)}}")
        names = [thread.name for thread in threading.enumerate()]
        return {{
            "pid": os.getpid(),
            "backend": backend(app),
            "factory": factory,
            "schedulers": names.count("APScheduler"),
            "heartbeats": names.count("bgjobs-heartbeat"),
        }}

    return app

"""


def values(state: AppState) -> list[Any]:
    """The parameters of all jobs, in order. Closes its connections."""
    with state.store.read() as connection:
        texts = connection.execute(sa.select(Job.parameters_json).order_by(Job.id)).scalars().all()
    state.store.dispose()
    return [json.loads(text)[0] for text in texts]


@pytest.fixture
def start(
    tmp_path: Path, app: Flask, database_url: str
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with a script, the database URL as its argument, and pipes to the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        (tmp_path / "script.py").write_text(script)
        process = subprocess.Popen(
            [sys.executable, "script.py", database_url],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE_SECONDS)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            # A child that outlived its parent exits at the end of its standard input.
            pipe.close()


def test_child_that_outlives_its_parent_loses_no_job(
    app: Flask, state: AppState, start: Callable[..., Any]
) -> None:
    """Jobs that a child enqueues after its parent has exited, as in a daemon, stay enqueued while
    other processes open and close the database."""
    daemon = start(DAEMON)
    assert daemon.wait(DEADLINE_SECONDS) == 0
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()
    expected = ["before"]
    for value in ("first", "second", "third"):
        daemon.stdin.write(f"{value}\n")
        daemon.stdin.flush()
        assert daemon.stdout.readline() == "enqueued\n"
        expected.append(value)
        assert values(state) == expected


def test_parent_and_child_share_no_connection(
    app: Flask, state: AppState, start: Callable[..., Any], database_url: str
) -> None:
    """If a process enqueues and then forks, parent and child enqueue at the same time over their
    own connections, and no job is lost or duplicated."""
    output, _ = start(PAIR).communicate(timeout=DEADLINE_SECONDS)
    child, parent = sorted(map(json.loads, output.splitlines()), key=lambda output: output["role"])
    assert not [name for name in child["files"] if "test.db" in name], (
        "the child inherited the database file"
    )
    assert child["backend"] is None or child["backend"] != parent["backend"]
    each = [f"{role} {number}" for role in ("parent", "child") for number in range(40)]
    assert sorted(values(state)) == sorted(["before", *each, "after"])


class Site:
    """A web server whose app uses its database before it serves."""

    def __init__(self, folder: Path, url: str, journal: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._log = folder / "site.log"
        self.source = folder / "forked_site.py"
        self.source.write_text(SITE.format(url=url, journal=str(journal)))
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> int:
        """Start ``python -m`` with this command; returns the process id."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": f"{self._folder}{os.pathsep}{Path.cwd()}"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._process.pid

    def ask(self) -> dict[str, Any]:
        """Wait for an answer: it describes the serving process. Each request enqueues ten jobs."""

        def answer() -> dict[str, Any] | None:
            address = f"http://127.0.0.1:{self.port}/"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as reply:
                description: dict[str, Any] = json.load(reply)
                return description
            return None

        description: dict[str, Any] = wait_until(answer, "an answer")
        return description

    def errors(self) -> list[str]:
        """The log lines that report an error or a warning."""
        log = self._log.read_text().splitlines()
        return [line for line in log if re.search("error|exception|traceback|warning", line, re.I)]

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DEADLINE_SECONDS)
            self._process.kill()
            self._process.wait(DEADLINE_SECONDS)


@pytest.fixture
def site(tmp_path: Path, app: Flask, database_url: str, journal: Path) -> Iterator[Site]:
    site = Site(tmp_path, database_url, journal)
    yield site
    site.end()


_RELOAD_SECONDS = 3 * DEADLINE_SECONDS
"""The reloader starts two processes one after the other."""


def threads_of(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def worker_pids(state: AppState) -> list[int]:
    """The process ids of all registered workers, including stopped ones."""
    with state.store.read() as connection:
        return sorted(connection.execute(sa.select(Worker.pid)).scalars())


def test_preloaded_processes_have_their_own_connections_and_workers(
    app: Flask, state: AppState, site: Site, journal: Path
) -> None:
    """With ``gunicorn --preload`` and an app that used its database before the fork, each of four
    serving processes has its own connection and one worker; the master has no worker. No job is
    lost or duplicated, and the log reports no error."""
    master = site.run(
        "gunicorn", "--preload", "--workers", "4", "--bind", f"127.0.0.1:{site.port}",
        "forked_site:create_app()",
    )  # fmt: skip
    replies = [site.ask()]
    with ThreadPoolExecutor(4) as executor:

        def ask_until_all_have_answered() -> bool:
            replies.extend(executor.map(lambda _: site.ask(), range(8)))
            return len({reply["pid"] for reply in replies}) == 4

        wait_until(ask_until_all_have_answered, "all four processes")
        serving = {reply["pid"] for reply in replies}
        wait_until(lambda: worker_pids(state) == sorted(serving), "one worker in each process")
        last: dict[int, dict[str, Any]] = {}

        def all_workers_run() -> bool:
            last.update((r["pid"], r) for r in executor.map(lambda _: site.ask(), range(8)))
            return len(last) == 4 and all(map(_worker_runs, last.values()))

        wait_until(all_workers_run, "a running worker in each process")
    assert master not in serving
    assert {(r["schedulers"], r["heartbeats"]) for r in last.values()} == {(1, 1)}
    if not state.store.has_one_writer:
        described = [*replies, *(reply["factory"] for reply in replies)]
        backends = {(each["pid"], each["backend"]) for each in described}
        assert len({backend for _, backend in backends}) == len(backends), "a shared connection"
    wait_until(lambda: _all_jobs_ended(state), "the end of all jobs")
    assert len(lines(journal)) == len(set(lines(journal))) == _count(state)
    assert {int(line.split()[0]) for line in lines(journal)} == {master, *serving}
    assert site.errors() == []


@pytest.mark.on("sqlite")
def test_reloader_child_has_one_scheduler(app: Flask, state: AppState, site: Site) -> None:
    """Under ``flask run --debug`` the child has one scheduler and one heartbeat, before and after a
    reload. The parent has no worker and no additional thread."""
    parent = site.run(
        "flask", "--app", "forked_site", "--debug", "run", "--port", str(site.port)
    )  # fmt: skip

    def running() -> dict[str, Any] | None:
        reply = site.ask()
        return reply if _worker_runs(reply) else None

    before = wait_until(running, "the worker", _RELOAD_SECONDS)
    site.source.touch()

    def reloaded() -> dict[str, Any] | None:
        reply = running()
        return reply if reply and reply["pid"] != before["pid"] else None

    after = wait_until(reloaded, "the reload", _RELOAD_SECONDS)
    for reply in (before, after):
        assert (reply["schedulers"], reply["heartbeats"]) == (1, 1)
    assert threads_of(parent) == 1
    assert worker_pids(state) == sorted([before["pid"], after["pid"]])


def _worker_runs(reply: dict[str, Any]) -> bool:
    # The heartbeat thread starts shortly before the scheduler.
    return bool(reply["heartbeats"] and reply["schedulers"])


def _count(state: AppState) -> int:
    with state.store.read() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(Job)) or 0)


def _all_jobs_ended(state: AppState) -> bool:
    with state.store.read() as connection:
        unfinished = sa.select(Job.id).where(Job.status.in_(["pending", "running"]))
        return connection.execute(unfinished).first() is None
