"""Slow databases: pages stop waiting and say what to do."""

from __future__ import annotations

from typing import Any

import flask
import pytest
import sqlalchemy as sa

from flask_bgjobs import Job
from flask_bgjobs.dashboard import access
from flask_bgjobs.operations import actions, queries
from flask_bgjobs.state import AppState
from tests.databases import product_of
from tests.integration.test_dashboard_support import Host, MakeHost, listed_ids
from tests.integration.test_dashboard_support import host_maker as host_maker

TAKES_LONG = product_of(900)
"""Longer than a thousandth of a second, and less than minutes."""


@pytest.fixture
def host(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose lists and queues take longer to read than the limit."""
    monkeypatch.setattr(access, "QUERY_SECONDS", 0.001)
    for name in ("list_jobs", "queues_of", "queue_stats"):
        monkeypatch.setattr(queries, name, read_slowly)
    return make_host()


def read_slowly(state: AppState, *_args: Any, **_options: Any) -> bool:
    with state.store.read() as connection:
        return bool(connection.exec_driver_sql(TAKES_LONG).scalar())


def test_list_keeps_its_filter(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The error page of a list shows its filter, and the log has the query without its values."""
    page = host.get("/list?status=failed&q=late", 503)
    assert "The database took longer than 0.001 s. Narrow the filter" in page
    assert 'value="late"' in page
    assert "Dashboard query timed out | Path: /jobs/list | Query: WITH RECURSIVE" in caplog.text


@pytest.mark.parametrize("path", ["/", "/queues"])
def test_other_pages_show_the_error(host: Host, path: str) -> None:
    """Other pages show only the error, and pages without a slow query still work."""
    page = host.get(path, 503)
    assert "The database took longer than 0.001 s." in page
    assert "Go to the jobs" in page
    host.get("/workers", 200)


def test_refresh_gets_503(host: Host) -> None:
    """The refresh script gets 503 and no page."""
    response = host.client.get("/jobs/queues", headers={access.FRAGMENT_HEADER: "1"})
    assert response.status_code == 503
    assert "<html" not in response.text


def test_api_gets_503(host: Host) -> None:
    """The API answers 503 with the message."""
    response = host.client.get("/jobs/api/v1/queues")
    assert response.status_code == 503
    assert response.json is not None
    assert response.json["error"]["status"] == 503
    assert "took longer than 0.001 s" in response.json["error"]["message"]


def test_connection_is_released_before_after_request(make_host: MakeHost) -> None:
    """When the host's ``after_request`` functions run, the dashboard has released its
    connection."""
    host = make_host()
    in_use = []

    @host.app.after_request
    def note(response: flask.Response) -> flask.Response:
        in_use.append(host.state.store.engine.pool.checkedout())
        return response

    host.get("/")
    host.get("/job/404", 404)
    assert in_use == [0, 0]


def test_authorizer_can_write(make_host: MakeHost) -> None:
    """The authorizer can write, even without WAL, where a reader blocks writers: pages do not read
    during its call."""

    def allow(_action: str, job: Job | None) -> bool:
        host.db.session.execute(sa.text("INSERT INTO seen VALUES (1)"))
        host.db.session.commit()
        return True

    host = make_host(authorizer=allow)
    with host.state.store.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE seen (number INTEGER)")
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    job_id = host.add()
    for path in ("/", f"/job/{job_id}", "/queues", "/dispatch"):
        host.get(path)


def test_nested_request_has_its_own_connection(make_host: MakeHost) -> None:
    """A request of the authorizer to its own app does not affect the outer page."""

    def allow(_action: str, job: Job | None) -> bool:
        assert host.app.test_client().get("/jobs/healthz").status_code == 503
        return job is None or job.id != 2

    host = make_host(authorizer=allow)
    host.add(count=3)
    assert listed_ids(host.get("/list?per=1")) == [3]
    assert listed_ids(host.get("/list")) == [3, 1]


def test_changes_may_take_longer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit does not apply to changes."""
    monkeypatch.setattr(actions, "pause", lambda state, *_: read_slowly(state))
    token = host.client.get("/jobs/api/v1/workers").headers["X-CSRFToken"]
    data = {"queue": "default", "csrf_token": token}
    assert host.client.post("/jobs/queues/pause", data=data).status_code == 303
