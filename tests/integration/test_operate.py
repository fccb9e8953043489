"""The operator's commands: statistics, queues, workers, prune, health, and changes of many jobs."""

from __future__ import annotations

import datetime as dt
import io
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, JobStatus, QueueNotFound, run_background_job
from flask_bgjobs.cli.output import progress_bar
from flask_bgjobs.enqueue.enqueue import enqueue
from flask_bgjobs.job.limits import Rule
from flask_bgjobs.job.turns import claim_rank
from flask_bgjobs.models import LimitRow, Queue, Worker
from flask_bgjobs.operations import actions
from flask_bgjobs.operations.queries import queue_stats, service_now
from flask_bgjobs.options import JobOptions
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.signals import job_cancelled
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.registration import register
from tests.apps import build_app
from tests.conftest import EXPORT, count_jobs, stored

DAY = 86_400.0


@pytest.fixture
def state(app: Flask) -> AppState:
    """The state of the app. Registered workers, which send no heartbeats here, stay alive on a slow
    machine."""
    found = state_of(app)
    object.__setattr__(found.config, "lease", 600.0)
    return found


def add(state: AppState, count: int = 1, *, age: float = 0.0, **values: Any) -> list[int]:
    """The ids of new jobs with these column values, enqueued and finished ``age`` seconds ago."""
    jobs = enqueue(state, "tests.jobs.echo", None, [()] * count, JobOptions(), None)
    ids = [job.id for job in jobs]
    then = state.store.after(sa.literal(-age))
    if JobStatus(values.get("status", "pending")).is_final:
        values["finished_at"] = then
    change(state, sa.update(Job).where(Job.id.in_(ids)).values(created_at=then, **values))
    return ids


def change(state: AppState, statement: Any) -> None:
    state.store.transaction(lambda connection: connection.execute(statement))


def silence(state: AppState, worker_id: int, seconds: float = 3_600) -> None:
    """Set a worker's last heartbeat to a long time ago."""
    long_ago = state.store.after(sa.literal(-seconds))
    change(state, sa.update(Worker).where(Worker.id == worker_id).values(heartbeat_at=long_ago))


def ids_with_status(state: AppState, *statuses: str) -> list[int]:
    statement = sa.select(Job.id).where(Job.status.in_(statuses)).order_by(Job.id)
    with state.store.read() as connection:
        return list(connection.scalars(statement))


def run_json(run: Any, *words: str, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code))


# Statistics


@pytest.mark.parametrize("most", [1, None])
def test_oldest_pending_job_at_any_priority(state: AppState, most: int | None) -> None:
    """The time of a queue's oldest pending job is correct at any priority, also if few jobs are
    counted."""
    chance = random.Random(11)
    now = service_now(state).now
    oldest: dict[str, dt.datetime] = {}
    for priority in range(-3, 4):
        for _ in range(6):
            queue = chance.choice(["default", "mail", "reports"])
            due = now - dt.timedelta(seconds=chance.randrange(10_000))
            add(state, queue=queue, priority=priority, claim_rank=claim_rank(priority), run_at=due)
            oldest[queue] = min(due, oldest.get(queue, due))
    add(state, queue="later", status="scheduled", run_at=now)
    found = {each.name: each.oldest_pending_at for each in queue_stats(state, most=most)}
    assert found == {**oldest, "later": None}


