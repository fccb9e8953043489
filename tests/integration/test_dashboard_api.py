"""The JSON API: its OpenAPI description, its access rights and its masked values."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import hypothesis
import pytest
import schemathesis
import sqlalchemy as sa
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.job.statuses import JobStatus
from flask_bgjobs.models import Attempt
from tests.integration.test_dashboard_support import (
    PREFIX,
    RECEIPT,
    SAMPLE,
    Host,
    MakeHost,
    now,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

API = f"{PREFIX}/api/v1"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SECRET = "hunter2-s3cret"


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


def get(host: Host, path: str, code: int = 200) -> Any:
    answer = host.client.get(API + path)
    assert answer.status_code == code, answer.text
    assert answer.content_type == "application/json"
    return answer.json


def post(host: Host, path: str, body: Any = None, code: int = 200) -> Any:
    token = host.client.get(f"{API}/stats").headers.get("X-CSRFToken", "")
    answer = host.client.post(API + path, json=body, headers={"X-CSRFToken": token})
    assert answer.status_code == code, answer.text
    assert answer.content_type == "application/json"
    return answer.json


def populated_host(host: Host) -> Host:
    """A host with a row of each kind that the API returns."""
    for status in ("pending", "scheduled", "retrying", "running", "completed", "cancelled"):
        host.add(status=status)
    failed = host.add(
        status="failed", error="E: x", error_type="E", finished_at=now(), tags_json='["a"]'
    )
    host.add_attempt(failed, error="E: x", error_type="E")
    host.add_line(failed, "a line")
    host.add_worker()
    with host.app.app_context():
        schedule = find(host.state, "poll")
        schedule.override(every=90)
        schedule.run_now()
    return host


DESCRIPTION = json.loads(
    importlib.resources.files("flask_bgjobs.dashboard").joinpath("openapi.json").read_text()
)
OPERATIONS = [(path, method) for path, each in DESCRIPTION["paths"].items() for method in each]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.slow
def test_api_conforms_to_its_description(make_host: MakeHost, path: str, method: str) -> None:
    """For any request, the API answers with a status and a body of its OpenAPI description."""
    entry = {"job": SAMPLE, "method": "execute", "parameters": ["x"], "every": 60}
    host = populated_host(make_host(BGJOBS_SCHEDULE={"poll": entry}))
    schema = schemathesis.openapi.from_wsgi(f"{API}/openapi.json", host.app)
    schema.config.update(base_url=f"http://localhost{API}")
    token = host.client.get(f"{API}/stats").headers["X-CSRFToken"]
    session = host.client.get_cookie("session")
    assert session is not None

    @hypothesis.settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method.upper()].as_strategy())
    def check(case: schemathesis.Case) -> None:
        case.headers["X-CSRFToken"] = token
        case.cookies["session"] = session.value
        case.validate_response(case.call(), checks=CHECKS)

    check()


def test_description_is_served(host: Host) -> None:
    """The API serves its OpenAPI description at any prefix, and the description lists all
    routes."""
    description = get(host, "/openapi.json")
    assert description["openapi"].startswith("3.1")
    assert description["servers"] == [{"url": "."}]
    described = {
        (method.upper(), path)
        for path, operations in description["paths"].items()
        for method in operations
    }
    rules = {
        (method, rule.rule.removeprefix(API))
        for rule in host.app.url_map.iter_rules()
        if rule.rule.startswith(API)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    plain = {
        (method, path.replace("<int:job_id>", "{job_id}").partition("<any")[0].rstrip("/"))
        for method, path in rules
        if path != "/openapi.json"
    }
    assert plain == {(method, path.removesuffix("/{verb}")) for method, path in described}


def test_each_error_status_is_described() -> None:
    """Every operation describes its answers to bad input, missing rights and a missing database,
    and the schema lists all statuses of jobs."""
    for path, method in OPERATIONS:
        responses = DESCRIPTION["paths"][path][method]["responses"]
        assert {"400", "401", "403", "503"} <= set(responses), (path, method)
    statuses = DESCRIPTION["components"]["schemas"]["JobStatus"]["enum"]
    assert statuses == [status.value for status in JobStatus]


@pytest.mark.parametrize("path", ["/stats?period=2h", "/queues?x=1", "/workers?ended=2"])
def test_unknown_parameters_are_400(host: Host, path: str) -> None:
    """An unknown parameter, or an unknown value of a parameter, is answered with 400."""
    assert get(host, path, 400)["error"]["status"] == 400


def test_list_with_filters_and_cursors(host: Host) -> None:
    """The list of jobs accepts the filters of the list page, and returns cursors."""
    ids = [host.add(queue="mail") for _ in range(5)]
    host.add(queue="other")
    page = get(host, "/jobs?queue=mail&per=2")
    assert [job["id"] for job in page["jobs"]] == ids[:-3:-1]
    following = get(host, f"/jobs?queue=mail&per=2&after={page['older']}")
    assert [job["id"] for job in following["jobs"]] == ids[2:0:-1]
    assert following["newer"]


@pytest.mark.parametrize(
    "query", ["status=nope", "sort=name", "q=colour:red", "after=x", "since=tomorrow"]
)
def test_invalid_filters_are_400(host: Host, query: str) -> None:
    """An invalid filter is answered with 400 and the reason as JSON."""
    error = get(host, f"/jobs?{query}", 400)["error"]
    assert error["status"] == 400
    assert error["message"]


def test_job_with_attempts_and_log(host: Host) -> None:
    """A job is returned with its attempts, its log and the reason why it is not running; a missing
    job is a 404."""
    job_id = host.add(queue="mail")
    host.add_attempt(job_id, error="E: x", error_type="E")
    host.add_line(job_id, "a line")
    job = get(host, f"/jobs/{job_id}")
    assert job["parameters"] == ["Hello"]
    assert job["attempts"][0]["error"] == "E: x"
    assert job["log"][0]["message"] == "a line"
    assert "No live worker" in job["why_not_running"][0]
    assert get(host, "/jobs/4711", 404)["error"]["status"] == 404


def test_secrets_are_masked(host: Host) -> None:
    """Values that the pages mask are masked in the API, too."""
    job_id = host.add(
        target=RECEIPT,
        method=None,
        parameters_json=json.dumps([7, SECRET]),
        status="failed",
        finished_at=now(),
        error=f"E: {SECRET}",
        error_type="E",
        owner=SECRET,
    )
    host.add_attempt(job_id, error=f"E: {SECRET}", error_type="E", traceback=SECRET)
    for path in ("/jobs", f"/jobs/{job_id}", "/errors", f"/jobs?q={SECRET}"):
        assert SECRET not in json.dumps(get(host, path)), path
    assert get(host, f"/jobs?q={SECRET}")["jobs"] == []


def test_changes_of_a_job(host: Host) -> None:
    """Actions change jobs like the buttons do; an impossible action is a 409."""
    job_id = host.add()
    assert post(host, f"/jobs/{job_id}/cancel") == {
        "id": job_id,
        "requested": False,
        "status": "cancelled",
    }
    assert host.job(job_id).status == "cancelled"
    assert (
        "already cancelled" in post(host, f"/jobs/{job_id}/cancel", None, 409)["error"]["message"]
    )
    running = host.add(status="running")
    assert post(host, f"/jobs/{running}/cancel")["requested"] is True
    assert post(host, "/jobs/4711/cancel", None, 404)
    assert get(host, "/audit")["entries"][0]["source"] == "api"


def test_dispatch(host: Host) -> None:
    """A dispatched job is stored with its options, and the audit trail records the dispatch."""
    body = {
        "target": SAMPLE,
        "method": "execute",
        "parameters": {"message": "Hi", "times": 2},
        "priority": "high",
        "queue": "mail",
        "run_at": "2030-01-01T00:00:00+02:00",
        "tags": ["a"],
    }
    dispatched = post(host, "/jobs", body, 201)
    job = host.job(dispatched["id"])
    assert (job.parameters, job.priority, job.queue) == ({"message": "Hi", "times": 2}, 3, "mail")
    assert job.run_at.isoformat() == "2029-12-31T22:00:00"
    assert job.tags == ["a"]
    entry = get(host, "/audit")["entries"][0]
    assert (entry["action"], entry["jobs"], entry["source"]) == ("dispatch", [job.id], "api")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (None, 400),
        ([], 400),
        ({}, 400),
        ({"target": 7}, 400),
        ({"target": "os.system", "parameters": ["true"]}, 403),
        ({"target": SAMPLE, "method": "nope"}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": "x"}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": []}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["x"], "colour": 1}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["x"], "queue": 1}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["x"], "delay": "x"}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["x"], "run_at": 5}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["x"], "tags": "a"}, 400),
        ({"target": SAMPLE, "method": "execute", "parameters": ["\ud800"]}, 400),
    ],
)
def test_invalid_dispatch_creates_no_job(host: Host, body: Any, code: int) -> None:
    """A job outside the allow-list, or with an invalid body, is refused and not created."""
    assert post(host, "/jobs", body, code)["error"]["message"]
    assert host.count() == 0


def test_dispatch_with_taken_unique_key(host: Host) -> None:
    """If the unique key is taken, the job that holds it is returned, and the audit trail has no
    second entry."""
    dispatch = {"target": SAMPLE, "method": "execute", "parameters": ["x"], "unique_key": "k"}
    first, second = (post(host, "/jobs", dispatch, 201) for _ in range(2))
    assert (first["id"], first["deduplicated"]) == (second["id"], False)
    assert second["deduplicated"] is True
    assert len(get(host, "/audit")["entries"]) == 1


def test_failing_identifier_prevents_dispatch(host: Host) -> None:
    """If the host's ``identify_visitor`` function raises, no job is created."""
    host.bgjobs.identify_visitor(lambda: str(1 / 0))
    token = host.client.get(f"{API}/stats").headers["X-CSRFToken"]
    body = {"target": SAMPLE, "method": "execute", "parameters": ["x"]}
    host.app.config["TESTING"] = True
    with pytest.raises(ZeroDivisionError):
        host.client.post(f"{API}/jobs", json=body, headers={"X-CSRFToken": token})
    assert host.count() == 0


