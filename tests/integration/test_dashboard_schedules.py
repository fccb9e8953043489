"""The pages of schedules: what they show, the changes, and the JSON API."""

from __future__ import annotations

import datetime as dt
import html
import json
import re
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs import BgJobs, Job
from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.flow.schedules.ticker import Ticker
from flask_bgjobs.models import AuditEntry, Schedule, ScheduleTick
from flask_bgjobs.store import Actor
from flask_bgjobs.worker.registration import register
from tests.integration.test_dashboard_support import PREFIX, RECEIPT, SAMPLE, Host, MakeHost, now
from tests.integration.test_dashboard_support import host_maker as host_maker

ADA = Actor("ada", "dashboard")
SECRET = "hunter2-s3cret"
HELLO = {"job": SAMPLE, "method": "execute", "parameters": ["Hello"]}
SCHEDULES = {
    "nightly": {**HELLO, "cron": "0 3 * * *", "timezone": "Europe/Berlin"},
    "poll": {**HELLO, "every": 30},
    "receipt": {"job": RECEIPT, "parameters": {"order_id": 7, "password": SECRET}, "every": 60},
}


def registered(host: Host, *, without: tuple[str, ...] = ()) -> Host:
    """The host, after a worker has started whose code has all schedules but ``without``."""
    with host.app.app_context():
        ticker = Ticker(host.state, host.state.store)
        names = [name for name in ticker.names if name not in without]
        register(host.state, "w-1", schedules=names)
        ticker.register()
    return host


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return registered(make_host(BGJOBS_SCHEDULE=SCHEDULES))


def change_row(host: Host, name: str, **values: Any) -> int:
    """Change the row of a schedule, and return its id."""
    with host.state.store.engine.begin() as connection:
        mine = sa.update(Schedule).where(Schedule.name == name)
        connection.execute(mine.values(**values) if values else mine.values(name=name))
        return int(connection.scalar(sa.select(Schedule.id).where(Schedule.name == name)) or 0)


def add_tick(host: Host, name: str, seconds: float, outcome: str = "fired", **values: Any) -> None:
    """Add a tick of so many seconds ago."""
    host._insert(
        ScheduleTick,
        schedule_id=change_row(host, name),
        tick_at=now(-seconds),
        outcome=outcome,
        created_at=now(),
        **{"missed": 0, **values},
    )


def find_in(host: Host, name: str) -> Any:
    with host.app.app_context():
        return find(host.state, name)


def row_of(page: str, name: str) -> str:
    """The text of a schedule's row in the list, without tags."""
    found = re.search(
        rf'<tr role="row" id="schedule-{re.escape(name)}">(.*?)</tr>', page, re.DOTALL
    )
    assert found is not None, name
    return words_of(found[1])


