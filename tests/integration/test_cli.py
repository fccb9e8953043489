"""The commands: what they print, and how they fail."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.app_state import AppState, state_of
from flask_bgjobs.testing import drain
from tests import jobs
from tests.apps import build_app
from tests.conftest import count_jobs, stored


def test_enqueue(app: Flask, run: Any) -> None:
    """``enqueue`` takes target, method, parameters and options, and says what it made."""
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
    """What the API refuses, the command refuses the same: one sentence, exit code 1 or 2."""
    output = run("enqueue", *words, code=code)
    assert message in output
    assert "Traceback" not in output
    assert count_jobs(app) == 0


def test_list(app: Flask, run: Any) -> None:
    """``list`` shows jobs newest first, filtered, as a table or as JSON."""
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
    """``show`` prints fields, log and attempts, with secrets masked."""
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
    """Changes say what they did to each job, and fail when they did nothing."""
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


def test_check_names_every_difference(app: Flask, run: Any, state: AppState) -> None:
    """``check`` is clean on a fresh database, and names what differs after a change."""
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
        "column bgjobs_job.extra is not one of ours",
        "table bgjobs_log is missing",
    ):
        assert sentence in output


def test_without_tables_one_sentence_says_what_to_run(database_url: str) -> None:
    """Without tables each command fails with the command that makes them."""
    app = build_app(database_url)
    for words in (["list"], ["enqueue", "tests.jobs.echo"], ["cancel", "1"], ["worker"]):
        result = app.test_cli_runner().invoke(args=["bgjobs", *words])
        assert result.exit_code == 1, words
        assert "flask db upgrade" in result.output
        assert "Traceback" not in result.output
    with app.app_context():
        app.extensions["bgjobs"].store.dispose()
        app.extensions["sqlalchemy"].engine.dispose()


def test_worker_says_what_it_is_and_did(app: Flask, run: Any) -> None:
    """``worker`` names app, database, queues and allow-list, and at the end what it did."""
    run_background_job("tests.jobs.echo", queue="mail")
    output = run("worker", "--burst", "-q", "mail, low", "-c", "2", "-n", "me")
    assert "worker me for the app shop" in output
    for line in (
        f"database   {state_of(app).store.host_engine.url}",
        "queues     mail, low",
        "pool       2 threads",
        f"allowed    {len(jobs.NAMES)} names",
        "dashboard  /jobs",
    ):
        assert f"  {line}\n" in output
    assert re.search(r"Worker me stopped after \d+\.\d s: 1 completed\n", output)
    assert "ran no job" in run("worker", "--burst")


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
def test_worker_refuses_wrong_usage(run: Any, words: list[str]) -> None:
    """Wrong usage ends with exit code 2."""
    run("worker", *words, code=2)
