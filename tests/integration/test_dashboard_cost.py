"""The cost of pages: few statements, none of which reads every job."""

from __future__ import annotations

import datetime as dt
import gzip
import re
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs, Job, Limit, run_background_job
from flask_bgjobs.dashboard import access
from flask_bgjobs.flow.schedules.ticker import Ticker
from flask_bgjobs.job.limits import key_id, limit_id
from flask_bgjobs.models import Attempt, FairKey, FairQueue, LimitKey, Schedule, ScheduleTick, Seat
from flask_bgjobs.operations.queries import listing
from flask_bgjobs.state import state_of
from flask_bgjobs.store import Actor, Store
from flask_bgjobs.worker.registration import register
from tests.integration.test_store import _copy_job, _plan_step, analyze, scans

pytestmark = pytest.mark.slow
MOST_STATEMENTS = 9
"""One of them reads the jobs that wait for code, on most pages, if any job waits."""
MORE_STATEMENTS = {"job that waits for a limit": 3}
"""Pages that may take more: the limit with its key, the jobs ahead, and those with seats."""
MOST_BYTES = 60_000
LIMITED = 900_000
"""The id of a job that waits for a limit."""
PAGES = {
    "overview": "/",
    "newest": "/list",
    "one status": "/list?status=failed",
    "statuses": "/list?status=failed&status=completed",
    "words": "/list?q=nothing+like+it",
    "queue": "/list?queue=mail",
    "name": "/list?job=tests.jobs.nope&status=failed",
    "times": "/list?since=2026-01-01&until=2026-02-01",
    "deep": "/list?after=NDAwMDA&queue=mail",
    "new jobs": "/list/new?above=40000&queue=mail&status=failed",
    "finished": "/list?sort=-finished",
    "due": "/list?sort=due&status=scheduled",
    "job": "/job/1",
    "errors": "/errors?period=24h",
    "queues": "/queues",
    "workers": "/workers",
    "schedules": "/schedules",
    "later schedules": "/schedules?after=s-0700&q=S-",
    "schedule": "/schedules?name=s-0777",
    "limits": "/limits",
    "limit": "/limits?name=many",
    "job that waits for a limit": f"/job/{LIMITED}",
    "audit": "/audit",
    "api limit": "/api/v1/limit?name=many",
    "api weights": "/api/v1/weights",
    "api schedules": "/api/v1/schedules?per=200",
    "api schedule": "/api/v1/schedule?name=s-0777",
    "api": "/api/v1/stats",
}


_FIRST_BY_ID = re.compile(r"FROM bgjobs_job ORDER BY bgjobs_job.id( DESC)?\s+LIMIT")


@pytest.fixture
def crowded(database_url: str) -> Iterator[flask.Flask]:
    """A host with 50,000 jobs, some failed attempts, an audit entry, 10,000 schedules, of which the
    first has 10,000 ticks, a limit with 500 keys, at the first of which 2,000 jobs wait, and 20
    queues in which 500 keys take turns."""
    app = flask.Flask(__name__)
    app.config.update(
        SECRET_KEY="x",
        SQLALCHEMY_DATABASE_URI=database_url,
        BGJOBS_ALLOWED_JOBS=["tests.jobs.echo"],
        BGJOBS_SCHEDULE={
            f"s-{number:04}": {"job": "tests.jobs.echo", "every": 60} for number in range(10_000)
        },
    )
    db = SQLAlchemy(app)
    BgJobs(app, db).authorize_dashboard(lambda action, job: True)
    with app.app_context():
        db.create_all()
        store = state_of(app).store
        first = run_background_job("tests.jobs.echo", parameters=["x"])
        for status in ("scheduled", "retrying", "completed", "failed", "pending"):
            _copy_job(store, status, 10_000)
        ended = sa.update(Job).where(Job.status.in_(["completed", "failed"]))
        store.transaction(lambda c: c.execute(ended.values(finished_at=store.now)))
        failure = {"attempt": 1, "outcome": "failed", "error_type": "E", "error": "E: x"}
        attempt = sa.insert(Attempt).values(job_id=first.id, finished_at=store.now, **failure)
        store.transaction(lambda c: [c.execute(attempt) for _ in range(50)])
        store.record(Actor("anna", "dashboard"), "cancel", jobs=[first.id])
        _add_schedules(app)
        _add_limits(store)
        _add_turns(store)
        analyze(store)
        yield app
        store.dispose()
        db.session.remove()
        db.engine.dispose()


