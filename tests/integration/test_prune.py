"""Pruning: deleted and kept jobs, and the steps of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import JobStatus, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue
from flask_bgjobs.models import Attempt, Job, JobLog, Worker
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState
from flask_bgjobs.worker.prune import Pruner
from flask_bgjobs.worker.registration import register
from tests.conftest import EXPORT, count_jobs

DAY = 86_400.0
RETENTION = {JobStatus.COMPLETED: 7 * DAY, JobStatus.FAILED: 30 * DAY, JobStatus.CANCELLED: None}


def add_finished(
    state: AppState, count: int, age: float, status: JobStatus = JobStatus.COMPLETED
) -> list[int]:
    """The ids of new jobs that finished ``age`` seconds ago by the database's clock."""
    jobs = enqueue(state, "tests.jobs.echo", None, [()] * count, JobOptions(), None)
    ids = [job.id for job in jobs]
    execute(
        state,
        sa.update(Job)
        .where(Job.id.in_(ids))
        .values(status=status.value, finished_at=state.store.after(sa.literal(-age))),
    )
    return ids


def execute(state: AppState, statement: Any) -> None:
    state.store.transaction(lambda connection: connection.execute(statement))


def hold(state: AppState, ids: list[int]) -> None:
    """Create rows of a host's table that refer to the jobs."""
    execute(state, sa.text(EXPORT))
    for job_id in ids:
        execute(state, sa.text(f"INSERT INTO export VALUES ({job_id})"))


def remaining_ids(state: AppState) -> list[int]:
    with state.store.read() as connection:
        return list(connection.scalars(sa.select(Job.id).order_by(Job.id)))


def test_each_status_has_its_retention(app: Flask, state: AppState) -> None:
    """Jobs are deleted after the retention of their status; ``None`` keeps them forever."""
    gone = add_finished(state, 2, 8 * DAY) + add_finished(state, 1, 31 * DAY, JobStatus.FAILED)
    kept = add_finished(state, 1, 6 * DAY) + add_finished(state, 1, 29 * DAY, JobStatus.FAILED)
    kept += add_finished(state, 1, 9_999 * DAY, JobStatus.CANCELLED)
    kept += [run_background_job("tests.jobs.echo").id]
    assert state.store.count_prunable(RETENTION) == len(gone)
    pruned = state.store.prune(RETENTION, 100)
    assert (pruned.deleted, pruned.held, pruned.cursor) == (3, 0, None)
    assert remaining_ids(state) == kept


def test_attempts_and_log_lines_are_deleted(app: Flask, state: AppState) -> None:
    """Pruning a job deletes its attempts and log lines, and no others."""
    old, young = add_finished(state, 1, 8 * DAY) + add_finished(state, 1, DAY)
    now = state.store.clock()
    for job_id in (old, young):
        common = {"job_id": job_id, "attempt": 1}
        execute(state, sa.insert(Attempt).values(**common, outcome="failed", finished_at=now))
        execute(state, sa.insert(JobLog).values(**common, created_at=now, message="x"))
    assert state.store.prune(RETENTION, 100).deleted == 1
    with state.store.read() as connection:
        for model in (Attempt, JobLog):
            assert connection.scalars(sa.select(model.job_id)).all() == [young]


def test_batches_respect_the_limit(app: Flask, state: AppState) -> None:
    """Batches of limited size delete the oldest jobs of each status first, until no job is left."""
    young, old = add_finished(state, 2, 8 * DAY), add_finished(state, 2, 9 * DAY)
    failed = add_finished(state, 1, 31 * DAY, JobStatus.FAILED)
    first = state.store.prune(RETENTION, 3)
    assert first.deleted == 3
    assert remaining_ids(state) == [young[1], *failed]
    assert not set(remaining_ids(state)) & set(old)
    second = state.store.prune(RETENTION, 3, first.cursor)
    assert (second.deleted, second.cursor) == (2, None)
    assert remaining_ids(state) == []


def test_referenced_jobs_are_counted_and_skipped(app: Flask, state: AppState) -> None:
    """Jobs with a foreign key of the host are kept; each batch begins after the previous one."""
    ids = add_finished(state, 6, 8 * DAY)
    hold(state, ids[:4])
    cursor, seen = None, []
    while not seen or cursor is not None:
        pruned = state.store.prune(RETENTION, 2, cursor)
        cursor = pruned.cursor
        seen.append((pruned.deleted, pruned.held))
    assert seen == [(0, 2), (0, 2), (2, 0), (0, 0)]
    assert remaining_ids(state) == ids[:4]


def test_failed_batch_deletes_nothing(app: Flask, state: AppState) -> None:
    """Jobs, attempts and log lines are deleted in one transaction."""
    add_finished(state, 3, 8 * DAY)
    execute(state, sa.text("DROP TABLE bgjobs_log"))
    with pytest.raises(sa.exc.DBAPIError):
        state.store.prune(RETENTION, 100)
    assert count_jobs(app) == 3


def test_pruner_steps(app: Flask, state: AppState) -> None:
    """A step deletes at most 500 jobs; ``False`` ends a pass, and the next pass resets the
    counts."""
    held = add_finished(state, 501, 8 * DAY)[:1]
    hold(state, held)
    pruner = Pruner(state.store, RETENTION)
    assert pruner.step() is True
    assert (pruner.deleted, pruner.held) == (499, 1)
    assert pruner.step() is False
    assert (pruner.deleted, pruner.held) == (500, 1)
    assert remaining_ids(state) == held
    add_finished(state, 2, 8 * DAY)
    assert pruner.step() is False
    assert (pruner.deleted, pruner.held) == (2, 1)


def test_old_worker_rows_are_deleted(app: Flask, state: AppState) -> None:
    """A pass deletes the rows of workers that stopped or died more than a week ago."""
    names = ["alive", "stopped", "dead", "stopped lately"]
    workers = {name: register(state, name) for name in names}
    for name, days in (("stopped", 8), ("dead", 8), ("stopped lately", 6)):
        ended = state.store.after(sa.literal(-days * DAY))
        values = {"status": name.split()[0], "stopped_at": ended, "heartbeat_at": ended}
        execute(state, sa.update(Worker).where(Worker.id == workers[name]).values(**values))
    assert Pruner(state.store, RETENTION).step() is False
    with state.store.read() as connection:
        found = connection.scalars(sa.select(Worker.name).order_by(Worker.id)).all()
    assert found == ["alive", "stopped lately"]
