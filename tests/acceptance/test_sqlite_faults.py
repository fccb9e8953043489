"""A SQLite file that is locked, replaced, or on a full disk, with real workers."""

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
"""Longer than a transaction is tried again, so that the error after that is seen as well."""
LEASE_SECONDS = 18
"""Shorter than that; in the same ratio to the interval as by default."""
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
    """Another program holds the write lock of a database."""
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
    """An app on a database of its own, with two workers."""

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

    def go_through_a_lock(self, lock: str) -> None:
        """Let jobs end while the database is locked; all is as if it had not been."""
        with self.app.app_context():
            jobs = [enqueue("hold", str(self.journal), seconds) for seconds in (2, 5, 15, 25)]
            wait_until(lambda: len(lines(self.journal)) >= len(jobs), "the starts")
            with locked(self.file, lock):
                until = time.monotonic() + LOCKED_SECONDS
                with pytest.raises(DatabaseUnusable, match="a transaction that is left open"):
                    enqueue("echo", 1)
                time.sleep(max(0.0, until - time.monotonic()))
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


def test_a_lock_of_33_seconds_loses_nothing(tmp_path: Path) -> None:
    """A program that holds the write lock for longer than the lease loses no outcome and makes no
    worker take the lease of another, in both pools, with and without WAL; an enqueue meanwhile
    ends with an error that says what to look for, and leaves no row."""
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
            list(threads.map(Site.go_through_a_lock, sites, ["IMMEDIATE", "EXCLUSIVE"]))


def test_a_stop_while_the_file_is_locked_is_soon_over(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """A worker that is told to stop twice ends, although it can record nothing."""
    worker = start_worker("-c", "2")
    enqueue("hold", str(journal), 600)
    wait_until(journal.exists, "the start")
    with locked(tmp_path / "test.db", "IMMEDIATE"):
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: "Worker stopping" in worker.log.read_text(), "the stop")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(DEADLINE_SECONDS) == 0


def test_a_replaced_file_is_gone_over_to(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """A worker whose database file is replaced notices, says so once, registers in the new file
    and runs its jobs; what it ran for the old one is stopped and changes no job of the new one,
    also not the one that has the same id."""
    worker = start_worker("-c", "2")
    file = tmp_path / "test.db"
    old = enqueue("hold", str(journal), 600)
    wait_until(lambda: lines(journal), "the start")
    new_url = f"sqlite:///{tmp_path / 'new.db'}"
    with _site_of(new_url) as new_app, new_app.app_context():
        job = enqueue("wait_for_file", str(tmp_path / "gate"))
    assert job.id == old.id
    _move_over(tmp_path / "new.db", file)
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


def test_jobs_find_the_new_file_as_well(app: Flask, start_worker: Start, tmp_path: Path) -> None:
    """After the file was replaced, jobs see the new one through the host's session, in both
    pools."""
    pools = {"BGJOBS_QUEUE_POOLS": {"children": "process"}, "BGJOBS_APP": "host:create_app"}
    start_worker(BGJOBS_CONCURRENCY=1, **pools)
    queues = ("default", "children")
    for seen, queue in enumerate(queues, 1):
        assert enqueue("count_by_session", queue=queue).wait(DEADLINE_SECONDS).result == seen
    with _site_of(f"sqlite:///{tmp_path / 'new.db'}"):
        pass
    _move_over(tmp_path / "new.db", tmp_path / "test.db")
    for seen, queue in enumerate(queues, 1):
        assert enqueue("count_by_session", queue=queue).wait(DEADLINE_SECONDS).result == seen


def test_a_file_that_is_deleted_and_made_anew(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """A worker whose database file is deleted lives, says that it is gone, makes no empty one,
    and works on in the one that ``flask bgjobs init-db`` makes."""
    worker = start_worker()
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    for file in tmp_path.glob("test.db*"):
        file.unlink()
    wait_until(lambda: "is gone" in worker.log.read_text(), "the notice")
    assert not (tmp_path / "test.db").exists()
    made = run_command(tmp_path, "init-db")
    assert made.returncode == 0, made.stderr
    assert enqueue("echo", 2).wait(DEADLINE_SECONDS).result == 2


def test_a_backup_from_the_middle_of_a_job_is_taken_up(
    app: Flask, start_worker: Start, tmp_path: Path, journal: Path
) -> None:
    """After a backup was put back that was made while a job ran, that job is run again under its
    old id once the lease of its former worker is over, and no retry is used."""
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
    _move_over(tmp_path / "backup.db", tmp_path / "test.db")
    assert stored(app, job).status == "running"
    assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert (job.attempt, job.retry_count) == (2, 0)
    notice = "its lease ran out | Rescued: 1"
    wait_until(lambda: notice in worker.log.read_text(), "the notice")


def test_the_log_of_the_old_file_keeps_the_new_one_closed(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """Where the old file's ``-wal`` was left beside the new file, the worker lives and says what
    to delete; once that is done, it works on in the new file, which is as it was."""
    worker = start_worker()
    assert enqueue("echo", 1).wait(DEADLINE_SECONDS).result == 1
    with _site_of(f"sqlite:///{tmp_path / 'new.db'}") as new_app, new_app.app_context():
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
    """A folder on a small disk of its own."""
    if os.geteuid() != 0:
        reason = "only root may mount a file system"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("wal", [True, False], ids=["wal", "journal"])
def test_a_full_disk_keeps_outcomes_waiting(
    disk: Path, tmp_path: Path, wal: bool, request: pytest.FixtureRequest
) -> None:
    """While the disk is full the worker lives, says so and keeps its outcomes, and an enqueue ends
    with an error that says what to do and leaves no row; once there is room, all is recorded, and
    nothing is corrupt."""
    url = f"sqlite:///{disk / 'test.db'}"
    workers = Workers(tmp_path, url)
    request.addfinalizer(workers.end)
    gate, filler = tmp_path / "gate", disk / "filler"
    with _site_of(url) as app:
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


def test_a_read_only_disk_is_one_sentence(disk: Path, tmp_path: Path) -> None:
    """A worker that may not write its database says so in one sentence, and what to do, and ends
    with exit code 1."""
    url = f"sqlite:///{disk / 'test.db'}"
    with _site_of(url):
        pass
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (tmp_path / "host.py").write_text(HOST.format(url=url))
    done = run_command(tmp_path, "worker")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "readonly database (this user must be allowed to write the file" in sentence
    assert "Traceback" not in done.stderr


def run_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``flask bgjobs …`` of the app in a folder."""
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
    """Write a file until its disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


@contextlib.contextmanager
def _site_of(url: str) -> Iterator[Flask]:
    app = build_app(url)
    with app.app_context():
        app.extensions["sqlalchemy"].create_all()
        yield app
        app.extensions["sqlalchemy"].engine.dispose()
    state_of(app).store.dispose()


def _move_over(new: Path, file: Path) -> None:
    """Put a file in the place of another as it should be done: without what lies beside it."""
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    os.replace(new, file)
