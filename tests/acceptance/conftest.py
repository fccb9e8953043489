"""Real workers in separate processes, on a database that the test shares with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from flask_bgjobs.state import state_of
from tests.apps import build_app, create_tables
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.preloaded import preloaded_interpreter

_SHOWN_CHARACTERS = 10_000
"""How much of the end of each log is printed."""

HOST = """
import json, os
from tests.apps import build_app
def create_app():
    return build_app({url!r}, **json.loads(os.environ["TEST_CONFIG"]))
"""


class Workers:
    """Starts workers, and kills those that are left after the test."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        (folder / "host.py").write_text(HOST.format(url=url))
        self._started: list[Any] = []

    def start(self, *options: str, **config: object) -> Any:
        """Start a worker of an app with ``config``, and wait until it has logged its start."""
        log = self._folder / f"worker-{len(self._started)}.log"
        arguments = ["--app", "host", "bgjobs", "worker", *options]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self._folder}{os.pathsep}{Path.cwd()}",
            "TEST_CONFIG": json.dumps(config),
        }
        with log.open("w") as output:
            spares = _interpreters_started_by(options, config)
            process = self._run_flask(arguments, environment, output, spares)
        self._started.append(process)
        process.log = log
        wait_until(
            lambda: "Worker started" in log.read_text() or process.poll() is not None,
            "the worker",
        )
        return process

    def _run_flask(
        self,
        arguments: list[str],
        environment: dict[str, str],
        output: IO[str],
        spares: int,
    ) -> Any:
        if not (self._folder / "sitecustomize.py").exists():
            return preloaded_interpreter().start_module(
                "flask",
                arguments,
                folder=self._folder,
                environment=environment,
                output=output,
                spares=spares,
            )
        # Only a new interpreter imports sitecustomize.
        return subprocess.Popen(
            [sys.executable, "-m", "flask", *arguments],
            cwd=self._folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def end(self) -> None:
        """Kill the remaining workers, and print the logs, which pytest shows if the test failed."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE_SECONDS)
            log: Path = process.log
            print(f"--- {log.name}", log.read_text()[-_SHOWN_CHARACTERS:], sep="\n")


def _interpreters_started_by(options: Sequence[str], config: Mapping[str, object]) -> int:
    """The number of interpreters that a worker is sure to start."""
    if "--reload" in options:
        return 0
    if "--processes" in options:
        return int(options[options.index("--processes") + 1])
    return int("process" in (*options, config.get("BGJOBS_POOL")) or "BGJOBS_QUEUE_POOLS" in config)


@pytest.fixture
def app(database_url: str) -> Iterator[object]:
    """The app in this process; pytest-flask pushes its context."""
    app = build_app(database_url)
    create_tables(app)
    yield app
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A file outside the database in which jobs record their runs."""
    return tmp_path / "journal"


@pytest.fixture
def start_worker(tmp_path: Path, app: object, database_url: str) -> Iterator[Callable[..., Any]]:
    """Starts ``flask bgjobs worker`` with options and configuration."""
    workers = Workers(tmp_path, database_url)
    yield workers.start
    workers.end()


SLEEP_BY_SELECT = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds)
"""
"""Every Python process with a faked clock imports this: libfaketime 0.9.10 breaks the system call
of ``time.sleep``, which is ``clock_nanosleep`` with a monotonic time."""


class WallClock:
    """A fake wall clock for processes that are started with its :meth:`environment`."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file, self._library = file, library
        self.jump_to(0)

    def jump_to(self, seconds: float) -> None:
        """Set how many seconds the clock is ahead of the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+g}")
        new.replace(self._file)

    def environment(self) -> dict[str, str]:
        """The environment of a process that reads this clock."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@pytest.fixture
def make_clock(tmp_path: Path) -> Callable[[str], WallClock]:
    """Creates wall clocks by name."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        reason = "libfaketime is not installed (apt-get install faketime)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "sitecustomize.py").write_text(SLEEP_BY_SELECT)
    return lambda name: WallClock(tmp_path / name, library)


@pytest.fixture
def clock(make_clock: Callable[[str], WallClock]) -> WallClock:
    """A fake wall clock."""
    return make_clock("clock")


@pytest.fixture
def start_with(
    start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Starts a worker with the given wall clock."""

    def start(clock: WallClock, *options: str, **config: object) -> Any:
        with monkeypatch.context() as patch:
            for name, value in clock.environment().items():
                patch.setenv(name, value)
            return start_worker(*options, **config)

    return start