def test_deeply_nested_json_is_400(host: Host) -> None:
    """JSON with 100,000 levels is answered with 400."""
    token = host.client.get(f"{API}/stats").headers["X-CSRFToken"]
    deep = '{"target": "x", "parameters": ' + "[" * 100_000 + "]" * 100_000 + "}"
    headers = {"X-CSRFToken": token, "Content-Type": "application/json"}
    answer = host.client.post(f"{API}/jobs", data=deep, headers=headers)
    assert answer.status_code == 400


def test_retry_without_retries_left_is_an_error(host: Host) -> None:
    """A job that raised ``Retry`` without retries left is listed as an error; a job that got its
    retry is not."""
    for status, attempt in (("failed", 1), ("completed", 2)):
        job_id = host.add(status=status, attempt=attempt, finished_at=now())
        host.add_attempt(job_id, error_type="Retry", error="Retry")
        change = sa.update(Attempt).values(outcome="retry")
        with host.state.store.engine.begin() as connection:
            connection.execute(change)
    (group,) = get(host, "/errors")["errors"]
    assert (group["error_type"], group["attempts"], group["last_job_id"]) == ("Retry", 1, 1)


def test_pause_and_drain(host: Host) -> None:
    """Queues can be paused and workers drained; an unknown queue is a 404, and an invalid value a
    400."""
    host.add(queue="mail")
    host.add_worker()
    assert post(host, "/queues/pause", {"queue": "mail"}) == {"queue": "mail", "changed": True}
    assert get(host, "/queues")["queues"][0]["paused_at"]
    assert post(host, "/queues/pause", {"queue": "mail"})["changed"] is False
    post(host, "/queues/pause", {"queue": "nope"}, 404)
    post(host, "/queues/pause", {"queue": 7}, 400)
    assert post(host, "/workers/drain", {"worker": 1})["changed"] is True
    assert get(host, "/workers")["workers"][0]["is_draining"] is True
    for nonsense in (0, "1", 1.5, True, 2**70):
        post(host, "/workers/drain", {"worker": nonsense}, 400)


