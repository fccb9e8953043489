"""Real workers as processes of their own, on a SQLite file that the test shares with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flask_bgjobs.app_state import state_of
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, wait_until

_SHOWN_CHARACTERS = 10_000
"""Of each log."""

HOST = """
import json, os
from tests.apps import build_app
def create_app():
    return build_app({url!r}, **json.loads(os.environ["TEST_CONFIG"]))
"""


class Workers:
    """Starts workers, and ends those that are left."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        (folder / "host.py").write_text(HOST.format(url=url))
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *options: str, **config: object) -> subprocess.Popen[str]:
        """A worker process of an app with ``config``, once it says that it has started."""
        log = self._folder / f"worker-{len(self._started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flask", "--app", "host", "bgjobs", "worker", *options],
                cwd=self._folder,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{self._folder}{os.pathsep}{Path.cwd()}",
                    "TEST_CONFIG": json.dumps(config),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self._started.append(process)
        process.log = log  # type: ignore[attr-defined]  # for the test to read
        wait_until(
            lambda: "Worker started" in log.read_text() or process.poll() is not None,
            "the worker",
        )
        return process

    def end(self) -> None:
        """End what is left, and show the logs where the test has failed."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE_SECONDS)
            log: Path = process.log  # type: ignore[attr-defined]
            print(f"--- {log.name}", log.read_text()[-_SHOWN_CHARACTERS:], sep="\n")


@pytest.fixture
def app(database_url: str) -> Iterator[object]:
    """The app in this process; its context is pushed by pytest-flask."""
    app = build_app(database_url)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
    yield app
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A file outside the database in which jobs note that they ran."""
    return tmp_path / "journal"


@pytest.fixture
def start_worker(
    tmp_path: Path, app: object, database_url: str
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``flask bgjobs worker`` with the options and the configuration given."""
    workers = Workers(tmp_path, database_url)
    yield workers.start
    workers.end()
