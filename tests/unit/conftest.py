"""Fixtures for the unit tests; none of them needs a database server or a process."""

from __future__ import annotations

import itertools
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import HealthCheck, settings

from flask_bgjobs import BgJobs
from flask_bgjobs.execution.current import CurrentJob
from flask_bgjobs.execution.execute import execute
from flask_bgjobs.execution.interrupt import InterruptScope
from flask_bgjobs.job.records import Outcome
from flask_bgjobs.state import AppState, state_of
from tests.unit.helpers import make_spec

# No deadline, because the machine may be busy. Hypothesis prints a failing example, so no
# database of examples is needed.
settings.register_profile(
    "unit",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")

_numbers = itertools.count(1)

Attempt = Callable[..., Outcome]
MakeModule = Callable[[str], str]


@pytest.fixture
def database() -> SQLAlchemy:
    """The host app's Flask-SQLAlchemy extension."""
    return SQLAlchemy()


@pytest.fixture
def host(database: SQLAlchemy) -> Flask:
    """A host app without a pushed context; unit tests do not need its tables."""
    host = Flask("shop")
    host.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    host.config["BGJOBS_DASHBOARD"] = False
    database.init_app(host)
    return host


@pytest.fixture
def bgjobs(host: Flask) -> Iterator[BgJobs]:
    """The extension, set up for ``host``; its connections are closed after the test."""
    yield BgJobs(host)
    state_of(host).store.dispose()
    state_of(host).store.host_engine.dispose()


@pytest.fixture
def state(host: Flask, bgjobs: BgJobs) -> AppState:
    """The extension's state for ``host``."""
    return state_of(host)


@pytest.fixture
def attempt(bgjobs: BgJobs, state: AppState) -> Attempt:
    """Runs one attempt of a function as a job, and returns the outcome."""

    def run(
        function: Callable[..., Any],
        parameters: Any = (),
        *,
        scope: InterruptScope | None = None,
        **changes: Any,
    ) -> Outcome:
        name = f"unit.job{next(_numbers)}"
        bgjobs.job(name=name)(function)
        stored = parameters if isinstance(parameters, dict) else list(parameters)
        spec = make_spec(target=name, parameters=stored, **changes)
        job = CurrentJob(spec, max_payload=state.config.max_payload)
        outcome = execute(state, spec, job, scope or InterruptScope(), time.monotonic())
        job.report_failure()
        return outcome

    return run


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeModule]:
    """Writes a module that tests can import; ``was_imported`` tells whether it was imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    mark = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"

    def make(source: str) -> str:
        name = f"unit_module_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(mark + textwrap.dedent(source), encoding="utf-8")
        return name

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("unit_module_"):
            del sys.modules[name]


@pytest.fixture
def was_imported(tmp_path: Path) -> Callable[[str], bool]:
    """Whether a module written by ``make_module`` has been imported."""
    return lambda name: (tmp_path / f"{name}.imported").exists()
