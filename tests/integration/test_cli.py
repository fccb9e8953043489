"""The commands: their output and their errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.models import JobLog
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.testing import drain
from tests.apps import build_app
from tests.conftest import count_jobs, stored


def test_enqueue(app: Flask, run: Any) -> None:
    """``enqueue`` accepts target, method, parameters and options, and prints the new job."""
    assert run(
        "enqueue", "tests.jobs.SampleJob", "execute", "-p", '["Hi"]', "--priority", "high",
        "--queue", "mail", "--delay", "5", "--retries", "1",
    ).startswith("Job 1 enqueued, scheduled: tests.jobs.SampleJob.execute")  # fmt: skip
    job = stored(app, 1)
    assert (job.parameters, job.priority, job.queue, job.retries) == (["Hi"], 3, "mail", 1)
    data = json.loads(run("enqueue", "tests.jobs.echo", "--unique-key", "k", "--json"))
    assert data == {"id": 2, "status": "pending", "deduplicated": False}
    assert "is already enqueued" in run("enqueue", "tests.jobs.echo", "--unique-key", "k")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["os.system"], 1, "is not allowed to run as a job"),
        (["tests.jobs.SampleJob", "_private"], 1, "not the name of a public method"),
        (["tests.jobs.echo", "-p", "{nonsense"], 2, "not JSON"),
        (["tests.jobs.echo", "-p", '"text"'], 1, "must be a list"),
        (["tests.jobs.echo", "-p", "[NaN]"], 1, "parameters[0]"),
        (["tests.jobs.echo", "--delay", "-1"], 1, "delay must be at least 0"),
        (["tests.jobs.echo", "--delay", "nan"], 1, "delay must be"),
        (["tests.jobs.echo", "--priority", "urgent"], 1, "high, medium, low"),
        (["tests.jobs.echo", "--queue", "A B"], 1, "queue must be"),
        ([], 2, "Missing argument"),
    ],
)
def test_enqueue_refuses_in_one_sentence(
    app: Flask, run: Any, words: list[str], code: int, message: str
) -> None:
    """The command refuses what the API refuses, in one sentence, with exit code 1 or 2."""
    output = run("enqueue", *words, code=code)
    assert message in output
    assert "Traceback" not in output
    assert count_jobs(app) == 0


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ('"', "a quote is not closed"),
        ("http://x", 'there is no field "http"'),
        ("a," * 10_000, "a comma must be between two values"),
    ],
)
def test_invalid_search_is_a_usage_error(app: Flask, run: Any, search: str, message: str) -> None:
    """An invalid search is a usage error that says what to write."""
    output = run("list", "--search", search, code=2)
    assert message in output
    assert "Traceback" not in output
    assert len(output) < 1_000


TERMINAL = "\x1b]0;title\x07 \x9b31m \x1b[2J \u202e \x7f"


def test_escape_sequences_are_not_printed(app: Flask, state: AppState, run: Any) -> None:
    """Escape sequences in the values of a job are printed as text, in tables and in JSON."""
    job = run_background_job(
        "tests.jobs.fail", parameters=[TERMINAL], retries=0, owner=TERMINAL, tags=["x"]
    )
    (settled,) = drain(app)
    assert settled.status == "failed"
    line = sa.insert(JobLog).values(
        job_id=job.id, attempt=1, created_at=state.store.now, message=f"{TERMINAL}\nsecond"
    )
    state.store.transaction(lambda connection: connection.execute(line))
    outputs = [
        run(*words)
        for words in (
            ("show", str(job.id)),
            ("show", str(job.id), "--json"),
            ("list",),
            ("list", "--json"),
        )
    ]
    for output in outputs:
        assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output) == []
    assert json.loads(outputs[1])["owner"] == TERMINAL
    assert json.loads(outputs[3])[0]["owner"] == TERMINAL
    assert "\\x1b]0;title" in outputs[0]


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31m", "x" * 256])
def test_invalid_worker_name_is_refused(app: Flask, run: Any, name: str) -> None:
    """A worker's name with control characters, or one that is too long, is refused."""
    output = run("worker", "--burst", "-n", name, code=1)
    assert "a worker's name has at most 255 characters" in output
    assert len(output) < 1_000
    assert "\x1b" not in output


def test_list(app: Flask, run: Any) -> None:
    """``list`` shows jobs newest first, with filters, as a table or as JSON."""
    run_background_job("tests.jobs.echo", queue="mail")
    run_background_job("tests.jobs.fail", parameters=["x\ny"], retries=0)
    drain(app)
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == ["ID", "2", "1"]
    assert "ValueError: x\\ny" in lines[1]
    assert [row["id"] for row in json.loads(run("list", "--status", "failed", "--json"))] == [2]
    assert [row["id"] for row in json.loads(run("list", "--queue", "mail", "--json"))] == [1]
    assert [row["id"] for row in json.loads(run("list", "--search", "jobs.fail", "--json"))] == [2]
    assert run("list", "--queue", "none") == "No jobs\n"
    run("list", "--status", "nonsense", code=2)


def test_show(app: Flask, run: Any) -> None:
    """``show`` prints fields, log and attempts, with masked secrets."""
    run_background_job("tests.jobs.login", parameters=["ann", "hunter2!"], retries=0)
    run_background_job("tests.jobs.report")
    drain(app)
    for words in (["show", "1"], ["show", "1", "--json"], ["list"], ["list", "--json"]):
        assert "hunter2!" not in run(*words)
    data = json.loads(run("show", "1", "--json"))
    assert data["parameters"] == ["ann", "***"]
    assert data["error"] == "ValueError: ann could not log in with ***"
    assert "Traceback" in data["attempts"][0]["traceback"]
    assert "step 1" in run("show", "2")
    assert "does not exist" in run("show", "99", code=1)
    run("show", "x", code=2)


