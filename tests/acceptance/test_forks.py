"""Forks and reloaders: no connection is shared, nothing is lost, and no worker is there twice."""

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
"""A process that has used its connections, and forks."""

DAEMON = f"""{START}
if child == 0:
    for line in sys.stdin:
        enqueue(line.strip())
        print("enqueued", flush=True)
os._exit(0)
"""
"""The child goes on without its parent, and enqueues what it is told."""

PAIR = f"""{START}
files = [os.path.realpath(f"/proc/self/fd/{{number}}") for number in os.listdir("/proc/self/fd")]
who = "parent" if child else "child"
for number in range(40):
    enqueue(f"{{who}} {{number}}")
with store.read() as connection:
    backend = number_of(connection)
if child:
    os.waitpid(child, 0)
    enqueue("after")
print(json.dumps({{"who": who, "files": files, "backend": backend}}), flush=True)
os._exit(0)
"""
"""Both go on at the same time; each tells its connection, and the files that it had open."""

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
    """The parameters of all jobs, in order; no connection stays open."""
    with state.store.read() as connection:
        texts = connection.execute(sa.select(Job.parameters_json).order_by(Job.id)).scalars().all()
    state.store.dispose()
    return [json.loads(text)[0] for text in texts]


@pytest.fixture
def start(
    tmp_path: Path, app: Flask, database_url: str
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with a script that is given the database, and pipes to talk with it."""
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
            # At its end a child that was left alone ends as well.
            pipe.close()


def test_a_child_that_outlives_its_parent_loses_nothing(
    app: Flask, state: AppState, start: Callable[..., Any]
) -> None:
    """What a process enqueues after a fork stays enqueued when its parent is gone and others
    open and close the database, as with a server that makes itself a daemon."""
    daemon = start(DAEMON)
    assert daemon.wait(DEADLINE_SECONDS) == 0
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()
    told = ["before"]
    for value in ("first", "second", "third"):
        daemon.stdin.write(f"{value}\n")
        daemon.stdin.flush()
        assert daemon.stdout.readline() == "enqueued\n"
        told.append(value)
        assert values(state) == told


def test_parent_and_child_share_no_connection(
    app: Flask, state: AppState, start: Callable[..., Any], database_url: str
) -> None:
    """After ``os.fork`` in a process that has enqueued, parent and child enqueue at the same time
    over connections of their own, and no job is lost or doubled."""
    output, _ = start(PAIR).communicate(timeout=DEADLINE_SECONDS)
    child, parent = sorted(map(json.loads, output.splitlines()), key=lambda told: told["who"])
    assert not [name for name in child["files"] if "test.db" in name], "inherited"
    assert child["backend"] is None or child["backend"] != parent["backend"]
    each = [f"{who} {number}" for who in ("parent", "child") for number in range(40)]
    assert sorted(values(state)) == sorted(["before", *each, "after"])


class Site:
    """An app that has used its database before it serves, and what answers for it."""

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
        """Serve with this command of Python's; its process id."""
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
        """What a process that serves tells of itself, once one answers; it enqueues ten jobs."""

        def answer() -> dict[str, Any] | None:
            address = f"http://127.0.0.1:{self.port}/"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as reply:
                told: dict[str, Any] = json.load(reply)
                return told
            return None

        told: dict[str, Any] = wait_until(answer, "an answer")
        return told

    def errors(self) -> list[str]:
        """The lines of its log that tell of something wrong."""
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
    made = Site(tmp_path, database_url, journal)
    yield made
    made.end()


_RELOAD_SECONDS = 3 * DEADLINE_SECONDS
"""Two processes begin anew, one after the other has ended."""


def threads_of(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def worker_pids(state: AppState) -> list[int]:
    """The processes of all workers that were ever registered."""
    with state.store.read() as connection:
        return sorted(connection.execute(sa.select(Worker.pid)).scalars())


def test_four_processes_of_a_preloaded_app(
    app: Flask, state: AppState, site: Site, journal: Path
) -> None:
    """With ``gunicorn --preload`` and an app that has used its database before the fork, each of
    four processes enqueues over a connection of its own, none over one of the master, and has one
    worker, the master none; no job is lost or doubled, and nothing is wrong in the log."""
    master = site.run(
        "gunicorn", "--preload", "--workers", "4", "--bind", f"127.0.0.1:{site.port}",
        "forked_site:create_app()",
    )  # fmt: skip
    replies = [site.ask()]
    with ThreadPoolExecutor(4) as asking:

        def ask_until_all_have_answered() -> bool:
            replies.extend(asking.map(lambda _: site.ask(), range(8)))
            return len({reply["pid"] for reply in replies}) == 4

        wait_until(ask_until_all_have_answered, "all four processes")
        serving = {reply["pid"] for reply in replies}
        wait_until(lambda: worker_pids(state) == sorted(serving), "one worker in each")
        last: dict[int, dict[str, Any]] = {}

        def all_work() -> bool:
            last.update((r["pid"], r) for r in asking.map(lambda _: site.ask(), range(8)))
            return len(last) == 4 and all(map(_works, last.values()))

        wait_until(all_work, "a worker that works in each")
    assert master not in serving
    assert {(r["schedulers"], r["heartbeats"]) for r in last.values()} == {(1, 1)}
    if not state.store.has_one_writer:
        told = [*replies, *(reply["factory"] for reply in replies)]
        backends = {(each["pid"], each["backend"]) for each in told}
        assert len({backend for _, backend in backends}) == len(backends), "a shared connection"
    wait_until(lambda: _is_over(state), "the end of all jobs")
    assert len(lines(journal)) == len(set(lines(journal))) == _count(state)
    assert {int(line.split()[0]) for line in lines(journal)} == {master, *serving}
    assert site.errors() == []


@pytest.mark.on("sqlite")
def test_the_reloaders_child_has_one_scheduler(app: Flask, state: AppState, site: Site) -> None:
    """Under ``flask run --debug`` the child has one scheduler and one heartbeat, also after a
    reload; the parent has neither a worker nor a thread."""
    parent = site.run(
        "flask", "--app", "forked_site", "--debug", "run", "--port", str(site.port)
    )  # fmt: skip

    def working() -> dict[str, Any] | None:
        told = site.ask()
        return told if _works(told) else None

    before = wait_until(working, "the worker", _RELOAD_SECONDS)
    site.source.touch()

    def reloaded() -> dict[str, Any] | None:
        told = working()
        return told if told and told["pid"] != before["pid"] else None

    after = wait_until(reloaded, "the reload", _RELOAD_SECONDS)
    for told in (before, after):
        assert (told["schedulers"], told["heartbeats"]) == (1, 1)
    assert threads_of(parent) == 1
    assert worker_pids(state) == sorted([before["pid"], after["pid"]])


def _works(told: dict[str, Any]) -> bool:
    # The heartbeat begins a moment before the scheduler.
    return bool(told["heartbeats"] and told["schedulers"])


def _count(state: AppState) -> int:
    with state.store.read() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(Job)) or 0)


def _is_over(state: AppState) -> bool:
    with state.store.read() as connection:
        unfinished = sa.select(Job.id).where(Job.status.in_(["pending", "running"]))
        return connection.execute(unfinished).first() is None
