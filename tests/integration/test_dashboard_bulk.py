"""Changing many jobs at once, queues and workers; and that all of it stands in the audit trail."""

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


def trail(host: Host) -> list[Any]:
    with host.state.store.read() as connection:
        return list(connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id)))


def fields(page: str) -> list[tuple[str, str]]:
    """The hidden fields of the question, as the browser would send them."""
    form = page.split('aria-labelledby="bgjobs-question"')[1].split("</form>")[0]
    found = re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', form)
    return [(name, html.unescape(value)) for name, value in found]


def send(host: Host, path: str, data: list[tuple[str, Any]], code: int) -> str:
    from werkzeug.datastructures import MultiDict

    answer = host.client.post(PREFIX + path, data=MultiDict(data))
    assert answer.status_code == code, answer.text
    return answer.text


def ask(host: Host, verb: str, *data: tuple[str, Any]) -> str:
    return send(host, f"/bulk/{verb}", [("csrf_token", host.token()), *data], 200)


def answer(host: Host, verb: str, question: str, **more: Any) -> str:
    """The page that follows when the question is answered."""
    send(host, f"/bulk/{verb}", [*fields(question), *more.items()], 303)
    return host.get("/list")


def test_chosen_jobs_are_changed_after_a_question(host: Host) -> None:
    """The question names verb and number; nothing happens until it is answered."""
    ids = [host.add() for _ in range(3)]
    done = host.add(status="completed")
    question = ask(host, "cancel", *(("id", each) for each in (*ids, done)))
    assert "Cancel 4 jobs?" in question
    assert [host.job(each).status for each in ids] == ["pending"] * 3
    page = answer(host, "cancel", question)
    assert "3 cancelled, 1 skipped." in page
    assert "1 skipped: it is already completed." in page
    assert {host.job(each).status for each in ids} == {"cancelled"}
    (entry,) = trail(host)
    assert (entry.action, entry.result, entry.reason) == ("cancel", "3 cancelled, 1 skipped", None)


def test_to_delete_takes_the_number(host: Host) -> None:
    """To delete, the number of jobs has to be typed; a wrong one changes nothing."""
    ids = [host.add(status="failed") for _ in range(2)]
    question = ask(host, "delete", *(("id", each) for each in ids))
    assert "Type <strong>2</strong>" in question
    for wrong in ("", "3", "two"):
        page = send(host, "/bulk/delete", [*fields(question), ("typed", wrong)], 400)
        typed = f"{wrong}, not 2" if wrong else "no number"
        assert f"You typed {typed}: nothing was changed." in page
    assert host.count() == 2
    answer(host, "delete", question, typed=" 2 ")
    assert host.count() == 0


def test_more_than_a_hundred_take_the_number(host: Host) -> None:
    """Up to a hundred jobs are cancelled by a click, more by their number."""
    host.add(100)
    assert "typed" not in ask(host, "cancel", ("all", 1))
    host.add(1)
    assert 'name="typed"' in ask(host, "cancel", ("all", 1))


def test_all_that_match_are_frozen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that matched when it was asked are changed, in chunks, and none that came later."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    wanted = [host.add(status="failed", queue="mail") for _ in range(5)]
    others = [host.add(status="failed"), host.add(queue="mail")]
    question = ask(host, "retry", ("all", 1), ("status", "failed"), ("queue", "mail"))
    assert "Retry 5 jobs?" in question
    assert "status:failed queue:mail" in question
    later = host.add(status="failed", queue="mail")
    page = answer(host, "retry", question)
    assert "5 pending again." in page
    assert {host.job(each).status for each in wanted} == {"pending"}
    assert [host.job(each).status for each in (*others, later)] == ["failed", "pending", "failed"]
    assert {entry.reason for entry in trail(host)} == {"status=failed&queue=mail"}


def test_work_goes_on_behind_what_it_cannot_change(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that an action cannot change are not read for it, however many they are."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", -1.0)
    host.add(5, status="completed")
    host.add(3, status="failed")
    for left in (1, 0):
        question = ask(host, "retry", ("all", 1))
        answer(host, "retry", question)
        with host.state.store.read() as connection:
            failed = sa.select(sa.func.count()).where(Job.status == "failed")
            assert connection.scalar(failed) == left


