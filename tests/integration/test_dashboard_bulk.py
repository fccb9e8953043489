"""Changes of many jobs, of queues and of workers, and their entries in the audit trail."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs.dashboard import changes
from flask_bgjobs.models import AuditEntry, Job, Worker
from tests.integration.test_dashboard_support import PREFIX, RECEIPT, Host, MakeHost, now
from tests.integration.test_dashboard_support import host_maker as host_maker


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


def audit_entries(host: Host) -> list[Any]:
    with host.state.store.read() as connection:
        return list(connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id)))


def hidden_fields(page: str) -> list[tuple[str, str]]:
    """The hidden fields of the confirmation form, as a browser would send them."""
    form = page.split('aria-labelledby="bgjobs-question"')[1].split("</form>")[0]
    found = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', form)
    return [(name, html.unescape(value)) for name, value in found]


def send(host: Host, path: str, data: list[tuple[str, Any]], code: int) -> str:
    from werkzeug.datastructures import MultiDict

    response = host.client.post(PREFIX + path, data=MultiDict(data))
    assert response.status_code == code, response.text
    return response.text


def open_confirmation(host: Host, verb: str, *data: tuple[str, Any]) -> str:
    return send(host, f"/bulk/{verb}", [("csrf_token", host.token()), *data], 200)


def confirm(host: Host, verb: str, confirmation: str, **more: Any) -> str:
    """The page shown after the form was confirmed."""
    send(host, f"/bulk/{verb}", [*hidden_fields(confirmation), *more.items()], 303)
    return host.get("/list")


def test_selected_jobs_are_changed_after_confirmation(host: Host) -> None:
    """The confirmation names the action and the number of jobs; nothing changes before it is
    sent."""
    ids = [host.add() for _ in range(3)]
    done = host.add(status="completed")
    confirmation = open_confirmation(host, "cancel", *(("id", each) for each in (*ids, done)))
    assert "Cancel 4 jobs?" in confirmation
    assert [host.job(each).status for each in ids] == ["pending"] * 3
    page = confirm(host, "cancel", confirmation)
    assert "3 cancelled, 1 skipped." in page
    assert "1 skipped: it is already completed." in page
    assert {host.job(each).status for each in ids} == {"cancelled"}
    (entry,) = audit_entries(host)
    assert (entry.action, entry.result, entry.reason) == ("cancel", "3 cancelled, 1 skipped", None)


def test_delete_requires_the_number(host: Host) -> None:
    """To delete jobs, their number must be typed; with a wrong number nothing changes."""
    ids = [host.add(status="failed") for _ in range(2)]
    confirmation = open_confirmation(host, "delete", *(("id", each) for each in ids))
    assert "Type <strong>2</strong>" in confirmation
    for wrong in ("", "3", "two"):
        page = send(host, "/bulk/delete", [*hidden_fields(confirmation), ("typed", wrong)], 400)
        typed = f"{wrong}, not 2" if wrong else "no number"
        assert f"You typed {typed}: nothing was changed." in page
    assert host.count() == 2
    confirm(host, "delete", confirmation, typed=" 2 ")
    assert host.count() == 0


def test_more_than_100_jobs_require_the_number(host: Host) -> None:
    """Up to 100 jobs are cancelled with one click; for more, their number must be typed."""
    host.add(100)
    assert "typed" not in open_confirmation(host, "cancel", ("all", 1))
    host.add(1)
    assert 'name="typed"' in open_confirmation(host, "cancel", ("all", 1))


def test_selection_is_fixed_at_the_confirmation(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs that matched when the confirmation was opened are changed, in batches, and no later
    ones."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    wanted = [host.add(status="failed", queue="mail") for _ in range(5)]
    others = [host.add(status="failed"), host.add(queue="mail")]
    confirmation = open_confirmation(
        host, "retry", ("all", 1), ("status", "failed"), ("queue", "mail")
    )
    assert "Retry 5 jobs?" in confirmation
    assert "status:failed queue:mail" in confirmation
    later = host.add(status="failed", queue="mail")
    page = confirm(host, "retry", confirmation)
    assert "5 pending again." in page
    assert {host.job(each).status for each in wanted} == {"pending"}
    assert [host.job(each).status for each in (*others, later)] == ["failed", "pending", "failed"]
    assert {entry.reason for entry in audit_entries(host)} == {"status=failed&queue=mail"}


def test_unchangeable_jobs_do_not_use_up_batches(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that an action cannot change are not read, however many they are."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", -1.0)
    host.add(5, status="completed")
    host.add(3, status="failed")
    for left in (1, 0):
        confirmation = open_confirmation(host, "retry", ("all", 1))
        confirm(host, "retry", confirmation)
        with host.state.store.read() as connection:
            failed = sa.select(sa.func.count()).where(Job.status == "failed")
            assert connection.scalar(failed) == left


@pytest.mark.parametrize("becomes", ["failed", "retrying"])
def test_job_that_fails_again_is_retried_once(
    host: Host, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """A job that fails again while other jobs are still being retried is not retried a second
    time."""
    host.add(3, status="retrying")
    host.add(3, status="failed")
    retry = host.state.store.retry
    retried: list[int] = []

    def retry_and_fail(ids: list[int], by: object) -> Any:
        result = retry(ids, by)
        retried.extend(ids)
        ended = now(1.0) if becomes == "failed" else None
        change = sa.update(Job).where(Job.id.in_(ids)).values(status=becomes, finished_at=ended)
        with host.state.store.engine.begin() as connection:
            connection.execute(change)
        return result

    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    confirmation = open_confirmation(host, "retry", ("all", 1))
    monkeypatch.setattr(host.state.store, "retry", retry_and_fail)
    confirm(host, "retry", confirmation)
    assert sorted(retried) == [1, 2, 3, 4, 5, 6]


def test_number_to_type_is_that_of_the_confirmation(host: Host) -> None:
    """The number to type is the one in the confirmation, even if workers have changed jobs
    since."""
    host.add(3, status="failed")
    confirmation = open_confirmation(host, "delete", ("all", 1), ("status", "failed"))
    host.state.store.retry([1])
    assert "2 deleted." in confirm(host, "delete", confirmation, typed="3")
    assert host.job(1).status == "pending"


@pytest.mark.parametrize("field", ["sort=zzz", 'q="', "since=zzz", "status=zzz"])
def test_invalid_filter_changes_nothing(host: Host, field: str) -> None:
    """With an invalid filter, nothing changes."""
    host.add(owner="x", tags_json='["x"]')
    name, _, value = field.partition("=")
    send(host, "/bulk/cancel", [("csrf_token", host.token()), ("all", 1), (name, value)], 400)
    assert host.job(1).status == "pending"


@pytest.mark.parametrize(
    ("field", "meant", "others"),
    [
        (
            ("error", "ValueError"),
            {"error_type": "ValueError"},
            [{"error_type": "valueerror"}, {"error_type": "ValueErrors"}, {}],
        ),
        (("owner", "42"), {"owner": "42"}, [{"owner": "4"}, {"owner": "421"}, {}]),
        (
            ("tag", "eu"),
            {"tags_json": '["vip", "eu"]'},
            [{"tags_json": '["EU"]'}, {"tags_json": '["europe"]'}, {"tags_json": '["e\\"u"]'}, {}],
        ),
    ],
    ids=["error", "owner", "tag"],
)
def test_filter_matches_exactly(
    host: Host, field: tuple[str, str], meant: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    """Only jobs with exactly this exception, owner or tag are changed."""
    for values in others:
        host.add(status="failed", error="E: x", **values)
    last = host.add(3, status="failed", error="E: x", **meant)
    name, value = field
    assert "All matching" in host.get(f"/list?status=failed&{name}={value}")
    confirmation = open_confirmation(host, "retry", ("all", 1), ("status", "failed"), field)
    assert "Retry 3 jobs?" in confirmation
    assert "3 pending again." in confirm(host, "retry", confirmation)
    statuses = [host.job(number).status for number in range(1, last + 1)]
    assert statuses == ["failed"] * len(others) + ["pending"] * 3


def test_masked_owner_is_not_matched(host: Host) -> None:
    """An owner that equals a secret parameter is masked, so that a filter by it matches no job."""
    host.add(
        status="failed",
        target=RECEIPT,
        method=None,
        owner="hunter2",
        parameters_json='{"order_id": 1, "password": "hunter2"}',
    )
    send(host, "/bulk/retry", [("csrf_token", host.token()), ("all", 1), ("owner", "hunter2")], 303)
    assert "There is no job to retry." in host.get("/list")
    forged = [("all", 1), ("owner", "hunter2"), ("count", 1), ("up_to", 9), ("confirmed", 1)]
    send(host, "/bulk/retry", [("csrf_token", host.token()), *forged], 303)
    assert "skipped" not in host.get("/list")
    assert host.job(1).status == "failed"


def test_hidden_jobs_are_not_counted(make_host: MakeHost) -> None:
    """Hidden jobs are counted neither in the confirmation nor in the result."""
    host = make_host(authorizer=lambda action, job: job is None or job.owner == "42")
    host.add(30, owner="7")
    host.add(2, owner="42")
    confirmation = open_confirmation(host, "cancel", ("all", 1))
    assert "Cancel 2 jobs?" in confirmation
    page = confirm(host, "cancel", confirmation)
    assert "2 cancelled." in page
    assert "skipped" not in page
    assert host.job(1).status == "pending"


def test_count_beyond_the_time_limit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """If counting takes too long, the confirmation says "more than", and the number counted so far
    must be typed."""
    monkeypatch.setattr(changes, "_COUNT_SECONDS", 0.0)
    host.add(200, owner="42")
    confirmation = open_confirmation(host, "cancel", ("all", 1), ("owner", "42"))
    assert "Cancel more than 1 job?" in confirmation
    refused = send(host, "/bulk/cancel", hidden_fields(confirmation), 400)
    assert "You typed no number: nothing was changed." in refused
    assert {host.job(number).status for number in (1, 200)} == {"pending"}
    assert "200 cancelled." in confirm(host, "cancel", confirmation, typed="1")


def test_count_without_result_opens_no_confirmation(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no job was found within the time limit, there is no confirmation, because the number is
    unknown."""
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", 0.0)
    host = make_host(authorizer=lambda action, job: job is None or action == "view")
    host.add(3, owner="42")
    token = ("csrf_token", host.token())
    send(host, "/bulk/cancel", [token, ("all", 1), ("owner", "42")], 303)
    assert "No job to cancel was found in time: narrow the filter." in host.get("/list")


