"""Two releases of one app side by side: no job fails because a worker does not have its code."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import enqueue, lines
from tests.conftest import stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

OLD_NAMES = ["tests.jobs.fail_times"]
NEW_NAMES = [*OLD_NAMES, "tests.jobs.record"]
JOBS = 2_000


def statuses(state: AppState) -> collections.Counter[str]:
    found = sa.select(Job.status, sa.func.count()).group_by(Job.status)
    with state.store.read() as connection:
        return collections.Counter(dict(iter(connection.execute(found))))


def test_rolling_over(app: Flask, state: AppState, start_worker: Start, journal: Path) -> None:
    """Two workers of the old release and two of the new one roll over 2,000 jobs, of which half
    are new: each job runs once, and none fails."""
    roll_over(state, start_worker, journal, "thread")


@pytest.mark.on("postgresql")
def test_rolling_over_with_child_processes(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """The same applies to workers with process pools."""
    roll_over(state, start_worker, journal, "process")


def roll_over(state: AppState, start_worker: Start, journal: Path, pool: str) -> None:
    options = ["-P", pool, "-c", "2"]
    old = [start_worker(*options, BGJOBS_ALLOWED_JOBS=OLD_NAMES, BGJOBS_APP="host")]
    old += [start_worker(*options, BGJOBS_ALLOWED_JOBS=OLD_NAMES, BGJOBS_APP="host")]
    for number in range(JOBS // 2):
        enqueue("record", str(journal), f"new {number}", retries=0)
        enqueue("fail_times", 0, str(journal), retries=0)
    wait_until(lambda: statuses(state)["waiting"] > 0, "the first waiting job")
    for gone in old:
        start_worker(*options, BGJOBS_ALLOWED_JOBS=NEW_NAMES, BGJOBS_APP="host")
        done = statuses(state)["completed"]
        wait_until(lambda done=done: statuses(state)["completed"] >= min(done + 200, JOBS), "jobs")
        gone.terminate()
    wait_until(lambda: statuses(state) == {"completed": JOBS}, "all jobs", seconds=120)
    ran = collections.Counter(lines(journal))
    assert set(ran.values()) == {1}
    assert len(ran) == JOBS
    warned = "Job waits for code | Worker: "
    assert all(worker.log.read_text().count(warned) == 1 for worker in old)


def test_releases_side_by_side(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """Workers of two releases that stay side by side run all jobs, each with its own code."""
    start_worker("-c", "2", BGJOBS_ALLOWED_JOBS=["tests.jobs.fail_times"])
    start_worker("-c", "2", BGJOBS_ALLOWED_JOBS=["tests.jobs.record"])
    jobs = [enqueue("record", str(journal), str(n)) for n in range(200)]
    jobs += [enqueue("fail_times", 0, str(journal)) for _ in range(200)]
    wait_until(lambda: statuses(state) == {"completed": len(jobs)}, "all jobs")
    assert len(lines(journal)) == len(jobs)


def test_job_that_no_release_has_fails_in_the_end(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """After ``BGJOBS_UNKNOWN_TIMEOUT`` a worker refuses the job, and others run meanwhile."""
    config = {"BGJOBS_ALLOWED_JOBS": OLD_NAMES, "BGJOBS_UNKNOWN_TIMEOUT": 1.5}
    worker = start_worker("-c", "1", **config)
    job = enqueue("record", str(journal), "never")
    wait_until(lambda: stored(app, job).status == "waiting", "the wait")
    assert enqueue("fail_times", 0).wait(60).status == "completed"
    assert job.wait(60).status == "failed"
    assert str(job.error).startswith("JobNotAllowed: 'tests.jobs.record' is not allowed")
    assert "Unauthorized or invalid job class/method" in worker.log.read_text()
    assert not journal.exists()
