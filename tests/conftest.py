"""Fixtures: an app on a real database for each test; and helpers that wait for a condition."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import Store
from tests import databases
from tests.apps import build_app, create_tables
from tests.prepared_databases import PreparedDatabases

EXPORT = "CREATE TABLE export (job_id BIGINT, FOREIGN KEY (job_id) REFERENCES bgjobs_job(id))"
"""Creates a table of the host whose foreign key refers to jobs."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.01, 0.1
"""The first and the longest pause between two checks of a condition."""
DEADLINE_SECONDS = 60.0
"""How long a test waits for a condition that must come true, even on a slow, busy machine."""


_JINJA_OPTIONS = (
    "finalize",
    "undefined",
    "optimized",
    "trim_blocks",
    "lstrip_blocks",
    "newline_sequence",
    "keep_trailing_newline",
    "line_statement_prefix",
    "line_comment_prefix",
    *(
        f"{kind}_{end}_string"
        for kind in ("block", "variable", "comment")
        for end in ("start", "end")
    ),
)
"""The options of a Jinja environment that affect the compiled code of a template."""


def wait_until(
    condition: Callable[[], Any], what: str = "the condition", seconds: float = DEADLINE_SECONDS
) -> Any:
    """Wait for the first true value of ``condition``; on failure, says ``what`` did not happen."""
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(pause)
        # Check less often over time: the processes under test need the processors.
        pause = min(1.2 * pause, _LAST_PAUSE_SECONDS)
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Find out once per run which database servers are missing; xdist workers get the result."""
    # A shell starts background commands with SIGINT ignored. Programs that tests stop with SIGINT
    # would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        config.missing_servers = config.workerinput["missing_servers"]  # type: ignore[attr-defined]
        return
    config.missing_servers = missing = databases.missing_servers()  # type: ignore[attr-defined]
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(*missing.values())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send the list of missing servers to an xdist worker."""
    node.workerinput["missing_servers"] = node.config.missing_servers


def pytest_report_header(config: Any) -> list[str]:
    """Report each missing server in one line."""
    return [f"{sentence}; its tests are skipped" for sentence in config.missing_servers.values()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each xdist process an equal share of the acceptance tests and slow tests, to run first.

    Acceptance tests take most of the time but little processor time, because they wait for other
    processes. Each xdist process gets a part of the list, and steals tests from the others when it
    has finished its own. A slow test that starts last would run alone.
    """
    parts = [_Part() for _ in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))]
    groups = itertools.groupby(items, lambda item: item.path)
    modules = {path: list(tests) for path, tests in groups}
    slow = [path for path in modules if path.parent.name == "acceptance"]
    # Distribute the large modules first, so that the small ones can balance the parts.
    for path in sorted(slow, key=lambda path: (-len(modules[path]), path)):
        min(parts, key=lambda part: len(part.slow)).slow += modules.pop(path)
    rest = list(itertools.chain.from_iterable(modules.values()))
    for item in filter(_is_slow, rest):
        min(parts, key=lambda part: len(part.slow)).slow.append(item)
    rest = list(itertools.filterfalse(_is_slow, rest))
    share = len(items) // len(parts)
    for part in parts:
        number = max(0, share - len(part.slow))
        part.quick, rest = rest[:number], rest[number:]
    items[:] = [*itertools.chain.from_iterable((*p.slow, *p.quick) for p in parts), *rest]


def pytest_collection_finish() -> None:
    """Keep modules and tests out of garbage collections: `make quick` takes about 4 % less time."""
    gc.collect()
    gc.freeze()


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@dataclasses.dataclass
class _Part:
    slow: list[pytest.Item] = dataclasses.field(default_factory=list)
    quick: list[pytest.Item] = dataclasses.field(default_factory=list)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses ``database_kind`` on the databases in its ``on`` mark, or on all."""
    if "database_kind" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("on")
        kinds = mark.args if mark else databases.KINDS
        missing = metafunc.config.missing_servers  # type: ignore[attr-defined]
        metafunc.parametrize("database_kind", [kind for kind in kinds if kind not in missing])


@pytest.fixture(scope="session", autouse=True)
def _templates_compiled_once() -> Iterator[None]:
    """Compile each template once for all apps of this test process: most tests create an app, and
    compiling the templates of a page takes ten times as long as rendering it."""
    compile_template, compiled = jinja2.Environment.compile, {}

    def compile_once(
        environment: jinja2.Environment, source: Any, name: Any = None, *args: Any
    ) -> Any:
        escapes = environment.autoescape
        escapes = escapes(name) if callable(escapes) else escapes
        options = [getattr(environment, option) for option in _JINJA_OPTIONS]
        key = (source, name, args, escapes, *options, *sorted(environment.extensions))
        if key not in compiled:
            compiled[key] = compile_template(environment, source, name, *args)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", compile_once)
        yield


@pytest.fixture(scope="session")
def prepared_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedDatabases]:
    """The databases of this test process that already have the tables."""
    prepared = PreparedDatabases(tmp_path_factory.mktemp("databases"))
    yield prepared
    prepared.close()


@pytest.fixture
def database_url(
    database_kind: str, tmp_path: Path, prepared_databases: PreparedDatabases
) -> Iterator[str]:
    """The URL of the test's own database, with empty tables."""
    with prepared_databases.use(database_kind, tmp_path) as url:
        yield url


@pytest.fixture
def empty_database_url(database_kind: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the test's own database, without tables."""
    with databases.new_database(database_kind, tmp_path) as url:
        yield url


@pytest.fixture
def make_app(database_url: str) -> Iterator[Callable[..., Flask]]:
    """Creates apps on the test's database, with tables, and closes their connections afterwards."""
    apps: list[Flask] = []

    def make(**config: Any) -> Flask:
        app = build_app(config.pop("database_url", database_url), **config)
        create_tables(app)
        apps.append(app)
        return app

    yield make
    for app in apps:
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()
        state_of(app).store.dispose()


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app; pytest-flask pushes its context for the test."""
    return make_app()


@pytest.fixture
def state(app: Flask) -> AppState:
    """The state of flask-bgjobs for the app."""
    return state_of(app)


@pytest.fixture
def store(state: AppState) -> Store:
    """The store of the app."""
    return state.store


@pytest.fixture
def run(app: Flask) -> Any:
    """Runs a ``flask bgjobs`` command in its own app context, and checks the exit code."""

    def invoke(*words: str, code: int = 0, answer: str | None = None) -> str:
        result = app.test_cli_runner().invoke(args=["bgjobs", *words], input=answer)
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def stored(app: Flask, job: Job | int) -> Job:
    """The job as stored in the database."""
    found = state_of(app).store.get(job if isinstance(job, int) else job.id)
    assert found is not None
    return found


def count_jobs(app: Flask) -> int:
    """The number of job rows."""
    with state_of(app).store.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM bgjobs_job").scalar() or 0)
