"""The commands ``flask bgjobs schedules …``, and the banner of a worker."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.flow.schedules.ticker import Ticker
from flask_bgjobs.models import Schedule
from flask_bgjobs.state import state_of
from flask_bgjobs.worker.registration import register
from tests.conftest import count_jobs

pytestmark = pytest.mark.on("sqlite")

SCHEDULE = {
    "shop.report": {
        "job": "tests.jobs.echo",
        "parameters": {"value": {"password": "hunter2"}},
        "cron": "0 3 * * *",
        "timezone": "Europe/Berlin",
        "jitter": 60,
        "grace": 600,
    },
    "shop.poll": {"job": "tests.jobs.echo", "every": dt.timedelta(days=100)},
}


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app(BGJOBS_SCHEDULE=SCHEDULE)


def register_worker(app: Flask) -> None:
    """Register a live worker whose code has the schedules."""
    state = state_of(app)
    ticker = Ticker(state, state.store)
    register(state, "w", schedules=ticker.names)
    ticker.register()


def test_list(app: Flask, run: Any) -> None:
    """The list shows when each recurring job runs, and its state."""
    assert "waits for the first worker" in run("schedules")
    register_worker(app)
    head, poll, report = run("schedules", "list").splitlines()
    assert re.split("  +", head) == [
        "NAME",
        "WHEN",
        "TIME ZONE",
        "NEXT RUN (UTC)",
        "LAST RUN (UTC)",
        "STATE",
    ]
    assert poll.startswith("shop.poll    every 100 days  UTC ")
    assert poll.endswith("active")
    assert report.startswith("shop.report  0 3 * * *       Europe/Berlin  2")


def test_list_as_json(app: Flask, run: Any) -> None:
    """``--json`` works with and without the word ``list``; secrets are masked."""
    register_worker(app)
    data = json.loads(run("schedules", "--json"))
    assert data == json.loads(run("schedules", "list", "--json"))
    poll, report = data
    assert (poll["name"], poll["every"], poll["words"]) == (
        "shop.poll",
        8.64e6,
        "Every 100 days",
    )
    assert (report["cron"], report["words"], report["state"]) == (
        "0 3 * * *",
        "At 03:00",
        "active",
    )
    assert "hunter2" not in json.dumps(data)
    assert report["next_run_at"].endswith("00:00.000Z")


def test_unreadable_row(app: Flask) -> None:
    """The list goes on after a row that cannot be read, and names it on standard error."""
    register_worker(app)
    broken = sa.update(Schedule).where(Schedule.name == "shop.poll").values(definition="{")
    state_of(app).store.transaction(lambda connection: connection.execute(broken))
    result = app.test_cli_runner().invoke(args=["bgjobs", "schedules", "list", "--json"])
    assert result.exit_code == 0
    assert [row["name"] for row in json.loads(result.stdout)] == ["shop.report"]
    assert "The row of the schedule shop.poll cannot be read; a worker" in result.stderr


def test_no_schedules(make_app: Callable[..., Flask]) -> None:
    """Without any, the command says how to add one."""
    result = make_app().test_cli_runner().invoke(args=["bgjobs", "schedules"])
    assert "No recurring jobs: decorate a function with @bgjobs.job(cron=" in result.output


def test_show(app: Flask, run: Any) -> None:
    """``show`` prints the next runs in the zone of the schedule and in UTC, and the last ones."""
    register_worker(app)
    run("schedules", "run", "report")
    text = run("schedules", "show", "report")
    assert "0 3 * * *  (At 03:00)" in text
    assert "up to 60 s" in text
    assert "600 s" in text
    assert text.count(" 03:00:00 CE") == 5
    assert "by hand  job 1" in text
    assert "hunter2" not in text
    data = json.loads(run("schedules", "show", "shop.report", "--json"))
    assert [tick["outcome"] for tick in data["ticks"]] == ["by hand"]
    assert len(data["next_runs"]) == 5


def test_pause_and_resume(app: Flask, run: Any) -> None:
    """A paused schedule says who paused it; resuming says when it runs next."""
    register_worker(app)
    assert run("schedules", "pause", "report") == "Schedule shop.report is paused\n"
    assert "paused by" in run("schedules")
    assert "Schedule shop.report runs next at 2" in run("schedules", "resume", "report")


def test_override_and_reset(app: Flask, run: Any) -> None:
    """An override shows how the schedule differs from the code, until it is reset."""
    register_worker(app)
    text = run("schedules", "override", "report", "--cron", "0 4 * * *", "--grace", "5m")
    assert "0 4 * * *, in the code 0 3 * * *; grace 300 s, in the code 600 s" in text
    assert "(overridden by " in text
    assert "(overridden)" in run("schedules")
    with app.app_context():
        assert find(state_of(app), "report").recurrence.grace == 300
    text = run("schedules", "reset", "report")
    assert text == "Schedule shop.report recurs as in the code: 0 3 * * *\n"


def test_run(app: Flask, run: Any) -> None:
    """``run`` enqueues a job."""
    assert run("schedules", "run", "poll") == "Job 1 enqueued\n"
    assert json.loads(run("schedules", "run", "poll", "--json")) == {
        "job": 2,
        "deduplicated": False,
    }
    assert count_jobs(app) == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("show", "reprt"), 1, "did you mean 'report'?"),
        (("override", "report", "--cron", "0 0 31 2 *"), 1, "it would never run"),
        (("override", "report", "--every", "0"), 1, "every must be at least 1 s"),
        (("override", "report", "--cron", "@daily", "--every", "5"), 1, "not both"),
        (("override", "report"), 2, "at least one option"),
        (("override", "report", "--missed", "x"), 2, "'x' is not one of"),
    ],
    ids=str,
)
def test_mistakes(run: Any, words: tuple[str, ...], code: int, message: str) -> None:
    """A mistake is one sentence that says what is allowed."""
    assert message in run("schedules", *words, code=code)


def test_banner(app: Flask, run: Any) -> None:
    """A worker names its schedules and the next tick of each."""
    text = run("worker", "--burst")
    assert "  schedules  2\n    shop.poll: every 100 days, next at 2" in text
    assert " 03:00:00 CE" in text
    run("schedules", "pause", "poll")
    assert "shop.poll: every 100 days, paused\n" in run("worker", "--burst")
    assert "schedules" not in run("worker", "--burst", "--no-scheduler")