def words_of(markup: str) -> str:
    """The text of a page or a part of it, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def names_on(page: str) -> list[str]:
    return re.findall(r'<tr role="row" id="schedule-([^"]+)"', page)


def follow(host: Host, response: Any) -> str:
    assert response.status_code == 303, response.text
    return html.unescape(host.client.get(response.headers["Location"]).text)


def audited(host: Host) -> list[tuple[str, str | None]]:
    with host.state.store.read() as connection:
        entries = connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id))
        return [(entry.action, entry.subject) for entry in entries]


class TestList:
    def test_row(self, host: Host) -> None:
        """A row shows the job, the expression and its words, the zone, and the next run."""
        page = host.get("/schedules")
        assert names_on(page) == ["nightly", "poll", "receipt"]
        row = row_of(page, "nightly")
        assert f"{SAMPLE}.execute" in row
        assert '["Hello"] 0 3 * * * At 03:00, Europe/Berlin in ' in row
        assert "never active" in row
        assert re.search("every 30 seconds (in|now|due) ", row_of(page, "poll"))
        assert page.count("<time datetime=") >= 3

    def test_secrets_are_masked(self, host: Host) -> None:
        """Parameters that are masked elsewhere are masked in the list, on the page of the schedule
        and in the API."""
        for path in (
            "/schedules",
            "/schedules?name=receipt",
            "/api/v1/schedules",
            "/api/v1/schedule?name=receipt",
        ):
            page = host.get(path)
            assert SECRET not in page
            assert "***" in page

    @pytest.mark.parametrize(
        ("outcome", "values", "shown"),
        [
            ("fired", {"job_id": 12}, "ran job 12"),
            ("by hand", {"job_id": 12}, "run by hand job 12"),
            (
                "skipped",
                {"job_id": 12, "reason": "job 12 is not finished"},
                "skipped job 12 is not finished",
            ),
            ("skipped", {"reason": "no worker ran it in time"}, "skipped no worker ran it in time"),
            ("unheard of", {}, "unheard of"),
        ],
    )
    def test_outcome_of_the_last_tick(
        self, host: Host, outcome: str, values: Any, shown: str
    ) -> None:
        """The outcome of the last tick is shown with an icon and words, its reason and its job."""
        add_tick(host, "poll", 90, "skipped", reason="an older one")
        add_tick(host, "poll", 5, outcome, **values)
        page = host.get("/schedules")
        assert f"5 s ago {shown}" in re.sub(r"\b[4-9] s ago", "5 s ago", row_of(page, "poll"))
        assert ('href="/jobs/job/12"' in page) is ("job_id" in values)

    def test_paused(self, host: Host) -> None:
        """A paused schedule shows who paused it and when, and has no next run."""
        find_in(host, "poll").pause(ADA)
        row = row_of(host.get("/schedules"), "poll")
        assert re.search(r"never paused by ada, (now|\d+ s ago) Run now", row), row
        assert "active" not in row

    def test_held(self, host: Host) -> None:
        """A schedule whose run waits for the end of its last job names that job."""
        change_row(host, "poll", held_at=now(-40), last_job_id=12)
        assert re.search(
            r"waiting for job 12 , since 4\d s ago", row_of(host.get("/schedules"), "poll")
        )

    def test_overdue(self, host: Host) -> None:
        """A next run in the past is shown as due."""
        change_row(host, "poll", next_tick_at=now(-70))
        assert "due 1 min ago" in row_of(host.get("/schedules"), "poll")

    def test_schedule_of_no_live_worker(self, make_host: MakeHost) -> None:
        """A schedule that no live worker has in its code is shown as such, without a next run."""
        host = registered(make_host(BGJOBS_SCHEDULE=SCHEDULES), without=("poll",))
        page = host.get("/schedules")
        assert "never not in the code of any live worker: it does not run" in row_of(page, "poll")
        assert "not in the code" not in row_of(page, "nightly")
        change_row(host, "nightly", retired_at=now(), due_at=None)
        assert "not in the code" in row_of(host.get("/schedules"), "nightly")

    def test_without_any_worker(self, make_host: MakeHost) -> None:
        """Before a worker has started, the schedules in the code are listed as not registered, and
        the page says how to start one."""
        host = make_host(BGJOBS_SCHEDULE=SCHEDULES)
        page = host.get("/schedules")
        assert names_on(page) == ["nightly", "poll", "receipt"]
        assert "not registered yet no worker has started with it" in row_of(page, "poll")
        assert "No live worker runs schedules." in page
        assert "flask bgjobs worker" in page
        assert "not registered yet" in host.get("/schedules?name=poll")

    def test_override(self, host: Host) -> None:
        """An overridden schedule shows the value in the code, the new one, by whom and when, and
        whether the code has changed since."""
        find_in(host, "nightly").override(ADA, cron="0 4 * * *", overlap="allow", grace=90)
        row = row_of(host.get("/schedules"), "nightly")
        assert re.search(
            r"Code says 0 3 \* \* \* , overridden to 0 4 \* \* \* ; grace none , overridden to 90 s"
            r" ; overlap skip , overridden to allow by ada (now|\d+ s ago) \.",
            row,
        ), row
        assert "changed since" not in row
        change_row(host, "nightly", overridden_code="{}")
        assert "The code has changed since." in row_of(host.get("/schedules"), "nightly")

    def test_unreadable_row(self, host: Host) -> None:
        """A row that cannot be read does not hide the others, and the page names it."""
        change_row(host, "poll", definition="nonsense")
        page = host.get("/schedules")
        assert names_on(page) == ["nightly", "receipt"]
        assert "The rows of poll cannot be read" in page
        host.get("/schedules?name=poll", 404)

    def test_unreadable_parameters(self, host: Host) -> None:
        """Parameters that cannot be decoded are shown as not readable."""
        definition = json.loads(find_in(host, "poll")._row.definition)
        change_row(host, "poll", definition=json.dumps({**definition, "parameters": "{nope"}))
        assert "not readable" in row_of(host.get("/schedules"), "poll")
        assert "not readable" in host.get("/schedules?name=poll")

    def test_empty_page_says_how_to_add_one(self, make_host: MakeHost) -> None:
        """Without schedules, the page shows the decorator that adds one."""
        page = html.unescape(make_host().get("/schedules"))
        assert "No schedules yet" in page
        assert '@bgjobs.job(cron="0 3 * * *")' in page

    def test_decorated_function(self, make_host: MakeHost) -> None:
        """The schedule of a decorated function has its name, and is found by the last part."""
        host = make_host()
        job = host.bgjobs.job(cron="0 3 * * *")(_tidy_up)
        assert job is not None
        assert names_on(host.get("/schedules")) == [f"{__name__}._tidy_up"]
        assert f"Schedule {__name__}._tidy_up" in host.get("/schedules?name=_tidy_up")

    def test_navigation(self, host: Host) -> None:
        """The navigation leads to the page, and marks it on the pages below it."""
        assert '<a href="/jobs/schedules">Schedules</a>' in host.get("/")
        marked = '<a href="/jobs/schedules" aria-current="page">Schedules</a>'
        assert marked in host.get("/schedules")
        assert marked in host.get("/schedules?name=poll")

    def test_page_refreshes(self, host: Host) -> None:
        """The script gets only the part that changes, and 304 while nothing does."""
        for path in ("/schedules", "/schedules?name=nightly"):
            headers = {"X-Bgjobs-Fragment": "1"}
            first = host.client.get(PREFIX + path, headers=headers)
            assert "<html" not in first.text
            headers["If-None-Match"] = first.headers["ETag"]
            assert host.client.get(PREFIX + path, headers=headers).status_code == 304


def _tidy_up() -> None:
    """A function to decorate."""


class TestManySchedules:
    @pytest.fixture
    def many(self, make_host: MakeHost) -> Host:
        """A host with 120 schedules in its code, of which a worker has registered 80."""
        names = [f"Shop_{number:03}" for number in range(120)]
        schedules = {name: {**HELLO, "every": 60} for name in names}
        registered(make_host(BGJOBS_SCHEDULE=dict(list(schedules.items())[::2])))
        registered(make_host(BGJOBS_SCHEDULE=dict(list(schedules.items())[:40])))
        return make_host(BGJOBS_SCHEDULE=schedules)

    def test_pages(self, many: Host) -> None:
        """Each page has 50 schedules by name, in the database or not, and links to the next."""
        names, path = [], "/schedules"
        sizes = []
        while True:
            page = html.unescape(many.get(path))
            sizes.append(len(names_on(page)))
            names += names_on(page)
            following = re.search(r'rel="next" href="/jobs(/schedules\?[^"]+)"', page)
            if following is None:
                break
            path = following[1]
        assert names == [f"Shop_{number:03}" for number in range(120)]
        assert sizes == [50, 50, 20]
        assert "First page" in page
        assert "No more schedules" in many.get("/schedules?after=Z")

    def test_api_pages(self, many: Host) -> None:
        """The API returns the same pages, of a chosen size."""
        names: list[str] = []
        after: str | None = ""
        while after is not None:
            page = json.loads(many.get(f"/api/v1/schedules?per=30&after={after}"))
            names += [each["name"] for each in page["schedules"]]
            after = page["following"]
        assert names == [f"Shop_{number:03}" for number in range(120)]

    @pytest.mark.parametrize(
        ("q", "number"), [("shop_1", 20), ("SHOP_00", 10), ("p_07", 10), ("%", 0), ("shop-", 0)]
    )
    def test_search(self, many: Host, q: str, number: int) -> None:
        """The search finds a part of the name in any case, without wildcards."""
        page = many.get(f"/schedules?q={q.replace('%', '%25')}")
        assert len(names_on(page)) == number
        assert f'value="{q}"' in page
        assert ("Nothing matches" in page) is (number == 0)
        found = json.loads(many.get(f"/api/v1/schedules?q={q.replace('%', '%25')}"))["schedules"]
        assert len(found) == number

    def test_next_page_keeps_the_search(self, many: Host) -> None:
        """The link to the next page keeps the search."""
        assert "?q=shop&amp;after=Shop_049" in many.get("/schedules?q=shop")


class TestDetail:
    def test_last_and_next_runs(self, host: Host) -> None:
        """The page of a schedule shows its last five ticks, and its next five runs in its zone and
        in UTC."""
        for number in range(7):
            add_tick(host, "nightly", 60 * number + 5, job_id=number + 1, missed=number * 11)
        page = host.get("/schedules?name=nightly")
        assert re.findall(r'href="/jobs/job/(\d+)"', page) == ["1", "2", "3", "4", "5"]
        words = words_of(page)
        assert "When Outcome Missed before" in words
        assert "ran job 5 44" in words
        runs = re.findall(r"(\S+) 03:00:00 (CES?T) \1 0[12]:00:00 UTC", words)
        assert len(runs) == 5

    def test_policies_in_words(self, host: Host) -> None:
        """What happens to late and overlapping runs is said in words."""
        words = words_of(host.get("/schedules?name=poll"))
        assert "For missed runs One run for all of them" in words
        assert "If a run is late It runs, however late it is" in words
        assert "If the last job is not finished The run is skipped" in words
        assert "Delay at random none" in words
        find_in(host, "poll").override(missed="skip", overlap="queue", jitter=20)
        words = words_of(host.get("/schedules?name=poll"))
        assert "For missed runs None of them runs" in words
        assert "skipped when it is more than a minute late" in words
        assert "The run waits until that job has finished" in words
        assert "Delay at random up to 20.0 s" in words
        find_in(host, "poll").override(grace=300)
        assert "more than 5 min late" in host.get("/schedules?name=poll")

    @pytest.mark.parametrize("name", ["nope", "", "%00", "%ED%A0%80", "x" * 3_000])
    def test_missing_schedule_is_404(self, host: Host, name: str) -> None:
        """An unknown name is a 404, on the page, in forms and in the API."""
        host.get(f"/schedules?name={name}", 404)
        host.get(f"/api/v1/schedule?name={name}", 404)
        assert host.post("/schedules/pause", schedule="nope").status_code == 404

    def test_name_with_markup(self, make_host: MakeHost) -> None:
        """A name with markup and special characters is escaped, and its page and buttons work."""
        name = "<b>\"a\" & 'b'</b> ?name=x#y %41/../é"
        host = make_host(BGJOBS_SCHEDULE={name: {**HELLO, "every": 30}})
        page = host.get("/schedules")
        assert "<b>" not in page
        address = re.search(r'class="bgj-name" href="/jobs([^"]+)"', page)
        assert address is not None
        assert f"Schedule {name}" in html.unescape(host.get(html.unescape(address[1])))
        assert f"Schedule {name} paused." in follow(
            host, host.post("/schedules/pause", schedule=name)
        )

    def test_page_of_a_job_links_to_its_schedule(self, host: Host) -> None:
        """The page of a job that a schedule has made links to the schedule."""
        with host.app.app_context():
            job = find(host.state, "poll").run_now()
        assert 'href="/jobs/schedules?name=poll">poll</a>' in host.get(f"/job/{job.id}")
        for meta in ('{"schedule": 7}', "[]", "nonsense", None):
            assert "Schedule</dt>" not in host.get(f"/job/{host.add(meta_json=meta)}")


class TestChanges:
    def test_run_now(self, host: Host) -> None:
        """Run now enqueues a job after a confirmation that needs no script, leaves the next run at
        its time, and is audited with the job."""
        before = find_in(host, "poll").next_tick_at
        page = html.unescape(host.get("/schedules"))
        menu = re.search(r'<details[^>]*id="bgjobs-run-poll">.*?</details>', page, re.DOTALL)
        assert menu is not None
        assert "Enqueue one job of poll now. The next run stays at its time." in menu[0]
        assert 'action="/jobs/schedules/run"' in menu[0]
        response = host.post("/schedules/run", schedule="poll", next="/jobs/schedules?q=p")
        assert response.headers["Location"] == "/jobs/schedules?q=p"
        assert "Job 1 of schedule poll enqueued." in follow(host, response)
        assert host.job(1).meta["schedule"] == "poll"
        assert find_in(host, "poll").next_tick_at == before
        assert audited(host) == [("run schedule", "poll")]
        assert "run schedule poll job 1" in words_of(host.get("/audit"))
        assert "run by hand job 1" in row_of(host.get("/schedules"), "poll")

    def test_run_of_a_unique_job(self, make_host: MakeHost) -> None:
        """If another job holds the unique key, no job is enqueued, and the message names that
        job."""
        entry = {**HELLO, "every": 60, "unique_key": "only one"}
        host = registered(make_host(BGJOBS_SCHEDULE={"poll": entry}))
        for _ in range(2):
            page = follow(host, host.post("/schedules/run", schedule="poll"))
        assert "Schedule poll was not run: job 1 holds its unique_key." in page
        assert host.count() == 1

    def test_run_of_a_job_that_is_not_allowed(self, make_host: MakeHost) -> None:
        """A job that the web process does not allow is refused with the reason."""
        registered(make_host(BGJOBS_SCHEDULE=SCHEDULES))
        host = make_host(BGJOBS_ALLOWED_JOBS=[RECEIPT])
        response = host.post("/schedules/run", schedule="poll")
        assert response.status_code == 400
        assert "is not allowed" in response.text
        assert host.count() == 0

    def test_pause_and_resume(self, host: Host) -> None:
        """A schedule is paused and resumed once, and the audit page says that it is a schedule."""
        page = follow(host, host.post("/schedules/pause", schedule="poll"))
        assert "Schedule poll paused." in page
        assert 'formaction="/jobs/schedules/resume"' in page or "/jobs/schedules/resume" in page
        assert "was paused already" in follow(host, host.post("/schedules/pause", schedule="poll"))
        assert "Schedule poll resumed." in follow(
            host, host.post("/schedules/resume", schedule="poll")
        )
        assert "was not paused" in follow(host, host.post("/schedules/resume", schedule="poll"))
        assert audited(host) == [("pause schedule", "poll"), ("resume schedule", "poll")]
        words = words_of(host.get("/audit"))
        assert "pause schedule poll" in words
        assert "queue poll" not in words

    def test_edit_overrides_changed_fields_only(self, host: Host) -> None:
        """Only the fields that the visitor has changed are overridden."""
        fields = form_fields(host.get("/schedules?name=nightly"))
        assert fields["cron"] == "0 3 * * *"
        assert fields["timezone"] == "Europe/Berlin"
        response = host.post("/schedules/override", **{**fields, "cron": " 0 4  * * * "})
        page = follow(host, response)
        assert "Schedule nightly changed." in page
        assert "overridden to" in page
        assert find_in(host, "nightly").overrides == {"cron": "0 4 * * *"}
        assert audited(host) == [("edit schedule", "nightly")]

    def test_edit_replaces_cron_by_an_interval(self, host: Host) -> None:
        """An interval replaces the cron expression; intervals take units."""
        fields = form_fields(host.get("/schedules?name=nightly"))
        follow(
            host,
            host.post(
                "/schedules/override",
                **{**fields, "cron": "", "every": "15m", "grace": "90s", "jitter": "2.5"},
            ),
        )
        assert find_in(host, "nightly").overrides == {"every": 900.0, "grace": 90.0, "jitter": 2.5}
        fields = form_fields(host.get("/schedules?name=nightly"))
        assert (fields["every"], fields["grace"], fields["jitter"]) == ("900", "90", "2.5")
        follow(host, host.post("/schedules/override", **{**fields, "jitter": ""}))
        assert find_in(host, "nightly").recurrence.jitter == 0

    def test_edit_without_a_change(self, host: Host) -> None:
        """If no value is different, nothing is overridden."""
        fields = form_fields(host.get("/schedules?name=nightly"))
        page = follow(host, host.post("/schedules/override", **fields))
        assert "nothing was changed" in page
        assert find_in(host, "nightly").overrides == {}

    def test_edit_keeps_the_change_of_another_person(self, host: Host) -> None:
        """A form that was opened before another person's change does not undo that change."""
        fields = form_fields(host.get("/schedules?name=nightly"))
        find_in(host, "nightly").override(ADA, cron="0 5 * * *")
        follow(host, host.post("/schedules/override", **{**fields, "overlap": "allow"}))
        assert find_in(host, "nightly").overrides == {"cron": "0 5 * * *", "overlap": "allow"}

    @pytest.mark.parametrize(
        ("values", "field", "message"),
        [
            ({"cron": "0 3 x * *"}, "cron", "'X' is not a day of the month"),
            ({"cron": "0 0 30 2 *"}, "cron", "it would never run"),
            ({"cron": "", "every": ""}, "every", "Give a cron expression or an interval."),
            ({"every": "30"}, "every", "Give either a cron expression or an interval, not both."),
            ({"cron": "", "every": "soon"}, "every", "Every must be seconds or like 90s"),
            ({"cron": "", "every": "0.5"}, "every", "at least 1 s"),
            ({"timezone": "Berlin"}, "timezone", "did you mean 'Europe/Berlin'?<"),
            ({"timezone": ""}, "timezone", "There is no time zone"),
            ({"missed": "never"}, "missed", "Missed must be one of once, skip, all"),
            ({"grace": "0"}, "grace", "Grace must be more than 0 s"),
            ({"overlap": "maybe"}, "overlap", "Overlap must be one of skip, queue, allow"),
            ({"jitter": "0.5"}, "jitter", "is 0 or at least 1 s"),
        ],
    )
    def test_invalid_values_are_shown_inline(
        self, host: Host, values: dict[str, str], field: str, message: str
    ) -> None:
        """An invalid value is answered with 400 and the reason at its field; the form keeps what
        was typed, and nothing is changed."""
        fields = form_fields(host.get("/schedules?name=nightly"))
        typed = {**fields, "jitter": "20", **values}
        response = host.post("/schedules/override", **typed)
        assert response.status_code == 400
        page = html.unescape(response.text)
        below = re.search(rf'<div id="{field}-hint">(.*?)</div>', page, re.DOTALL)
        assert below is not None
        assert message in below[1]
        if field not in ("missed", "overlap"):
            assert f'name="{field}" type="text" value="{typed[field]}"' in page
        assert f'name="jitter" type="text" value="{typed["jitter"]}"' in page
        assert 'aria-current="page">Schedules' in page
        assert (find_in(host, "nightly").overrides, audited(host)) == ({}, [])

    def test_grace_can_be_removed(self, make_host: MakeHost) -> None:
        """An empty field removes the grace of the code, also for the next change."""
        entry = {**HELLO, "every": 60, "grace": 30}
        host = registered(make_host(BGJOBS_SCHEDULE={"poll": entry}))
        fields = form_fields(host.get("/schedules?name=poll"))
        response = host.post("/schedules/override", **{**fields, "grace": ""})
        assert response.status_code == 303
        assert find_in(host, "poll").recurrence.grace is None
        fields = form_fields(host.get("/schedules?name=poll"))
        host.post("/schedules/override", **{**fields, "overlap": "allow"})
        assert find_in(host, "poll").overrides == {"grace": None, "overlap": "allow"}

    @pytest.mark.parametrize("before", ["", "[]", "nonsense", "[" * 5_000])
    def test_form_without_its_former_values(self, host: Host, before: str) -> None:
        """Without the values that the form showed, all fields are taken as changed."""
        fields = form_fields(host.get("/schedules?name=poll"))
        follow(host, host.post("/schedules/override", **{**fields, "before": before}))
        assert find_in(host, "poll").overrides["every"] == 30.0

    def test_reset(self, host: Host) -> None:
        """An overridden schedule can be reset to the code, after a confirmation."""
        assert "bgjobs-reset-poll" not in host.get("/schedules?name=poll")
        find_in(host, "poll").override(every=90)
        page = html.unescape(host.get("/schedules?name=poll"))
        assert "It then runs as the code says: every 30 seconds." in page
        page = follow(host, host.post("/schedules/reset", schedule="poll"))
        assert "Schedule poll reset." in page
        assert find_in(host, "poll").overrides == {}
        assert "was not overridden" in follow(host, host.post("/schedules/reset", schedule="poll"))
        assert audited(host) == [("reset schedule", "poll")]

    def test_change_before_any_worker(self, make_host: MakeHost) -> None:
        """A schedule that only the code of the web process has can be paused and run."""
        host = make_host(BGJOBS_SCHEDULE=SCHEDULES)
        follow(host, host.post("/schedules/pause", schedule="poll"))
        assert find_in(host, "poll").paused_at is not None
        follow(host, host.post("/schedules/run", schedule="nightly"))
        assert host.count() == 1

    @pytest.mark.parametrize("wanted", ["https://evil.example/", "/jobs/../admin", ""])
    def test_next_outside_the_dashboard_is_ignored(self, host: Host, wanted: str) -> None:
        """After a change, the visitor is redirected only to pages of this dashboard."""
        response = host.post("/schedules/pause", schedule="poll", next=wanted)
        assert response.headers["Location"] == "/jobs/schedules"

    def test_very_long_interval(self, make_host: MakeHost) -> None:
        """Long intervals are shown with all digits."""
        every = dt.timedelta(days=100)
        host = registered(make_host(BGJOBS_SCHEDULE={"rare": {**HELLO, "every": every}}))
        assert "every 100 days" in row_of(host.get("/schedules"), "rare")
        assert form_fields(host.get("/schedules?name=rare"))["every"] == "8640000"


