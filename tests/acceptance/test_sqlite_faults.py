"""Real workers on a SQLite file that is locked, replaced, deleted, or on a full disk."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import DatabaseUnusable
from flask_bgjobs.models import Worker
from flask_bgjobs.state import state_of
from tests.acceptance.conftest import HOST, Workers
from tests.acceptance.helpers import enqueue, lines
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, count_jobs, stored, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]

LOCKED_SECONDS = 33
"""Longer than a transaction is retried, so that the error after the last try also occurs."""
LEASE_SECONDS = 18
"""Shorter than the lock; its ratio to the heartbeat interval is the default one."""
HOLD_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute(f"BEGIN {sys.argv[2]}")
connection.execute("CREATE TABLE IF NOT EXISTS host (id INTEGER)")
print("locked", flush=True)
sys.stdin.read()
connection.execute("COMMIT")
"""


@contextlib.contextmanager
def locked(file: Path, lock: str) -> Iterator[None]:
    """Hold a lock on the database in another process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(file), lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.communicate(timeout=DEADLINE_SECONDS)
    assert holder.returncode == 0


class Site:
    """An app with its own database and two workers."""

    def __init__(self, folder: Path, pool: str, **config: Any) -> None:
        folder.mkdir()
        self.file = folder / "test.db"
        url = f"sqlite:///{self.file}"
        self.journal = folder / "journal"
        self.app = build_app(url)
        with self.app.app_context():
            self.app.extensions["sqlalchemy"].create_all()
        self.workers = Workers(folder, url)
        self.logs = [
            self.workers.start("-P", pool, "-c", "4", BGJOBS_APP="host:create_app", **config).log
            for _ in range(2)
        ]

    def close(self) -> None:
        self.workers.end()
        with self.app.app_context():
            self.app.extensions["sqlalchemy"].engine.dispose()
        state_of(self.app).store.dispose()

    def run_jobs_under_lock(self, lock: str) -> None:
        """Let jobs end while the database is locked, and check that the lock changed nothing."""
        with self.app.app_context():
            jobs = [enqueue("hold", str(self.journal), seconds) for seconds in (2, 5, 15, 25)]
            wait_until(lambda: len(lines(self.journal)) >= len(jobs), "the starts")
            with locked(self.file, lock):
                unlock_at = time.monotonic() + LOCKED_SECONDS
                with pytest.raises(DatabaseUnusable, match="a transaction that was left open"):
                    enqueue("echo", 1)
                time.sleep(max(0.0, unlock_at - time.monotonic()))
            for job in jobs:
                assert job.wait(DEADLINE_SECONDS).status == "completed"
                assert (job.attempt, job.retry_count, job.suspect) == (1, 0, False)
            assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
            assert count_jobs(self.app) == len(jobs) + 1
        assert sum(line.startswith("start") for line in lines(self.journal)) == len(jobs)
        for log in self.logs:
            text = log.read_text()
            assert "Worker dead" not in text
            assert "Lease lost" not in text


def test_write_lock_of_33_seconds_loses_no_outcome(tmp_path: Path) -> None:
    """If another program holds the write lock for longer than the lease, no outcome and no lease is
    lost, in both pools, with and without WAL. An enqueue during the lock raises an error that
    says what to look for, and saves no row."""
    lease = {
        "BGJOBS_LEASE": LEASE_SECONDS,
        "BGJOBS_HEARTBEAT_INTERVAL": LEASE_SECONDS / 6,
        "BGJOBS_POLL_INTERVAL": 1,
    }
    with contextlib.ExitStack() as stack:
        sites = []
        for name, pool, wal in (("wal", "thread", True), ("journal", "process", False)):
            site = Site(tmp_path / name, pool, BGJOBS_SQLITE_WAL=wal, **lease)
            stack.callback(site.close)
            sites.append(site)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(Site.run_jobs_under_lock, sites, ["IMMEDIATE", "EXCLUSIVE"]))


def test_worker_stops_while_the_file_is_locked(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """A second SIGTERM ends the worker, although it cannot write to the database."""
    worker = start_worker("-c", "2")
    enqueue("hold", str(journal), 600)
    wait_until(journal.exists, "the start")
    with locked(tmp_path / "test.db", "IMMEDIATE"):
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: "Worker stopping" in worker.log.read_text(), "the stop")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(DEADLINE_SECONDS) == 0


def test_worker_switches_to_a_replaced_file(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """A worker whose database file is replaced logs that once, registers in the new file and runs
    its jobs. It stops the jobs of the old file, which change no job of the new file, not even
    the one with the same id."""
    worker = start_worker("-c", "2")
    file = tmp_path / "test.db"
    old = enqueue("hold", str(journal), 600)
    wait_until(lambda: lines(journal), "the start")
    new_url = f"sqlite:///{tmp_path / 'new.db'}"
    with _app_on(new_url) as new_app, new_app.app_context():
        job = enqueue("wait_for_file", str(tmp_path / "gate"))
    assert job.id == old.id
    _replace_database(tmp_path / "new.db", file)
    wait_until(lambda: f"stopped {old.id} JobCancelled" in lines(journal), "the end of the old job")
    wait_until(lambda: stored(app, job).status == "running", "the claim")
    (tmp_path / "gate").touch()
    assert job.wait(DEADLINE_SECONDS).result is True
    assert stored(app, job).attempt == 1
    text = worker.log.read_text()
    assert text.count("Database file replaced") == 1
    with state_of(app).store.read() as connection:
        assert connection.scalars(sa.select(Worker.status)).all() == ["alive"]
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    worker.terminate()
    assert worker.wait(DEADLINE_SECONDS) == 0


def test_jobs_use_the_replaced_file(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """After the file was replaced, the host's session uses the new one in both pools."""
    pools = {"BGJOBS_QUEUE_POOLS": {"children": "process"}, "BGJOBS_APP": "host:create_app"}
    start_worker(BGJOBS_CONCURRENCY=1, **pools)
    queues = ("default", "children")
    for seen, queue in enumerate(queues, 1):
        assert enqueue("count_by_session", queue=queue).wait(DEADLINE_SECONDS).result == seen
    with _app_on(f"sqlite:///{tmp_path / 'new.db'}"):
        pass
    _replace_database(tmp_path / "new.db", tmp_path / "test.db")
    for seen, queue in enumerate(queues, 1):
        assert enqueue("count_by_session", queue=queue).wait(DEADLINE_SECONDS).result == seen


