"""The pages of limits: what they show, the changes, and the JSON API."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs import Job, Limit, run_background_job
from flask_bgjobs.flow.limits.manage import LimitState, find
from flask_bgjobs.job.limits import Rule
from flask_bgjobs.models import AuditEntry
from flask_bgjobs.store import Actor
from flask_bgjobs.worker.registration import register
from tests.integration.test_dashboard_support import PREFIX, SAMPLE, Host, MakeHost
from tests.integration.test_dashboard_support import host_maker as host_maker

NOTHING = "\N{EN DASH}"
ADA = Actor("ada", "dashboard")
SYNC = Limit("sync", concurrency=1, key="{message}")
MAIL = Limit("mailgun", rate=5, per=3600, burst=5)


def filled(host: Host) -> Host:
    """The host, with jobs that wait for limits."""
    with host.app.app_context():
        register(host.state, "w-1")
        for message in ("acme", "acme", "zoo"):
            enqueue(message, SYNC)
        enqueue("mail", MAIL)
        while host.state.store.admit().more:
            pass
    return host


def enqueue(message: str, limit: Limit) -> Job:
    return run_background_job(SAMPLE, "execute", [message], limits=limit)


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return filled(make_host())


def limit_in(host: Host, name: str) -> LimitState:
    with host.app.app_context():
        return find(host.state, name)


def rows_of(page: str, kind: str) -> list[str]:
    """The texts of the rows of a table, without tags."""
    found = re.findall(rf'<tr role="row" id="{kind}-\d+">(.*?)</tr>', page, re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", row)).split()) for row in found]


def follow(host: Host, response: Any) -> str:
    assert response.status_code == 303, response.text
    return html.unescape(host.client.get(response.headers["Location"]).text)


def audited(host: Host) -> list[tuple[str, str | None]]:
    with host.state.store.read() as connection:
        entries = connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id))
        return [(entry.action, entry.subject) for entry in entries]


class TestPages:
    def test_list(self, host: Host) -> None:
        """The list shows what each limit allows, and the keys at which jobs wait."""
        page = host.get("/limits")
        assert rows_of(page, "limit") == [
            "mailgun 5 in 3600 s, 5 in a burst active Pause Edit",
            "sync 1 at once active Pause Edit",
        ]
        keys = rows_of(page, "key")
        assert len(keys) == 3
        assert f"sync acme 1 of 1 1 {NOTHING} {NOTHING} full Pause" in keys
        assert f"sync zoo 1 of 1 0 {NOTHING} {NOTHING} full Pause" in keys
        assert any(row.startswith("mailgun 1 0 4 of 5") for row in keys), keys
        assert 'aria-current="page">Limits</a>' in page

    def test_one_limit(self, host: Host) -> None:
        """The page of a limit shows its keys, and a form with its numbers."""
        page = host.get("/limits?name=sync")
        assert "Limit sync" in page
        assert rows_of(page, "key")[0] == f"acme 1 of 1 1 {NOTHING} {NOTHING} full Pause"
        assert 'name="concurrency" type="text" value="1"' in page
        host.get("/limits?name=nope", 404)

    def test_without_limits(self, make_host: MakeHost) -> None:
        """Without limits, the page says how to make one."""
        assert "No limits yet" in make_host().get("/limits")

    def test_limits_without_jobs(self, make_host: MakeHost) -> None:
        """Limits of the configuration are listed before a job uses them."""
        page = make_host(BGJOBS_LIMITS={"quiet": {"concurrency": 2}}).get("/limits")
        assert rows_of(page, "limit") == ["quiet 2 at once active Pause Edit"]
        assert "No job uses a limit now." in page

    def test_names_are_escaped(self, make_host: MakeHost) -> None:
        """Keys and names are text, not markup."""
        host = make_host()
        with host.app.app_context():
            register(host.state, "w-1")
            enqueue("<script>alert(1)</script>", Limit("<b>x</b>", concurrency=1, key="{message}"))
            host.state.store.admit()
        page = host.get("/limits")
        assert "<script>alert" not in page
        assert "&lt;b&gt;x&lt;/b&gt;" in page

    def test_job_waits(self, host: Host) -> None:
        """The page of a waiting job names the limit that it waits for, and the job that runs
        instead, with links to both."""
        page = html.unescape(host.get("/job/2"))
        limit, holder = "/jobs/limits?name=sync", "/jobs/job/1"
        assert f'the limit <a href="{limit}">sync</a>, key acme (1 at once)' in page
        assert f'The seats are taken: <a href="{holder}">job 1</a> is pending.' in page

    def test_job_waits_for_a_strange_name(self, make_host: MakeHost) -> None:
        """Names of limits with special characters are text, and are linked as a whole."""
        host = make_host()
        with host.app.app_context():
            register(host.state, "w-1")
            limit = Limit("a(b|<i>job 7</i>", concurrency=1)
            enqueue("x", limit)
            enqueue("x", limit)
            host.state.store.admit()
        page = host.get("/job/2")
        assert re.search(r'the limit <a href="[^"]+">a\(b\|&lt;i&gt;job 7&lt;/i&gt;</a> \(1', page)


class TestChanges:
    def test_pause_and_resume(self, host: Host) -> None:
        """A limit and a key are paused and resumed, and the audit trail says so."""
        assert "Limit sync is paused." in follow(host, host.post("/limits/pause", limit="sync"))
        assert "paused" in rows_of(host.get("/limits"), "limit")[1]
        assert "is not paused" in follow(host, host.post("/limits/resume", limit="sync"))
        page = follow(host, host.post("/limits/pause", limit="sync", key="zoo"))
        assert "Key zoo of limit sync is paused." in page
        assert any("zoo" in row and "paused" in row for row in rows_of(page, "key"))
        follow(host, host.post("/limits/resume", limit="sync", key="zoo"))
        assert audited(host) == [
            ("pause limit", "sync"),
            ("resume limit", "sync"),
            ("pause limit", "sync [zoo]"),
            ("resume limit", "sync [zoo]"),
        ]

    def test_override_and_reset(self, host: Host) -> None:
        """Only changed numbers are overridden; the page shows how they differ from the code."""
        before = json.dumps({"concurrency": "1", "rate": "", "per": "", "burst": ""})
        fields = {"concurrency": "3", "rate": "", "per": "", "burst": "", "before": before}
        page = follow(host, host.post("/limits/override", limit="sync", **fields))
        assert "Limit sync allows 3 at once now." in page
        assert re.search(r"Code says <code>1 at once</code>, overridden to <code>3 at once", page)
        assert limit_in(host, "sync").overrides == {"concurrency": 3}
        page = follow(host, host.post("/limits/override", limit="sync", **fields | {"before": ""}))
        page = follow(host, host.post("/limits/reset", limit="sync"))
        assert "Limit sync is as in the code: 1 at once." in page
        assert limit_in(host, "sync").rule == Rule(concurrency=1)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"concurrency": "many"}, "Give a whole number"),
            ({"concurrency": "0"}, "concurrency must be a whole number"),
            ({"concurrency": "9" * 400}, "Give a whole number"),
            ({"rate": "5"}, "rate and per need each other"),
            ({"rate": "5", "per": "soon"}, "The period must be seconds"),
            ({"concurrency": ""}, "give concurrency, or rate with per"),
        ],
    )
    def test_invalid_numbers(self, host: Host, fields: dict[str, str], message: str) -> None:
        """A number that is not valid is shown again with the reason."""
        before = json.dumps({"concurrency": "1"})
        given = {"concurrency": "1", "before": before, **fields}
        response = host.post("/limits/override", limit="sync", **given)
        assert response.status_code == 400
        assert message in html.unescape(response.text)
        assert not limit_in(host, "sync").overrides

    def test_nothing_different(self, host: Host) -> None:
        """A form that changes nothing overrides nothing."""
        fields = {"concurrency": "1", "before": json.dumps({"concurrency": "1"})}
        page = follow(host, host.post("/limits/override", limit="sync", **fields))
        assert "No value was different" in page

    def test_unknown_limit(self, host: Host) -> None:
        """A limit that does not exist is not found."""
        assert host.post("/limits/pause", limit="nope").status_code == 404
        assert host.post("/limits/explode", limit="sync").status_code == 404
        assert host.post("/limits/pause", limit="sync", key="x" * 300).status_code == 400


class TestRights:
    @pytest.mark.parametrize("verb", ["pause", "resume", "override", "reset"])
    def test_changes_need_the_right(self, make_host: MakeHost, verb: str) -> None:
        """Each change asks the authorizer for ``limit``; without that right, there are no
        buttons."""
        asked: list[str] = []

        def allow(action: str, job: Job | None) -> bool:
            asked.append(action)
            return action == "view"

        host = filled(make_host(authorizer=allow))
        assert host.post(f"/limits/{verb}", limit="sync").status_code == 403
        assert "limit" in asked
        for path in ("/limits", "/limits?name=sync"):
            assert "/limits/" not in host.get(path)

    def test_names_of_people_need_the_right_audit(self, make_host: MakeHost) -> None:
        """Who has changed a limit is shown only to those who may see the audit trail."""
        host = filled(make_host(authorizer=lambda action, job: action != "audit"))
        limit_in(host, "sync").override(ADA, concurrency=2)
        limit_in(host, "mailgun").pause(by=ADA)
        for path in (
            "/limits",
            "/limits?name=sync",
            "/api/v1/limits",
            "/api/v1/limit?name=mailgun",
        ):
            assert re.search(r"\bada\b", host.get(path)) is None

    def test_hidden_without_all_jobs(self, make_host: MakeHost) -> None:
        """A visitor who may not see all jobs sees no limits, because their names and keys come from
        jobs."""
        host = filled(make_host(authorizer=lambda action, job: job is None or job.owner == "me"))
        for path in ("/limits", "/limits?name=sync", "/api/v1/limits", "/api/v1/limit?name=sync"):
            assert "sync" not in host.get(path, 403)
        assert host.post("/limits/pause", limit="sync").status_code == 403


class TestApi:
    def post(self, host: Host, verb: str, body: Any, code: int = 200) -> Any:
        response = host.client.post(
            f"{PREFIX}/api/v1/limits/{verb}", json=body, headers={"X-CSRFToken": host.token()}
        )
        assert response.status_code == code, response.text
        return response.json

    def test_reads(self, host: Host) -> None:
        """The API returns limits, and the keys of one."""
        names = [each["name"] for each in json.loads(host.get("/api/v1/limits"))["limits"]]
        assert names == ["mailgun", "sync"]
        data = json.loads(host.get("/api/v1/limit?name=sync"))
        assert data["rule"] == {"concurrency": 1, "rate": None, "per": None, "burst": 1}
        assert [(k["key"], k["held"], k["waiting"]) for k in data["keys"]] == [
            ("acme", 1, 1),
            ("zoo", 1, 0),
        ]
        host.get("/api/v1/limit", 400)
        host.get("/api/v1/limit?name=nope", 404)

    def test_changes(self, host: Host) -> None:
        """The API makes the same changes as the pages."""
        changed = self.post(host, "override", {"limit": "mailgun", "rate": 9, "per": 60})
        assert (changed["state"], changed["rule"]["rate"]) == ("overridden", 9)
        assert self.post(host, "reset", {"limit": "mailgun"})["state"] == "active"
        assert self.post(host, "pause", {"limit": "sync"})["state"] == "paused"
        assert self.post(host, "resume", {"limit": "sync"})["state"] == "active"
        self.post(host, "pause", {"limit": "sync", "key": "zoo"})
        keys = json.loads(host.get("/api/v1/limit?name=sync"))["keys"]
        assert [k["key"] for k in keys if k["paused_at"]] == ["zoo"]

    @pytest.mark.parametrize(
        ("verb", "body", "message"),
        [
            ("override", {"limit": "sync", "speed": 1}, "there is no field 'speed'"),
            ("override", {"limit": "sync"}, "needs a value"),
            ("override", {"limit": "sync", "concurrency": "2"}, "must be a whole number"),
            ("reset", {"limit": "sync", "key": "zoo"}, "there is no field 'key'"),
            ("pause", {"limit": "sync", "key": 5}, "a key is a str"),
            ("pause", {}, "limit must be the name"),
        ],
    )
    def test_errors(self, host: Host, verb: str, body: Any, message: str) -> None:
        """Errors say which field is wrong."""
        assert message in self.post(host, verb, body, 400)["error"]["message"]
