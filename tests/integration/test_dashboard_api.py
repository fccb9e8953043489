"""The JSON API: that it keeps to its description, its rights and its masks."""

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


def filled(host: Host) -> Host:
    """Something of everything that the API can tell of."""
    for status in ("pending", "scheduled", "retrying", "running", "completed", "cancelled"):
        host.add(status=status)
    failed = host.add(
        status="failed", error="E: x", error_type="E", finished_at=now(), tags_json='["a"]'
    )
    host.add_attempt(failed, error="E: x", error_type="E")
    host.add_line(failed, "a line")
    host.add_worker()
    return host


DESCRIPTION = json.loads(
    importlib.resources.files("flask_bgjobs.dashboard").joinpath("openapi.json").read_text()
)
OPERATIONS = [(path, method) for path, each in DESCRIPTION["paths"].items() for method in each]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_it_keeps_to_its_description(make_host: MakeHost, path: str, method: str) -> None:
    """Whatever is asked of it, the API answers with a code and a body that it describes."""
    host = filled(make_host())
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


def test_the_description_is_served(host: Host) -> None:
    """The description that the package holds can be read where the API is, at any prefix."""
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


def test_each_refusal_is_described() -> None:
    """Every operation describes what it answers to bad input, to strangers and without a database,
    and the statuses are those of jobs."""
    for path, method in OPERATIONS:
        responses = DESCRIPTION["paths"][path][method]["responses"]
        assert {"400", "401", "403", "503"} <= set(responses), (path, method)
    statuses = DESCRIPTION["components"]["schemas"]["JobStatus"]["enum"]
    assert statuses == [status.value for status in JobStatus]


@pytest.mark.parametrize("path", ["/stats?period=2h", "/queues?x=1", "/workers?ended=2"])
def test_unknown_values_are_400(host: Host, path: str) -> None:
    """Reading anything with a parameter or a value that it does not have is refused."""
    assert get(host, path, 400)["error"]["status"] == 400


def test_jobs_are_listed_as_filtered(host: Host) -> None:
    """The API takes the filters of the list, and gives its cursors."""
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
def test_what_makes_no_sense_is_400(host: Host, query: str) -> None:
    """A filter that makes no sense is refused with the reason, as JSON."""
    error = get(host, f"/jobs?{query}", 400)["error"]
    assert error["status"] == 400
    assert error["message"]


def test_a_job_with_all_that_is_known(host: Host) -> None:
    """One job has its attempts, lines and reasons, and is not there where it is missing."""
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
    """What is masked on the pages is masked here."""
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


def test_jobs_are_changed(host: Host) -> None:
    """Verbs do what buttons do; what cannot be done is a conflict."""
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


def test_a_job_is_dispatched(host: Host) -> None:
    """A job is enqueued as run_background_job would, and the trail says by whom."""
    body = {
        "target": SAMPLE,
        "method": "execute",
        "parameters": {"message": "Hi", "times": 2},
        "priority": "high",
        "queue": "mail",
        "run_at": "2030-01-01T00:00:00+02:00",
        "tags": ["a"],
    }
    made = post(host, "/jobs", body, 201)
    job = host.job(made["id"])
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
def test_what_cannot_be_dispatched(host: Host, body: Any, code: int) -> None:
    """What may not run, or makes no sense, leaves no job."""
    assert post(host, "/jobs", body, code)["error"]["message"]
    assert host.count() == 0


def test_a_job_that_is_there_already_is_not_dispatched_again(host: Host) -> None:
    """With a key that is taken, the job that has it is given back, and the trail says nothing."""
    dispatch = {"target": SAMPLE, "method": "execute", "parameters": ["x"], "unique_key": "k"}
    first, second = (post(host, "/jobs", dispatch, 201) for _ in range(2))
    assert (first["id"], first["deduplicated"]) == (second["id"], False)
    assert second["deduplicated"] is True
    assert len(get(host, "/audit")["entries"]) == 1