def test_text_search_cannot_select_all(host: Host) -> None:
    """A text search cannot select all matching jobs, because it is only evaluated for the shown
    page."""
    host.add(status="failed", error="E: x")
    assert "All matching" not in host.get("/list?q=x")
    assert "All matching" in host.get("/list?status=failed")
    token = ("csrf_token", host.token())
    send(host, "/bulk/retry", [token, ("all", 1), ("q", "x")], 400)
    assert host.job(1).status == "failed"


def test_empty_selection(host: Host) -> None:
    """Without a selection, or with invalid ids, the page asks to select jobs first."""
    host.add()
    for data in ([], [("id", "x"), ("id", "-1"), ("id", "9" * 30)]):
        send(host, "/bulk/cancel", [("csrf_token", host.token()), *data], 303)
        assert "Select jobs first." in host.get("/list")


def test_jobs_without_the_right_are_skipped(make_host: MakeHost) -> None:
    """The authorizer is called for each job; hidden jobs are reported like missing ones."""

    def allow(action: str, job: Any) -> bool:
        if job is None:
            return True
        return job.owner != "hidden" and (action == "view" or job.owner == "mine")

    host = make_host(authorizer=allow)
    mine, yours = host.add(owner="mine"), host.add(owner="yours")
    hidden = host.add(owner="hidden")
    ids = [("id", each) for each in (mine, yours, hidden, 4711)]
    page = confirm(host, "cancel", open_confirmation(host, "cancel", *ids))
    assert "1 cancelled, 3 skipped." in page
    assert "1 skipped: you are not allowed to." in page
    assert "2 skipped: it does not exist." in page
    assert [host.job(each).status for each in (mine, yours, hidden)] == [
        "cancelled",
        "pending",
        "pending",
    ]


