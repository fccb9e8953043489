"""The evidence: the planned jobs, the runs in the journal, and the final state of the database."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.state import state_of

from . import history
from .app import table
from .crew import Death
from .history import Change
from .journal import Note, Reader, Run
from .plan import Planned

CRASHED = OutcomeKind.CRASHED.value
LOST = (OutcomeKind.LOST.value, OutcomeKind.LOST_AMONG.value)
_CLOCK_STEP_SECONDS = 0.002
"""SQLite's clock has a resolution of one millisecond."""
_AT_ONCE = 500


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The input of the verification, read once after the last worker has ended."""

    planned: Mapping[int, Planned]
    """By token."""
    jobs: Mapping[int, Job]
    """The rows, by id."""
    history: Mapping[int, Sequence[Change]]
    runs: Mapping[tuple[int, int], Sequence[Run]]
    """By job id and attempt."""
    starts: Mapping[int, Sequence[Note]]
    orders: frozenset[int]
    """The tokens that have a row in the host's own table."""
    failures: Mapping[int, Sequence[tuple[int, str, str]]]
    """Attempt, outcome and error of each attempt that did not complete, by job id."""
    seats: Sequence[int]
    """The job of each seat that is left."""
    deaths: Sequence[tuple[Death, frozenset[int]]]
    """The killed workers, each with its ids in the database."""
    clock_offset: float
    """Seconds to add to the machine's time to get the database's time."""
    clock_slack: float
    """The largest error of ``clock_offset``, in seconds."""

    def by_token(self) -> dict[int, list[Job]]:
        """The rows of each token; more than one is a violation."""
        found: dict[int, list[Job]] = collections.defaultdict(list)
        for job in self.jobs.values():
            found[int(job.owner or 0)].append(job)
        return found

    def planned_of(self, job: Job) -> Planned:
        """The plan for this job."""
        return self.planned[int(job.owner or 0)]

    def describe_job(self, job_id: int) -> list[str]:
        """The readable history of a job, line by line."""
        job = self.jobs.get(job_id)
        lines = [f"job {job_id}"]
        if job is not None:
            planned = self.planned_of(job)
            lines[0] += (
                f": token {planned.token}, {planned.kind.name}, {planned.how}, {planned.result}"
                f"{', cancel asked' if planned.cancel_asked else ''}; {job.status}, "
                f"retries {job.retry_count}/{job.retries}, crashes {job.crash_count}"
                f"{f', {job.error}' if job.error else ''}"
            )
        events = [(change.at, str(change)) for change in self.history.get(job_id, ())]
        for start in self.starts.get(job_id, ()):
            at = start.at + self.clock_offset
            ends = [run.ended for run in self.runs[job_id, start.attempt] if run.start is start]
            ended = ends[0] or "never ended"
            events.append((at, f"{at:.3f} ran attempt {start.attempt} in {start.pid}: {ended}"))
        failures = [
            f"attempt {attempt}: {outcome}: {error}"
            for attempt, outcome, error in self.failures.get(job_id, ())
        ]
        return [*lines, *(text for _, text in sorted(events)), *failures]


def gather(
    app: Flask, planned: Mapping[int, Planned], reader: Reader, deaths: Iterable[Death]
) -> Evidence:
    """Read the evidence from the database and the journal."""
    store = state_of(app).store
    reader.read()
    orders, attempts = table(app, "chaos_order"), table(app, "bgjobs_attempt")
    workers = table(app, "bgjobs_worker")
    failures: dict[int, list[tuple[int, str, str]]] = collections.defaultdict(list)
    ids_of: dict[str, set[int]] = collections.defaultdict(set)
    with store.host_engine.connect() as connection:
        for row in connection.execute(sa.select(attempts).order_by(attempts.c.id)):
            failures[row.job_id].append((row.attempt, row.outcome, row.error or ""))
        for row in connection.execute(sa.select(workers.c.id, workers.c.name)):
            ids_of[row.name].add(row.id)
        seats = connection.scalars(sa.select(table(app, "bgjobs_seat").c.job_id)).all()
        tokens = frozenset(connection.scalars(sa.select(orders.c.token)))
    offset, slack = _compare_clocks(app)
    return Evidence(
        planned=planned,
        jobs={job.id: job for job in _all_jobs(app)},
        history=history.read(app),
        runs=reader.runs,
        starts=reader.starts(),
        orders=tokens,
        failures=failures,
        seats=seats,
        deaths=[(death, frozenset(ids_of[death.worker])) for death in deaths],
        clock_offset=offset,
        clock_slack=slack,
    )


def _all_jobs(app: Flask) -> list[Job]:
    store: Any = state_of(app).store
    jobs = table(app, "bgjobs_job")
    with store.host_engine.connect() as connection:
        ids = list(connection.scalars(sa.select(jobs.c.id)))
    return [
        job
        for first in range(0, len(ids), _AT_ONCE)
        for job in store.get_many(ids[first : first + _AT_ONCE])
    ]


def _compare_clocks(app: Flask) -> tuple[float, float]:
    store = state_of(app).store
    before = time.time()
    shown = store.clock().replace(tzinfo=dt.UTC).timestamp()
    after = time.time()
    return shown - (before + after) / 2, (after - before) / 2 + _CLOCK_STEP_SECONDS
