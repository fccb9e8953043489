"""What a job leaves changed in its process: the next job finds nothing of it."""

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
    """A job of ``tests.process_jobs``, once it has ended."""
    job = run_background_job(f"tests.process_jobs.{name}", parameters=parameters, retries=0)
    return job.wait(DEADLINE_SECONDS)


def test_a_child_is_for_the_next_job_what_it_was(
    app: Flask, start_worker: Start, tmp_path: Path
) -> None:
    """Handlers of signals, timers, blocked signals, context variables, working directory and umask
    that a job in a child process has changed are those of before for the next job there."""
    start_worker("-P", "process", "-c", "1")
    before = run("look_at_process").result
    changing = run("leave_changes", str(tmp_path))
    assert (changing.status, changing.error_type) == ("failed", "ValueError")
    assert run("look_at_process").result == before
    assert before["tenant"] == "nobody"


@POOLS
@pytest.mark.parametrize("name", ["change_own_state", "change_own_state_async"])
def test_context_and_alarm_end_with_the_job(
    app: Flask, start_worker: Start, pool: str, name: str
) -> None:
    """A context variable, an alarm and blocked signals of a job are gone in the next job on the
    same thread or child."""
    start_worker("-P", pool, "-c", "1")
    before = run("look_at_process").result
    assert run(name).status == "completed"
    assert run("look_at_process").result == before


@POOLS
def test_an_alarm_that_is_left_ends_nothing(app: Flask, start_worker: Start, pool: str) -> None:
    """An alarm that a job leaves set hits neither the next job nor the worker."""
    worker = start_worker("-P", pool, "-c", "1")
    run("set_alarm_and_return")
    held = run_background_job("tests.jobs.tell_slowly", parameters=[3, 0.2], retries=0)
    held.wait(DEADLINE_SECONDS)
    assert (held.status, held.attempt) == ("completed", 1)
    assert worker.poll() is None
