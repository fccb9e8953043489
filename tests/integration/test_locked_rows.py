"""Rows that another transaction has locked: statements skip them, and try again later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.job.records import JobSpec, Outcome, Report
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import Attempt, JobLog
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Store
from flask_bgjobs.worker.outbox import Outbox
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.rescue import Sweeper
from tests.conftest import EXPORT, stored, wait_until
from tests.integration.test_worker import rows, running_worker

# SQLite locks the whole file and has no row locks.
pytestmark = pytest.mark.on("postgresql", "mysql")


class Lock(Protocol):
    def __call__(self, *ids: int) -> AbstractContextManager[object]: ...


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


@pytest.fixture
def locked(state: AppState) -> Lock:
    """Locks the rows of jobs, as a transaction of the host would."""

    @contextlib.contextmanager
    def lock(*ids: int) -> Iterator[None]:
        with state.store.host_engine.connect() as connection, connection.begin():
            connection.execute(sa.select(Job.id).where(Job.id.in_(ids)).with_for_update())
            yield

    return lock


@pytest.fixture
def store(state: AppState) -> Iterator[Store]:
    """The store with a deadline, as a worker uses it."""
    worker_store = state.store.with_deadline(60.0)
    yield worker_store
    worker_store.dispose()


def claim(store: Store, worker: int, number: int) -> list[JobSpec]:
    for _ in range(number):
        run_background_job("tests.jobs.echo", retries=1)
    return store.claim(worker, number)


def outcome(spec: JobSpec, kind: OutcomeKind = OutcomeKind.COMPLETED, **more: Any) -> Outcome:
    return Outcome(spec.id, spec.attempt, kind, wait_seconds=0.0, **more)


@pytest.mark.parametrize("kind", [OutcomeKind.COMPLETED, OutcomeKind.FAILED])
def test_outcomes_of_locked_jobs_are_recorded_later(
    app: Flask,
    state: AppState,
    store: Store,
    worker: int,
    locked: Lock,
    monkeypatch: pytest.MonkeyPatch,
    kind: OutcomeKind,
) -> None:
    """A settle records the outcomes of unlocked jobs, does not take a locked row for a lost lease,
    and records its outcome later."""
    monkeypatch.setattr("flask_bgjobs.worker.outbox._LOCKED_PAUSE_SECONDS", 0.0)
    specs = claim(store, worker, 3)
    outbox = Outbox(store)
    for spec in specs:
        outbox.put(spec, outcome(spec, kind))
    after = "completed" if kind is OutcomeKind.COMPLETED else "retrying"

    def record() -> list[tuple[int, str | None]]:
        return [(settled.job_id, settled.status) for settled in outbox.record(worker, "one")]

    with locked(specs[1].id):
        assert record() == [(specs[0].id, after), (specs[2].id, after)]
        assert (len(outbox), outbox.unlocked) == (1, 0)
        assert record() == []
        assert stored(app, specs[1].id).status == "running"
    assert record() == [(specs[1].id, after)]
    assert len(outbox) == 0
    assert len(rows(state, Attempt)) == (0 if kind is OutcomeKind.COMPLETED else 3)


def test_lost_lease_and_locked_row_are_distinguished(
    store: Store, worker: int, locked: Lock
) -> None:
    """A settle reports a job of another attempt as lost, and leaves out a locked job of the same
    batch."""
    lost, kept = claim(store, worker, 2)
    store.settle(worker, "one", [(lost, outcome(lost, OutcomeKind.GIVEN_BACK))])
    with locked(kept.id):
        for record in (
            lambda batch: store.complete(worker, batch),
            lambda batch: store.settle(worker, "one", batch),
        ):
            (settled,) = record([(spec, outcome(spec)) for spec in (lost, kept)])
            assert (settled.job_id, settled.status) == (lost.id, None)


def test_reports_of_locked_jobs_are_written_later(
    app: Flask, state: AppState, store: Store, worker: int, locked: Lock
) -> None:
    """Starts and reports of locked jobs are kept for later; those of other jobs are written."""
    first, second = claim(store, worker, 2)
    reports = {spec.key: Report(progress=0.5, lines=("a line",)) for spec in (first, second)}
    with locked(first.id):
        assert store.mark_started(worker, [first, second]) == ({second.id}, {first.id})
        view = store.observe(worker, reports)
        assert view.attempts == {first.id: 1, second.id: 1}
        assert list(reports) == [first.key]
        assert stored(app, second.id).progress == 0.5
    assert store.mark_started(worker, [first]) == ({first.id}, set())
    store.observe(worker, reports)
    assert reports == {}
    assert [line.job_id for line in rows(state, JobLog)] == [second.id, first.id]


@pytest.mark.on("sqlite", "postgresql", "mysql")
def test_refused_report_does_not_block_others(
    app: Flask, store: Store, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that the database refuses is dropped, and the reports of other jobs are written."""
    first, second = claim(store, worker, 2)
    write_lines = type(store).write_lines

    def refuse(self: Store, connection: Any, job_id: int, *rest: Any) -> None:
        if job_id == first.id:
            raise sa.exc.DataError("insert", None, Exception("too large"))
        write_lines(self, connection, job_id, *rest)

    monkeypatch.setattr(type(store), "write_lines", refuse)
    reports = {spec.key: Report(progress=0.5, lines=("a line",)) for spec in (first, second)}
    store.observe(worker, reports)
    assert reports == {}
    assert [stored(app, spec.id).progress for spec in (first, second)] == [None, 0.5]