@pytest.mark.parametrize("becomes", ["failed", "retrying"])
def test_a_job_is_retried_once(host: Host, monkeypatch: pytest.MonkeyPatch, becomes: str) -> None:
    """A job that fails again while others are still retried is left to its next retry."""
    host.add(3, status="retrying")
    host.add(3, status="failed")
    retry = host.state.store.retry
    times: list[int] = []

    def retry_and_fail(ids: list[int], by: object) -> Any:
        result = retry(ids, by)
        times.extend(ids)
        ended = now(1.0) if becomes == "failed" else None
        change = sa.update(Job).where(Job.id.in_(ids)).values(status=becomes, finished_at=ended)
        with host.state.store.engine.begin() as connection:
            connection.execute(change)
        return result

    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    question = ask(host, "retry", ("all", 1))
    monkeypatch.setattr(host.state.store, "retry", retry_and_fail)
    answer(host, "retry", question)
    assert sorted(times) == [1, 2, 3, 4, 5, 6]


def test_the_number_that_was_asked_is_answered(host: Host) -> None:
    """Workers go on meanwhile: the number to type is the one that the question named."""
    host.add(3, status="failed")
    question = ask(host, "delete", ("all", 1), ("status", "failed"))
    host.state.store.retry([1])
    assert "2 deleted." in answer(host, "delete", question, typed="3")
    assert host.job(1).status == "pending"