def test_stats(state: AppState, run: Any) -> None:
    """``stats`` counts jobs by status and queue, jobs finished in the last hour, and workers."""
    add(state, 2, queue="mail", run_at=state.store.after(sa.literal(-120.0)))
    add(state, 1, queue="mail", status="scheduled")
    add(state, 1, status="running")
    add(state, 3, status="completed")
    add(state, 1, status="completed", age=7_200)
    add(state, 1, status="failed", age=3_000)
    register(state, "alive")
    silence(state, register(state, "silent"))
    data = run_json(run, "stats")
    assert data["jobs"] == {
        "scheduled": 1,
        "waiting": 0,
        "pending": 2,
        "running": 1,
        "retrying": 0,
        "completed": 4,
        "failed": 1,
        "cancelled": 0,
    }
    default, mail = data["queues"]
    assert (default["name"], default["queued"], default["running"]) == ("default", 0, 1)
    assert default["oldest_pending_seconds"] is None
    assert (mail["name"], mail["queued"], mail["running"]) == ("mail", 3, 0)
    assert 120 <= mail["oldest_pending_seconds"] < 180
    assert data["last_hour"] == {"completed": 3, "failed": 1}
    assert data["workers"] == {"alive": 1, "silent": 1}
    output = run("stats")
    for line in ("completed  4", "mail     3       0        2 min", "1 alive, 1 silent"):
        assert line in output
    assert "Last hour: 3 completed, 1 failed" in output


def test_stats_of_an_empty_database(run: Any) -> None:
    """In an empty database, all numbers are 0."""
    assert set(run_json(run, "stats")["jobs"].values()) == {0}
    assert "Workers: 0 alive, 0 silent" in run("stats")
    assert run("queues") == "No queues yet\n"
    assert run("workers") == "No workers\n"


def test_queues(state: AppState, run: Any) -> None:
    """``queues`` shows the jobs and workers of each queue, and since when it is paused."""
    for status in ("pending", "scheduled", "retrying", "running", "completed"):
        add(state, 1, queue="mail", status=status)
    add(state, 2, queue="low")
    register(state, "all")
    register(state, "mailer", queues=["mail"])
    silence(state, register(state, "silent", queues=["low"]))
    run("pause", "low")
    low, mail = run_json(run, "queues")
    numbers = ("pending", "scheduled", "retrying", "running", "workers")
    assert [mail[key] for key in ("name", *numbers)] == ["mail", 1, 1, 1, 1, 2]
    assert [low[key] for key in ("name", *numbers)] == ["low", 2, 0, 0, 0, 1]
    assert mail["paused_at"] is None
    assert low["paused_at"].endswith("Z")
    lines = run("queues").splitlines()
    assert lines[1].split()[:5] == ["low", "2", "0", "0", "0"]
    assert lines[1].endswith(low["paused_at"])


def test_workers(state: AppState, run: Any) -> None:
    """``workers`` shows live and silent workers, and with ``--all`` also stopped ones."""
    first = register(state, "first", concurrency=4, queues=["mail", "low"])
    silent, stopped = register(state, "second"), register(state, "third")
    add(state, 3, status="running", worker_id=first)
    silence(state, silent)
    state.store.stop_worker(stopped)
    found = run_json(run, "workers")
    assert [(each["name"], each["status"]) for each in found] == [
        ("second", "silent"),
        ("first", "alive"),
    ]
    assert (found[1]["queues"], found[1]["concurrency"]) == (["mail", "low"], 4)
    assert (found[1]["running"], found[0]["running"]) == (3, 0)
    assert found[0]["heartbeat_age_seconds"] >= 3_600
    assert [each["status"] for each in run_json(run, "workers", "--all")][2:] == ["stopped"]
    output = run("workers", "--all")
    for text in ("mail,low", "1 h ago", "silent", "stopped"):
        assert text in output


# Pause and resume


def test_paused_queue_is_not_claimed(state: AppState, run: Any) -> None:
    """No worker claims from a paused queue until it is resumed."""
    (job_id,) = add(state, 1, queue="mail")
    worker = register(state, "one")
    assert run("pause", "mail") == "Queue mail paused\n"
    assert state.store.claim(worker, 10) == state.store.claim(worker, 10, ["mail"]) == []
    assert run("pause", "mail") == "Queue mail is already paused\n"
    assert run("resume", "mail") == "Queue mail resumed\n"
    assert run("resume", "mail") == "Queue mail is not paused\n"
    assert [spec.id for spec in state.store.claim(worker, 10)] == [job_id]