class TestRights:
    def test_api_without_authorizer_is_closed(self, make_host: MakeHost) -> None:
        """Without an authorizer, the API answers 403 as JSON."""
        host = make_host(authorizer=None)
        for path in ("/stats", "/jobs", "/openapi.json", "/audit"):
            assert get(host, path, 403)["error"]["status"] == 403

    def test_change_needs_a_valid_token(self, host: Host) -> None:
        """Without a token, or with the token of another session, nothing changes."""
        job_id = host.add()
        for headers in ({}, {"X-CSRFToken": "x"}):
            answer = host.client.post(f"{API}/jobs/{job_id}/cancel", headers=headers)
            assert answer.status_code == 400
            assert answer.content_type == "application/json"
        other = host.app.test_client()
        token = other.get(f"{API}/stats").headers["X-CSRFToken"]
        answer = host.client.post(f"{API}/jobs/{job_id}/cancel", headers={"X-CSRFToken": token})
        assert answer.status_code == 400
        assert host.job(job_id).status == "pending"

    def test_viewer_cannot_change_anything(self, make_host: MakeHost) -> None:
        """A visitor with only the ``view`` right gets 403 for each change."""
        host = make_host(authorizer=lambda action, job: action == "view")
        job_id = host.add()
        host.add_worker()
        post(host, f"/jobs/{job_id}/cancel", None, 403)
        post(host, "/jobs", {"target": SAMPLE}, 403)
        post(host, "/queues/pause", {"queue": "default"}, 403)
        post(host, "/workers/drain", {"worker": 1}, 403)
        get(host, "/audit", 403)
        assert host.job(job_id).status == "pending"

    def test_hidden_jobs_are_missing(self, make_host: MakeHost) -> None:
        """A job that the visitor may not view is in no list, and no error message reveals it."""
        host = make_host(authorizer=lambda action, job: job is None or job.owner == "me")
        hidden = host.add(owner="you", status="failed", error="E: yours", error_type="E")
        host.add_attempt(hidden, error="E: yours", error_type="E")
        assert get(host, "/jobs")["jobs"] == []
        get(host, f"/jobs/{hidden}", 404)
        assert get(host, "/errors")["errors"] == []
        dispatch = {"target": SAMPLE, "method": "execute", "parameters": ["x"], "unique_key": "k"}
        post(host, "/jobs", {**dispatch, "owner": "you"}, 201)
        assert "id" not in post(host, "/jobs", {**dispatch, "owner": "me"}, 409)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/jobs?statsu=failed", "there is no parameter 'statsu'; the parameters are after, before"),
        ("/jobs?per=0", "per must be 1 to 200, and not '0'"),
        ("/jobs?per=many", "per must be 1 to 200"),
        ("/stats?period=2h", "period must be one of 1h, 24h, 7d"),
        ("/queues?period=1h", "there is no parameter 'period'; it takes none"),
    ],
)
def test_error_names_an_unknown_parameter(host: Host, path: str, message: str) -> None:
    """A misspelt filter is refused instead of returning all jobs, and the error lists the
    parameters."""
    assert message in json.loads(host.get(f"/api/v1{path}", 400))["error"]["message"]