@pytest.mark.parametrize("field", ["sort=zzz", 'q="', "since=zzz", "status=zzz"])
def test_filters_that_cannot_be_meant(host: Host, field: str) -> None:
    """A filter that makes no sense changes nothing."""
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
def test_all_of_one_kind_are_changed(
    host: Host, field: tuple[str, str], meant: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    """All jobs with one exception, owner or tag, and no other."""
    for values in others:
        host.add(status="failed", error="E: x", **values)
    last = host.add(3, status="failed", error="E: x", **meant)
    name, value = field
    assert "All matching" in host.get(f"/list?status=failed&{name}={value}")
    question = ask(host, "retry", ("all", 1), ("status", "failed"), field)
    assert "Retry 3 jobs?" in question
    assert "3 pending again." in answer(host, "retry", question)
    statuses = [host.job(number).status for number in range(1, last + 1)]
    assert statuses == ["failed"] * len(others) + ["pending"] * 3


def test_what_is_masked_is_not_found_by_a_change(host: Host) -> None:
    """An owner that is a secret of the job's parameters is not shown, so nobody can mean it."""
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


def test_jobs_that_one_may_not_see_are_not_counted(make_host: MakeHost) -> None:
    """Neither in the question nor in what is told of its answer."""
    host = make_host(authorizer=lambda action, job: job is None or job.owner == "42")
    host.add(30, owner="7")
    host.add(2, owner="42")
    question = ask(host, "cancel", ("all", 1))
    assert "Cancel 2 jobs?" in question
    page = answer(host, "cancel", question)
    assert "2 cancelled." in page
    assert "skipped" not in page
    assert host.job(1).status == "pending"


def test_a_count_that_takes_too_long_says_more_than(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted by then has to be typed, however few they are."""
    monkeypatch.setattr(changes, "_COUNT_SECONDS", 0.0)
    host.add(200, owner="42")
    question = ask(host, "cancel", ("all", 1), ("owner", "42"))
    assert "Cancel more than 1 job?" in question
    refused = send(host, "/bulk/cancel", fields(question), 400)
    assert "You typed no number: nothing was changed." in refused
    assert {host.job(number).status for number in (1, 200)} == {"pending"}
    assert "200 cancelled." in answer(host, "cancel", question, typed="1")


def test_a_count_that_finds_nothing_in_time_asks_nothing(
    make_host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many jobs would be meant is not known at all."""
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", 0.0)
    host = make_host(authorizer=lambda action, job: job is None or action == "view")
    host.add(3, owner="42")
    token = ("csrf_token", host.token())
    send(host, "/bulk/cancel", [token, ("all", 1), ("owner", "42")], 303)
    assert "No job to cancel was found in time: narrow the filter." in host.get("/list")


def test_words_cannot_mean_all(host: Host) -> None:
    """What words find is only known of what is shown, so they cannot mean all jobs."""
    host.add(status="failed", error="E: x")
    assert "All matching" not in host.get("/list?q=x")
    assert "All matching" in host.get("/list?status=failed")
    token = ("csrf_token", host.token())
    send(host, "/bulk/retry", [token, ("all", 1), ("q", "x")], 400)
    assert host.job(1).status == "failed"


def test_nothing_chosen_is_said(host: Host) -> None:
    """Without a choice, and with nonsense for ids, nothing is asked and nothing done."""
    host.add()
    for data in ([], [("id", "x"), ("id", "-1"), ("id", "9" * 30)]):
        send(host, "/bulk/cancel", [("csrf_token", host.token()), *data], 303)
        assert "Select jobs first." in host.get("/list")


def test_what_one_may_not_change_is_skipped(make_host: MakeHost) -> None:
    """The authorizer is asked for each job; hidden ones look like missing ones."""

    def allow(action: str, job: Any) -> bool:
        if job is None:
            return True
        return job.owner != "hidden" and (action == "view" or job.owner == "mine")

    host = make_host(authorizer=allow)
    mine, yours = host.add(owner="mine"), host.add(owner="yours")
    hidden = host.add(owner="hidden")
    ids = [("id", each) for each in (mine, yours, hidden, 4711)]
    page = answer(host, "cancel", ask(host, "cancel", *ids))
    assert "1 cancelled, 3 skipped." in page
    assert "1 skipped: you are not allowed to." in page
    assert "2 skipped: it does not exist." in page
    assert [host.job(each).status for each in (mine, yours, hidden)] == [
        "cancelled",
        "pending",
        "pending",
    ]


def test_long_work_ends_in_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer than one request may is left, and said."""
    monkeypatch.setattr(changes, "_BATCH_JOBS", 2)
    monkeypatch.setattr(changes, "_REQUEST_SECONDS", -1.0)
    host.add(5)
    page = answer(host, "cancel", ask(host, "cancel", ("all", 1)))
    assert "2 cancelled." in page
    assert "Repeat the action for the rest." in page


def test_the_filters_are_kept(host: Host) -> None:
    """Afterwards the visitor is back on the list as it was."""
    host.add(status="failed")
    here = "/jobs/list?status=failed&per=20"
    question = ask(host, "retry", ("id", 1), ("next", here))
    assert f'href="{html.escape(here)}"' in question
    answer_page = host.client.post(f"{PREFIX}/bulk/retry", data=dict(fields(question)))
    assert answer_page.location == here


def test_queues_are_paused_and_resumed(host: Host) -> None:
    """The page of queues pauses and resumes, says so, and names who did it."""
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
    assert [(entry.action, entry.subject) for entry in trail(host)] == [
        ("pause", "mail"),
        ("resume", "mail"),
    ]


def test_an_unknown_queue_is_refused(host: Host) -> None:
    """A queue that nobody knows is not paused."""
    host.add(queue="mail")
    answer_page = host.post("/queues/pause", queue="mial")
    assert answer_page.status_code == 400
    assert "did you mean" in answer_page.text


def test_a_worker_is_asked_to_end(host: Host) -> None:
    """The page of workers asks one to end, once, and shows that it was asked."""
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
    assert [(entry.action, entry.subject) for entry in trail(host)] == [("drain", "w-1")]


@pytest.mark.parametrize("worker", ["", "x", "0", "4711", "9" * 40])
def test_a_worker_that_is_not_there(host: Host, worker: str) -> None:
    """Nonsense drains nobody."""
    host.add_worker("w-1")
    assert host.post("/workers/drain", worker=worker).status_code == 303
    assert "draining…" not in host.get("/workers")


class TestWhoItWas:
    def test_the_host_names_its_visitors(self, make_host: MakeHost) -> None:
        """What the host says of the visitor stands in the trail."""
        host = make_host()
        host.bgjobs.identify_visitor(lambda: "Anna Ångström")
        host.post(f"/job/{host.add()}/cancel")
        (entry,) = trail(host)
        assert (entry.actor, entry.source) == ("Anna Ångström", "dashboard")
        assert "Anna Ångström" in host.get("/audit")

    def test_nobody_is_logged_in(self, make_host: MakeHost) -> None:
        """Without a login the address is what is known."""
        host = make_host()
        host.post(f"/job/{host.add()}/cancel")
        assert trail(host)[0].actor == "anonymous (127.0.0.1)"

    def test_a_job_shows_who_changed_it(self, host: Host) -> None:
        """The page of a job tells what people did to it."""
        job_id = host.add()
        host.bgjobs.identify_visitor(lambda: "anna")
        host.post(f"/job/{job_id}/cancel")
        host.post(f"/job/{job_id}/retry")
        page = host.get(f"/job/{job_id}")
        assert page.count(">anna<") == 2

    def test_a_dispatch_is_written_down(self, host: Host) -> None:
        """Whoever enqueues by the form stands in the trail."""
        host.post("/dispatch", job="tests.integration.test_dashboard_support.send_receipt",
                  parameters="[7]")  # fmt: skip
        (entry,) = trail(host)
        assert entry.action == "dispatch"
        assert entry.subject.endswith("send_receipt")

    def test_the_trail_is_a_right_of_its_own(self, make_host: MakeHost) -> None:
        """Who may view need not see who changes what; a public dashboard shows it to nobody."""
        host = make_host(authorizer=lambda action, job: action != "audit")
        host.post(f"/job/{host.add()}/cancel")
        host.get("/audit", 403)
        assert "/audit" not in host.get("/list")
        assert "anonymous" not in host.get("/job/1")


def test_the_trail_has_pages(host: Host) -> None:
    """The newest fifty changes are on the first page."""
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