def test_second_pause_keeps_the_time(state: AppState) -> None:
    """Pausing a paused queue again does not change the time of the pause."""
    assert actions.pause(state, "default") is True
    long_ago = state.store.after(sa.literal(-DAY))
    change(state, sa.update(Queue).values(paused_at=long_ago))
    assert actions.pause(state, "default") is False
    with state.store.read() as connection:
        paused_at = connection.scalar(sa.select(Queue.paused_at))
    assert (state.store.clock() - paused_at).total_seconds() > DAY / 2


@pytest.mark.parametrize("status", ["pending", "scheduled", "retrying"])
def test_queues_of_waiting_jobs_are_known(state: AppState, status: str) -> None:
    """A queue can be paused if a job waits in it, or if it is the default queue."""
    add(state, 1, queue="mail", status=status)
    assert actions.pause(state, "mail")
    assert actions.pause(state, "default")


def test_queues_of_claimed_jobs_are_known(state: AppState, run: Any) -> None:
    """A queue can still be paused after its last job was claimed and finished."""
    run_background_job("tests.jobs.echo", queue="mail")
    run("worker", "--burst")
    assert actions.pause(state, "mail")


def test_configured_queues_are_known(make_app: Callable[..., Flask]) -> None:
    """A queue of BGJOBS_QUEUES can be paused before its first job."""
    app = make_app(BGJOBS_QUEUES=["urgent"])
    assert actions.pause(app.extensions["bgjobs"], "urgent")


def test_unknown_queues_are_refused(state: AppState, run: Any) -> None:
    """For an unknown queue, ``pause`` and ``resume`` fail with a suggestion and create no row."""
    add(state, 1, queue="mail")
    for command in ("pause", "resume"):
        assert "did you mean 'mail'?" in run(command, "mial", code=1)
        assert "the known queues are default, mail" in run(command, "zzz", code=1)
        run(command, code=2)
    with pytest.raises(QueueNotFound):
        actions.pause(state, "mial")
    assert state.store.queue_names() == {"mail"}


# Prune


def test_prune_follows_the_retention(app: Flask, state: AppState, run: Any) -> None:
    """``prune`` shows how many jobs it would delete by BGJOBS_RETENTION, and deletes them after
    confirmation."""
    add(state, 2, status="completed", age=8 * DAY)
    add(state, 1, status="failed", age=8 * DAY)
    assert "Permanently delete 2 jobs? [y/N]" in run("prune", answer="n\n", code=1)
    assert count_jobs(app) == 3
    assert run("prune", answer="y\n").endswith("2 jobs deleted, 0 referenced by other tables\n")
    assert run("prune") == "0 jobs deleted, 0 referenced by other tables\n"
    assert ids_with_status(state, "failed") == [3]


