"""The audit trail: who changed what, in the transaction of the change."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.models import AuditedJob, AuditEntry, Worker
from flask_bgjobs.operations import actions
from flask_bgjobs.state import AppState
from flask_bgjobs.store import DONE, Actor, Store
from flask_bgjobs.worker.worker import register
from tests.conftest import stored, wait_until
from tests.integration.test_worker import running_worker

ANNA = Actor("anna", "dashboard")


def _entries(store: Store) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id)))


def _jobs(store: Store) -> list[tuple[int, int]]:
    with store.read() as connection:
        rows = connection.execute(sa.select(AuditedJob.entry_id, AuditedJob.job_id))
        return sorted((row.entry_id, row.job_id) for row in rows)


def _enqueue(number: int = 1) -> list[int]:
    return [run_background_job("tests.jobs.echo", parameters=["x"]).id for _ in range(number)]


@pytest.mark.parametrize("verb", ["cancel", "delete"])
def test_a_change_is_written_down(app: Flask, state: AppState, store: Store, verb: str) -> None:
    """An entry says who did what to which jobs, when and with what result."""
    ids = _enqueue(2)
    getattr(actions, verb)(state, [*ids, 999_999], ANNA)
    (entry,) = _entries(store)
    assert (entry.actor, entry.source, entry.action) == ("anna", "dashboard", verb)
    assert entry.result == f"2 {DONE[verb]}, 1 skipped"
    assert abs(entry.created_at - store.clock()) < dt.timedelta(seconds=30)
    assert _jobs(store) == [(entry.id, job_id) for job_id in ids]


def test_a_retry_is_written_down(app: Flask, state: AppState, store: Store) -> None:
    """A job that was cancelled and retried has two entries."""
    (job_id,) = _enqueue()
    actions.cancel(state, [job_id], ANNA)
    actions.retry(state, [job_id], Actor("bert", "command line"))
    assert [(entry.actor, entry.action) for entry in _entries(store)] == [
        ("anna", "cancel"),
        ("bert", "retry"),
    ]


def test_what_changes_nothing_leaves_no_entry(app: Flask, state: AppState, store: Store) -> None:
    """To cancel what is cancelled, and to pause what is paused, changes nothing."""
    (job_id,) = _enqueue()
    for _ in range(2):
        actions.cancel(state, [job_id], ANNA)
        actions.pause(state, "default", ANNA)
    assert [entry.action for entry in _entries(store)] == ["cancel", "pause"]


def test_queues_are_written_down(app: Flask, state: AppState, store: Store) -> None:
    """Pausing and resuming name the queue."""
    actions.pause(state, "default", ANNA)
    actions.resume(state, "default", ANNA)
    assert [(entry.action, entry.subject) for entry in _entries(store)] == [
        ("pause", "default"),
        ("resume", "default"),
    ]


def test_code_leaves_no_entry(app: Flask, state: AppState, store: Store) -> None:
    """What the app's own code does is no matter of the audit trail."""
    job = run_background_job("tests.jobs.echo", parameters=["x"])
    job.cancel()
    assert _entries(store) == []


def test_the_change_and_its_entry_are_one_transaction(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the entry cannot be written, nothing is changed either."""
    (job_id,) = _enqueue()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(type(store), "audit", refuse)
    with pytest.raises(RuntimeError, match="no room"):
        actions.cancel(state, [job_id], ANNA)
    assert store.get(job_id).status == "pending"  # type: ignore[union-attr]  # it is there


@pytest.mark.parametrize("name", ["a\x00b", "x" * 400, "ü\ud800", "<b>'\"%s{}"])
def test_every_name_can_be_written(app: Flask, state: AppState, store: Store, name: str) -> None:
    """Whatever a host calls its users, the trail can hold it."""
    actions.cancel(state, _enqueue(), Actor(name, "dashboard", reason=name))
    (entry,) = _entries(store)
    assert len(entry.actor) <= 255
    assert "\x00" not in entry.actor


def test_old_entries_are_pruned(app: Flask, state: AppState, store: Store) -> None:
    """Entries are kept for a year, and their jobs go with them."""
    actions.cancel(state, _enqueue(), ANNA)
    actions.cancel(state, _enqueue(), ANNA)
    old, young = _entries(store)
    long_ago = store.clock() - dt.timedelta(days=366)
    change = sa.update(AuditEntry).where(AuditEntry.id == old.id).values(created_at=long_ago)
    store.transaction(lambda connection: connection.execute(change))
    assert store.prune_audits(10) == 1
    assert [entry.id for entry in _entries(store)] == [young.id]
    assert [entry_id for entry_id, _ in _jobs(store)] == [young.id]


def test_a_worker_is_drained(app: Flask, state: AppState, store: Store, tmp_path: Path) -> None:
    """A worker that is asked to end finishes what it runs, takes nothing more, and ends; the trail
    tells who asked."""
    gate = tmp_path / "gate"
    with running_worker(app, name="one", concurrency=1, shutdown_timeout=0) as worker:
        wait_until(lambda: worker._id, "its registration")
        long = run_background_job("tests.jobs.wait_for_file", parameters=[str(gate)])
        wait_until(lambda: stored(app, long).started_at, "its start")
        assert store.drain_worker(worker._id, ANNA)
        assert not store.drain_worker(worker._id, ANNA)
        wait_until(lambda: worker._is_draining, "its notice")
        other = run_background_job("tests.jobs.echo", parameters=["x"])
        gate.touch()
        wait_until(lambda: _ended(store, worker._id), "its end")
    assert stored(app, long).status == "completed"
    assert stored(app, other).status == "pending"
    (entry,) = _entries(store)
    assert (entry.action, entry.subject, entry.actor) == ("drain", "one", "anna")


def _ended(store: Store, worker_id: int) -> bool:
    with store.read() as connection:
        status = connection.scalar(sa.select(Worker.status).where(Worker.id == worker_id))
    return bool(status == "stopped")


def test_a_worker_that_has_ended_is_not_drained(app: Flask, state: AppState, store: Store) -> None:
    """There is nothing to ask of a worker that is gone."""
    worker_id = register(state, "gone")
    store.stop_worker(worker_id)
    assert not store.drain_worker(worker_id, ANNA)
    assert _entries(store) == []
