"""Many jobs at once: all outcomes are those that the test computed in advance."""

from __future__ import annotations

import collections
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import BgJobsError, Job, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_sets
from flask_bgjobs.job.statuses import FINAL
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import descendants
from tests.conftest import count_jobs, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]


def _statuses(state: AppState) -> collections.Counter[tuple[str, str, int]]:
    """The number of jobs by target, status and retries used."""
    columns = sa.select(Job.target, Job.status, Job.retry_count)
    with state.store.read() as connection:
        return collections.Counter(
            (row.target.rpartition(".")[2], row.status, row.retry_count)
            for row in connection.execute(columns)
        )


def _all_jobs_ended(state: AppState) -> bool:
    """Whether all jobs have ended; a cheap query, because the test polls it."""
    unfinished = sa.select(Job.id).where(Job.status.not_in(sorted(FINAL))).limit(1)
    with state.store.read() as connection:
        return connection.scalar(unfinished) is None


def test_a_thousand_mixed_jobs_end_as_expected(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """1,001 jobs that pass, fail, retry, hang, wait, are cancelled or refused end as expected."""
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
    wait_until(lambda: _all_jobs_ended(state), "the end of all jobs")
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


CRASHING = {"exit_quietly", "crash_worker", "crash_once", "ignore_term"}


class Mix:
    """Jobs of many kinds, their expected outcomes, and the jobs to cancel."""

    def __init__(self, state: AppState, journal: str, *, with_crashes: bool) -> None:
        self.expected: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self.to_cancel: list[Job] = []
        self.racing: list[Job] = []
        self._random = random.Random(3)
        kinds: list[tuple[int, str, list[Any], dict[str, Any], tuple[str, int]]] = [
            (526, "echo", [1], {}, ("completed", 0)),
            (66, "fail_times", [1], {"retries": 1, "retry_delay": 0.05}, ("completed", 1)),
            (100, "fail", [], {"retries": 2, "retry_delay": 0.02}, ("failed", 2)),
            (50, "system_exit", [], {"retries": 0}, ("failed", 0)),
            (50, "hold", [journal, 600], {"timeout": 0.1, "retries": 0}, ("failed", 0)),
            (50, "async_hold", [journal], {}, ("cancelled", 0)),
            (50, "record", [journal, "late"], {"delay": 600}, ("cancelled", 0)),
            (66, "report", [2], {}, ("racing", 0)),
            (10, "exit_quietly", [0], {}, ("failed", 0)),
            (10, "crash_worker", [journal], {"retries": 1}, ("failed", 0)),
            (10, "crash_once", [journal], {"retries": 0}, ("completed", 0)),
            (10, "ignore_term", [journal], {"timeout": 0.1, "retries": 0}, ("failed", 0)),
        ]
        kinds = [kind for kind in kinds if with_crashes or kind[1] not in CRASHING]
        names = [kind for kind in kinds for _ in range(kind[0])]
        self._random.shuffle(names)
        for _, name, parameters, options, (status, retries) in names:
            job = run_background_job(
                f"tests.jobs.{name}", parameters=parameters, session=state.db.session, **options
            )
            if status == "racing":
                self.racing.append(job)
                continue
            self.expected[name, status, retries] += 1
            if status == "cancelled":
                self.to_cancel.append(job)
        # One commit for all: thousands of commits would take minutes on a slow disk.
        state.db.session.commit()
        self.size = len(names)

        self._uncancelled = self.to_cancel + self.racing
        self._random.shuffle(self._uncancelled)

    def cancel_at_random(self, state: AppState, left: int = 0) -> None:
        """Cancel a few jobs at a time until ``left`` are left, while the other jobs run. Waits for
        the end of cancelled jobs that were running."""
        jobs = self._uncancelled
        while len(jobs) > left:
            batch = [jobs.pop() for _ in range(min(len(jobs), self._random.randint(1, 20)))]
            state.store.cancel([job.id for job in batch])
            running = [job for job in batch if job.refresh().status == "running"]
            wait_until(lambda running=running: all(j.refresh().is_finished for j in running))


def _memory(pid: int) -> int:
    """The resident memory of a process, in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 // 2**20


@pytest.mark.on("sqlite")
def test_a_thousand_mixed_jobs_in_children(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """998 jobs that pass, raise, exit, hang until their timeout, kill their own process, ignore
    SIGTERM or are cancelled at random end as expected. The worker's memory grows by less than
    20 MiB, and no child process is left."""
    mix = Mix(state, str(tmp_path / "journal"), with_crashes=True)
    assert mix.size == 998
    _run(mix, start_worker("-P", "process", "-c", "4"), state, tmp_path / "journal")


@pytest.mark.on("sqlite")
def test_a_thousand_mixed_jobs_in_threads(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """958 mixed jobs, without those that kill their process or ignore SIGTERM, end as expected."""
    mix = Mix(state, str(tmp_path / "journal"), with_crashes=False)
    assert mix.size == 958
    _run(mix, start_worker("-c", "10"), state, tmp_path / "journal")


def _run(mix: Mix, worker: Any, state: AppState, journal: Path) -> None:
    mix.cancel_at_random(state, left=mix.size // 9)
    before = _memory(worker.pid)
    mix.cancel_at_random(state)
    wait_until(lambda: _all_jobs_ended(state), "the end of all jobs", 200)
    seen = _statuses(state)
    raced = seen.pop(("report", "completed", 0), 0) + seen.pop(("report", "cancelled", 0), 0)
    assert raced == len(mix.racing)
    assert seen == mix.expected
    assert _memory(worker.pid) - before < 20
    below = descendants(worker.pid)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert "late" not in journal.read_text().splitlines()
