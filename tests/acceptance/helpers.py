"""Helpers of the acceptance tests: jobs, journals, workers and processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.models import Worker
from flask_bgjobs.state import AppState
from tests.conftest import wait_until


def enqueue(name: str, *parameters: Any, **options: Any) -> Job:
    """Enqueue a job of ``tests.jobs``."""
    return run_background_job(f"tests.jobs.{name}", parameters=parameters, **options)


def starts(journal: Path) -> int:
    """The number of jobs that have recorded their start, including jobs that have ended."""
    return sum(line.startswith("start") for line in lines(journal))


def lines(path: Path) -> list[str]:
    """The lines of a journal."""
    return path.read_text().splitlines() if path.exists() else []


def workers(state: AppState) -> dict[int, str]:
    """The status of all registered workers by id, including stopped ones, in order."""
    return {row.id: row.status for row in _worker_rows(state)}


def beats(state: AppState) -> dict[str, int]:
    """The number of heartbeats of each living worker, by name."""
    return {row.name: row.beats for row in _worker_rows(state) if row.status == "alive"}


def _worker_rows(state: AppState) -> list[sa.Row[Any]]:
    columns = (Worker.id, Worker.name, Worker.status, Worker.beats)
    with state.store.read() as connection:
        return list(connection.execute(sa.select(*columns).order_by(Worker.id)))


def stop_between_transactions(worker: Any, state: AppState) -> None:
    """Stop a process with SIGSTOP, but not while it holds a lock that others would wait for."""

    def stop() -> bool:
        worker.send_signal(signal.SIGSTOP)
        wait_until(lambda: _is_stopped(worker.pid), "the stop of all threads")
        if _is_quiet(state):
            return True
        worker.send_signal(signal.SIGCONT)
        return False

    wait_until(stop, "a moment between two transactions")


def _is_stopped(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in threads} == {"T"}


def _is_quiet(state: AppState) -> bool:
    engine = state.store.host_engine
    if engine.dialect.name == "postgresql":
        with state.store.read() as connection:
            return not connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND state <> 'idle'"
                " AND backend_type = 'client backend'"
            ).scalar()
    if engine.dialect.name == "mysql":
        return _holds_no_lock(engine)
    probe = sqlite3.connect(engine.url.database or "", timeout=0)
    try:
        probe.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    finally:
        probe.close()
    return True


def _holds_no_lock(engine: sa.Engine) -> bool:
    """Whether no row is locked. MySQL has no up-to-date list of locks, so this tries to lock."""
    with engine.connect() as connection:
        try:
            for table in ("bgjobs_job", "bgjobs_worker"):
                connection.exec_driver_sql(f"SELECT id FROM {table} FOR UPDATE NOWAIT")
        except sa.exc.OperationalError:
            return False
    return True


def descendants(pid: int) -> list[int]:
    """The ids of the living child processes of ``pid``, and of their children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return [child for child in found if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def processor_seconds(pid: int) -> float:
    """The processor time that a process has used, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # The user and system time are fields 14 and 15; the first two are cut off.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
