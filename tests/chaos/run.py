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
"""For what is left when chaos ends; jobs take two seconds at most."""
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 10
_LONGEST = 3.0
"""Times as long as asked for: so long chaos goes on where a slow machine had too few faults."""


def run(
    name: str, *, seconds: float, seed: int, say: Callable[[str], object] = lambda _: None
) -> Report:
    """The report of one run.

    :param name: of the database: ``sqlite``, ``postgresql``, ``mysql`` or a URL.
    :param seconds: of chaos; the drain and the verification come after.
    :param seed: of all that is drawn at random.
    :param say: told what is going on.
    :raises CannotRun: when the database cannot be used.
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
        """Do it all."""
        try:
            self._make_tables()
            self._rage()
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

    def _rage(self) -> None:
        """Chaos: jobs and faults all the time."""
        self._crew.replace_dead()
        self._load.start()
        self._faults.start()
        began, said = time.monotonic(), 0
        for passed in self._ticks(_LONGEST * self._seconds):
            self._raise_errors()
            if passed >= self._seconds and not self._faults.too_few():
                break
            if passed >= said + _SAY_SECONDS:
                said += _SAY_SECONDS
                self._say(f"{said} s of chaos, {len(self._load.planned):,} enqueues")
        self._raged = time.monotonic() - began
        self._faults.stop()
        self._load.stop()
        self._raise_errors()

    def _drain(self) -> None:
        """Let fresh workers do what is left; only jobs still kill them."""
        self._say("chaos is over, fresh workers do what is left")
        self._crew.dismiss()
        self._crew.replace_dead()
        looked = 0.0
        for passed in self._ticks(_DRAIN_SECONDS):
            if passed - looked > _LOOK_SECONDS:
                looked = passed
                if self._is_drained():
                    break
        self._crew.dismiss()

    def _is_drained(self) -> bool:
        try:
            return not unfinished(self._app)
        except SQLAlchemyError:
            # A connection of the pool that a fault has ended.
            return False

    def _ticks(self, seconds: float) -> Iterator[float]:
        """Seconds that have passed, again and again; dead workers are replaced meanwhile."""
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
            seconds=self._raged,
            wall_seconds=time.monotonic() - self._began,
            database=state_of(self._app).store.host_engine.url.render_as_string(),
            figures=figures(evidence),
            cancels=self._load.cancels,
            workers=self._crew.hired,
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