def test_change_stops_at_the_time_limit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that exceeds the time of one request stops, and the page says to repeat it."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", -1.0)
    host.add(5)
    page = confirm(host, "cancel", open_confirmation(host, "cancel", ("all", 1)))
    assert "2 cancelled." in page
    assert "Repeat the action for the rest." in page


def test_filters_are_kept_after_a_change(host: Host) -> None:
    """After a change, the visitor is back on the list with its filters."""
    host.add(status="failed")
    here = "/jobs/list?status=failed&per=20"
    confirmation = open_confirmation(host, "retry", ("id", 1), ("next", here))
    assert f'href="{html.escape(here)}"' in confirmation
    response = host.client.post(f"{PREFIX}/bulk/retry", data=dict(hidden_fields(confirmation)))
    assert response.location == here


def test_queues_are_paused_and_resumed(host: Host) -> None:
    """The page of queues pauses and resumes a queue, confirms it, and records it in the audit
    trail."""
    host.add(queue="mail")
    assert "/queues/pause" in host.get("/queues")
    host.post("/queues/pause", queue="mail")
    page = host.get("/queues")
    assert "Queue mail paused." in page
    assert "/queues/resume" in page
    assert "mail" in host.state.store.queue_names()
    host.post("/queues/pause", queue="mail")
    assert "Queue mail was paused already." in host.get("/queues")
    host.post("/queues/resume", queue="mail")
    assert "Queue mail resumed." in host.get("/queues")
    assert [(entry.action, entry.subject) for entry in audit_entries(host)] == [
        ("pause", "mail"),
        ("resume", "mail"),
    ]


