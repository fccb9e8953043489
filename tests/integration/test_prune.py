"""Pruning: what goes, what stays, and how a pass goes on."""

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
from flask_bgjobs.worker.worker import register
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
    """Let rows of a host's table refer to jobs."""
    execute(state, sa.text(EXPORT))
    for job_id in ids:
        execute(state, sa.text(f"INSERT INTO export VALUES ({job_id})"))


def left(state: AppState) -> list[int]:
    with state.store.read() as connection:
        return list(connection.scalars(sa.select(Job.id).order_by(Job.id)))


def test_each_status_has_its_retention(app: Flask, state: AppState) -> None:
    """Jobs go when they are older than their status is kept; ``None`` keeps for ever."""
    gone = add_finished(state, 2, 8 * DAY) + add_finished(state, 1, 31 * DAY, JobStatus.FAILED)
    kept = add_finished(state, 1, 6 * DAY) + add_finished(state, 1, 29 * DAY, JobStatus.FAILED)
    kept += add_finished(state, 1, 9_999 * DAY, JobStatus.CANCELLED)
    kept += [run_background_job("tests.jobs.echo").id]
    assert state.store.count_prunable(RETENTION) == len(gone)
    pruned = state.store.prune(RETENTION, 100)
    assert (pruned.deleted, pruned.held, pruned.cursor) == (3, 0, None)
    assert left(state) == kept


def test_attempts_and_lines_go_along(app: Flask, state: AppState) -> None:
    """A job's attempts and log lines go with it, and those of others stay."""
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


def test_a_batch_is_no_larger_than_its_limit(app: Flask, state: AppState) -> None:
    """Batches follow each other through all statuses, oldest first, until nothing is left."""
    young, old = add_finished(state, 2, 8 * DAY), add_finished(state, 2, 9 * DAY)
    failed = add_finished(state, 1, 31 * DAY, JobStatus.FAILED)
    first = state.store.prune(RETENTION, 3)
    assert first.deleted == 3
    assert left(state) == [young[1], *failed]
    assert not set(left(state)) & set(old)
    second = state.store.prune(RETENTION, 3, first.cursor)
    assert (second.deleted, second.cursor) == (2, None)
    assert left(state) == []


def test_held_rows_are_counted_and_passed(app: Flask, state: AppState) -> None:
    """Rows that a host's foreign key holds stay; each batch begins behind those before it."""
    ids = add_finished(state, 6, 8 * DAY)
    hold(state, ids[:4])
    cursor, seen = None, []
    while not seen or cursor is not None:
        pruned = state.store.prune(RETENTION, 2, cursor)
        cursor = pruned.cursor
        seen.append((pruned.deleted, pruned.held))
    assert seen == [(0, 2), (0, 2), (2, 0), (0, 0)]
    assert left(state) == ids[:4]


def test_a_batch_that_fails_deletes_nothing(app: Flask, state: AppState) -> None:
    """Job, attempts and lines go in one transaction: a failure in between leaves them all."""
    add_finished(state, 3, 8 * DAY)
    execute(state, sa.text("DROP TABLE bgjobs_log"))
    with pytest.raises(sa.exc.DBAPIError):
        state.store.prune(RETENTION, 100)
    assert count_jobs(app) == 3


def test_the_pruner_goes_step_by_step(app: Flask, state: AppState) -> None:
    """A step deletes 500 at most; ``False`` ends a pass, and the next one counts anew."""
    held = add_finished(state, 501, 8 * DAY)[:1]
    hold(state, held)
    pruner = Pruner(state.store, RETENTION)
    assert pruner.step() is True
    assert (pruner.deleted, pruner.held) == (499, 1)
    assert pruner.step() is False
    assert (pruner.deleted, pruner.held) == (500, 1)
    assert left(state) == held
    add_finished(state, 2, 8 * DAY)
    assert pruner.step() is False
    assert (pruner.deleted, pruner.held) == (2, 1)


def test_workers_that_are_long_gone_go_too(app: Flask, state: AppState) -> None:
    """A pass ends with the rows of workers that stopped or died more than a week ago."""
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
