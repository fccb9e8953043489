"""``/jobs/healthz``: what a load balancer is told."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flask
import pytest
import sqlalchemy as sa

from tests.integration.test_dashboard_support import PREFIX, Host, MakeHost, now
from tests.integration.test_dashboard_support import host_maker as host_maker

PATH = f"{PREFIX}/healthz"


def answer(host: Host, method: str = "GET") -> tuple[int, str]:
    response = host.client.open(PATH, method=method)
    return response.status_code, response.text


def test_it_is_ok_while_a_worker_is_heard_of(make_host: MakeHost) -> None:
    """200 and ``ok`` with a live worker, whatever else is dead; plain text that nobody keeps."""
    host = make_host()
    host.add_worker(status="dead")
    host.add_worker(heartbeat_at=now(-3600))
    host.add_worker(heartbeat_at=now(-5))
    response = host.client.get(PATH)
    assert (response.status_code, response.text) == (200, "ok")
    assert response.mimetype == "text/plain"
    assert response.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize(
    "worker",
    [None, {"heartbeat_at": now(-61)}, {"status": "dead"}, {"status": "stopped"}],
    ids=["none", "silent", "dead", "stopped"],
)
def test_it_is_unavailable_without_a_live_worker(
    make_host: MakeHost, worker: dict[str, Any] | None
) -> None:
    """503 when no worker has beaten within the lease, and when all have ended."""
    host = make_host()
    if worker is not None:
        host.add_worker(**worker)
    assert answer(host) == (503, "no worker is alive")


def test_a_login_gate_of_the_host_does_not_stand_before_it(make_host: MakeHost) -> None:
    """A function of the host's that sends every request to log in is not asked: a redirect would
    count as healthy."""
    host = make_host()

    @host.app.before_request
    def gate() -> Any:
        return flask.redirect("/login")

    assert answer(host) == (503, "no worker is alive")
    host.add_worker()
    assert answer(host) == (200, "ok")
    assert host.client.get(f"{PREFIX}/").status_code == 302


def refuse(action: str, job: object) -> bool:
    raise AssertionError("the authorizer is not asked")


@pytest.mark.parametrize("authorizer", [None, refuse])
def test_it_needs_no_login_and_no_authorizer(make_host: MakeHost, authorizer: Any) -> None:
    """It answers before anybody has said who may see the rest, and asks nobody afterwards."""
    host = make_host(authorizer=authorizer)
    host.add_worker()
    assert answer(host) == (200, "ok")
    host.get("/", 403)


@pytest.mark.parametrize("status", [200, 503])
def test_it_answers_get_and_head_only(make_host: MakeHost, status: int) -> None:
    """HEAD is GET without a body, and everything else is 405."""
    host = make_host()
    if status == 200:
        host.add_worker()
    assert answer(host, "HEAD") == (status, "")
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert answer(host, method)[0] == 405


@pytest.mark.parametrize("damage", ["no tables", "no file"])
def test_a_database_that_does_not_answer_is_no_server_error(
    make_host: MakeHost, tmp_path: pathlib.Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the database it is 503 without detail; the log says what is wrong."""
    host = make_host()
    host.add_worker()
    if damage == "no tables":
        host.state.store.transaction(lambda c: c.execute(sa.text("DROP TABLE bgjobs_worker")))
    else:
        host.state.store.dispose()
        (tmp_path / "host.db").unlink()
        (tmp_path / "host.db").mkdir()
    assert answer(host) == (503, "the database does not answer")
    assert "Health check failed" in caplog.text


def test_it_costs_one_statement(make_host: MakeHost) -> None:
    """A check every few seconds reads the workers once, and nothing of the jobs."""
    host = make_host()
    host.add_worker()
    host.add(count=3)
    statements: list[str] = []
    sa.event.listen(
        host.state.store.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: statements.append(statement),
    )
    assert answer(host) == (200, "ok")
    asked = [each for each in statements if not each.startswith("BEGIN")]
    assert len(asked) == 1
    assert "bgjobs_job" not in asked[0]


@pytest.mark.parametrize("path", ["/", "/list", "/job/1", "/queues", "/api/v1/jobs"])
@pytest.mark.parametrize("damage", ["no tables", "no file"])
def test_pages_say_what_is_wrong_with_the_database(
    make_host: MakeHost,
    tmp_path: pathlib.Path,
    damage: str,
    path: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A page or the API is 503 and says what to do; what the database said is in the log alone."""
    host = make_host()
    says = "The database does not answer"
    if damage == "no tables":
        with host.app.app_context():
            host.db.drop_all()
        says = "flask bgjobs init-db"
    else:
        host.state.store.dispose()
        (tmp_path / "host.db").unlink()
        (tmp_path / "host.db").mkdir()
    page = host.get(path, 503)
    assert says in page
    assert "sqlite3" not in page
    assert "Database not usable | Path: /jobs" in caplog.text
    if "api" in path:
        assert json.loads(page)["error"]["status"] == 503


def test_a_host_whose_layout_needs_the_database(make_host: MakeHost) -> None:
    """The answer is 503 also where the page that would tell it cannot be made."""
    host = make_host()

    @host.app.context_processor
    def visitors() -> dict[str, int | None]:
        return {"visitors": host.db.session.scalar(sa.text("SELECT count(*) FROM visitor"))}

    answer = host.client.get("/jobs/")
    assert (answer.status_code, answer.mimetype) == (503, "text/plain")
    assert "lacks a table" in answer.text
