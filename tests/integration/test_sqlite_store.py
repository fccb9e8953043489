"""SQLite files: replaced files, network file systems and read-only files."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import OperationalError

from flask_bgjobs import DatabaseUnusable, Job, run_background_job
from flask_bgjobs.job.records import Outcome
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.models import Queue, Worker
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import Store
from flask_bgjobs.system.mounts import network_file_system
from flask_bgjobs.worker.registration import register
from tests.apps import build_app
from tests.conftest import count_jobs, stored

pytestmark = pytest.mark.on("sqlite")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of the database."""
    return tmp_path / "test.db"


def enqueue(value: int = 0, **options: Any) -> Job:
    return run_background_job("tests.jobs.echo", parameters=[value], **options)


def replace(file: Path, new: Path) -> None:
    """Replace ``file`` by ``new`` correctly: without the old ``-wal`` and ``-shm`` files."""
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    os.replace(new, file)


def empty_database(path: Path) -> Path:
    """A database file with empty tables."""
    app = build_app(f"sqlite:///{path}")
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        db.create_all()
        db.engine.dispose()
    return path


def backup(file: Path, to: Path) -> Path:
    """A copy of the database as it is now."""
    source, target = sqlite3.connect(file), sqlite3.connect(to)
    source.backup(target)
    source.close()
    target.close()
    return to


class TestReplacedFile:
    def test_store_switches_to_the_new_file(
        self, app: Flask, store: Store, file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After the database file was replaced, the connections of flask-bgjobs and of the host use
        the new file, and this is logged once."""
        assert enqueue(1).id == 1
        replace(file, empty_database(file.with_name("new.db")))
        assert count_jobs(app) == 0
        assert enqueue(2).id == 1
        assert state_of(app).db.session.get(Job, 1).parameters == [2]
        assert caplog.text.count("Database file replaced") == 1

    def test_missing_file_is_not_created(self, app: Flask, store: Store, file: Path) -> None:
        """A missing database file is an error, and no empty file is created; with a new file, the
        store works again."""
        enqueue()
        file.unlink()
        for _ in range(2):
            with pytest.raises(OperationalError, match=r"the database file .*test\.db is gone"):
                enqueue()
            assert not file.exists()
        empty_database(file)
        enqueue()
        assert count_jobs(app) == 1

    @pytest.mark.parametrize("kept", ["new file", "old WAL"])
    def test_new_file_with_old_wal_is_refused(
        self, app: Flask, store: Store, file: Path, kept: str
    ) -> None:
        """A new file beside the ``-wal`` file of the old one is not opened, because SQLite would
        write the old pages into it."""
        # With the same pages as the old file: only then would its -wal fit.
        new = shutil.copy(file, file.with_name("new.db"))
        store.prepare(wal=True)
        for number in range(50):
            enqueue(number)
        wal = Path(f"{file}-wal")
        assert wal.stat().st_size > 0
        os.replace(new, file)
        for _ in range(2):
            with pytest.raises(OperationalError, match=r"delete .*test\.db-wal and .*test\.db-shm"):
                store.living_workers()
        assert wal.exists()
        if kept == "new file":
            wal.unlink()
            Path(f"{file}-shm").unlink()
            assert count_jobs(app) == 0
        else:
            # Another program opened the file, and so applied the old WAL.
            backup(file, file.with_name("other.db"))
            assert not wal.exists()
        enqueue()
        with store.read() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"

    def test_outcome_of_old_file_changes_no_job_of_new_file(
        self, app: Flask, store: Store, state: AppState, file: Path
    ) -> None:
        """Worker ids differ between files, so a worker of the old file cannot change a job of the
        new one with the same id and attempt."""
        old_worker = register(state, "old", concurrency=1)
        enqueue()
        (spec,) = store.claim(old_worker, 1)
        replace(file, empty_database(file.with_name("new.db")))
        new_worker = register(state, "new", concurrency=1)
        job = enqueue()
        (other,) = store.claim(new_worker, 1)
        assert (other.id, other.attempt) == (spec.id, spec.attempt)
        outcome = Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0)
        (settled,) = store.settle(old_worker, "old", [(spec, outcome)])
        assert settled.status is None
        assert stored(app, job).status == "running"

    def test_worker_starts_over_in_a_new_file(
        self, app: Flask, store: Store, state: AppState, file: Path
    ) -> None:
        """A worker without a row in the new file starts over after its next heartbeat, in WAL mode
        as before."""
        store.prepare(wal=True)
        worker = register(state, "one", concurrency=1)
        assert store.beat(worker)
        replace(file, empty_database(file.with_name("new.db")))
        assert not store.beat(worker)
        worker = register(state, "one", concurrency=1)
        assert store.beat(worker)
        enqueue(queue="mail")
        assert len(store.claim(worker, 1)) == 1
        with store.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.scalar(sa.select(Queue.name)) == "mail"

    def test_worker_starts_over_in_a_copy(
        self, app: Flask, store: Store, state: AppState, file: Path
    ) -> None:
        """In a copy with the worker's row, the worker starts over as well, so that the jobs that
        were running in the copy are rescued."""
        worker = register(state, "one", concurrency=1)
        assert store.beat(worker)
        job = enqueue(queue="mail")
        (spec,) = store.claim(worker, 1)
        copy = backup(file, file.with_name("copy.db"))
        outcome = Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0)
        store.settle(worker, "one", [(spec, outcome)])
        replace(file, copy)
        assert not store.beat(worker)
        (row,) = store.living_workers()
        assert row.id == worker
        assert [settled.job_id for settled in store.rescue(worker, row.beats)] == [job.id]

    def test_queue_is_registered_in_the_new_file(
        self, app: Flask, store: Store, state: AppState, file: Path
    ) -> None:
        """A queue that was registered in the old file is registered again in the new one."""
        for database in ("old", "new"):
            if database == "new":
                replace(file, empty_database(file.with_name("new.db")))
            enqueue(queue="mail")
            store.claim(register(state, "one", concurrency=1), 1)
            with store.read() as connection:
                assert connection.scalars(sa.select(Queue.name)).all() == ["mail"]

    def test_changed_symlink_counts_as_replaced(self, tmp_path: Path) -> None:
        """If the database is a symbolic link, a new target counts as a replaced file."""
        first, second = (empty_database(tmp_path / name) for name in ("first.db", "second.db"))
        link = tmp_path / "link.db"
        link.symlink_to(first)
        app = build_app(f"sqlite:///{link}")
        store = state_of(app).store
        with app.app_context():
            store.prepare(wal=True)
            enqueue()
            (tmp_path / "next").symlink_to(second)
            os.replace(tmp_path / "next", link)
            assert count_jobs(app) == 0
        store.dispose()


def test_wal_beside_the_target_of_a_symlink(tmp_path: Path) -> None:
    """If the database is a symbolic link, the old ``-wal`` file is looked for beside its target."""
    target, link = empty_database(tmp_path / "target.db"), tmp_path / "link.db"
    link.symlink_to(target)
    app = build_app(f"sqlite:///{link}")
    with app.app_context():
        store = state_of(app).store
        store.prepare(wal=True)
        enqueue()
        store.living_workers()
        os.replace(empty_database(tmp_path / "new.db"), target)
        with pytest.raises(OperationalError, match=r"delete .*target\.db-wal"):
            store.living_workers()
    store.dispose()


def test_worker_ids_increase(
    state: AppState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker ids are unique and increase, also at the same moment and after the clock was set
    back."""
    ids = [register(state, f"w{number}") for number in range(10)]
    monkeypatch.setattr("time.time_ns", lambda: 0)
    ids += [register(state, f"w{number}") for number in range(10, 20)]
    assert ids == sorted(set(ids))
    with store.read() as connection:
        names = connection.scalars(sa.select(Worker.name).order_by(Worker.id)).all()
    assert names == [f"w{number}" for number in range(20)]


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /srv nfs4 rw 0 0
//server/share /srv/my\\040share cifs rw 0 0
/dev/sdb1 /srv/local ext4 rw 0 0
user@host: /home/user/remote fuse.sshfs rw 0 0
host /covered 9p rw 0 0
/dev/sdc1 /covered xfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/app.db", None),
        ("/srv/app.db", "nfs4"),
        ("/srv/deep/er/app.db", "nfs4"),
        ("/srvx/app.db", None),
        ("/srv/my share/app.db", "cifs"),
        ("/srv/local/app.db", None),
        ("/home/user/remote/app.db", "fuse.sshfs"),
        ("/covered/app.db", None),
    ],
)
def test_network_file_systems_are_detected(path: str, expected: str | None, tmp_path: Path) -> None:
    """The file system of a file is that of its nearest mount point."""
    table = tmp_path / "mounts"
    table.write_text(MOUNTS)
    assert network_file_system(path, table) == expected


