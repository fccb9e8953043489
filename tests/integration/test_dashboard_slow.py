"""Nobody waits for long on a database that is slow, and who asked is told what to do."""

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
    """A host whose lists and queues take longer to read than a visitor would wait."""
    monkeypatch.setattr(access, "QUERY_SECONDS", 0.001)
    for name in ("list_jobs", "queues_of", "queue_stats"):
        monkeypatch.setattr(queries, name, read_slowly)
    return make_host()


def read_slowly(state: AppState, *_args: Any, **_options: Any) -> bool:
    with state.store.read() as connection:
        return bool(connection.exec_driver_sql(TAKES_LONG).scalar())


def test_a_list_says_so_beside_its_filter(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The filter is there as it was, to be narrowed; the log has the query without its values."""
    page = host.get("/list?status=failed&q=late", 503)
    assert "The database took longer than 0.001 s. Narrow the filter" in page
    assert 'value="late"' in page
    assert "Dashboard query timed out | Path: /jobs/list | Query: WITH RECURSIVE" in caplog.text


@pytest.mark.parametrize("path", ["/", "/queues"])
def test_other_pages_say_so_alone(host: Host, path: str) -> None:
    """What needs no slow query works afterwards as ever."""
    page = host.get(path, 503)
    assert "The database took longer than 0.001 s." in page
    assert "Go to the jobs" in page
    host.get("/workers", 200)


def test_a_refresh_says_so(host: Host) -> None:
    """The script that refreshes a page gets the code, and asks less often."""
    answer = host.client.get("/jobs/queues", headers={access.FRAGMENT_HEADER: "1"})
    assert answer.status_code == 503
    assert "<html" not in answer.text


def test_the_api_says_so(host: Host) -> None:
    """Programs get the code and the sentence."""
    answer = host.client.get("/jobs/api/v1/queues")
    assert answer.status_code == 503
    assert answer.json is not None
    assert answer.json["error"]["status"] == 503
    assert "took longer than 0.001 s" in answer.json["error"]["message"]


def test_the_connection_is_free_before_the_host_goes_on(make_host: MakeHost) -> None:
    """What the host does after a request, such as to write, finds nothing of ours in the way."""
    host = make_host()
    in_use = []

    @host.app.after_request
    def look(response: flask.Response) -> flask.Response:
        in_use.append(host.state.store.engine.pool.checkedout())
        return response

    host.get("/")
    host.get("/job/404", 404)
    assert in_use == [0, 0]


def test_the_host_may_write_while_it_is_asked(make_host: MakeHost) -> None:
    """Also without WAL, where who reads keeps writers out: a page does not read while it asks the
    host who may see what."""

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


def test_a_request_within_a_request_reads_for_itself(make_host: MakeHost) -> None:
    """What the host asks of its own app meanwhile takes nothing away from the page."""

    def allow(_action: str, job: Job | None) -> bool:
        assert host.app.test_client().get("/jobs/healthz").status_code == 503
        return job is None or job.id != 2

    host = make_host(authorizer=allow)
    host.add(count=3)
    assert listed_ids(host.get("/list?per=1")) == [3]
    assert listed_ids(host.get("/list")) == [3, 1]


def test_changes_may_take_longer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the many jobs that a change is about may take its time."""
    monkeypatch.setattr(actions, "pause", lambda state, *_: read_slowly(state))
    token = host.client.get("/jobs/api/v1/workers").headers["X-CSRFToken"]
    data = {"queue": "default", "csrf_token": token}
    assert host.client.post("/jobs/queues/pause", data=data).status_code == 303