def test_cancel_retry_delete(app: Flask, run: Any, state: AppState) -> None:
    """``cancel``, ``retry`` and ``delete`` print the result for each job, and fail if nothing
    changed."""
    run_background_job("tests.jobs.echo")
    assert "Job 1 cancelled" in run("cancel", "1")
    assert "Job 1 skipped: it is already cancelled" in run("cancel", "1", code=1)
    assert "Job 1 pending again" in run("retry", "1")
    assert "Job 9 skipped: it does not exist" in run("cancel", "1", "9")
    state.store.retry([1])
    result = app.test_cli_runner().invoke(args=["bgjobs", "delete", "1"], input="n\n")
    assert result.exit_code == 1
    assert count_jobs(app) == 1
    assert "Job 1 deleted" in run("delete", "1", "--yes")
    assert count_jobs(app) == 0
    run("cancel", code=2)
    run("cancel", "0", code=2)
    for command in ("show", "cancel", "retry", "delete"):
        run(command, str(2**63), code=2)


def test_check_reports_every_difference(app: Flask, run: Any, state: AppState) -> None:
    """``check`` succeeds on a fresh database, and reports each difference after a change."""
    assert "matches the models" in run("check")
    on_table = " ON bgjobs_job" if state.store.engine.name == "mysql" else ""
    for statement in (
        f"DROP INDEX ix_bgjobs_job_due{on_table}",
        "ALTER TABLE bgjobs_job DROP COLUMN owner",
        "ALTER TABLE bgjobs_job ADD COLUMN extra TEXT",
        "DROP TABLE bgjobs_log",
    ):
        state.store.transaction(lambda c, text=statement: c.exec_driver_sql(text))
    output = run("check", code=1)
    for sentence in (
        "index ix_bgjobs_job_due on bgjobs_job is missing",
        "column bgjobs_job.owner is missing",
        "column bgjobs_job.extra is not part of flask-bgjobs",
        "table bgjobs_log is missing",
    ):
        assert sentence in output


def test_missing_tables_name_the_command(empty_database_url: str) -> None:
    """Without tables, each command fails and names the command that creates them."""
    app = build_app(empty_database_url)
    for words in (["list"], ["enqueue", "tests.jobs.echo"], ["cancel", "1"], ["worker"]):
        result = app.test_cli_runner().invoke(args=["bgjobs", *words])
        assert result.exit_code == 1, words
        assert "flask db upgrade" in result.output
        assert "Traceback" not in result.output
    with app.app_context():
        app.extensions["bgjobs"].store.dispose()
        app.extensions["sqlalchemy"].engine.dispose()


def test_worker_prints_settings_and_results(app: Flask, run: Any) -> None:
    """``worker`` prints app, database, queues and allow-list, and at the end the number of jobs."""
    run_background_job("tests.jobs.echo", queue="mail")
    output = run("worker", "--burst", "-q", "mail, low", "-c", "2", "-n", "me")
    assert "worker me for the app shop" in output
    for line in (
        f"database   {state_of(app).store.host_engine.url}",
        "queues     mail, low",
        "pool       2 threads",
        f"allowed    {len(app.config['BGJOBS_ALLOWED_JOBS'])} names",
        "dashboard  off",
    ):
        assert f"  {line}\n" in output
    assert re.search(r"Worker me stopped after \d+\.\d s: 1 completed\n", output)
    assert "s: no jobs" in run("worker", "--burst")


@pytest.mark.on("sqlite")
def test_worker_prints_dashboard_prefix(make_app: Callable[..., Flask]) -> None:
    """``worker`` prints the URL prefix of the dashboard."""
    app = make_app(BGJOBS_DASHBOARD=True, BGJOBS_DASHBOARD_URL_PREFIX="/background")
    result = app.test_cli_runner().invoke(args=["bgjobs", "worker", "--burst"])
    assert "  dashboard  /background\n" in result.output


@pytest.mark.parametrize(
    "words",
    [
        ["-q", "A B"],
        ["-c", "0"],
        ["--max-jobs", "0"],
        ["--max-time", "-1"],
        ["--shutdown-timeout", "x"],
        ["--nonsense"],
    ],
)
def test_worker_usage_errors(run: Any, words: list[str]) -> None:
    """Invalid options end with exit code 2."""
    run("worker", *words, code=2)


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("option", ["--max-time", "--max-memory", "--shutdown-timeout"])
@pytest.mark.parametrize("value", ["nan", "NaN", "-1", "inf", "soon"])
def test_worker_limits_must_be_numbers(app: Flask, run: Any, option: str, value: str) -> None:
    """A limit that is not a number, or out of range, is a usage error."""
    assert option in run("worker", option, value, code=2)


@pytest.mark.on("postgresql")
def test_check_reports_missing_keepalive(make_app: Callable[..., Flask], database_url: str) -> None:
    """``check`` says what to set if a dead connection would only be noticed after hours."""

    def output(**connect_args: Any) -> str:
        app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": connect_args})
        result = app.test_cli_runner().invoke(args=["bgjobs", "check"])
        assert result.exit_code == 0, result.output
        return str(result.output)

    assert "Note: the app's connections to PostgreSQL" in output()
    assert "Note:" not in output(keepalives_idle=30)
    assert "Note:" not in output(tcp_user_timeout=60_000)