def form_fields(page: str) -> dict[str, str]:
    """The fields of the form that edits a schedule, as a browser would send them."""
    form = page.split('id="bgjobs-edit"')[1]
    fields = dict(re.findall(r'<input[^>]* name="(\w+)"[^>]*? value="([^"]*)"', form))
    for name, options in re.findall(
        r'<select[^>]* name="(\w+)".*?>(.*?)</select>', form, re.DOTALL
    ):
        fields[name] = re.findall(r'<option value="(\w+)" selected', options)[0]
    del fields["csrf_token"]
    return {name: html.unescape(value) for name, value in fields.items()}


class TestRights:
    @pytest.mark.parametrize("verb", ["run", "pause", "resume", "override", "reset"])
    def test_changes_need_the_right(self, make_host: MakeHost, verb: str) -> None:
        """Each change asks the authorizer for ``schedule`` without a job; without that right, it is
        refused, and the pages have no buttons."""
        asked: list[tuple[str, Job | None]] = []

        def allow(action: str, job: Job | None) -> bool:
            asked.append((action, job))
            return action == "view"

        host = registered(make_host(authorizer=allow, BGJOBS_SCHEDULE=SCHEDULES))
        assert host.post(f"/schedules/{verb}", schedule="poll").status_code == 403
        assert ("schedule", None) in asked
        for path in ("/schedules", "/schedules?name=poll"):
            assert "/schedules/" not in host.get(path)
            assert "Run now" not in host.get(path)
        assert (find_in(host, "poll").paused_at, host.count(), audited(host)) == (None, 0, [])

    def test_read_only(self, make_host: MakeHost) -> None:
        """BGJOBS_READ_ONLY refuses all changes, and hides their buttons."""
        host = registered(make_host(BGJOBS_READ_ONLY=True, BGJOBS_SCHEDULE=SCHEDULES))
        for verb in ("run", "pause", "resume", "override", "reset"):
            response = host.post(f"/schedules/{verb}", schedule="poll")
            assert response.status_code == 403
            assert "BGJOBS_READ_ONLY" in response.text
        assert "/schedules/" not in host.get("/schedules")
        assert host.count() == 0

    @pytest.mark.parametrize("token", [None, "nonsense"])
    def test_changes_need_a_token(self, host: Host, token: str | None) -> None:
        """Without a valid CSRF token, nothing changes."""
        data = {"schedule": "poll", **({} if token is None else {"csrf_token": token})}
        response = host.client.post(f"{PREFIX}/schedules/pause", data=data)
        assert response.status_code == 400
        assert find_in(host, "poll").paused_at is None

    def test_no_get_changes_anything(self, host: Host) -> None:
        """A GET on an action is a 405, and an unknown action a 404."""
        host.get(f"/schedules/pause?schedule=poll&csrf_token={host.token()}", 405)
        assert host.post("/schedules/explode", schedule="poll").status_code == 404
        assert find_in(host, "poll").paused_at is None

    def test_names_of_people_need_the_audit_right(self, make_host: MakeHost) -> None:
        """Who paused or overrode a schedule is shown only with the right ``audit``."""
        host = registered(
            make_host(authorizer=lambda action, job: action != "audit", BGJOBS_SCHEDULE=SCHEDULES)
        )
        find_in(host, "poll").pause(ADA)
        find_in(host, "poll").override(ADA, every=90)
        for path in (
            "/schedules",
            "/schedules?name=poll",
            "/api/v1/schedules",
            "/api/v1/schedule?name=poll",
        ):
            page = host.get(path)
            assert re.search(r"\bada\b", page) is None
            assert "paused" in page

    def test_hidden_schedule_looks_like_a_missing_one(self, make_host: MakeHost) -> None:
        """A visitor sees the schedules of whose jobs the authorizer lets them see one; others are
        missing, in lists, pages, forms, messages and the API."""
        schedules = {
            "mine": {**HELLO, "every": 60, "owner": "me"},
            "yours": {**HELLO, "every": 60, "owner": "you"},
        }
        host = registered(
            make_host(
                authorizer=lambda action, job: job is None or job.owner == "me",
                BGJOBS_SCHEDULE=schedules,
            )
        )
        assert names_on(host.get("/schedules")) == ["mine"]
        assert host.get("/schedules?name=yours", 404) == host.get("/schedules?name=nope", 404)
        hidden = json.loads(host.get("/api/v1/schedule?name=yours", 404))
        assert hidden == json.loads(host.get("/api/v1/schedule?name=yourz", 404))
        (each,) = json.loads(host.get("/api/v1/schedules"))["schedules"]
        assert each["name"] == "mine"
        assert host.post("/schedules/run", schedule="yours").status_code == 404
        assert host.post("/schedules/run", schedule="mine").status_code == 303
        assert host.count() == 1

    def test_authorizer_that_raises_for_a_made_up_job(self, make_host: MakeHost) -> None:
        """An authorizer that raises for a job that does not exist hides schedules, and nothing
        else."""

        def allow(action: str, job: Job | None) -> bool:
            if job is not None and not job.id:
                raise LookupError("no such row")
            return True

        host = registered(make_host(authorizer=allow, BGJOBS_SCHEDULE=SCHEDULES))
        page = host.get("/schedules")
        assert names_on(page) == []
        assert "Workers</a>" in page