def _add_schedules(app: flask.Flask) -> None:
    ticker = Ticker(state_of(app), state_of(app).store)
    register(state_of(app), "w", schedules=ticker.names)
    ticker.register()
    store = state_of(app).store
    with store.engine.begin() as connection:
        first = connection.scalar(sa.select(sa.func.min(Schedule.id)))
        begin = dt.datetime(2026, 1, 1)
        usual = {"schedule_id": first, "outcome": "fired", "missed": 0, "created_at": begin}
        ticks = [{**usual, "tick_at": begin + dt.timedelta(minutes=n)} for n in range(10_000)]
        connection.execute(sa.insert(ScheduleTick), ticks)


def _add_limits(store: Store) -> None:
    limit = Limit("many", concurrency=1, key="{value}")
    _, waiting = (
        run_background_job("tests.jobs.echo", parameters=[0], limits=limit) for _ in range(2)
    )
    store.admit()
    # A number that is the same on all databases.
    for table, column in ((Job.__table__, "id"), (Seat.__table__, "job_id")):
        mine = sa.update(table).where(table.c[column] == waiting.id).values({column: LIMITED})
        store.transaction(lambda c, mine=mine: c.execute(mine))
    usual = {"state": 0, "claim_rank": 0, "run_at": store.clock(), "position": 0, "further": 0}
    first = key_id("many", "0")
    seats = [{**usual, "key_id": first, "job_id": 10**6 + n} for n in range(2_000)]
    keys = [{"id": n, "limit_id": limit_id("many"), "name": f"k{n}"} for n in range(1, 500)]
    seats += [{**usual, "key_id": n, "job_id": 10**7 + n} for n in range(1, 500)]
    with store.engine.begin() as connection:
        connection.execute(sa.insert(LimitKey).values(used_at=store.now), keys)
        connection.execute(sa.insert(Seat), seats)


def _add_turns(store: Store) -> None:
    """Add 25 keys to each of 20 queues, which is as many as the page reads, and jobs of theirs."""
    queues = [
        {"id": n, "queue": f"q{n}", "priority": 0, "turn": 1.0, "last": 500.0, "round": 1}
        for n in range(20)
    ]
    usual = {"round": 1, "following": 400.0}
    keys = [{**usual, "id": n, "fair_queue_id": n % 20, "name": f"tenant {n}"} for n in range(500)]
    with store.engine.begin() as connection:
        connection.execute(sa.insert(FairQueue), queues)
        connection.execute(sa.insert(FairKey).values(used_at=store.now), keys)
        first = sa.select(Job.id).where(Job.status == "pending").limit(20)
        for number, job_id in enumerate(connection.scalars(first).all()):
            update = sa.update(Job).where(Job.id == job_id)
            connection.execute(update.values(queue=f"q{number}", claim_rank=2))


def test_pages_take_few_statements(crowded: flask.Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50,000 jobs, each page takes at most nine statements, reads no table of jobs as a
    whole, and is at most 60 KB compressed."""
    # Fewer than there are jobs, like the default of 100,000 among a million.
    monkeypatch.setattr(listing, "SEARCHED_ROWS", 500)
    problems = []
    # Two more statements read sample jobs for the authorizer, every ten seconds.
    monkeypatch.setattr(access, "_SAMPLES_KEPT_SECONDS", 3_600.0)
    _get(crowded, "/")
    for name, path in PAGES.items():
        page: list[bytes] = []
        seen = _statements(crowded, lambda path=path, page=page: page.append(_get(crowded, path)))
        if len(seen) > MOST_STATEMENTS + MORE_STATEMENTS.get(name, 0):
            problems.append(f"{name}: {len(seen)} statements")
        if len(gzip.compress(page[0], 6)) > MOST_BYTES:
            problems.append(f"{name}: too large")
        problems += [f"{name}: {plan}" for plan in _plans_that_scan(crowded, seen)]
    assert problems == []


def _plans_that_scan(app: flask.Flask, statements: list[tuple[str, Any]]) -> Iterator[str]:
    store = state_of(app).store
    explain = "EXPLAIN QUERY PLAN" if store.engine.name == "sqlite" else "EXPLAIN"
    for statement, parameters in statements:
        # The database stops after the first few ids.
        if Job.__tablename__ not in statement or _FIRST_BY_ID.search(statement):
            continue
        with store.read() as connection:
            plan = connection.exec_driver_sql(f"{explain} {statement}", parameters)
            lines = "\n".join(_plan_step(row) for row in plan)
        if scans(lines):
            yield f"{statement}\n{lines}"


def _get(app: flask.Flask, path: str) -> bytes:
    response = app.test_client().get(f"/jobs{path}")
    assert response.status_code == 200, response.text
    return response.data


def _statements(app: flask.Flask, work: Callable[[], object]) -> list[tuple[str, Any]]:
    """All statements that the engine of flask-bgjobs ran."""
    engine = state_of(app).store.engine
    seen: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if not statement.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
            seen.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        work()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert seen
    return seen
