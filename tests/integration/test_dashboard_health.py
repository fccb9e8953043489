"""``/jobs/healthz``, for load balancers."""

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


def check_health(host: Host, method: str = "GET") -> tuple[int, str]:
    response = host.client.open(PATH, method=method)
    return response.status_code, response.text


def test_ok_with_a_live_worker(make_host: MakeHost) -> None:
    """With one live worker, the answer is 200 and ``ok`` as plain text that must not be cached."""
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
def test_503_without_a_live_worker(make_host: MakeHost, worker: dict[str, Any] | None) -> None:
    """If no worker has sent a heartbeat within the lease, or all have stopped, the answer is
    503."""
    host = make_host()
    if worker is not None:
        host.add_worker(**worker)
    assert check_health(host) == (503, "no worker is alive")


def test_before_request_of_host_is_skipped(make_host: MakeHost) -> None:
    """A ``before_request`` function of the host is not called: its redirect to a login would count
    as healthy."""
    host = make_host()

    @host.app.before_request
    def gate() -> Any:
        return flask.redirect("/login")

    assert check_health(host) == (503, "no worker is alive")
    host.add_worker()
    assert check_health(host) == (200, "ok")
    assert host.client.get(f"{PREFIX}/").status_code == 302


def refuse(action: str, job: object) -> bool:
    raise AssertionError("the authorizer was called")


@pytest.mark.parametrize("authorizer", [None, refuse])
def test_no_authorizer_is_needed(make_host: MakeHost, authorizer: Any) -> None:
    """The health check works without an authorizer, and does not call one."""
    host = make_host(authorizer=authorizer)
    host.add_worker()
    assert check_health(host) == (200, "ok")
    host.get("/", 403)


@pytest.mark.parametrize("status", [200, 503])
def test_only_get_and_head_are_allowed(make_host: MakeHost, status: int) -> None:
    """HEAD is answered without a body, and all other methods with 405."""
    host = make_host()
    if status == 200:
        host.add_worker()
    assert check_health(host, "HEAD") == (status, "")
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert check_health(host, method)[0] == 405


@pytest.mark.parametrize("damage", ["no tables", "no file"])
def test_503_without_database(
    make_host: MakeHost, tmp_path: pathlib.Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the database, the answer is 503 without details, which are logged."""
    host = make_host()
    host.add_worker()
    if damage == "no tables":
        host.state.store.transaction(lambda c: c.execute(sa.text("DROP TABLE bgjobs_worker")))
    else:
        host.state.store.dispose()
        (tmp_path / "host.db").unlink()
        (tmp_path / "host.db").mkdir()
    assert check_health(host) == (503, "the database does not answer")
    assert "Health check failed" in caplog.text


def test_health_check_takes_one_statement(make_host: MakeHost) -> None:
    """A health check takes one statement, which does not read jobs."""
    host = make_host()
    host.add_worker()
    host.add(count=3)
    statements: list[str] = []
    sa.event.listen(
        host.state.store.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: statements.append(statement),
    )
    assert check_health(host) == (200, "ok")
    queries = [each for each in statements if not each.startswith("BEGIN")]
    assert len(queries) == 1
    assert "bgjobs_job" not in queries[0]


@pytest.mark.parametrize("path", ["/", "/list", "/job/1", "/queues", "/api/v1/jobs"])
@pytest.mark.parametrize("damage", ["no tables", "no file"])
def test_pages_without_database_are_503(
    make_host: MakeHost,
    tmp_path: pathlib.Path,
    damage: str,
    path: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pages and the API answer 503 and say what to do; the database's own message is only
    logged."""
    host = make_host()
    message = "The database does not answer"
    if damage == "no tables":
        with host.app.app_context():
            host.db.drop_all()
        message = "flask bgjobs init-db"
    else:
        host.state.store.dispose()
        (tmp_path / "host.db").unlink()
        (tmp_path / "host.db").mkdir()
    page = host.get(path, 503)
    assert message in page
    assert "sqlite3" not in page
    assert "Database not usable | Path: /jobs" in caplog.text
    if "api" in path:
        assert json.loads(page)["error"]["status"] == 503


def test_layout_that_needs_the_database(make_host: MakeHost) -> None:
    """The answer is 503 even if the host's layout cannot be rendered without the database."""
    host = make_host()

    @host.app.context_processor
    def visitors() -> dict[str, int | None]:
        return {"visitors": host.db.session.scalar(sa.text("SELECT count(*) FROM visitor"))}

    response = host.client.get("/jobs/")
    assert (response.status_code, response.mimetype) == (503, "text/plain")
    assert "lacks a table" in response.text
