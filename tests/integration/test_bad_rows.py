"""Invalid rows: only their own jobs fail, and all pages and commands still work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.job.row_check import checked
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.worker import Worker
from tests.conftest import stored, wait_until
from tests.unit.helpers import make_spec

pytestmark = pytest.mark.slow

Cases = Sequence[tuple[str, Any]]
"""Columns with values."""
MAX = 2_147_483_647
DEEP = "[" * 100_000

ON_ALL = [
    ("attempt", MAX),
    ("retry_count", -7),
    ("retries", -1),
    ("crash_count", -1),
    ("retry_delay", "[NaN]"),
    ("retry_delay", "[-Infinity]"),
    ("retry_delay", "[-5]"),
    ("retry_delay", "[1e300]"),
    ("retry_delay", "5"),
    ("retry_delay", "null"),
    ("retry_delay", '[["a"]]'),
    ("retry_delay", '["1"]'),
    ("retry_delay", "[]"),
    ("retry_delay", "{}"),
    ("retry_delay", "nonsense"),
    ("retry_delay", "[" * 50_000),
    ("backoff", "nonsense"),
    ("backoff", ""),
    ("jitter", -1.0),
    ("jitter", 1e300),
    ("timeout", 0.0),
    ("timeout", -1.0),
    ("max_retry_delay", -1.0),
    ("target", ""),
    ("target", "os._exit"),
    ("target", "tests.jobs.echo "),
    ("method", "execute"),
    ("method", "__init__"),
    ("parameters", "5"),
    ("parameters", "null"),
    ("parameters", "nonsense"),
    ("parameters", '"text"'),
    ("parameters", '{"no": "such"}'),
    ("parameters", '[{"__bgjobs__": "datetime", "v": 5}]'),
    ("parameters", DEEP),
]
"""Values with which a job cannot run, on every database."""
ON_POSTGRESQL = [
    *((name, value) for name in ("jitter", "timeout", "max_retry_delay") for value in ("NaN",)),
    *((name, "Infinity") for name in ("jitter", "timeout", "max_retry_delay")),
    ("run_at", "-infinity"),
    ("run_at", "0001-01-01 BC"),
]
ON_SQLITE = [
    *(
        (name, value)
        for name in ("retry_count", "retries", "crash_count")
        for value in ("abc", b"\0", 1.5, 2**40)
    ),
    ("attempt", 2**40),
    *(
        (name, value)
        for name in ("jitter", "timeout", "max_retry_delay")
        for value in ("abc", b"\0", float("inf"))
    ),
    *((name, b"\xff\0") for name in ("target", "method", "parameters", "retry_delay")),
    ("run_at", ""),
    ("run_at", "2026"),
    ("run_at", b"\0"),
    ("run_at", 5),
]
HARMLESS = [
    ("timeout", 1e10),
    ("timeout", 1e300),
    ("priority", -MAX),
    ("claim_rank", 2**40),
    ("retries", MAX),
    ("meta", "nonsense"),
    ("meta", "[]"),
    ("meta", DEEP),
    ("tags", "nonsense"),
    ("tags", "5"),
    ("owner", "\u202e<b>"),
    ("unique_key", ""),
    *(("failure_rules", value) for value in ("nonsense", "[]", "[" * 5_000)),
    ("retention_seconds", -1.0),
    ("worker_id", -1),
    ("progress_note", "x" * 255),
    ("result", "nonsense"),
    ("error", "\u202e<b>"),
    ("waits_for", "nonsense"),
    ("waits_for", "code"),
    ("waiting_on", "\u202e<b>"),
    *(
        ("limits", value)
        for value in ("nonsense", "[]", "[[1]]", '[["a", "b", {"no": 1}]]', "[" * 5_000)
    ),
    ("limit_key_id", 5),
    ("fair_key", ""),
    ("fair_key", "\u202e<b>"),
]
"""Invalid values that do not prevent a job from running."""
HARMLESS_ON_SQLITE = [
    *(
        (name, value)
        for name in (
            *("created_at", "claimed_at", "started_at", "finished_at", "cancel_requested_at"),
            *("unique_expires_at", "debounce_until", "waiting_since"),
        )
        for value in ("", "never", b"\0", 5)
    ),
    *(
        (name, "abc")
        for name in ("progress", "worker_id", "suspect", "claim_rank", "unique_until_start")
    ),
    ("retention_seconds", "abc"),
    ("failure_rules", b"\xff"),
    ("progress", 1e300),
    *(("priority", value) for value in ("abc", b"\0", 1.5, 2**40)),
    *(("attempt", value) for value in ("abc", b"\0", 1.5)),
    ("queue", b"\xff\0"),
    ("result", b"\xff"),
    ("error", b"\xff"),
    ("tags", b"\xff"),
    ("limits", b"\xff"),
    ("limit_key_id", "abc"),
]
ALL_COLUMNS = {column.name for column in Job.__table__.columns}


def spoil(app: Flask, job: Job, column: str, value: Any) -> None:
    """Write a value that no enqueue writes."""
    with state_of(app).store.host_engine.begin() as connection:
        connection.exec_driver_sql(*_update(connection.dialect.name, column, value, job.id))


def _update(dialect: str, column: str, value: Any, job_id: int) -> tuple[str, tuple[Any, ...]]:
    mark = "?" if dialect == "sqlite" else "%s"
    cast = "::text::timestamp" if dialect == "postgresql" and column.endswith("_at") else ""
    statement = f"UPDATE bgjobs_job SET {column} = {mark}{cast} WHERE id = {mark}"
    return statement, (value, job_id)


LIST_PAGES = [
    "/jobs/",
    "/jobs/list",
    "/jobs/list?sort=run_at",
    "/jobs/list?sort=-priority",
    "/jobs/list?q=tests",
    "/jobs/errors",
    "/jobs/queues",
    "/jobs/workers",
    "/jobs/schedules",
    "/jobs/limits",
    "/jobs/api/v1/weights",
    "/jobs/api/v1/jobs",
    "/jobs/api/v1/stats",
]
JOB_PAGES = ["/jobs/job/{}", "/jobs/dispatch?from={}", "/jobs/api/v1/jobs/{}"]


def assert_pages_and_commands_work(app: Flask, run: Any, jobs: Sequence[Job]) -> None:
    """No page and no command that shows one of the jobs fails."""
    client = app.test_client()
    addresses = [*LIST_PAGES, *(page.format(job.id) for page in JOB_PAGES for job in jobs)]
    codes = {address: client.get(address).status_code for address in addresses}
    assert {address: code for address, code in codes.items() if code >= 500} == {}
    for words in (["list"], ["list", "--json"], ["stats"]):
        run(*words)
    for job in jobs:
        run("show", str(job.id))
        run("show", str(job.id), "--json")


def spoil_each(app: Flask, cases: Cases) -> list[Job]:
    """Create a job for each case, with that value in that column."""
    jobs = [run_background_job("tests.jobs.echo", retries=0) for _ in cases]
    for job, (column, value) in zip(jobs, cases, strict=True):
        spoil(app, job, column, value)
    return jobs


def run_burst(app: Flask, **options: Any) -> None:
    Worker(state_of(app), WorkerOptions(burst=True, concurrency=1, **options)).run()


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    """An app with a public dashboard."""
    return make_app(BGJOBS_DASHBOARD_PUBLIC=True)


def test_bad_rows_fail_alone(app: Flask, run: Any) -> None:
    """A job with an invalid row fails with a message; the job after it completes."""
    assert_fail_alone(app, run, ON_ALL)


@pytest.mark.on("postgresql")
def test_bad_postgresql_rows_fail_alone(app: Flask, run: Any) -> None:
    """A value that only PostgreSQL can store, such as NaN or an infinite time, fails only its own
    job."""
    assert_fail_alone(app, run, ON_POSTGRESQL)


@pytest.mark.on("sqlite")
def test_bad_sqlite_rows_fail_alone(app: Flask, run: Any) -> None:
    """SQLite stores any type in any column; a value of a wrong type fails only its own job."""
    assert_fail_alone(app, run, ON_SQLITE)


def assert_fail_alone(app: Flask, run: Any, cases: Cases) -> None:
    bad = spoil_each(app, cases)
    good = run_background_job("tests.jobs.echo", parameters=["good"], priority=-1)
    assert_pages_and_commands_work(app, run, bad)
    run_burst(app)
    assert stored(app, good).status == "completed"
    ended = {case: stored(app, job) for case, job in zip(cases, bad, strict=True)}
    assert {case: j.status for case, j in ended.items() if j.status != "failed"} == {}
    assert [case for case, job in ended.items() if not job.error] == []
    assert_pages_and_commands_work(app, run, bad)


def test_jobs_with_harmless_values_run(app: Flask, run: Any) -> None:
    """An invalid value in a column that running does not need does not prevent the job from
    running."""
    assert_run(app, run, HARMLESS)


@pytest.mark.on("sqlite")
def test_jobs_with_harmless_sqlite_values_run(app: Flask, run: Any) -> None:
    """The same applies to values of wrong types, which only SQLite stores."""
    assert_run(app, run, HARMLESS_ON_SQLITE)


def assert_run(app: Flask, run: Any, cases: Cases) -> None:
    bad = spoil_each(app, cases)
    assert_pages_and_commands_work(app, run, bad)
    run_burst(app)
    ended = {case: stored(app, job).status for case, job in zip(cases, bad, strict=True)}
    assert {case: status for case, status in ended.items() if status != "completed"} == {}
    for job, (column, value) in zip(bad, cases, strict=True):
        spoil(app, job, column, value)
    assert_pages_and_commands_work(app, run, bad)


@pytest.mark.on("sqlite", "postgresql")
def test_negative_attempt_delays_no_other_job(app: Flask) -> None:
    """A job with a negative ``attempt`` waits for a worker with a list of queues, and delays no
    other job."""
    (bad,) = spoil_each(app, [("attempt", -5)])
    good = run_background_job("tests.jobs.echo")
    run_burst(app)
    assert (stored(app, good).status, stored(app, bad).status) == ("completed", "pending")
    run_burst(app, queues=["default"])
    assert stored(app, bad).status == "failed"


def test_every_column_has_a_case() -> None:
    """Every column that an edit can spoil has a case in this module."""
    cases = [*ON_ALL, *ON_POSTGRESQL, *ON_SQLITE, *HARMLESS, *HARMLESS_ON_SQLITE]
    left = ALL_COLUMNS - {column for column, _ in cases}
    # Unknown statuses and invalid deadlines are tested below.
    assert left == {"id", "error_type", "unique_hash", "status", "deadline_at"}


@pytest.mark.on("sqlite")
def test_invalid_deadlines_end_only_their_jobs(app: Flask, run: Any) -> None:
    """A job whose deadline is no time runs or expires, and others run."""
    bad = spoil_each(app, [("deadline_at", value) for value in ("", "never", b"\0", 5)])
    good = run_background_job("tests.jobs.echo")
    assert_pages_and_commands_work(app, run, bad)
    run_burst(app)
    assert stored(app, good).status == "completed"
    assert {stored(app, job).status for job in bad} <= {"completed", "cancelled"}


def test_unknown_statuses_are_shown(app: Flask, run: Any) -> None:
    """A job with an unknown status is shown with it, is not run, and can be deleted."""
    statuses = ["nonsense", "", "RUNNING", "later"]
    bad = spoil_each(app, [("status", status) for status in statuses])
    good = run_background_job("tests.jobs.echo")
    run_burst(app)
    assert stored(app, good).status == "completed"
    assert [stored(app, job).status for job in bad] == statuses
    assert_pages_and_commands_work(app, run, bad)
    run("delete", *(str(job.id) for job in bad), "--yes")
    assert [state_of(app).store.get(job.id) for job in bad] == [None] * len(bad)


def test_running_job_without_a_worker_is_rescued(app: Flask, state: AppState) -> None:
    """A running job without a worker, or with an unknown one, is run again."""
    lost = [run_background_job("tests.jobs.echo", parameters=[n]) for n in range(2)]
    for job, worker_id in zip(lost, (None, -7), strict=True):
        spoil(app, job, "worker_id", worker_id)
        spoil(app, job, "status", "running")
    worker = Worker(state, WorkerOptions(concurrency=1))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: all(stored(app, job).status == "completed" for job in lost), "both jobs")
    finally:
        worker.stop()
        thread.join(60)


@pytest.mark.parametrize(
    ("column", "value"), [("retry_delay", "[NaN]"), ("crash_count", MAX), ("retry_count", -7)]
)
def test_bad_row_does_not_block_a_rescue(
    app: Flask, state: AppState, column: str, value: Any
) -> None:
    """A row that was spoiled while it ran does not prevent the rescue of other jobs."""
    from flask_bgjobs.worker.registration import register

    dead = register(state, "dead", concurrency=1)
    bad, good = (run_background_job("tests.jobs.echo", parameters=[n]) for n in range(2))
    state.store.claim(dead, 2)
    spoil(app, bad, "suspect", True)
    spoil(app, bad, column, value)
    state.store.rescue(dead, 0)
    assert stored(app, good).status == "pending"
    assert stored(app, bad).status in ("pending", "failed")
    with state.store.read() as connection:
        statuses = connection.scalars(sa.select(WorkerRow.status)).all()
    assert list(statuses) == ["dead"]


@pytest.mark.on("sqlite")
def test_drain_fails_bad_rows(app: Flask) -> None:
    """``drain`` fails an invalid row as a worker does."""
    bad = run_background_job("tests.jobs.echo", parameters=["bad"])
    spoil(app, bad, "jitter", -1)
    (settled,) = drain(app)
    assert settled.error is not None
    assert "InvalidRow: the row's jitter is -1" in settled.error


def test_check_of_valid_row_makes_no_copy() -> None:
    """The check of a valid row returns the same object."""
    spec = make_spec()
    assert checked(spec) == (spec, None)
    assert checked(spec)[0] is spec
