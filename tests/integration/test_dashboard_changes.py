"""Changes in the dashboard: dispatch, cancel, retry and delete."""

from __future__ import annotations

import datetime as dt
import html
import json
import re
from typing import Any

import pytest

from flask_bgjobs.job import serialize
from tests.conftest import DEADLINE_SECONDS
from tests.integration.test_dashboard_support import (
    BROKEN,
    PREFIX,
    RECEIPT,
    SAMPLE,
    Host,
    MakeHost,
    now,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

EXECUTE = f"{SAMPLE}:execute"


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


def follow(host: Host, response: Any) -> str:
    assert response.status_code == 303
    page = host.client.get(response.headers["Location"])
    assert page.status_code == 200
    return html.unescape(page.text)


# Cancel, retry, delete


def test_waiting_job_is_cancelled_at_once(host: Host) -> None:
    """Cancelling a waiting job shows a message once."""
    job_id = host.add()
    assert f"Job {job_id} cancelled." in follow(host, host.post(f"/job/{job_id}/cancel"))
    assert host.job(job_id).status == "cancelled"
    assert f"Job {job_id} cancelled." not in host.get("/list")


def test_running_job_gets_a_cancel_request(host: Host) -> None:
    """Cancelling a running job is a request, and the job is shown as cancelling."""
    job_id = host.add(status="running", attempt=1)
    page = follow(host, host.post(f"/job/{job_id}/cancel"))
    assert f"Job {job_id} was asked to stop." in page
    assert "cancelling…" in page
    assert host.job(job_id).status == "running"


def test_cancel_of_finished_job_is_skipped(host: Host) -> None:
    """A job that cannot be cancelled is skipped, with the reason."""
    job_id = host.add(status="completed")
    page = follow(host, host.post(f"/job/{job_id}/cancel"))
    assert f"Job {job_id} skipped: it is already completed." in page


def test_failed_job_is_retried(host: Host) -> None:
    """Retry makes a failed job pending, with all its retries."""
    job_id = host.add(status="failed", retry_count=3, attempt=4)
    follow(host, host.post(f"/job/{job_id}/retry"))
    assert host.job(job_id).status == "pending"
    assert host.job(job_id).retry_count == 0


def test_delete_leads_to_the_list(host: Host) -> None:
    """After a job was deleted on its own page, the list is shown."""
    job_id = host.add(status="failed")
    response = host.post(f"/job/{job_id}/delete", next=f"{PREFIX}/job/{job_id}")
    assert response.headers["Location"] == f"{PREFIX}/list"
    assert f"Job {job_id} deleted." in follow(host, response)
    assert host.count() == 0


def test_unknown_action_is_404(host: Host) -> None:
    """An action other than cancel, retry and delete is a 404."""
    job_id = host.add()
    assert host.post(f"/job/{job_id}/explode").status_code == 404


# Dispatch


def test_form_offers_the_allow_list(make_host: MakeHost) -> None:
    """The form offers only allowed jobs; jobs that cannot be imported are listed but disabled."""
    host = make_host(BGJOBS_ALLOWED_JOBS=[SAMPLE, RECEIPT, BROKEN, "no.such.module.Thing"])
    page = html.unescape(host.get("/dispatch"))
    form = page.split("<main")[1].split("<datalist")[0]
    values = re.findall(r'<option value="([^"]+)"( disabled)?', form)
    assert dict(values) == {
        EXECUTE: "",
        RECEIPT: "",
        BROKEN: " disabled",
        "no.such.module.Thing": " disabled",
    }
    assert f"{SAMPLE}.execute(message, times=…)" in page
    assert "No module named 'no'" in page


def test_every_field_is_stored(host: Host) -> None:
    """Every field of the form is stored in the job."""
    response = host.post(
        "/dispatch",
        job=EXECUTE,
        parameters='{"message": "Hi", "times": 2}',
        queue="mail",
        priority="high",
        delay="3600",
        retries="5",
        retry_delay="1, 2.5",
        timeout="30",
    )
    assert "Job 1 enqueued." in follow(host, response)
    job = host.job(1)
    assert (job.target, job.method) == (SAMPLE, "execute")
    assert job.parameters == {"message": "Hi", "times": 2}
    assert (job.queue, job.priority, job.retries, job.timeout) == ("mail", 3, 5, 30.0)
    assert json.loads(job.retry_delay) == [1.0, 2.5]
    assert job.status == "scheduled"
    assert 3_600 - DEADLINE_SECONDS < (job.run_at - now()).total_seconds() <= 3_600


def test_empty_fields_take_defaults(host: Host) -> None:
    """Empty fields take the configured defaults."""
    follow(host, host.post("/dispatch", job=EXECUTE, parameters='["Hi"]'))
    job = host.job(1)
    assert (job.status, job.queue, job.priority, job.retries) == ("pending", "default", 0, 3)


def test_run_at_time_zones(host: Host) -> None:
    """``run_at`` is in UTC, in the selected time zone, or in its own offset."""
    base = {"job": EXECUTE, "parameters": '["Hi"]'}
    year = now().year + 1
    host.post("/dispatch", **base, run_at=f"{year}-06-01T12:00")
    host.post("/dispatch", **base, run_at=f"{year}-06-01T12:00:00+02:00")
    in_berlin = {"run_at": f"{year}-06-01T12:00", "zone": "Europe/Berlin"}
    host.post("/dispatch", **base, **in_berlin)
    assert host.job(1).run_at == dt.datetime(year, 6, 1, 12)
    assert host.job(2).run_at == dt.datetime(year, 6, 1, 10)
    assert host.job(3).run_at == dt.datetime(year, 6, 1, 10)


@pytest.mark.parametrize(
    ("zone", "message"),
    [
        ("Mars/Olympus", "'Mars/Olympus' is not a known time zone"),
        ("../../etc/passwd", "is not a known time zone"),
        ("Europe/Berlin", "There is no such time in Europe/Berlin: the clocks are set forward"),
    ],
)
def test_invalid_local_time_is_refused(host: Host, zone: str, message: str) -> None:
    """An unknown time zone, and a time in the hour that is skipped when clocks are set forward, are
    refused."""
    fields = {"job": EXECUTE, "parameters": '["Hi"]', "run_at": "2027-03-28T02:30", "zone": zone}
    response = host.post("/dispatch", **fields)
    assert response.status_code == 400
    page = html.unescape(response.text)
    assert page.count(message) == 1
    assert 'value="2027-03-28T02:30"' in page
    assert host.count() == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("job", "", "Choose a job."),
        ("job", "os.system", "is not allowed"),
        ("job", f"{SAMPLE}:nothing", "has no method"),
        ("job", SAMPLE, "name the method"),
        ("parameters", "[1,", "Not JSON"),
        ("parameters", '"Hello"', "Must be a list"),
        ("parameters", "7", "Must be a list"),
        ("parameters", "[NaN]", "not a number that JSON can hold"),
        ("parameters", "[1e999]", "not a number that JSON can hold"),
        ("parameters", "[" * 100_000, "Not "),
        ("parameters", "[" + "9" * 5000 + "]", "Not readable"),
        ("parameters", '["\\ud800"]', "lone surrogate"),
        ("parameters", '{"__bgjobs__": "x", "v": 1}', "Not readable"),
        ("parameters", "[]", "do not fit"),
        ("parameters", '{"mess": 1}', "do not fit"),
        ("queue", "Mail Box", "Queue must be"),
        ("queue", "é", "Queue must be"),
        ("priority", "urgent", "Priority 'urgent' is unknown"),
        ("priority", "99999999999", "must be a whole number"),
        ("delay", "soon", "not a number of seconds"),
        ("delay", "nan", "at most a hundred years"),
        ("delay", "inf", "at most a hundred years"),
        ("delay", "-5", "at least 0 s"),
        ("delay", "1e300", "at most a hundred years"),
        ("run_at", "tomorrow", "Must be a time"),
        ("run_at", "9999-12-31T23:59", "within a hundred years"),
        ("run_at", "0001-01-01T00:00+14:00", "within a hundred years"),
        ("retries", "many", "Must be a whole number"),
        ("retries", "-1", "retries must be a whole number"),
        ("retries", "99999999", "retries must be a whole number"),
        ("retry_delay", "1,x", "not a number of seconds"),
        ("retry_delay", ",".join(["1"] * 200), "1 to 100 of them"),
        ("timeout", "0", "more than 0 s"),
        ("timeout", "x", "not a number of seconds"),
    ],
)
def test_errors_are_shown_and_input_is_kept(
    host: Host, field: str, value: str, message: str
) -> None:
    """An invalid form is answered with 400 and the same input; no job is enqueued."""
    fields = {"job": EXECUTE, "parameters": '["Hi"]', "queue": "mail", field: value}
    response = host.post("/dispatch", **fields)
    assert response.status_code == 400
    page = html.unescape(response.text)
    assert message.lower() in page.lower()
    if field != "job":
        assert f'value="{EXECUTE}" selected' in page
        assert value in page
    if field != "queue":
        assert 'value="mail"' in page
    assert host.count() == 0


