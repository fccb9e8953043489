"""``start_worker``: it starts a worker only in the process that serves requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.models import Worker
from flask_bgjobs.state import AppState
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.databases import KINDS

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]

SITE = """
import os
from flask_bgjobs import BgJobs, run_background_job
from tests.apps import build_app

def create_app():
    app = build_app({url!r}, **{config})
    bgjobs = BgJobs()
    bgjobs.start_worker(app)

    @app.get("/")
    def serve():
        return {{"pid": os.getpid()}}

    return app

if __name__ == "__main__":
    create_app().run(port={port}, use_reloader={reload})
"""


class Site:
    """An app whose factory starts a worker, served in different ways."""

    def __init__(self, folder: Path, url: str, **config: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._url, self._config = url, config
        self.write(reload=False)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "site.log"

    def write(self, *, reload: bool) -> None:
        text = SITE.format(url=self._url, config=self._config, port=self.port, reload=reload)
        (self._folder / "site_app.py").write_text(text)

    def run(self, *command: str) -> int:
        """Start Python with these arguments; returns the process id."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": f"{self._folder}{os.pathsep}{Path.cwd()}"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self.process.pid

    def ask(self) -> int:
        """Wait for an answer; returns the id of the process that sent it."""

        def answer() -> int | None:
            address = f"http://127.0.0.1:{self.port}/"
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as reply:
                return int(json.load(reply)["pid"])
            return None

        return int(wait_until(answer, "an answer"))

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_SECONDS)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DEADLINE_SECONDS)
            self.process.kill()
            self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def site(tmp_path: Path, app: object, database_url: str) -> Iterator[Site]:
    site = Site(tmp_path, database_url)
    yield site
    site.end()


def worker_pids(state: AppState) -> list[int]:
    with state.store.read() as connection:
        return list(connection.execute(sa.select(Worker.pid).order_by(Worker.id)).scalars())


def flask(*words: str) -> list[str]:
    return ["-m", "flask", "--app", "site_app", *words]


def test_flask_run_starts_the_worker_at_once(app: Flask, state: AppState, site: Site) -> None:
    """Under ``flask run`` the worker starts at once, in the process that serves requests."""
    pid = site.run(*flask("run", "--port", str(site.port)))
    job = run_background_job("tests.jobs.process_id")
    assert job.wait(DEADLINE_SECONDS).result == pid
    assert worker_pids(state) == [pid]


def test_reloader_parent_has_no_worker(
    app: Flask, state: AppState, site: Site, tmp_path: Path
) -> None:
    """Under the reloader only the serving child has a worker. A reload replaces it, and its running
    job is released."""
    parent = site.run(*flask("--debug", "run", "--port", str(site.port)))
    serving = run_background_job("tests.jobs.process_id").wait(DEADLINE_SECONDS).result
    assert serving != parent
    assert site.ask() == serving
    journal = tmp_path / "journal"
    held = run_background_job("tests.jobs.hold", parameters=[str(journal), 600], priority=-1)
    wait_until(journal.exists, "the start")
    (tmp_path / "site_app.py").touch()

    def new_pid() -> int:
        job = run_background_job("tests.jobs.process_id", priority=9)
        return int(job.wait(DEADLINE_SECONDS).result)

    wait_until(lambda: new_pid() not in (parent, serving), "the reload")
    assert held.refresh().retry_count == 0
    assert parent not in worker_pids(state)


@pytest.mark.parametrize("reload", [False, True])
def test_app_run_starts_one_worker(app: Flask, state: AppState, site: Site, reload: bool) -> None:
    """Under ``app.run``, with or without the reloader, the serving process has the only worker
    after the first request."""
    site.write(reload=reload)
    started = site.run("site_app.py")
    serving = site.ask()
    job = run_background_job("tests.jobs.process_id")
    assert job.wait(DEADLINE_SECONDS).result == serving
    assert worker_pids(state) == [serving]
    assert (serving != started) == reload


@pytest.mark.on(*KINDS)
def test_pre_fork_master_has_no_worker(app: Flask, state: AppState, site: Site) -> None:
    """With ``gunicorn --preload`` each serving process has its own worker; the master has none."""
    master = site.run(
        "-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"127.0.0.1:{site.port}",
        "site_app:create_app()",
    )  # fmt: skip
    serving = {site.ask()}
    wait_until(lambda: serving.add(site.ask()) or len(serving) == 2, "both processes")
    assert master not in serving
    wait_until(lambda: set(worker_pids(state)) == serving, "both workers")
    pids = {
        run_background_job("tests.jobs.process_id").wait(DEADLINE_SECONDS).result for _ in range(20)
    }
    assert pids <= serving


def test_gunicorn_hook_can_start_the_worker(
    app: Flask, state: AppState, site: Site, tmp_path: Path
) -> None:
    """With a gunicorn hook the worker runs before the first request."""
    (tmp_path / "gunicorn.conf.py").write_text(
        "def post_worker_init(worker):\n    worker.wsgi.extensions['bgjobs_worker'].start()\n"
    )
    master = site.run("-m", "gunicorn", "--bind", f"127.0.0.1:{site.port}", "site_app:create_app()")
    job = run_background_job("tests.jobs.process_id")
    assert job.wait(DEADLINE_SECONDS).result not in (master, None)


@pytest.mark.parametrize(
    "words", [["routes"], ["bgjobs", "list"], ["bgjobs", "enqueue", "tests.jobs.echo"]]
)
def test_other_commands_start_no_worker(
    app: Flask, state: AppState, site: Site, words: list[str]
) -> None:
    """Other ``flask`` commands start no worker, even if they enqueue a job."""
    site.run(*flask(*words))
    assert site.process is not None
    assert site.process.wait(DEADLINE_SECONDS) == 0
    assert worker_pids(state) == []


@pytest.mark.on(*KINDS)
def test_worker_command_starts_one_worker(app: Flask, state: AppState, site: Site) -> None:
    """``flask bgjobs worker`` starts one worker and not two if the app calls ``start_worker``."""
    pid = site.run(*flask("bgjobs", "worker", "--burst"))
    assert site.process is not None
    assert site.process.wait(DEADLINE_SECONDS) == 0
    assert worker_pids(state) == [pid]


@pytest.mark.on(*KINDS)
def test_worker_stops_with_the_server(
    app: Flask, state: AppState, site: Site, tmp_path: Path
) -> None:
    """When the server ends, the running job finishes within the grace period, the worker's row says
    stopped, and the scheduler submits nothing to executors that Python has already shut down."""
    site.run(*flask("run", "--port", str(site.port)))
    journal = tmp_path / "journal"
    job = run_background_job("tests.jobs.hold", parameters=[str(journal), 1.0])
    wait_until(journal.exists, "the start")
    site.stop()
    assert job.refresh().status == "completed"
    with state.store.read() as connection:
        assert connection.execute(sa.select(Worker.status)).scalars().all() == ["stopped"]
    assert "Error submitting" not in site.log.read_text()