def test_prune_keeps_limits_of_the_code(
    state: AppState, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``prune`` imports the jobs first, so it knows the limits in the code."""
    imported: list[AppState] = []
    monkeypatch.setattr("flask_bgjobs.cli.operate.import_jobs", imported.append)
    old = state.store.after(sa.literal(-2.0 * DAY))
    state.store.define_limits({name: Rule(concurrency=1) for name in ("mail", "gone")})
    change(state, sa.update(LimitRow).values(defined_at=old))
    rules = {"mail": Rule(concurrency=1)}
    monkeypatch.setattr(
        "flask_bgjobs.flow.limits.definition.rules", lambda _: rules if imported else {}
    )
    run("prune", "--yes")
    with state.store.read() as connection:
        assert connection.scalars(sa.select(LimitRow.name)).all() == ["mail"]


def test_prune_by_status_and_age(app: Flask, state: AppState, run: Any) -> None:
    """``--status`` and ``--older-than`` override the configuration."""
    for status in ("completed", "failed", "cancelled"):
        add(state, 1, status=status, age=2 * DAY)
        add(state, 1, status=status, age=3_600)
    words = ("--status", "failed", "--status", "cancelled", "--older-than", "1d", "--yes")
    assert run("prune", *words) == "2 jobs deleted, 0 referenced by other tables\n"
    assert len(ids_with_status(state, "completed")) == 2
    assert run("prune", "--older-than", "1h", "--yes").startswith("4 jobs deleted")
    assert count_jobs(app) == 0


def test_prune_keeps_jobs_with_foreign_keys(app: Flask, state: AppState, run: Any) -> None:
    """Jobs that another table refers to are counted and kept; a thousand others are deleted."""
    held = add(state, 3, status="completed", age=8 * DAY)
    add(state, 1_001, status="completed", age=8 * DAY)
    change(state, sa.text(EXPORT))
    for job_id in held:
        change(state, sa.text(f"INSERT INTO export VALUES ({job_id})"))
    assert run("prune", "--yes") == "1,001 jobs deleted, 3 referenced by other tables\n"
    assert ids_with_status(state, "completed") == held


def test_prune_without_retention(make_app: Callable[..., Flask]) -> None:
    """If BGJOBS_RETENTION is ``None``, ``prune`` deletes jobs only with ``--older-than``."""
    app = make_app(BGJOBS_RETENTION=None)
    with app.app_context():
        add(app.extensions["bgjobs"], 1, status="completed", age=999 * DAY)
    runner = app.test_cli_runner()
    assert "sets no age" in runner.invoke(args=["bgjobs", "prune"]).output
    assert count_jobs(app) == 1
    runner.invoke(args=["bgjobs", "prune", "--older-than", "30d", "--yes"])
    assert count_jobs(app) == 0


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "-7d", "7w", "soon", "1e9d", ""])
def test_invalid_duration_is_refused(state: AppState, run: Any, text: str) -> None:
    """An invalid duration ends with exit code 2 and deletes nothing."""
    add(state, 1, status="completed", age=8 * DAY)
    assert "not '" in run("prune", "--yes", "--older-than", text, code=2)
    run("delete", "--yes", "--since", text, code=2)
    assert ids_with_status(state, "completed") == [1]


# Health


def test_health(state: AppState, run: Any) -> None:
    """``health`` exits with 0 while a worker is alive, and names queues that no worker serves."""
    assert run("health", code=1).startswith("Not healthy: no worker is alive")
    worker = register(state, "one", queues=["default"])
    assert run("health") == "Healthy: 1 worker alive\n"
    add(state, 1, queue="mail")
    assert run("health") == "Healthy: 1 worker alive; no live worker serves mail\n"
    data = run_json(run, "health")
    assert (data["healthy"], data["database"], data["alive"]) == (True, True, 1)
    assert data["unserved"] == ["mail"]
    silence(state, worker)
    assert "no worker is alive" in run("health", code=1)
    data = run_json(run, "health", code=1)
    assert (data["healthy"], data["database"], data["silent"]) == (False, True, 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [(None, "then `flask db upgrade`"), ("sqlite:////nowhere/at/all.db", "unable to open")],
)
def test_health_without_database(empty_database_url: str, url: str | None, message: str) -> None:
    """If the database cannot be used, ``health`` prints one sentence or JSON, and exits with 1."""
    app = build_app(url or empty_database_url)
    result = app.test_cli_runner().invoke(args=["bgjobs", "health"])
    assert result.exit_code == 1
    assert result.output.startswith("Not healthy: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    result = app.test_cli_runner().invoke(args=["bgjobs", "health", "--json"])
    assert result.exit_code == 1
    data = json.loads(result.output)
    assert (data["healthy"], data["database"]) == (False, False)
    with app.app_context():
        app.extensions["bgjobs"].store.dispose()
        app.extensions["sqlalchemy"].engine.dispose()


# Many jobs at once


def test_cancel_many(state: AppState, run: Any) -> None:
    """``cancel`` counts the selected jobs, asks for confirmation, and cancels in batches; running
    jobs get a cancel request."""
    waiting = add(state, 1_200, queue="mail")
    running = add(state, 3, queue="mail", status="running")
    add(state, 1, queue="mail", status="completed")
    others = add(state, 2)
    signalled: list[int] = []

    def note(sender: object, job: Job) -> None:
        signalled.append(job.id)

    with job_cancelled.connected_to(note):
        assert "Cancel 1,203 jobs? [y/N]" in run("cancel", "--queue", "mail", answer="n\n", code=1)
        assert ids_with_status(state, "cancelled") == signalled == []
        output = run("cancel", "--queue", "mail", "--yes")
    assert output == "1,200 jobs cancelled, 3 asked to stop\n"
    assert ids_with_status(state, "cancelled") == signalled == waiting
    assert ids_with_status(state, "pending") == others
    assert all(job.is_cancelling for job in state.store.get_many(running))


def test_retry_many(app: Flask, state: AppState, run: Any) -> None:
    """``retry`` makes each selected job pending, and skips a job whose unique key is taken."""
    for _ in range(3):
        run_background_job("tests.jobs.fail", retries=0)
    drain(app)
    key = run_background_job("tests.jobs.fail", retries=0, unique_key="k").id
    drain(app)
    run_background_job("tests.jobs.echo", unique_key="k", delay=60)
    output = run("retry", "--status", "failed", "--yes")
    assert "3 jobs pending again, 1 skipped\n" in output
    assert "1 job skipped: another job holds its unique_key" in output
    assert ids_with_status(state, "pending") == [1, 2, 3]
    assert "1 skipped" in run("retry", "--status", "failed", "--yes", code=1)
    assert stored(app, key).status == "failed"


@pytest.mark.parametrize("becomes", ["failed", "retrying"])
def test_job_that_fails_during_the_command_is_retried_once(
    state: AppState, monkeypatch: pytest.MonkeyPatch, run: Any, becomes: str
) -> None:
    """A job that fails again while the command runs is not retried a second time."""
    add(state, 3, status="retrying")
    add(state, 3, status="failed")
    retried: list[int] = []

    retry = state.store.retry

    def retry_and_fail(ids: list[int], by: object) -> Any:
        result = retry(ids, by)
        retried.extend(ids)
        ended = state.store.after(sa.literal(1.0)) if becomes == "failed" else None
        failed = {"status": becomes, "finished_at": ended}
        change(state, sa.update(Job).where(Job.id.in_(ids)).values(**failed))
        return result

    monkeypatch.setattr(actions, "_BATCH_JOBS", 2)
    monkeypatch.setattr(state.store, "retry", retry_and_fail)
    run("retry", "--status", "failed", "--status", "retrying", "--yes")
    assert sorted(retried) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_delete_many(app: Flask, state: AppState, run: Any) -> None:
    """``delete`` deletes all jobs but running ones, and continues after jobs that it cannot
    delete."""
    running = add(state, 1, status="running")
    held = add(state, 2, status="failed")
    add(state, 1_100, status="failed")
    add(state, 2)
    change(state, sa.text(EXPORT))
    for job_id in held:
        change(state, sa.text(f"INSERT INTO export VALUES ({job_id})"))
    output = run("delete", "--queue", "default", "--yes")
    assert output.startswith("1,102 jobs deleted, 2 skipped\n")
    assert "2 jobs skipped: a row of another table refers to it" in output
    assert sorted(ids_with_status(state, *JobStatus)) == running + held


def test_selection_options_combine(app: Flask, state: AppState, run: Any) -> None:
    """Status, queue, target and times all apply together."""
    wanted = add(state, 1, status="failed", age=7_200, queue="mail", target="a.B", method="c")
    add(state, 1, status="failed", age=7_200, queue="mail", target="a.B", method="d")
    add(state, 1, status="failed", age=7_200, queue="low", target="a.B", method="c")
    add(state, 1, status="failed", age=600, queue="mail", target="a.B", method="c")
    add(state, 1, status="failed", age=DAY, queue="mail", target="a.B", method="c")
    add(state, 1, status="cancelled", age=7_200, queue="mail", target="a.B", method="c")
    words = ["--status", "failed", "--queue", "mail", "--target", "a.B.c"]
    times = ["--since", "3h", "--until", "1h"]
    assert run("retry", *words, *times, "--yes") == "1 job pending again\n"
    assert ids_with_status(state, "pending") == wanted
    assert run("retry", *words, *times, "--yes") == "No jobs match\n"
    assert run("delete", "--target", "a.B", "--yes") == "6 jobs deleted\n"


def test_selection_by_exception(state: AppState, run: Any) -> None:
    """``--error`` selects jobs by the exact class of their last exception, in ``list`` and in
    ``retry``."""
    ids = add(state, 2, status="failed", error_type="ValueError", error="ValueError: no")
    add(state, 1, status="failed", error_type="valueerror", error="valueerror: no")
    add(state, 1, status="failed", error_type="KeyError", error="KeyError: ValueError")
    listed = json.loads(run("list", "--error", "ValueError", "--json"))
    assert sorted(job["id"] for job in listed) == ids
    assert run("retry", "--error", "ValueError", "--yes") == "2 jobs pending again\n"
    assert ids_with_status(state, "pending") == ids
    assert run("retry", "--error", "OSError", "--yes") == "No jobs match\n"


def test_times_apply_to_the_newest_attempt(state: AppState, run: Any) -> None:
    """For an unfinished job that has run, ``--since`` applies to its newest attempt."""
    (tried,), (untried,) = add(state, 1, age=DAY, status="retrying"), add(state, 1, age=DAY)
    change(state, sa.update(Job).where(Job.id == tried).values(claimed_at=state.store.now))
    assert run("cancel", "--since", "1h", "--yes") == "1 job cancelled\n"
    assert ids_with_status(state, "cancelled") == [tried]
    assert ids_with_status(state, "pending") == [untried]


def test_times_apply_to_finish_or_enqueue(state: AppState, run: Any) -> None:
    """``--since`` and ``--until`` apply to the finish of finished jobs and to the enqueue of
    others, in UTC unless they give an offset."""
    (finished,), (waiting,) = add(state, 1, status="failed"), add(state, 1)
    half_past = dt.datetime(2020, 1, 2, 12, 30)
    for job_id, column in ((finished, Job.finished_at), (waiting, Job.created_at)):
        change(state, sa.update(Job).where(Job.id == job_id).values({column: half_past}))
    until = ("--until", "2020-01-02T13:00Z")
    for since in ("2020-01-02T12:00:00", "2020-01-02 13:15+01:00", "2020-01-02"):
        output = run("delete", "--since", since, *until, answer="n\n", code=1)
        assert "Permanently delete 2 jobs?" in output
    assert run("delete", "--until", "2020-01-02T12:00") == "No jobs match\n"
    assert run("delete", "--since", "2020-01-02T13:00", "--until", "1d") == "No jobs match\n"


@pytest.mark.parametrize("command", ["retry", "cancel", "delete"])
def test_ids_or_a_selection(state: AppState, run: Any, command: str) -> None:
    """With neither ids nor a selection, or with both, the command exits with a usage error."""
    add(state)
    for words in ([], ["1", "--queue", "default"], ["--yes"]):
        output = run(command, *words, code=2)
        assert "give either the ids of jobs, or a selection with --status" in output
    assert ids_with_status(state, "pending") == [1]


@pytest.mark.parametrize(
    ("command", "status"),
    [("retry", "completed"), ("retry", "running"), ("cancel", "failed"), ("delete", "running")],
)
def test_status_outside_the_command_is_refused(run: Any, command: str, status: str) -> None:
    """A command accepts only statuses that it can change."""
    assert "is not one of" in run(command, "--status", status, "--yes", code=2)


def test_progress_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress bar is written only to a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, is_drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(4, "Jobs") as advance:
            advance(4)
        assert ("100%" in stream.getvalue()) is is_drawn
        assert bool(stream.getvalue()) is is_drawn


def test_queue_of_decorator_can_be_paused_before_first_job(state: AppState, run: Any) -> None:
    """The queue of a decorated function can be paused before its first job."""
    options = JobOptions(queue="reports")
    decorated = {"shop.report": Decorated(print, options)}
    state.registry = Registry(state.config.allowed_jobs, decorated)
    assert run("pause", "reports") == "Queue reports paused\n"
