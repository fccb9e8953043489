"""The audit trail: an entry for each change, in the same transaction."""

from __future__ import annotations

import datetime as dt
import logging
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
from flask_bgjobs.worker.registration import register
from tests.conftest import DEADLINE_SECONDS, stored, wait_until
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
def test_change_is_recorded(app: Flask, state: AppState, store: Store, verb: str) -> None:
    """An entry names the actor, the action, the jobs, the time and the result."""
    ids = _enqueue(2)
    getattr(actions, verb)(state, [*ids, 999_999], ANNA)
    (entry,) = _entries(store)
    assert (entry.actor, entry.source, entry.action) == ("anna", "dashboard", verb)
    assert entry.result == f"2 {DONE[verb]}, 1 skipped"
    assert abs(entry.created_at - store.clock()) < dt.timedelta(seconds=DEADLINE_SECONDS)
    assert _jobs(store) == [(entry.id, job_id) for job_id in ids]


def test_retry_is_recorded(app: Flask, state: AppState, store: Store) -> None:
    """A job that was cancelled and retried has two entries."""
    (job_id,) = _enqueue()
    actions.cancel(state, [job_id], ANNA)
    actions.retry(state, [job_id], Actor("bert", "command line"))
    assert [(entry.actor, entry.action) for entry in _entries(store)] == [
        ("anna", "cancel"),
        ("bert", "retry"),
    ]


def test_action_without_effect_is_not_recorded(app: Flask, state: AppState, store: Store) -> None:
    """Cancelling a cancelled job, or pausing a paused queue, leaves no entry."""
    (job_id,) = _enqueue()
    for _ in range(2):
        actions.cancel(state, [job_id], ANNA)
        actions.pause(state, "default", ANNA)
    assert [entry.action for entry in _entries(store)] == ["cancel", "pause"]


def test_pause_and_resume_are_recorded(app: Flask, state: AppState, store: Store) -> None:
    """The entries of pause and resume name the queue."""
    actions.pause(state, "default", ANNA)
    actions.resume(state, "default", ANNA)
    assert [(entry.action, entry.subject) for entry in _entries(store)] == [
        ("pause", "default"),
        ("resume", "default"),
    ]


def test_changes_by_code_are_not_recorded(app: Flask, state: AppState, store: Store) -> None:
    """Changes by the app's own code leave no entry."""
    job = run_background_job("tests.jobs.echo", parameters=["x"])
    job.cancel()
    assert _entries(store) == []


def test_change_and_entry_are_one_transaction(
    app: Flask, state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the entry cannot be written, nothing changes."""
    (job_id,) = _enqueue()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(type(store), "audit", refuse)
    with pytest.raises(RuntimeError, match="no room"):
        actions.cancel(state, [job_id], ANNA)
    assert store.get(job_id).status == "pending"  # type: ignore[union-attr]  # it is there


@pytest.mark.parametrize("name", ["a\x00b", "x" * 400, "ü\ud800", "<b>'\"%s{}"])
def test_any_actor_name_can_be_stored(app: Flask, state: AppState, store: Store, name: str) -> None:
    """The audit trail can store any name of an actor."""
    actions.cancel(state, _enqueue(), Actor(name, "dashboard", reason=name))
    (entry,) = _entries(store)
    assert len(entry.actor) <= 255
    assert "\x00" not in entry.actor


def test_old_entries_are_pruned(app: Flask, state: AppState, store: Store) -> None:
    """Entries are kept for a year, and are deleted together with their lists of jobs."""
    actions.cancel(state, _enqueue(), ANNA)
    actions.cancel(state, _enqueue(), ANNA)
    old, young = _entries(store)
    long_ago = store.clock() - dt.timedelta(days=366)
    change = sa.update(AuditEntry).where(AuditEntry.id == old.id).values(created_at=long_ago)
    store.transaction(lambda connection: connection.execute(change))
    assert store.prune_audits(10) == 1
    assert [entry.id for entry in _entries(store)] == [young.id]
    assert [entry_id for entry_id, _ in _jobs(store)] == [young.id]


def test_drained_worker_finishes_and_stops(
    app: Flask, state: AppState, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A drained worker finishes its running jobs, claims no others, and stops; the entry names the
    actor."""
    gate = tmp_path / "gate"
    caplog.set_level(logging.INFO, "flask_bgjobs")
    with running_worker(app, name="one", concurrency=1, shutdown_timeout=0):
        worker_id = wait_until(lambda: _worker_id(store, "one"), "the worker's row")
        long = run_background_job("tests.jobs.wait_for_file", parameters=[str(gate)])
        wait_until(lambda: stored(app, long).started_at, "the start of the job")
        assert store.drain_worker(worker_id, ANNA)
        assert not store.drain_worker(worker_id, ANNA)
        wait_until(lambda: "Worker draining | Worker: one" in caplog.text, "the log line")
        other = run_background_job("tests.jobs.echo", parameters=["x"])
        gate.touch()
        wait_until(lambda: _is_stopped(store, worker_id), "the end of the worker")
    assert stored(app, long).status == "completed"
    assert stored(app, other).status == "pending"
    (entry,) = _entries(store)
    assert (entry.action, entry.subject, entry.actor) == ("drain", "one", "anna")


def _worker_id(store: Store, name: str) -> int | None:
    with store.read() as connection:
        return connection.scalar(sa.select(Worker.id).where(Worker.name == name))


def _is_stopped(store: Store, worker_id: int) -> bool:
    with store.read() as connection:
        status = connection.scalar(sa.select(Worker.status).where(Worker.id == worker_id))
    return bool(status == "stopped")


def test_stopped_worker_is_not_drained(app: Flask, state: AppState, store: Store) -> None:
    """Draining a stopped worker does nothing and leaves no entry."""
    worker_id = register(state, "gone")
    store.stop_worker(worker_id)
    assert not store.drain_worker(worker_id, ANNA)
    assert _entries(store) == []
