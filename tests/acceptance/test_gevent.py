"""gevent: web processes that serve requests in greenlets, and workers that refuse to start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask import Flask

from flask_bgjobs.state import AppState
from tests.conftest import DEADLINE_SECONDS, count_jobs, wait_until

pytestmark = pytest.mark.acceptance

SITE = """
{head}
import threading
from flask_bgjobs import BgJobs, run_background_job
from tests.apps import build_app

def create_app():
    app = build_app(
        {url!r},
        BGJOBS_POOL={pool!r},
        BGJOBS_APP="greenlet_site:create_app",
        BGJOBS_DASHBOARD=True,
    )
    {start}

    @app.post("/")
    def enqueue():
        return {{"job": run_background_job("tests.jobs.echo").id}}

    return app
"""
CONCURRENT_REQUESTS = 30


class Site:
    """An app served by gunicorn's gevent workers."""

    def __init__(self, folder: Path, url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._url = url
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / "site.log"

    def write(self, *, head: str = "", pool: str = "thread", start: str = "") -> None:
        text = SITE.format(url=self._url, head=head, pool=pool, start=start)
        (self._folder / "greenlet_site.py").write_text(text)

    def serve(self, *options: str) -> None:
        self.run(
            "gunicorn", "--worker-class", "gevent", "--bind", f"127.0.0.1:{self.port}", *options,
            "greenlet_site:create_app()",
        )  # fmt: skip

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": f"{self._folder}{os.pathsep}{Path.cwd()}"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._process

    def ask(self, path: str, data: bytes | None = None) -> int:
        """The status of the answer, or 0 without an answer."""
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, data, timeout=DEADLINE_SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def ask_concurrently(self, path: str, data: bytes | None = None) -> set[int]:
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as executor:
            return set(executor.map(lambda _: self.ask(path, data), range(CONCURRENT_REQUESTS)))

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self.log.exists():
            print(self.log.read_text())


@pytest.fixture
def site(tmp_path: Path, app: Flask, database_url: str) -> Iterator[Site]:
    pytest.importorskip("gevent")
    site = Site(tmp_path, database_url)
    yield site
    site.end()


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_concurrent_requests_in_greenlets_are_answered(
    site: Site, state: AppState, preload: bool
) -> None:
    """Concurrent requests are answered, even if gevent patches a process that has already built the
    app."""
    site.write()
    site.serve(*(["--preload"] if preload else []))
    wait_until(lambda: site.ask("/nothing") == 404, "the server")
    assert site.ask_concurrently("/jobs/healthz") == {503}
    assert "no worker is alive" not in site.log.read_text()
    assert site.ask_concurrently("/", b"") == {200}
    assert count_jobs(state.app) == CONCURRENT_REQUESTS


@pytest.mark.on("sqlite")
def test_gevent_server_refuses_a_worker_and_serves_requests(site: Site, state: AppState) -> None:
    """If the server patches threads after ``start_worker``, the worker does not start, the log says
    once what to run instead, and requests are answered."""
    site.write(start="BgJobs().start_worker(app)")
    site.serve("--preload")
    wait_until(lambda: site.ask("/nothing") == 404, "the server")
    assert site.ask_concurrently("/", b"") == {200}
    assert site.log.read_text().count("run `flask bgjobs worker` as a separate process") == 1
    assert site.ask("/jobs/healthz") == 503


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("pool", ["thread", "process"])
def test_worker_with_patched_threads_is_refused(site: Site, pool: str, app: Flask) -> None:
    """A worker whose app patches threads exits with one sentence that says what to change."""
    site.write(head="from gevent import monkey; monkey.patch_all()", pool=pool)
    worker = site.run("flask", "--app", "greenlet_site:create_app", "bgjobs", "worker", "--burst")
    assert worker.wait(DEADLINE_SECONDS) == 1
    log = site.log.read_text()
    assert "gevent has patched the threads of this process" in log
    assert "Traceback" not in log