class TestApi:
    @pytest.fixture
    def host(self, host: Host) -> Host:
        host.bgjobs.identify_visitor(lambda: "bob")
        return host

    def post(self, host: Host, verb: str, body: Any, code: int = 200) -> Any:
        response = host.client.post(
            f"{PREFIX}/api/v1/schedules/{verb}", json=body, headers={"X-CSRFToken": host.token()}
        )
        assert response.status_code == code, response.text
        return response.json

    def test_one_schedule(self, host: Host) -> None:
        """A schedule is returned with its recurrence now and in the code, its ticks and its next
        runs."""
        add_tick(host, "nightly", 5, job_id=7)
        find_in(host, "nightly").override(ADA, cron="0 4 * * *")
        data = json.loads(host.get("/api/v1/schedule?name=nightly"))
        assert (data["cron"], data["code"]["cron"]) == ("0 4 * * *", "0 3 * * *")
        assert (data["words"], data["timezone"]) == ("At 04:00", "Europe/Berlin")
        assert (data["overridden"], data["overridden_by"]) == (["cron"], "ada")
        assert data["ticks"] == [data["last_tick"]]
        assert (data["last_tick"]["outcome"], data["last_tick"]["job_id"]) == ("fired", 7)
        assert len(data["next_runs"]) == 5
        assert data["next_runs"][0]["at"] == data["next_run_at"]
        assert data["parameters"] == ["Hello"]
        assert data["is_registered"] is data["is_in_live_code"] is True
        host.get("/api/v1/schedule", 400)

    def test_changes(self, host: Host) -> None:
        """The API makes the same changes as the pages, says whether something changed, and the
        audit trail records the visitor."""
        poll = {"schedule": "poll"}
        unchanged = {"schedule": "poll", "changed": False, "job": None}
        changed = {**unchanged, "changed": True}
        assert self.post(host, "pause", poll) == changed
        assert self.post(host, "pause", poll) == unchanged
        assert self.post(host, "resume", poll) == changed
        assert self.post(host, "resume", poll) == unchanged
        assert self.post(host, "override", {**poll, "every": 90, "overlap": "allow"}) == changed
        assert find_in(host, "poll").overrides == {"every": 90.0, "overlap": "allow"}
        assert self.post(host, "reset", poll) == changed
        assert self.post(host, "reset", poll) == unchanged
        assert self.post(host, "run", poll) == {**changed, "job": 1}
        entries = json.loads(host.get("/api/v1/audit"))["entries"]
        assert {(entry["actor"], entry["source"]) for entry in entries} == {("bob", "api")}
        assert [entry["action"] for entry in entries] == [
            "run schedule",
            "reset schedule",
            "edit schedule",
            "resume schedule",
            "pause schedule",
        ]

    @pytest.mark.parametrize(
        ("verb", "body", "code", "message"),
        [
            ("pause", {}, 400, "schedule must be the name"),
            ("pause", {"schedule": 7}, 400, "schedule must be the name"),
            ("pause", {"schedule": "nope"}, 404, "there is no schedule 'nope'"),
            ("pause", {"schedule": "poll", "cron": "x"}, 400, "there is no field 'cron'"),
            ("override", {"schedule": "poll"}, 400, "give at least one option"),
            ("override", {"schedule": "poll", "colour": 1}, 400, "there is no field 'colour'"),
            ("override", {"schedule": "poll", "cron": "x"}, 400, "five fields"),
            ("override", {"schedule": "poll", "every": "x"}, 400, "every must be seconds"),
            ("override", {"schedule": "poll", "every": 1, "cron": "@daily"}, 400, "not both"),
        ],
    )
    def test_invalid_changes(
        self, host: Host, verb: str, body: Any, code: int, message: str
    ) -> None:
        """An invalid change is refused with the reason."""
        assert message in self.post(host, verb, body, code)["error"]["message"]
        assert audited(host) == []

    def test_job_that_is_not_allowed_is_403(self, make_host: MakeHost) -> None:
        """A job outside the allow-list is not run."""
        registered(make_host(BGJOBS_SCHEDULE=SCHEDULES))
        host = make_host(BGJOBS_ALLOWED_JOBS=[RECEIPT])
        self.post(host, "run", {"schedule": "poll"}, 403)
        assert host.count() == 0


def test_bgjobs_is_closed_by_default(make_host: MakeHost) -> None:
    """Without an authorizer, the page of schedules is closed; a public dashboard shows it without
    the names of people."""
    make_host(authorizer=None).get("/schedules", 403)
    host = registered(
        make_host(authorizer=None, BGJOBS_DASHBOARD_PUBLIC=True, BGJOBS_SCHEDULE=SCHEDULES)
    )
    find_in(host, "poll").pause(ADA)
    page = host.get("/schedules")
    assert names_on(page) == ["nightly", "poll", "receipt"]
    assert "ada" not in row_of(page, "poll")
    assert isinstance(host.bgjobs, BgJobs)
