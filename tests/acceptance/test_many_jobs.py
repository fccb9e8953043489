"""Many jobs at once: what comes out is what was computed beforehand."""

from __future__ import annotations

import collections
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import BgJobsError, Job, run_background_job
from flask_bgjobs.app_state import AppState
from flask_bgjobs.enqueue import enqueue as enqueue_sets
from flask_bgjobs.options import JobOptions
from tests.conftest import count_jobs, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]


def _statuses(state: AppState) -> collections.Counter[tuple[str, str, int]]:
    """How many jobs there are by target, status and retries used."""
    columns = sa.select(Job.target, Job.status, Job.retry_count)
    with state.store.read() as connection:
        return collections.Counter(
            (row.target.rpartition(".")[2], row.status, row.retry_count)
            for row in connection.execute(columns)
        )


def test_a_thousand_mixed_jobs_end_as_computed(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """1,000 jobs that pass, fail, retry, hang, wait, are cancelled or refused: all as computed."""
    journal = str(tmp_path / "journal")
    refused = 0
    to_cancel: list[Job] = []
    for number in range(100):
        for value in range(4):
            run_background_job("tests.jobs.echo", parameters=[value], priority=number % 5 - 2)
        run_background_job("tests.jobs.fail_times", parameters=[2], retries=2, retry_delay=0.05)
        run_background_job("tests.jobs.fail", retries=number % 3, retry_delay=0.02, jitter=0.5)
        run_background_job("tests.jobs.report", parameters=[2], delay=0.01 * number)
        run_background_job(
            "tests.jobs.hold", parameters=[journal, 60], timeout=0.05, retries=0, queue="slow"
        )
        to_cancel.append(
            run_background_job("tests.jobs.record", parameters=[journal, "no"], delay=600)
        )
        with pytest.raises(BgJobsError):
            run_background_job("tests.jobs.not_allowed")
        refused += 1
    running = run_background_job("tests.jobs.hold", parameters=[journal, 600], priority=9)
    expected = collections.Counter(
        {
            ("echo", "completed", 0): 400,
            ("fail_times", "completed", 2): 100,
            ("fail", "failed", 0): 34,
            ("fail", "failed", 1): 33,
            ("fail", "failed", 2): 33,
            ("report", "completed", 0): 100,
            ("hold", "failed", 0): 100,
            ("hold", "cancelled", 0): 1,
            ("record", "cancelled", 0): 100,
        }
    )
    assert count_jobs(app) + refused == 1_001
    worker = start_worker("-c", "10")
    state.store.cancel([job.id for job in to_cancel])
    wait_until(lambda: running.refresh().status == "running", "the start")
    state.store.cancel([running.id])
    wait_until(
        lambda: all(
            status in ("completed", "failed", "cancelled") for _, status, _ in _statuses(state)
        ),
        "the end of all jobs",
    )
    assert _statuses(state) == expected
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert "no" not in Path(journal).read_text().splitlines()


def test_two_workers_run_each_of_5000_jobs_once(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """Two worker processes on one SQLite file run 5,000 jobs, each exactly once."""
    journal = tmp_path / "journal"
    sets = [[str(journal), str(number)] for number in range(5_000)]
    enqueue_sets(state, "tests.jobs.record", None, sets, JobOptions())
    workers = [start_worker("--burst", "-n", name) for name in ("one", "two")]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert sorted(map(int, journal.read_text().split())) == list(range(5_000))
    assert _statuses(state) == {("record", "completed", 0): 5_000}
    with state.store.read() as connection:
        attempts = connection.execute(sa.select(sa.func.max(Job.attempt))).scalar()
    assert attempts == 1