def test_unknown_queue_is_refused(host: Host) -> None:
    """An unknown queue is not paused, and the error suggests a name."""
    host.add(queue="mail")
    response = host.post("/queues/pause", queue="mial")
    assert response.status_code == 400
    assert "did you mean" in response.text


def test_worker_is_drained(host: Host) -> None:
    """The page of workers drains a worker once, and shows that it is draining."""
    host.add_worker("w-1")
    host.post("/workers/drain", worker="1")
    page = host.get("/workers")
    assert "was asked to finish its running jobs" in page
    assert "draining…" in page
    assert "/workers/drain" not in page
    host.post("/workers/drain", worker="1")
    assert "has stopped, or is already draining" in host.get("/workers")
    with host.state.store.read() as connection:
        assert connection.scalar(sa.select(Worker.drain_requested_at)) is not None
    assert [(entry.action, entry.subject) for entry in audit_entries(host)] == [("drain", "w-1")]


@pytest.mark.parametrize("worker", ["", "x", "0", "4711", "9" * 40])
def test_unknown_worker_is_not_drained(host: Host, worker: str) -> None:
    """An invalid or unknown worker id drains no worker."""
    host.add_worker("w-1")
    assert host.post("/workers/drain", worker=worker).status_code == 303
    assert "draining…" not in host.get("/workers")


class TestActor:
    def test_identified_visitor(self, make_host: MakeHost) -> None:
        """The name from ``identify_visitor`` is recorded in the audit trail."""
        host = make_host()
        host.bgjobs.identify_visitor(lambda: "Anna Ångström")
        host.post(f"/job/{host.add()}/cancel")
        (entry,) = audit_entries(host)
        assert (entry.actor, entry.source) == ("Anna Ångström", "dashboard")
        assert "Anna Ångström" in host.get("/audit")

    def test_anonymous_visitor(self, make_host: MakeHost) -> None:
        """Without a login, the address of the visitor is recorded."""
        host = make_host()
        host.post(f"/job/{host.add()}/cancel")
        assert audit_entries(host)[0].actor == "anonymous (127.0.0.1)"

    def test_job_page_shows_its_changes(self, host: Host) -> None:
        """The page of a job shows who changed it."""
        job_id = host.add()
        host.bgjobs.identify_visitor(lambda: "anna")
        host.post(f"/job/{job_id}/cancel")
        host.post(f"/job/{job_id}/retry")
        page = host.get(f"/job/{job_id}")
        assert page.count(">anna<") == 2

    def test_dispatch_is_recorded(self, host: Host) -> None:
        """A dispatch by the form is recorded in the audit trail."""
        host.post("/dispatch", job="tests.integration.test_dashboard_support.send_receipt",
                  parameters="[7]")  # fmt: skip
        (entry,) = audit_entries(host)
        assert entry.action == "dispatch"
        assert entry.subject.endswith("send_receipt")

    def test_audit_trail_needs_its_own_right(self, make_host: MakeHost) -> None:
        """Without the ``audit`` right, a visitor sees neither the audit page nor the names of other
        visitors."""
        host = make_host(authorizer=lambda action, job: action != "audit")
        host.post(f"/job/{host.add()}/cancel")
        host.get("/audit", 403)
        assert "/audit" not in host.get("/list")
        assert "anonymous" not in host.get("/job/1")


def test_audit_trail_is_paged(host: Host) -> None:
    """The audit page shows the newest 50 changes and links to older ones."""
    job_id = host.add()
    for _ in range(30):
        host.post(f"/job/{job_id}/cancel")
        host.post(f"/job/{job_id}/retry")
    first = host.get("/audit")
    older = re.search(r'href="/jobs(/audit\?after=[^"]+)"', first)
    assert older is not None
    second = host.get(older[1])
    ids = [int(each) for each in re.findall(r'id="audit-(\d+)"', first + second)]
    assert ids == list(range(60, 0, -1))
    host.get("/audit?after=nonsense", 400)