def test_missing_job_has_its_own_message(host: Host) -> None:
    """The message of a 404 is about the job, not about the address."""
    error = json.loads(host.get("/api/v1/jobs/99", 404))["error"]
    assert error["message"] == "there is no such job, or you may not see it"


@pytest.mark.parametrize(
    "sent",
    [
        {"target": "x." * 500_000 + "x"},
        {"target": "y" * 1_000_000},
        {"target": SAMPLE, "method": "m" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "queue": "Q" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "priority": "p" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "delay": "d" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "backoff": "b" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "tags": "t" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "run_at": "r" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "unique_key": "u" * 1_000_000},
        {"target": SAMPLE, "method": "execute", "z" * 1_000_000: 1},
        ["x" * 1_000_000],
        "x" * 1_000_000,
    ],
    ids=lambda sent: ",".join(key[:9] for key in sent) if isinstance(sent, dict) else "",
)
def test_errors_do_not_repeat_long_input(
    host: Host, caplog: pytest.LogCaptureFixture, sent: Any
) -> None:
    """If a request has a million characters, neither the answer nor the log repeats them."""
    answer = host.client.post(
        f"{PREFIX}/api/v1/jobs", json=sent, headers={"X-CSRFToken": host.token()}
    )
    assert answer.status_code in (400, 403)
    assert len(answer.text) < 5_000
    for record in caplog.records:
        assert len(record.getMessage()) < 5_000
        assert len(str(vars(record))) < 20_000