def test_who_cannot_be_named_dispatches_nothing(host: Host) -> None:
    """Where the host's own function fails, no job is left behind that nobody has dispatched."""
    host.bgjobs.identify_visitor(lambda: str(1 / 0))
    token = host.client.get(f"{API}/stats").headers["X-CSRFToken"]
    body = {"target": SAMPLE, "method": "execute", "parameters": ["x"]}
    host.app.config["TESTING"] = True
    with pytest.raises(ZeroDivisionError):
        host.client.post(f"{API}/jobs", json=body, headers={"X-CSRFToken": token})
    assert host.count() == 0


def test_nested_nonsense_is_400(host: Host) -> None:
    """JSON that is nested beyond all reason is refused."""
    token = host.client.get(f"{API}/stats").headers["X-CSRFToken"]
    deep = '{"target": "x", "parameters": ' + "[" * 100_000 + "]" * 100_000 + "}"
    headers = {"X-CSRFToken": token, "Content-Type": "application/json"}
    answer = host.client.post(f"{API}/jobs", data=deep, headers=headers)
    assert answer.status_code == 400


def test_a_retry_that_was_the_last_is_an_error(host: Host) -> None:
    """A job that asked for one retry more than it had has failed; one that got it has not."""
    for status, attempt in (("failed", 1), ("completed", 2)):
        job_id = host.add(status=status, attempt=attempt, finished_at=now())
        host.add_attempt(job_id, error_type="Retry", error="Retry")
        change = sa.update(Attempt).values(outcome="retry")
        with host.state.store.engine.begin() as connection:
            connection.execute(change)
    (group,) = get(host, "/errors")["errors"]
    assert (group["error_type"], group["attempts"], group["last_job_id"]) == ("Retry", 1, 1)


def test_queues_and_workers_are_changed(host: Host) -> None:
    """Queues are paused, workers drained; what does not exist is said."""
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
    def test_it_is_closed_until_somebody_may(self, make_host: MakeHost) -> None:
        """Without an authorizer everything is 403, as JSON."""
        host = make_host(authorizer=None)
        for path in ("/stats", "/jobs", "/openapi.json", "/audit"):
            assert get(host, path, 403)["error"]["status"] == 403

    def test_a_change_needs_the_token(self, host: Host) -> None:
        """Without the token, or with that of another session, nothing is changed."""
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

    def test_each_change_is_asked_for(self, make_host: MakeHost) -> None:
        """Who may only view changes nothing here either."""
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
        """Who may not see a job finds it in no list, and no error tells of it."""
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
    ("path", "says"),
    [
        ("/jobs?statsu=failed", "there is no parameter 'statsu'; the parameters are after, before"),
        ("/jobs?per=0", "per must be 1 to 200, and not '0'"),
        ("/jobs?per=many", "per must be 1 to 200"),
        ("/stats?period=2h", "period must be one of 1h, 24h, 7d"),
        ("/queues?period=1h", "there is no parameter 'period'; there are none"),
    ],
)
def test_a_parameter_that_would_be_overlooked_is_refused(host: Host, path: str, says: str) -> None:
    """Who misspells a filter must not get every job."""
    assert says in json.loads(host.get(f"/api/v1{path}", 400))["error"]["message"]


def test_a_job_that_is_not_there_is_told_in_words(host: Host) -> None:
    """404 speaks of the job, not of an address."""
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
def test_a_refusal_does_not_repeat_what_is_long(
    host: Host, caplog: pytest.LogCaptureFixture, sent: Any
) -> None:
    """Neither the answer nor the log holds a megabyte because somebody has sent one."""
    answer = host.client.post(
        f"{PREFIX}/api/v1/jobs", json=sent, headers={"X-CSRFToken": host.token()}
    )
    assert answer.status_code in (400, 403)
    assert len(answer.text) < 5_000
    for record in caplog.records:
        assert len(record.getMessage()) < 5_000
        assert len(str(vars(record))) < 20_000