@pytest.mark.parametrize("field", ["parameters", "queue", "priority", "retries", "timeout"])
def test_error_is_shown_at_its_field(host: Host, field: str) -> None:
    """The message is shown at its field."""
    fields = {"job": EXECUTE, "parameters": '["Hi"]', field: "{-1}"}
    page = host.post("/dispatch", **fields).text
    below = re.search(rf'<div id="{field}-hint">\s*<p class="bgj-wrong">', page)
    assert below is not None


def test_delay_and_run_at_exclude_each_other(host: Host) -> None:
    """A form with both delay and ``run_at`` is refused."""
    fields = {"job": EXECUTE, "parameters": '["Hi"]', "delay": "5", "run_at": "2099-01-01T00:00"}
    response = host.post("/dispatch", **fields)
    assert response.status_code == 400
    assert "not both" in response.text


def test_missing_and_repeated_fields_are_400(host: Host) -> None:
    """A form with missing, repeated or unknown fields is answered with 400."""
    token = host.token()
    for data in (
        {},
        {"job": [EXECUTE, "x"], "parameters": ["[]", "{}"]},
        {"again": ["x", "1"], "job": "\x00"},
        {"again": str(10**30), "job": EXECUTE, "parameters": "[\x00]"},
    ):
        response = host.client.post(f"{PREFIX}/dispatch", data={"csrf_token": token, **data})
        assert response.status_code == 400
    assert host.count() == 0


