"""Changes that a job leaves in its process: the next job starts without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import Job, run_background_job
from tests.conftest import DEADLINE_SECONDS

pytestmark = [pytest.mark.acceptance, pytest.mark.on("sqlite")]
Start = Callable[..., Any]

POOLS = pytest.mark.parametrize("pool", ["thread", "process"])


def run(name: str, *parameters: Any) -> Job:
    """Run a job of ``tests.process_jobs`` and wait for its end."""
    job = run_background_job(f"tests.process_jobs.{name}", parameters=parameters, retries=0)
    return job.wait(DEADLINE_SECONDS)


def test_next_job_finds_the_child_unchanged(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """After a job in a child process changed signal handlers, timers, blocked signals, context
    variables, the working directory and the umask, the next job there finds the former values."""
    start_worker("-P", "process", "-c", "1")
    before = run("inspect_process").result
    changing = run("change_process_and_raise", str(tmp_path))
    assert (changing.status, changing.error_type) == ("failed", "ValueError")
    assert run("inspect_process").result == before
    assert before["tenant"] == "no tenant"


@POOLS
@pytest.mark.parametrize("name", ["change_own_state", "change_own_state_async"])
def test_context_and_alarm_end_with_the_job(
    app: Flask, start_worker: Start, pool: str, name: str
) -> None:
    """The next job in the same thread or child starts without the context variable, the alarm and
    the blocked signals of the job before."""
    start_worker("-P", pool, "-c", "1")
    before = run("inspect_process").result
    assert run(name).status == "completed"
    assert run("inspect_process").result == before


@POOLS
def test_leftover_alarm_ends_neither_job_nor_worker(
    app: Flask, start_worker: Start, pool: str
) -> None:
    """An alarm that a job leaves set interrupts neither the next job nor the worker."""
    worker = start_worker("-P", pool, "-c", "1")
    run("set_alarm_and_return")
    held = run_background_job("tests.jobs.tell_slowly", parameters=[3, 0.2], retries=0)
    held.wait(DEADLINE_SECONDS)
    assert (held.status, held.attempt) == ("completed", 1)
    assert worker.poll() is None