def test_no_detection_without_proc_mounts(tmp_path: Path) -> None:
    """Without ``/proc/mounts``, no file counts as on a network file system."""
    assert network_file_system("/srv/app.db", tmp_path / "none") is None


def test_network_file_system_is_logged(
    app: Flask,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On NFS, the start of a worker logs a warning and does not turn WAL mode on."""
    table = tmp_path / "mounts"
    table.write_text(f"server:/export {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr("flask_bgjobs.system.mounts._MOUNTS", table)
    assert store.prepare(wal=True) is None
    (record,) = [r for r in caplog.records if "network file system (nfs4)" in r.message]
    assert record.levelno == logging.WARNING
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"


def test_read_only_database(app: Flask, run: Any, file: Path) -> None:
    """Enqueueing into a read-only file raises an error that says what to do, and the command prints
    one sentence."""
    enqueue()
    url = f"sqlite:///file:{file}?mode=ro&uri=true"
    read_only = build_app(url)
    with read_only.app_context():
        with pytest.raises(DatabaseUnusable, match="must be allowed to write the file") as raised:
            enqueue()
        assert isinstance(raised.value.__cause__, OperationalError)
        done = read_only.test_cli_runner().invoke(args=["bgjobs", "enqueue", "tests.jobs.echo"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: the job was not enqueued: attempt to write a readonly")
    assert done.output.count("\n") == 1
    assert count_jobs(app) == 1
    state_of(read_only).store.dispose()


def test_wait_for_the_lock_ends_with_the_deadline(state: AppState) -> None:
    """A store that is to give up soon waits no longer than that for the write lock."""
    store = state.store.with_deadline(60)

    def wait_milliseconds() -> int:
        read = sa.text("PRAGMA busy_timeout")
        return int(store.transaction(lambda c: c.execute(read).scalar_one()))

    assert wait_milliseconds() == 5_000
    store.give_up_at = time.monotonic() + 2
    assert wait_milliseconds() <= 2_000
    store.dispose()
