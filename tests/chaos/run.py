"""A run, from the empty database to the report."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from flask_bgjobs.state import state_of

from . import history
from .app import build_app
from .crew import Crew
from .database import Database, open_database
from .evidence import gather
from .faults import Faults
from .figures import figures
from .journal import Reader
from .load import Load, unfinished
from .report import Report
from .settings import Settings
from .verify import verify

_TICK_SECONDS = 0.05
_DRAIN_SECONDS = 120.0
"""For the jobs that are unfinished when chaos ends; a job takes two seconds at most."""
_POLL_SECONDS = 0.5
_PROGRESS_SECONDS = 10
_MAX_EXTENSION = 3.0
"""On a slow machine chaos continues up to this multiple of ``seconds`` to have enough faults."""


def run(
    name: str, *, seconds: float, seed: int, say: Callable[[str], object] = lambda _: None
) -> Report:
    """Run chaos once and return the report.

    :param name: the database: ``sqlite``, ``postgresql``, ``mysql`` or a URL.
    :param seconds: length of the chaos phase; the drain and the verification follow.
    :param seed: seed of all random choices.
    :param say: called with each line of progress.
    :raises CannotRun: if the database cannot be used.
    """
    database = open_database(name)
    settings = Settings(database.url, tempfile.mkdtemp(prefix="bgjobs-chaos-"), database.schema)
    try:
        report = _Run(settings, database, seconds, seed, say).report()
    except BaseException:
        shutil.rmtree(settings.folder)
        raise
    finally:
        database.close()
    if report.is_good:
        shutil.rmtree(settings.folder)
    else:
        report.write_evidence(Path(settings.folder) / "evidence")
        say(f"the history of each job and the workers' logs are kept in {settings.folder}")
    return report


class _Run:
    def __init__(
        self,
        settings: Settings,
        database: Database,
        seconds: float,
        seed: int,
        say: Callable[[str], object],
    ) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._seed = seed
        self._say = say
        self._app = build_app(settings)
        self._reader = Reader(settings.journal)
        self._crew = Crew(settings)
        self._load = Load(self._app, seed)
        self._faults = Faults(self._app, self._crew, database, seed, seconds)

    def report(self) -> Report:
        """Run all steps and clean up."""
        try:
            self._make_tables()
            self._run_chaos()
            self._drain()
            return self._judge()
        finally:
            self._faults.stop()
            self._load.stop()
            self._crew.end()
            _close(self._app)

    def _make_tables(self) -> None:
        with self._app.app_context():
            self._app.extensions["sqlalchemy"].create_all()
        history.install(self._app)

    def _run_chaos(self) -> None:
        """The chaos phase: jobs and faults together."""
        self._crew.replace_dead()
        self._load.start()
        self._faults.start()
        began, reported = time.monotonic(), 0
        for passed in self._ticks(_MAX_EXTENSION * self._seconds):
            self._raise_errors()
            if passed >= self._seconds and not self._faults.too_few():
                break
            if passed >= reported + _PROGRESS_SECONDS:
                reported += _PROGRESS_SECONDS
                self._say(f"{reported} s of chaos, {len(self._load.planned):,} enqueues")
        self._chaos_seconds = time.monotonic() - began
        self._faults.stop()
        self._load.stop()
        self._raise_errors()

    def _drain(self) -> None:
        """Let new workers finish the remaining jobs; only jobs still kill workers."""
        self._say("chaos has ended; new workers finish the remaining jobs")
        self._crew.dismiss()
        self._crew.replace_dead()
        checked_at = 0.0
        for passed in self._ticks(_DRAIN_SECONDS):
            if passed - checked_at > _POLL_SECONDS:
                checked_at = passed
                if self._is_drained():
                    break
        self._crew.dismiss()

    def _is_drained(self) -> bool:
        try:
            return not unfinished(self._app)
        except SQLAlchemyError:
            # A fault has ended this pooled connection.
            return False

    def _ticks(self, seconds: float) -> Iterator[float]:
        """Yield the elapsed seconds repeatedly, and replace dead workers meanwhile."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            self._crew.replace_dead()
            yield passed
            time.sleep(_TICK_SECONDS)

    def _raise_errors(self) -> None:
        for error in [*self._faults.errors, *self._load.errors]:
            raise error

    def _judge(self) -> Report:
        evidence = gather(self._app, self._load.planned, self._reader, self._crew.deaths)
        faults = dict(self._faults.counts)
        killed_by_jobs = len(self._crew.deaths) - faults["workers killed"]
        return Report(
            seed=self._seed,
            seconds=self._chaos_seconds,
            wall_seconds=time.monotonic() - self._began,
            database=state_of(self._app).store.host_engine.url.render_as_string(),
            figures=figures(evidence),
            cancels=self._load.cancels,
            workers=self._crew.started,
            workers_killed_by_jobs=max(0, killed_by_jobs),
            late_outcomes=self._crew.count_in_logs("Lease lost | Job"),
            faults=faults,
            violations=verify(evidence),
            too_few=self._faults.too_few(),
            badly_ended=self._crew.badly_ended,
            evidence=evidence,
        )


def _close(app: Flask) -> None:
    engines: Any
    with app.app_context():
        engines = app.extensions["sqlalchemy"].engines
    for engine in engines.values():
        try:
            engine.dispose()
        except SQLAlchemyError:
            continue
    state_of(app).store.dispose()