def test_oversized_form_is_413(make_host: MakeHost) -> None:
    """A body beyond the app's limit is answered with a 413 page."""
    host = make_host(MAX_CONTENT_LENGTH=10_000)
    response = host.post("/dispatch", job=EXECUTE, parameters="x" * 20_000)
    assert response.status_code == 413
    assert "<h1>" in response.text


# Dispatch again


def form_fields(page: str) -> dict[str, str]:
    """The fields of the dispatch form, as a browser would send them."""
    fields = dict(re.findall(r'<input[^>]* name="(\w+)"[^>]* value="([^"]*)"', page))
    chosen = re.search(r'<option value="([^"]*)" selected', page)
    text = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page, re.DOTALL)
    assert chosen is not None
    assert text is not None
    found = {**fields, "job": chosen[1], "parameters": text[1]}
    del found["csrf_token"]
    return {key: html.unescape(value) for key, value in found.items() if key != "next"}


def test_again_copies_secrets_on_the_server(host: Host) -> None:
    """Dispatch again fills in the form; masked values are copied on the server and never shown."""
    job_id = host.add(
        target=RECEIPT,
        method=None,
        parameters_json='{"order_id":7,"password":"hunter2"}',
        queue="mail",
        priority=4,
        retries=9,
        retry_delay="[1.5,2.0]",
        backoff="fixed",
        timeout=12.0,
        tags_json='["vip"]',
        status="failed",
    )
    page = host.get(f"/dispatch?again={job_id}")
    assert "hunter2" not in page
    fields = form_fields(page)
    fields["parameters"] = fields["parameters"].replace("7", "8")
    response = host.post("/dispatch", **fields)
    assert response.status_code == 303
    new = host.job(job_id + 1)
    assert new.parameters == {"order_id": 8, "password": "hunter2"}
    assert (new.queue, new.priority, new.retries, new.timeout) == ("mail", 4, 9, 12.0)
    assert new.tags == ["vip"]
    assert json.loads(new.retry_delay) == [1.5, 2.0]


@pytest.mark.parametrize(
    "parameters",
    [
        [7, "hunter2"],
        {"order_id": 7, "password": "hunter2"},
        {"order_id": {"a": [1, {"api_key": "k3y", "b": (1, 2)}]}},
        {"order_id": dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "password": ["a", "b"]},
        {"order_id": {"__bgjobs__": "x"}},
        {"order_id": "***", "password": "***"},
    ],
)
def test_again_keeps_parameters_and_types(host: Host, parameters: Any) -> None:
    """An unchanged form dispatches equal parameters of the same types."""
    host.add(target=RECEIPT, method=None, parameters_json=serialize.dumps(parameters))
    response = host.post("/dispatch", **form_fields(host.get("/dispatch?again=1")))
    assert response.status_code == 303, response.text
    assert host.job(2).parameters == parameters


def test_secrets_are_copied_only_to_the_same_parameter(host: Host) -> None:
    """A masked value cannot be copied to another job or parameter, where it would be shown."""
    host.add(target=RECEIPT, method=None, parameters_json='[7,"hunter2"]')
    fields = {"again": "1", "job": EXECUTE, "parameters": '["a", "***"]'}
    host.post("/dispatch", **fields)
    assert host.job(2).parameters == ["a", "***"]
    fields = {"again": "1", "job": RECEIPT, "parameters": '["***", "***"]'}
    host.post("/dispatch", **fields)
    assert host.job(3).parameters == ["***", "hunter2"]
    fields = {"again": "1", "job": RECEIPT, "parameters": '{"order_id": "***"}'}
    host.post("/dispatch", **fields)
    assert host.job(4).parameters == {"order_id": "***"}


def test_errors_do_not_show_secrets(host: Host) -> None:
    """A refused form shows ``***`` again, and no message contains the value."""
    host.add(target=RECEIPT, method=None, parameters_json='{"order_id":7,"password":"hunter2"}')
    response = host.post(
        "/dispatch",
        again="1",
        job=RECEIPT,
        parameters='{"order_id": 7, "password": "***", "more": 1}',
    )
    assert response.status_code == 400
    assert "hunter2" not in response.text
