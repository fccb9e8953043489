"""The pages of the dashboard: their content, their cost, and the values that they hide."""

from __future__ import annotations

import base64
import datetime as dt
import html
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import jinja2
import pytest
import sqlalchemy as sa
from flask import Flask
from werkzeug.exceptions import Forbidden
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from flask_bgjobs import Job
from flask_bgjobs.job import serialize
from flask_bgjobs.job.statuses import JobStatus
from flask_bgjobs.operations import queries
from flask_bgjobs.store import Actor
from tests.conftest import wait_until
from tests.integration.test_dashboard_support import (
    PREFIX,
    RECEIPT,
    SAMPLE,
    SECTIONS,
    Host,
    MakeHost,
    listed_ids,
    now,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

CORPUS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</textarea></pre></title><svg/onload=alert(1)>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt; &amp; é ‮ \x00 \x1b[31m \u2028",
    "\\u0000\\ud800",
    "%s %(x)s %n",
    "a" * 5000,
]
SECRET = "hunter2-s3cr3t"


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


# The list


def test_list_shows_every_column(host: Host) -> None:
    """A row shows class, method, parameters, queue, status, priority, retries, date and error."""
    job_id = host.add(
        status="failed",
        retry_count=2,
        priority=9,
        queue="mail",
        error="ValueError: no price",
        error_type="ValueError",
    )
    page = html.unescape(host.get("/list"))
    for shown in ("SampleJob", "execute", '["Hello"]', "mail", ">failed<", ">9<", "2/3"):
        assert shown in page
    assert "ValueError: no price" in page
    assert f'href="/jobs/job/{job_id}"' in page
    assert re.search(r'<time datetime="\d{4}-\d\d-\d\dT[\d:.]+Z"', page)


def test_job_with_cancel_request_is_shown_as_cancelling(host: Host) -> None:
    """A running job with a cancel request shows "cancelling…" and no cancel button."""
    host.add(status="running", attempt=1, cancel_requested_at=now(), progress=0.4)
    page = host.get("/list")
    assert "cancelling…" in page
    assert "/job/1/cancel" not in page
    assert "40 %" in page


def test_filters_combine(host: Host) -> None:
    """Status and queue can be given several times; all filters apply together."""
    mail = host.add(queue="mail")
    failed = host.add(status="failed", queue="mail")
    other = host.add(status="completed", queue="other")
    assert listed_ids(host.get("/list")) == [other, failed, mail]
    assert listed_ids(host.get("/list?status=failed")) == [failed]
    assert listed_ids(host.get("/list?status=failed&status=completed")) == [other, failed]
    assert listed_ids(host.get("/list?queue=mail")) == [failed, mail]
    assert listed_ids(host.get("/list?queue=mail&queue=other")) == [other, failed, mail]
    assert listed_ids(host.get("/list?queue=mail&status=pending")) == [mail]
    assert "Nothing matches" in host.get("/list?queue=none")


@pytest.mark.parametrize(
    ("q", "values"),
    [
        ("sendy", {"target": "shop.Sendy", "method": None}),
        ("SENDY", {"target": "shop.Sendy"}),
        ("job.exec", {}),
        ("perform", {"method": "perform"}),
        ("no price", {"error": "ValueError: no price"}),
        ("urgent", {"tags_json": '["x","urgent"]'}),
        ("grün", {"tags_json": json.dumps(["grün"])}),
        ("user-42", {"owner": "user-42"}),
        ("receipt-7", {"unique_key": "receipt-7"}),
        ("Zürich", {"parameters_json": serialize.dumps(["Zürich"])}),
        ("100%", {"error": "disk 100% full"}),
        ("a_b", {"error": "a_b"}),
        ("back\\slash", {"error": "back\\slash"}),
    ],
)
def test_text_search(host: Host, q: str, values: dict[str, Any]) -> None:
    """The text search covers name, error, tags, owner, unique key and parameters."""
    host.add(target="other.thing", method="other")
    wanted = host.add(**values)
    host.add(target="other.thing", method="other", error="disk 100 full, axb, backslash")
    assert listed_ids(host.get(f"/list?q={quote(q)}")) == [wanted]


@pytest.mark.parametrize("q", ["%", "_", "%%%", "\\", "'", "a%b"])
def test_wildcards_are_literal(host: Host, q: str) -> None:
    """Characters with a meaning in LIKE or SQL are searched literally."""
    host.add(target="plain.words", parameters_json="[]", error="plain words")
    assert listed_ids(host.get(f"/list?q={quote(q)}")) == []


def test_search_by_id(host: Host) -> None:
    """A number finds the job with that id."""
    first = host.add(id=7, parameters_json="[]")
    host.add(id=200_000, parameters_json="[]")
    assert listed_ids(host.get("/list?q=7")) == [first]
    assert listed_ids(host.get("/list?q=%237")) == [first]


def test_paging_in_both_directions(host: Host) -> None:
    """The links to older and newer jobs lead through every job once, in both directions."""
    host.add(count=25)
    everything = list(range(25, 0, -1))
    seen: list[int] = []
    path, going_down = f"{PREFIX}/list?per=10", []
    while path:
        page = host.client.get(path).text
        going_down.append(listed_ids(page))
        seen += listed_ids(page)
        found = re.search(r'rel="next" href="([^"]+)"', page)
        path = html.unescape(found[1]) if found else ""
    assert seen == everything
    going_up = [listed_ids(page)]
    while found := re.search(r'rel="prev" href="([^"]+)"', page):
        page = host.client.get(html.unescape(found[1])).text
        going_up.append(listed_ids(page))
    assert going_up == going_down[::-1]


def test_paging_keeps_the_filters(host: Host) -> None:
    """The link to older jobs keeps status, queue, text and page size."""
    host.add(count=5, status="failed", queue="mail")
    page = html.unescape(host.get("/list?status=failed&queue=mail&q=Sample&per=2"))
    link = re.search(r'rel="next" href="([^"]+)"', page)
    assert link is not None
    for part in ("status=failed", "queue=mail", "q=Sample", "per=2", "after="):
        assert part in link[1]
    assert listed_ids(host.client.get(link[1]).text) == [3, 2]


def test_several_statuses_are_paged_in_order(host: Host) -> None:
    """Jobs of several statuses are listed newest first across pages."""
    words = itertools.cycle(["failed", "completed", "pending"])
    ids = [host.add(status=next(words)) for _ in range(12)]
    wanted = [job_id for job_id in reversed(ids) if host.job(job_id).status != "pending"]
    page = queries.list_jobs(
        host.state, queries.JobFilters(statuses=("failed", "completed")), per=5
    )
    found = [row.id for row in page.jobs]
    rest = queries.list_jobs(
        host.state,
        queries.JobFilters(statuses=("failed", "completed")),
        per=5,
        after=page.older,
    )
    assert found + [row.id for row in rest.jobs] == wanted


@pytest.mark.parametrize(
    "query",
    [
        "after=nonsense",
        "after=",
        "before=%00",
        "after=aWQ6LTE",
        "after=aWQ6OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk",
        "after=aWQ6MQ&before=aWQ6MQ",
        "per=-1",
        "per=0",
        "per=999999999999999999999999",
        "per=abc",
        "per=%C2%B2",
        "status=bogus",
        "status=",
        "status=%00",
        "queue=%00",
        "queue=" + "q" * 5000,
        "&".join(f"queue=q{n}" for n in range(2000)),
        "q=%00",
        "q=%ff%fe",
        "q=" + "x" * 5000,
        "q=99999999999999999999999999999",
        "q=%C2%B2",
        "q=%ED%A0%80",
        "page=99999999999999999999&sort=;drop",
    ],
)
def test_invalid_query_is_never_a_500(host: Host, query: str) -> None:
    """An invalid query string is corrected or answered with 400, always with a page."""
    host.add(count=3)
    answer = host.client.get(f"{PREFIX}/list?{query}")
    assert answer.status_code in (200, 400)
    assert "<h1>" in answer.text


@pytest.mark.parametrize(
    "job_id", ["0", "4711", str(2**63), str(10**30), "9" * 400, "-1", "x", "1.5", "²"]
)
def test_invalid_ids_are_404(host: Host, job_id: str) -> None:
    """The page of a missing or invalid id is a 404."""
    host.get(f"/job/{job_id}", 404)
    assert host.client.post(f"{PREFIX}/job/{job_id}/cancel").status_code in (400, 404)


def test_broken_rows_are_shown(host: Host) -> None:
    """A row with invalid or unknown JSON does not break the page."""
    for parameters in ("{broken", "7", '{"__bgjobs__":"unknown","v":1}', ""):
        job_id = host.add(
            parameters_json=parameters,
            tags_json="{",
            retry_delay="x",
            result_json="{",
            meta_json="[",
            status="failed",
            error=f"E: {SECRET}",
            error_type="E",
            progress=7.5,
        )
        assert job_id in listed_ids(host.get("/list"))
        assert SECRET not in host.get(f"/job/{job_id}")
        host.get(f"/dispatch?again={job_id}")


def test_large_parameters_are_left_out_of_lists(host: Host) -> None:
    """Parameters that are too large for a list are omitted there, and truncated on the job's
    page."""
    job_id = host.add(parameters_json=serialize.dumps(["x" * 500_000]))
    page = host.get("/list")
    assert "too large to list" in page
    assert len(page) < 50_000
    assert len(host.get(f"/job/{job_id}")) < 200_000


class Markup(HTMLParser):
    """The tags, attributes and links that a browser would find in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attributes} | {(tag, "")}
        self.links += [value or "" for name, value in attributes if name in LINKS]


LINKS = ("href", "src", "action", "formaction")


def add_job_with_text(host: Host, text: str) -> int:
    """Add a job with ``text`` in every text field."""
    stored = text.replace("\x00", "\ufffd")
    job_id = host.add(
        target=stored[:200],
        method=stored[:200],
        parameters_json=serialize.dumps({"message": text, text: text}),
        queue=stored[:64],
        status="failed",
        finished_at=now(),
        error=stored,
        error_type=stored[:200],
        progress=0.5,
        progress_note=stored[:200],
        result_json=serialize.dumps(text),
        meta_json=serialize.dumps({"note": text}),
        tags_json=json.dumps([stored]),
        owner=stored[:200],
        unique_key=stored[:200],
    )
    host.add_attempt(
        job_id, error=stored, error_type=stored[:200], traceback=stored, worker_name=stored[:200]
    )
    host.add_line(job_id, stored)
    return job_id


def pages_with_text(host: Host, text: str) -> list[str]:
    """Every page that shows a job with this text."""
    job_id = add_job_with_text(host, text)
    host.add_worker(text.replace("\x00", "\ufffd"), host=text.replace("\x00", "\ufffd"))
    paths = ("/", "/list", f"/job/{job_id}", f"/dispatch?again={job_id}")
    phrase = text.replace('"', "'")[:150]
    filtered = f"/list?q={quote(chr(34) + phrase + chr(34))}&queue={quote(text)}&tag={quote(text)}"
    host.state.store.record(Actor(text, "dashboard", reason=text), "cancel", subject=text)
    others = (*SECTIONS, "/workers?ended=1")
    return [host.get(path) for path in (*paths, filtered, *others)]


@pytest.mark.parametrize("text", CORPUS)
@pytest.mark.slow
def test_markup_in_any_field_is_escaped(make_host: MakeHost, text: str, tmp_path: Any) -> None:
    """Whatever text a job contains, its pages have no other tags and attributes than the pages of a
    harmless job."""
    plain = make_host(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/plain.db")
    known = set().union(*(Markup(page).found for page in pages_with_text(plain, "plain")))
    known |= Markup(plain.get("/list?q=nothing")).found
    for page in pages_with_text(make_host(), text):
        markup = Markup(page)
        assert markup.found <= known
        assert all(link.startswith(("/jobs/", "#")) for link in markup.links)
        assert "\x00" not in page


def test_template_syntax_is_not_evaluated(host: Host) -> None:
    """Template syntax in a job is shown literally."""
    pages = [page for page in pages_with_text(host, "{{ 7*7 }}{% raw %}") if "raw" in page]
    assert len(pages) == 9
    assert all("{{ 7*7 }}{% raw %}" in page for page in pages)


def test_pages_load_only_own_files(host: Host) -> None:
    """Pages load only files of the dashboard, and have no inline scripts or styles."""
    job_id = host.add(status="failed", error="E: x")
    pages = (*SECTIONS, "/dispatch")
    for path in ("/", "/list", f"/job/{job_id}", *pages):
        page = host.get(path)
        assert "style=" not in page
        assert "<style" not in page
        assert re.findall(r"<script(?! src=\"/jobs/static/)", page) == []
        assert re.findall(r'(?:src|href)="(?:https?:)?//', page) == []


def test_time_filter_is_the_same_in_every_order(host: Host) -> None:
    """In every order, ``since`` applies to the finish, else to the newest attempt, else to the
    enqueue."""
    old, new = now(-7_200), now(-60)
    ended = host.add(status="failed", created_at=old, finished_at=new)
    tried = host.add(status="retrying", created_at=old, claimed_at=new, run_at=now(60))
    waiting = host.add(status="retrying", created_at=new, run_at=now(60))
    host.add(status="failed", created_at=old, finished_at=old)
    host.add(status="retrying", created_at=old, claimed_at=old, run_at=now(60))
    since = f"since={now(-600):%Y-%m-%dT%H:%M:%S}"
    for sort, expected in (
        ("-created", [waiting, tried, ended]),
        ("created", [ended, tried, waiting]),
        ("-finished", [ended]),
        ("due", [tried, waiting]),
    ):
        assert listed_ids(host.get(f"/list?{since}&sort={sort}")) == expected, sort


def test_error_links_to_jobs_of_the_period(host: Host) -> None:
    """An exception links to its jobs of the selected period, all of which can be retried at
    once."""
    values = {"status": "failed", "error_type": "ValueError", "error": "ValueError: no"}
    recent = host.add(**values)
    host.add_attempt(recent, error_type="ValueError", error="ValueError: no")
    old = host.add(**values, finished_at=now(-7_200), created_at=now(-7_200))
    host.add_attempt(old, error_type="ValueError", finished_at=now(-7_200))
    for period, expected in (("1h", [recent]), ("24h", [old, recent])):
        page = host.get(f"/errors?period={period}")
        (link,) = re.findall(r'href="/jobs(/list\?[^"]+)"', page)
        assert "error=ValueError" in link
        listed = host.get(link.replace("&amp;", "&"))
        assert sorted(listed_ids(listed)) == sorted(expected)
        assert "All matching" in listed


def test_totals_are_hidden_in_filtered_lists(host: Host) -> None:
    """Totals of all jobs are not shown above a filtered list."""
    host.add(7, queue="mail")
    assert '<span class="bgj-number">7</span>' in host.get("/list")
    assert '<span class="bgj-number">7</span>' in host.get("/list?status=failed")
    for part in ("queue=default", "q=x", "owner=42", "error=E"):
        page = host.get(f"/list?{part}")
        assert "bgj-number" not in page
        assert f'href="/jobs/list?status=failed&amp;{part}"' in page or "status=failed" in page


def test_totals_need_access_to_all_jobs(make_host: MakeHost) -> None:
    """A visitor with access only to some jobs does not learn how many others there are."""
    host = make_host(authorizer=lambda action, job: job is None or job.owner == "42")
    host.add(4, owner="7", status="failed", error="E: x")
    host.add(30, owner="42", status="failed", error="E: x")
    for path in ("/", "/list", "/list?status=failed"):
        page = host.get(path)
        assert "bgj-number" not in page
        assert "bgj-chart" not in page
    assert len(listed_ids(host.get("/list"))) == 30
    host.add(5, owner="7", priority=9)
    waiting = host.add(owner="42")
    for address in (f"/job/{waiting}", f"/api/v1/jobs/{waiting}"):
        assert "ahead of it" not in host.get(address)
    assert "only some of them" in host.get("/queues", 403)
    stats = host.client.get("/jobs/api/v1/stats").json
    assert (stats["jobs"], stats["ended"]) == (None, None)
    assert host.client.get("/jobs/api/v1/queues").status_code == 403


@pytest.mark.parametrize(
    "authorizer",
    [
        lambda action, job: True,
        lambda action, job: action == "view",
        lambda action, job: job is None or not job.tags,
    ],
)
def test_visitor_with_access_to_all_jobs_sees_totals(make_host: MakeHost, authorizer: Any) -> None:
    """Totals are shown if the authorizer allows a job without an owner, whatever else it checks."""
    host = make_host(authorizer=authorizer)
    host.add(4, owner="7")
    assert '<span class="bgj-number">4</span>' in host.get("/")
    host.get("/queues")


@pytest.mark.parametrize("column", ["queue", "owner", "target"])
def test_totals_are_hidden_if_some_jobs_are_hidden(make_host: MakeHost, column: str) -> None:
    """If only a few jobs are hidden, totals are hidden, too: they would reveal how many."""
    hidden = {"queue": "payroll", "owner": "boss", "target": "tests.jobs.Secret"}[column]
    host = make_host(authorizer=lambda action, job: job is None or getattr(job, column) != hidden)
    host.add(7, **{column: hidden})
    host.add(3)
    assert host.client.get(f"{PREFIX}/api/v1/stats").json["jobs"] is None
    host.get("/queues", 403)
    assert "bgj-number" not in host.get("/list")


def test_hidden_queue_hides_totals_despite_newer_jobs(make_host: MakeHost) -> None:
    """A visitor cannot reveal the totals by enqueueing jobs in other queues."""
    host = make_host(authorizer=lambda action, job: job is None or job.queue != "payroll")
    host.add(queue="payroll")
    host.add(30)
    host.get("/queues", 403)


@pytest.mark.parametrize("error", [KeyError("no such owner"), Forbidden()], ids=repr)
def test_authorizer_that_fails_for_a_job_without_owner(
    make_host: MakeHost, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """If the authorizer raises for a job without an owner, only totals are hidden, and the error is
    logged once."""

    def allow(action: str, job: Job | None) -> bool:
        if job is not None and job.owner != "7":
            raise error
        return True

    host = make_host(authorizer=allow)
    job_id = host.add(owner="7")
    assert "bgj-number" not in host.get("/")
    assert listed_ids(host.get("/list")) == [job_id]
    assert caplog.text.count("raised") == isinstance(error, KeyError)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/queues/pause", "Queues"),
        ("/schedules/pause", "Schedules"),
        ("/limits/pause", "Limits"),
        ("/weights/reset", "Limits"),
    ],
)
def test_page_of_a_refused_change_marks_its_section(host: Host, path: str, label: str) -> None:
    """The navigation marks the section of a change that was refused."""
    answer = host.post(path)
    assert answer.status_code in {400, 404}
    assert f'aria-current="page">{label}</a>' in answer.text


def test_missing_workers_are_announced(host: Host) -> None:
    """Pages warn if no worker is alive, also if no job waits or the only worker is silent, and name
    the last worker."""
    host.add(status="completed")
    for path in ("/", "/list", "/workers"):
        assert "<strong>No worker is alive.</strong>" in host.get(path)
    host.add_worker("spring", status="dead", heartbeat_at=now(-300))
    host.add_worker("autumn", status="stopped", heartbeat_at=now(-600), stopped_at=now(-600))
    workers = host.get("/workers")
    assert "The last one was <strong>spring</strong>" in workers
    assert "It was found dead" in workers
    host.add_worker("winter", heartbeat_at=now(-3_600))
    workers = host.get("/workers")
    assert "<strong>No worker is alive.</strong>" in workers
    assert "is silent. The next worker that starts takes over its jobs." in workers
    host.add_worker("summer")
    assert "<strong>No worker is alive.</strong>" not in host.get("/")
    assert "is silent. Another worker takes over its jobs." in host.get("/workers")


def test_job_page_names_the_successor_of_a_silent_worker(host: Host) -> None:
    """The page of a running job does not promise another worker if none is alive."""
    host.add_worker("lost", heartbeat_at=now(-3_600))
    job = host.add(status="running", attempt=1, worker_id=1, claimed_at=now(), started_at=now())
    assert "The next worker that starts takes over the job" in host.get(f"/job/{job}")
    host.add_worker("found")
    assert "Another worker takes over the job" in host.get(f"/job/{job}")


def test_drain_button_is_in_a_menu(host: Host) -> None:
    """The drain button is in a menu that explains the effect."""
    host.add_worker()
    page = host.get("/workers")
    menu = page.split('<details class="bgj-choice bgj-confirm"')[1].split("</details>")[0]
    assert "finishes its running jobs, and stops." in menu
    assert page.count('name="worker"') == menu.count('name="worker"') == 1


def test_reason_busy_slots(host: Host) -> None:
    """A due job waits if all slots of the workers of its queue are busy."""
    host.add_worker(concurrency=2)
    host.add_worker("other", queues='["other"]', concurrency=9)
    waiting = host.add()
    host.add(status="running", worker_id=1)
    assert "slots" not in host.get(f"/job/{waiting}")
    host.add(status="running", worker_id=1)
    reason = "All {} slots of the {} the queue are busy."
    assert reason.format(2, "worker that serves") in host.get(f"/job/{waiting}")
    host.add_worker("third", concurrency=1)
    assert "slots" not in host.get(f"/job/{waiting}")
    host.add(status="running", worker_id=3)
    assert reason.format(3, "workers that serve") in host.get(f"/job/{waiting}")


def test_reason_busy_slots_after_a_claim(host: Host) -> None:
    """A prefetched job waits for a slot of the worker that claimed it."""
    host.add_worker("w1", concurrency=2)
    claimed = host.add(status="running", worker_id=1)
    assert "w1 has claimed it and starts it next." in host.get(f"/job/{claimed}")
    host.add(count=2, status="running", worker_id=1, started_at=now())
    assert "w1 has claimed it, and starts it as soon as one of its 2 slots is free." in host.get(
        f"/job/{claimed}"
    )


def test_draining_worker_does_not_serve_its_queues(host: Host) -> None:
    """A queue whose only worker is draining is shown as not served."""
    waiting = host.add()
    host.add_worker(drain_requested_at=now())
    assert "No live worker serves the queue default" in host.get(f"/job/{waiting}")


def test_direction_characters_are_escaped(host: Host) -> None:
    """Characters that change the direction of text are shown as escapes."""
    turned = "moc.live\u202e"
    job_id = host.add(owner=turned, status="failed", error=f"E: {turned}", tags_json='["\u2066x"]')
    for path in ("/list", f"/job/{job_id}"):
        page = host.get(path)
        assert re.search("[\u202a-\u202e\u2066-\u2069]", page) is None
        assert r"moc.live\u202e" in page


@pytest.mark.parametrize("when", ["9999-12-31T23:59:59", "0001-01-01T00:00", "1970-01-01"])
def test_extreme_times(host: Host, when: str) -> None:
    """The filters accept the first and the last possible time."""
    host.add()
    assert listed_ids(host.get(f"/list?since={when}")) == ([] if when > "9" else [1])
    assert listed_ids(host.get(f"/list?until={when}")) == ([1] if when > "9" else [])


def test_invalid_search_keeps_the_other_filters(host: Host) -> None:
    """After an invalid search, the form keeps the other filters."""
    page = host.get("/list?status=failed&owner=anna&q=colour:red", 400)
    assert 'value="failed" checked' in page
    assert 'name="owner" value="anna"' in page
    assert 'value="colour:red"' in page


# Secrets


def secret_job(host: Host) -> int:
    job_id = host.add(
        target=RECEIPT,
        method=None,
        parameters_json=serialize.dumps([7, SECRET]),
        status="failed",
        error=f"LoginFailed: {SECRET} is wrong",
        error_type="LoginFailed",
        progress_note=f"trying {SECRET}",
        progress=0.5,
        result_json=serialize.dumps({"api_key": "other-s3cret", "echo": [SECRET]}),
        meta_json=serialize.dumps({"token": "other-s3cret", "seen": f"x{SECRET}x"}),
        tags_json=json.dumps([SECRET]),
        owner=SECRET,
        unique_key=f"receipt-{SECRET}",
    )
    host.add_attempt(
        job_id,
        error=f"LoginFailed: {SECRET} is wrong",
        traceback=f"Traceback …\n  password = {SECRET!r}\nLoginFailed: {SECRET} is wrong",
    )
    host.add_line(job_id, f"log in with {SECRET}")
    return job_id


def test_masked_values_are_on_no_page(host: Host) -> None:
    """The value of a secret parameter is on no page: not in errors, logs, results or forms."""
    job_id = secret_job(host)
    for path in ("/list", "/errors", f"/job/{job_id}", f"/dispatch?again={job_id}"):
        page = host.get(path)
        assert SECRET not in page, path
        assert "other-s3cret" not in page, path
        assert "***" in page, path


@pytest.mark.parametrize(
    "part", [SECRET, SECRET[:4], SECRET[-5:], "other-s3cret", "LoginFailed: h"]
)
def test_masked_values_cannot_be_found(host: Host, part: str) -> None:
    """A search for a secret, or a part of it, finds no job."""
    host.add()
    search = "/list?q=" + quote(f'"{part}"')
    without = host.get(search)
    secret_job(host)
    assert listed_ids(host.get(search)) == []
    assert listed_ids(without) == []
    assert len(listed_ids(host.get("/list?q=LoginFailed"))) == 1


def test_parameters_of_an_unknown_target_are_all_masked(host: Host) -> None:
    """If a target cannot be resolved, all its positional parameters are masked, because any of them
    may be secret."""
    job_id = host.add(target="gone.module.Thing", parameters_json=serialize.dumps([SECRET]))
    assert SECRET not in host.get("/list") + host.get(f"/job/{job_id}")


# A job


def test_failed_job_shows_its_attempts(host: Host) -> None:
    """The page of a failed job shows each attempt with worker, run time, error and traceback."""
    job_id = host.add(
        status="failed",
        attempt=2,
        retry_count=1,
        retries=1,
        error="ValueError: no price",
        started_at=now(-5),
        finished_at=now(-3),
    )
    host.add_attempt(
        job_id,
        worker_name="worker-9",
        started_at=now(-2),
        error="ValueError: no price",
        traceback="Traceback …\n  line 42\nValueError: no price",
    )
    host.add_line(job_id, "read 10 rows")
    page = host.get(f"/job/{job_id}")
    for shown in ("worker-9", "ran 2.0 s", "ValueError: no price", "line 42", "read 10 rows"):
        assert shown in page
    assert "1 of 1" in page


class TestNewJobs:
    """A later page of a list does not move, and shows the number of new jobs."""

    ADDRESS = re.compile(r'data-bgjobs-from="([^"]+)"')

    def new_jobs_note(self, host: Host, page: str) -> str:
        (address,) = self.ADDRESS.findall(page)
        return host.get(html.unescape(address).removeprefix(PREFIX)).strip()

    def test_filters_apply(self, host: Host) -> None:
        """Only new jobs that match the filters are counted."""
        host.add(count=3, queue="mail")
        last = host.add(queue="mail")
        page = host.get(f"/list?queue=mail&status=pending&per=2&{cursor_after(last)}")
        assert self.new_jobs_note(host, page) == ""
        host.add(queue="mail")
        host.add(queue="other")
        host.add(queue="mail", status="failed")
        assert ">1 new job</a>" in self.new_jobs_note(host, page)
        host.add(count=11, queue="mail")
        link = self.new_jobs_note(host, page)
        assert ">12 new jobs</a>" in link
        assert "/jobs/list?status=pending&amp;queue=mail&amp;per=2" in link
        host.add(count=100, queue="mail")
        assert ">100+ new jobs</a>" in self.new_jobs_note(host, page)

    def test_time_filter_applies(self, host: Host) -> None:
        """A list of a past period gets no new jobs."""
        last = host.add(count=3)
        until = f"{now(-3600):%Y-%m-%dT%H:%M}"
        page = host.get(f"/list?since=2020-01-01&until={until}&{cursor_after(last)}")
        host.add()
        assert self.new_jobs_note(host, page) == ""

    def test_hidden_jobs_are_not_counted(self, make_host: MakeHost) -> None:
        """Hidden jobs are not counted, so that the number reveals nothing about them."""
        host = make_host(authorizer=lambda action, job: job is None or job.owner == "42")
        last = host.add(count=3, owner="42")
        page = host.get(f"/list?{cursor_after(last)}")
        host.add(count=5, owner="7")
        assert self.new_jobs_note(host, page) == ""
        host.add(count=2, owner="42")
        assert ">2 new jobs</a>" in self.new_jobs_note(host, page)

    @pytest.mark.parametrize("query", ["q=late", "sort=created", "sort=-finished"])
    def test_searches_and_other_orders_have_no_note(self, host: Host, query: str) -> None:
        """Searches do not count new jobs, because it would cost too much, nor do other orders,
        where new jobs are not first."""
        last = host.add(count=3)
        cursor = "" if "finished" in query else cursor_after(last)
        assert not self.ADDRESS.search(host.get(f"/list?{query}&{cursor}"))
        host.get(f"/list/new?above=1&{query}", 400)

    def test_first_page_has_no_note(self, host: Host) -> None:
        """The first page has no note, because it is refreshed instead."""
        host.add()
        assert not self.ADDRESS.search(host.get("/list"))
        host.get("/list/new?above=nonsense&status=failed")
        host.get("/list/new?status=nonsense", 400)


def cursor_after(job_id: int) -> str:
    """The query of the page after a job, in a list ordered by id."""
    return "after=" + base64.urlsafe_b64encode(str(job_id).encode()).decode().rstrip("=")


def test_attempts_show_their_log_lines(host: Host) -> None:
    """Every attempt is shown with its wait, its run and its log lines, newest first, including the
    running attempt and an attempt without a row."""
    job_id = host.add(
        status="running",
        attempt=3,
        retry_count=1,
        retries=3,
        worker_id=1,
        run_at=now(-10),
        started_at=now(-7),
        error="ValueError: no price",
    )
    host.add_worker("worker-1")
    host.add_attempt(
        job_id,
        worker_name="worker-9",
        due_at=now(-120),
        started_at=now(-60),
        finished_at=now(-58),
        error="ValueError: no price",
    )
    for attempt in (1, 2, 3):
        host.add_line(job_id, f"line of {attempt}", attempt)
    words = " ".join(re.sub("<[^>]*>", " ", host.get(f"/job/{job_id}")).split())
    _, third, second, first = re.split(r"Attempt (?=\d ·)", words)
    assert third.startswith("3 · running · worker worker-1")
    assert second.startswith("2 · given back or snoozed")
    assert first.startswith("1 · failed")
    assert "worker worker-9 · waited 1 min · ran 2.0 s" in first
    for number, part in ((3, third), (2, second), (1, first)):
        assert f"line of {number}" in part


def test_wait_starts_after_the_previous_attempt(host: Host) -> None:
    """If a worker died, the wait of the next attempt starts at that time, although the job was due
    earlier."""
    due_at = now(-1_000)
    died_at = due_at + dt.timedelta(seconds=900)
    started_at = died_at + dt.timedelta(seconds=10)
    job_id = host.add(status="running", attempt=2, run_at=due_at, started_at=started_at)
    died = {"outcome": "crashed", "due_at": due_at, "started_at": due_at, "finished_at": died_at}
    host.add_attempt(job_id, **died)
    page = host.get(f"/job/{job_id}")
    assert "Attempt 2</strong> · running · waited 10.0 s" in page
    assert "waited 0 ms" in page
    gap = host.add(status="running", attempt=3, run_at=now(-1_000), started_at=now(-90))
    host.add_line(gap, "of one that was given back", 2)
    assert "waited" not in host.get(f"/job/{gap}")


def test_completed_attempt_is_listed(host: Host) -> None:
    """A completed job lists its attempt; a job that never ran lists none."""
    done = host.add(status="completed", attempt=1, run_at=now(-9), started_at=now(-8))
    assert "Attempt 1</strong> · completed" in host.get(f"/job/{done}")
    waiting = host.add()
    assert "bgjobs-attempts" not in host.get(f"/job/{waiting}")


def test_traceback_omits_library_frames(host: Host) -> None:
    """The traceback omits frames of libraries, and a second one shows all frames."""
    job_id = host.add(status="failed", attempt=1, error="KeyError: 'x'")
    library = '  File "/venv/lib/python3.11/site-packages/requests/api.py", line 59, in get\n'
    frames = [f'  File "/srv/shop.py", line 4, in send\n{library}', '  File "/srv/x.py", line 1\n']
    host.add_attempt(job_id, error="KeyError: 'x'", traceback="".join(frames) + "KeyError: 'x'\n")
    page = host.get(f"/job/{job_id}")
    assert "library frames: 1" in page
    assert page.count("requests/api.py") == 1
    assert page.index("library frames: 1") < page.index("Full traceback, with library frames")


def test_why_a_job_waits(host: Host) -> None:
    """The page of a waiting job gives the reason: its time, its worker, its queue, or other
    jobs."""
    soon = host.add(status="scheduled", run_at=now(3600))
    assert "not due yet" in host.get(f"/job/{soon}")
    waiting = host.add(queue="mail", priority=1)
    assert "No live worker serves the queue mail" in host.get(f"/job/{waiting}")
    host.add_worker(queues='["other"]')
    host.add_worker(heartbeat_at=now(-3600))
    assert "No live worker serves the queue mail" in host.get(f"/job/{waiting}")
    host.add_worker(queues='["mail"]')
    assert "the next free worker takes it" in host.get(f"/job/{waiting}")
    host.add(count=2, queue="mail", priority=5)
    host.add(count=3, queue="mail", priority=0)
    assert "2 jobs of the queue mail are ahead of it" in host.get(f"/job/{waiting}")
    host.pause("mail")
    assert "The queue mail is paused" in host.get(f"/job/{waiting}")
    done = host.add(status="completed")
    assert "Why it is not running" not in host.get(f"/job/{done}")


def test_unserved_queues_are_announced(host: Host) -> None:
    """Overview and list warn about queues with jobs and without a live worker."""
    host.add(queue="mail")
    for path in ("/", "/list"):
        assert "flask bgjobs worker" in host.get(path)
    host.add_worker()
    for path in ("/", "/list"):
        assert "flask bgjobs worker" not in host.get(path)


def test_empty_pages_show_how_to_enqueue(host: Host) -> None:
    """Without any job, the pages show how to enqueue one."""
    for path in ("/", "/list"):
        assert "run_background_job(" in host.get(path)


# Counts and cost


def test_counts_of_finished_jobs_are_limited(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished jobs are counted up to a limit; counts of waiting jobs are exact."""
    monkeypatch.setattr(queries.stats, "_FINISHED_CAP", 1000)
    host.add(count=1500, status="completed")
    host.add(count=1200, status="pending")
    counts = queries.count_by_status(host.state)
    assert str(counts["completed"]) == "1k+"
    assert str(counts["pending"]) == "1,200"
    assert str(counts["failed"]) == "0"
    assert set(counts) == {status.value for status in JobStatus}


@pytest.mark.parametrize(
    "path", ["/", "/list", "/list?status=failed&status=pending&q=x", "/job/60"]
)
def test_page_takes_at_most_eight_statements(host: Host, path: str) -> None:
    """Each page takes at most eight statements, however many jobs there are."""
    host.add(count=60)
    host.add_worker()
    host.get(path)
    statements: list[str] = []

    def note(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().upper().startswith(("SELECT", "WITH")):
            statements.append(statement)

    engine = host.state.store.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    host.get(path)
    sa.event.remove(engine, "before_cursor_execute", note)
    assert 1 <= len(statements) <= 8, statements


def test_pages_do_not_use_the_host_session(host: Host) -> None:
    """Pages never use ``db.session``."""
    host.add()

    def fail(*_: Any) -> None:
        raise AssertionError("the host's session was used")

    sa.event.listen(host.db.session, "after_begin", fail)
    for path in ("/", "/list?q=x", "/job/1", "/dispatch?again=1"):
        host.get(path)


# Refresh


def test_fragment_of_a_page(host: Host) -> None:
    """The refresh script gets the part of a page that changes, and 304 until it has changed."""
    job_id = host.add()
    for path in ("/", "/list", f"/job/{job_id}"):
        headers = {"X-Bgjobs-Fragment": "1"}
        # The chart moves every minute, which may be between the two requests.
        for _ in range(2):
            first = host.client.get(PREFIX + path, headers=headers)
            again = {**headers, "If-None-Match": first.headers["ETag"]}
            second = host.client.get(PREFIX + path, headers=again)
            if second.status_code == 304:
                break
        assert second.status_code == 304
        assert "<html" not in first.text
        assert first.headers["X-CSRFToken"]
        host.add_line(job_id, "news")
        host.add(count=1)
        host.post(f"/job/{job_id}/cancel")
        assert host.client.get(PREFIX + path, headers=again).status_code == 200


@pytest.mark.parametrize("path", ["/", "/list"])
def test_a_new_token_is_no_change(host: Host, path: str) -> None:
    """A page with a new CSRF token and no other difference has not changed."""
    host.add()
    headers = {"X-Bgjobs-Fragment": "1"}

    def status_with_new_token() -> int:
        first = host.client.get(PREFIX + path, headers=headers)
        old = first.headers["X-CSRFToken"]

        def has_new_token() -> bool:
            return host.client.get(PREFIX + path, headers=headers).headers["X-CSRFToken"] != old

        wait_until(has_new_token, "a later token")
        again = {**headers, "If-None-Match": first.headers["ETag"]}
        return host.client.get(PREFIX + path, headers=again).status_code

    # The chart moves every minute, which may be between the two requests.
    assert 304 in (status_with_new_token(), status_with_new_token())


def test_only_the_first_page_is_refreshed(host: Host) -> None:
    """Later pages of a list are not refreshed."""
    host.add(count=5)
    assert "data-bgjobs-live" in host.get("/list")
    page = host.get("/list?per=2")
    link = re.search(r'rel="next" href="([^"]+)"', page)
    assert link is not None
    deeper = host.client.get(html.unescape(link[1])).text
    assert '<div id="bgjobs-live">' in deeper


# Inside a host


@pytest.mark.parametrize("prefix", ["/admin/background", "/x"])
def test_any_url_prefix(make_host: MakeHost, prefix: str) -> None:
    """All links and forms stay below the prefix, also behind SCRIPT_NAME."""
    host = make_host(BGJOBS_DASHBOARD_URL_PREFIX=prefix)
    job_id = host.add(status="failed")
    mounted = DispatcherMiddleware(lambda e, s: [], {"/shop": host.app.wsgi_app})
    outer = Flask("outer")
    outer.wsgi_app = mounted  # type: ignore[method-assign]
    client = outer.test_client()
    for path in ("/", "/list?q=Sample", f"/job/{job_id}", f"/dispatch?again={job_id}"):
        page = client.get(f"/shop{prefix}{path}")
        assert page.status_code == 200
        links = re.findall(r'(?:href|src|action|formaction)="([^"#]+)"', page.text)
        assert links
        assert all(link.startswith(f"/shop{prefix}/") for link in links)
    token = re.search(r'name="csrf_token" value="([^"]+)"', page.text)
    assert token is not None
    answer = client.post(
        f"/shop{prefix}/job/{job_id}/retry",
        data={"csrf_token": token[1], "next": f"/shop{prefix}/list?status=failed"},
    )
    assert answer.headers["Location"] == f"/shop{prefix}/list?status=failed"


def test_layout_of_the_host(make_host: MakeHost) -> None:
    """The host's layout needs only the block ``content``."""
    host = make_host(BGJOBS_BASE_TEMPLATE="site.html")
    site = "<html><body>Our shop{% block content %}{% endblock %}</body></html>"
    host.app.jinja_loader = jinja2.DictLoader({"site.html": site})
    job_id = host.add()
    for path in ("/", "/list", f"/job/{job_id}", "/dispatch"):
        page = host.get(path)
        assert page.startswith("<html><body>Our shop")
        assert "bgjobs.css" in page
        assert page.count('aria-label="Background jobs"') == 1


def test_extended_layout(make_host: MakeHost) -> None:
    """A layout that extends the dashboard's layout can fill its blocks, and nothing is shown
    twice."""
    host = make_host(BGJOBS_BASE_TEMPLATE="site.html")
    blocks = ("head_extra", "nav_before", "nav_extra", "messages", "footer")
    site = "{% extends 'bgjobs/layout.html' %}" + "".join(
        f"{{% block {name} %}}<i>{name} of ours</i>{{% endblock %}}" for name in blocks
    )
    host.app.jinja_loader = jinja2.DictLoader({"site.html": site})
    page = host.get("/list")
    for name in blocks:
        assert page.count(f"{name} of ours") == 1
    assert page.count('aria-label="Background jobs"') == 1


@pytest.mark.slow
def test_templates_use_no_undefined_name(make_host: MakeHost) -> None:
    """All pages work with StrictUndefined."""
    host = make_host()
    host.app.jinja_env.undefined = jinja2.StrictUndefined
    job_id = secret_job(host)
    waiting = host.add(queue="mail")
    pages = (*SECTIONS, "/list?q=a:b")
    for path in ("/", "/list?q=x&status=failed", f"/job/{job_id}", f"/job/{waiting}", *pages):
        host.get(path, 400 if ":" in path else 200)
    host.get(f"/dispatch?again={job_id}")
    host.get("/list?status=bogus", 400)


def test_in_memory_database(make_host: MakeHost) -> None:
    """On a database with a single connection, pages and changes work, and a dispatch is
    committed."""
    host = make_host(SQLALCHEMY_DATABASE_URI="sqlite://")
    for path in ("/", "/list", "/dispatch"):
        host.get(path)
    answer = host.post("/dispatch", job=f"{SAMPLE}:execute", parameters='["x"]')
    assert answer.status_code == 303
    assert listed_ids(host.get("/list")) == [1]
    host.post("/job/1/cancel")
    assert ">cancelled<" in host.get("/job/1")


def test_two_apps_have_separate_settings(tmp_path: Any, make_host: MakeHost) -> None:
    """A page uses the settings of its own app."""
    open_host = make_host(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/a.db")
    closed = make_host(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/b.db", authorizer=None)
    open_host.add()
    assert listed_ids(open_host.get("/list")) == [1]
    closed.get("/list", 403)


def test_worst_queues_are_listed_first(host: Host) -> None:
    """With many queues, the overview lists unserved queues first, then those that have waited
    longest."""
    host.add_worker(queues='["a", "b", "c", "d", "e", "f", "g", "h", "i"]')
    for number, queue in enumerate("abcdefghi"):
        host.add(queue=queue, run_at=now(-10 * number))
    host.add(queue="zz")
    page = host.get("/")
    shown = re.findall(r'<th scope="row"><a href="[^"]*">(\w+)</a>', page)
    assert shown == ["zz", *"ihgfedc"]
    assert "All 10 queues" in page
    assert 'The queue <a href="/jobs/list?queue=zz">zz</a> has work' in page


def test_unserved_queues_share_one_warning(host: Host) -> None:
    """Several unserved queues share one warning; a filtered list warns about its own queue only."""
    for queue in "abcde":
        host.add(queue=queue)
    page = host.get("/")
    assert "5 queues have work" in page
    assert "and 2 more" in page
    assert page.count("alert-warning") == 1
    assert 'The queue <a href="/jobs/list?queue=e">e</a> has work' in host.get("/list?queue=e")
    host.add_worker()
    assert "have work" not in host.get("/")


def test_error_links_to_its_jobs(host: Host) -> None:
    """An exception links to the failed and retrying jobs with it, and to no others."""
    wanted = []
    for status in ("failed", "retrying", "completed"):
        for kind in ("KeyError", "ValueError"):
            job_id = host.add(status=status, error=f"{kind}: x", error_type=kind)
            host.add_attempt(job_id, error=f"{kind}: x", error_type=kind)
            if kind == "KeyError" and status != "completed":
                wanted.append(job_id)
    page = html.unescape(host.get("/errors"))
    (address,) = re.findall(r'href="/jobs(/list\?[^"]*KeyError[^"]*)"', page)
    assert listed_ids(host.get(address)) == wanted[::-1]


def test_silent_worker_with_drain_request_is_silent(host: Host) -> None:
    """A drain request does not hide that a worker is silent."""
    host.add_worker("lost", heartbeat_at=now(-3_600), drain_requested_at=now())
    page = host.get("/workers")
    assert ">silent<" in page
    assert ">draining…<" in page
    assert "is silent" in page


def test_cancel_between_attempts_is_no_run_time(host: Host) -> None:
    """If a job was cancelled between two attempts, the time until the cancel is not shown as its
    run time."""
    job_id = host.add(
        status="cancelled", started_at=now(-100), run_at=now(500), finished_at=now(), attempt=1
    )
    assert " ran " not in host.get("/list")
    assert "ran " not in re.sub(r"<script.*|<style.*", "", host.get(f"/job/{job_id}"))


def test_overlong_search_is_refused(host: Host) -> None:
    """A search that is too long is refused, because a part of it would find other jobs."""
    host.add()
    page = host.get(f"/list?q={'SampleJob+' * 20}nothing", 400)
    assert "A search must not exceed 200 characters." in page


@pytest.mark.slow
def test_long_log_shows_newest_lines(host: Host) -> None:
    """Of a long log, the newest lines are shown, with a note that older ones exist."""
    job_id = host.add(status="running", attempt=1)
    for number in range(501):
        host.add_line(job_id, f"line {number}.")
    page = host.get(f"/job/{job_id}")
    assert "(older lines are not shown)" in page
    assert "line 1." in page
    assert "line 0." not in page
    assert page.index("older lines") < page.index("line 1.")