def test_worker_continues_in_a_recreated_file(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """A worker whose database file is deleted logs that, creates no empty file, and continues in
    the file that ``flask bgjobs init-db`` creates."""
    worker = start_worker()
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    for file in tmp_path.glob("test.db*"):
        file.unlink()
    wait_until(lambda: "is gone" in worker.log.read_text(), "the notice")
    assert not (tmp_path / "test.db").exists()
    done = run_command(tmp_path, "init-db")
    assert done.returncode == 0, done.stderr
    assert enqueue("echo", 2).wait(DEADLINE_SECONDS).result == 2


def test_restored_backup_runs_its_running_job_again(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """If a backup that was made while a job ran is restored, the job runs again with the same id
    after the lease of its worker, and uses no retry."""
    worker = start_worker()
    gate = tmp_path / "gate"
    job = enqueue("wait_for_file", str(gate))
    wait_until(lambda: stored(app, job).started_at is not None, "the start")
    source, target = (sqlite3.connect(tmp_path / name) for name in ("test.db", "backup.db"))
    source.backup(target)
    source.close()
    target.close()
    gate.touch()
    assert job.wait(DEADLINE_SECONDS).status == "completed"
    _replace_database(tmp_path / "backup.db", tmp_path / "test.db")
    assert stored(app, job).status == "running"
    assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert (job.attempt, job.retry_count) == (2, 0)
    notice = "its lease ran out | Rescued: 1"
    wait_until(lambda: notice in worker.log.read_text(), "the notice")


def test_leftover_wal_file_is_reported(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """If the old file's ``-wal`` is left beside the new file, the worker logs what to delete. After
    that it runs the job of the new file, which is intact."""
    worker = start_worker()
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    with _app_on(f"sqlite:///{tmp_path / 'new.db'}") as new_app, new_app.app_context():
        job = enqueue("echo", 2)
    state_of(app).store.dispose()
    os.replace(tmp_path / "new.db", tmp_path / "test.db")
    advice = f"delete {tmp_path}/test.db-wal and {tmp_path}/test.db-shm"
    wait_until(lambda: advice in worker.log.read_text(), "the advice")
    assert worker.poll() is None
    for name in ("test.db-wal", "test.db-shm"):
        (tmp_path / name).unlink()
    assert job.wait(DEADLINE_SECONDS).result == 2
    assert count_jobs(app) == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on its own small file system."""
    if os.geteuid() != 0:
        reason = "only root can mount a file system"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("wal", [True, False], ids=["wal", "journal"])
def test_outcomes_are_recorded_after_a_full_disk(
    disk: Path, tmp_path: Path, wal: bool, request: pytest.FixtureRequest
) -> None:
    """While the disk is full the worker logs that and keeps its outcomes, and an enqueue raises an
    error that says what to do and saves no row. When there is space again, all outcomes are
    recorded, and the database is not corrupt."""
    url = f"sqlite:///{disk / 'test.db'}"
    workers = Workers(tmp_path, url)
    request.addfinalizer(workers.end)
    gate, filler = tmp_path / "gate", disk / "filler"
    with _app_on(url) as app:
        jobs = [enqueue("wait_for_file", str(gate)) for _ in range(3)]
        worker = workers.start(BGJOBS_SQLITE_WAL=wal)
        wait_until(lambda: all(stored(app, job).started_at for job in jobs), "the starts")
        _fill(filler)
        wait_until(lambda: "disk is full" in worker.log.read_text(), "the notice")
        with pytest.raises(DatabaseUnusable, match="free up space on the disk"):
            enqueue("echo", "x" * 100_000)
        gate.touch()
        wait_until(lambda: "Outcomes kept: 3" in worker.log.read_text(), "the outcomes")
        assert worker.poll() is None
        filler.unlink()
        for job in jobs:
            assert job.wait(DEADLINE_SECONDS).result is True
            assert (job.attempt, job.retry_count) == (1, 0)
        assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
        assert count_jobs(app) == 4
        worker.terminate()
        assert worker.wait(DEADLINE_SECONDS) == 0
        with state_of(app).store.read() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_read_only_disk_is_reported_in_one_sentence(disk: Path, tmp_path: Path) -> None:
    """A worker that cannot write to its database says in one sentence what to do, and exits with
    code 1."""
    url = f"sqlite:///{disk / 'test.db'}"
    with _app_on(url):
        pass
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (tmp_path / "host.py").write_text(HOST.format(url=url))
    done = run_command(tmp_path, "worker")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "readonly database (this user must be allowed to write the file" in sentence
    assert "Traceback" not in done.stderr


def run_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``flask bgjobs …`` for the app in a folder."""
    path = f"{folder}{os.pathsep}{Path.cwd()}"
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "host", "bgjobs", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TEST_CONFIG": "{}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def _fill(file: Path) -> None:
    """Write to a file until its disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


@contextlib.contextmanager
def _app_on(url: str) -> Iterator[Flask]:
    app = build_app(url)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
        yield app
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


def _replace_database(new: Path, file: Path) -> None:
    """Replace a database file correctly: delete its ``-wal`` and ``-shm`` files first."""
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    os.replace(new, file)