def test_rescue_leaves_locked_jobs_to_a_later_sweep(
    app: Flask, state: AppState, store: Store, worker: int, locked: Lock
) -> None:
    """If a dead worker's session still locks a job, its other jobs are rescued at once, and the
    locked job by a later sweep."""
    first, second = claim(store, worker, 2)
    sweeper = Sweeper(store, lease=3600)
    with locked(first.id):
        assert [s.job_id for s in store.rescue(worker, 0) or ()] == [second.id]
        assert sweeper.sweep(0) == []
        assert stored(app, first.id).status == "running"
    assert [(s.job_id, s.status) for s in sweeper.sweep(0)] == [(first.id, "pending")]


def test_sweep_does_not_wait_for_locked_worker_row(
    state: AppState, store: Store, worker: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that died during a claim is rescued by the first sweep after its session has
    ended."""
    claim(store, worker, 1)
    sweeper = Sweeper(store, lease=0.0)
    with state.store.host_engine.connect() as connection, connection.begin():
        worker_row = sa.select(WorkerRow.name).where(WorkerRow.id == worker)
        connection.execute(worker_row.with_for_update(read=True))
        assert sweeper.sweep(0) == []
        assert "Worker dead" not in caplog.text
    assert [settled.status for settled in sweeper.sweep(0)] == ["pending"]


def test_cancel_skips_and_reports_locked_jobs(app: Flask, state: AppState, locked: Lock) -> None:
    """Cancelling many jobs skips a locked one and gives the reason, instead of waiting for the
    lock."""
    ids = [run_background_job("tests.jobs.echo").id for _ in range(3)]
    with locked(ids[1]):
        result = state.store.cancel([*ids, ids[-1] + 1])
    assert result.done == [ids[0], ids[2]]
    assert result.skipped == {
        ids[1]: "another transaction has locked it",
        ids[-1] + 1: "it does not exist",
    }
    assert stored(app, ids[1]).status == "pending"


def test_pruning_skips_locked_jobs(store: Store, worker: int, locked: Lock) -> None:
    """Pruning leaves a locked job to the next pass."""
    specs = claim(store, worker, 3)
    store.complete(worker, [(spec, outcome(spec)) for spec in specs])
    retention = {JobStatus.COMPLETED: 0.0}
    with locked(specs[1].id):
        assert store.prune(retention, 10).deleted == 2
    assert store.prune(retention, 10).deleted == 1


def test_pruning_does_not_wait_for_referring_rows(
    state: AppState, store: Store, worker: int
) -> None:
    """Pruning keeps a job while a transaction of the host changes a row that refers to it."""
    specs = claim(store, worker, 3)
    store.complete(worker, [(spec, outcome(spec)) for spec in specs])
    engine = state.store.host_engine
    with engine.begin() as connection:
        connection.exec_driver_sql(EXPORT)
        connection.exec_driver_sql(f"INSERT INTO export VALUES ({specs[1].id})")
    with engine.connect() as connection, connection.begin():
        connection.exec_driver_sql("DELETE FROM export")
        pruned = store.prune({JobStatus.COMPLETED: 0.0}, 10)
        assert (pruned.deleted, pruned.held) == (2, 1)


@pytest.mark.parametrize("how", ["locks", "refers to"])
def test_job_that_locks_its_own_row_delays_no_other(
    app: Flask, state: AppState, tmp_path: Path, how: str
) -> None:
    """While a job holds a lock on its own row, other jobs are claimed, started and settled."""
    with state.store.host_engine.begin() as connection:
        connection.exec_driver_sql(EXPORT)
    journal, end, noted = tmp_path / "journal", tmp_path / "end", str(tmp_path / "noted")
    job = run_background_job("tests.jobs.keep_own_row", parameters=[str(journal), str(end), how])
    with running_worker(app, concurrency=2):
        wait_until(journal.exists, "the lock")
        for _ in range(8):
            other = run_background_job("tests.jobs.note_process", parameters=[noted, 0.3])
            assert other.wait(60).status == "completed"
        assert stored(app, job).status == "running"
        end.touch()
        assert job.wait(60).status == "completed"
    assert [line.message for line in rows(state, JobLog)] == ["locked"]
