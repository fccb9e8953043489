"""Weights of keys at run time: overrides in Python, on the command line, on the dashboard, and in
the JSON API."""

from __future__ import annotations

import collections
import html
import json
import re
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs import BgJobs, InvalidJob, Job, Limit, run_background_job
from flask_bgjobs.flow.fairness.data import drift
from flask_bgjobs.flow.fairness.manage import Weights
from flask_bgjobs.models import AuditEntry, Weight
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Actor, KeyTurns, Store
from flask_bgjobs.worker.registration import register
from tests.integration.test_dashboard_support import PREFIX, SAMPLE, Host, MakeHost
from tests.integration.test_dashboard_support import host_maker as host_maker
from tests.integration.test_fairness import add, claim, keys, take

ADA = Actor("ada", "command line")


def audited(store: Store) -> list[tuple[str, str | None]]:
    with store.read() as connection:
        entries = connection.execute(sa.select(AuditEntry.__table__).order_by(AuditEntry.id))
        return [(entry.action, entry.subject) for entry in entries]


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


class TestOverride:
    def test_acts_on_jobs_that_become_due(self, state: AppState, worker: int) -> None:
        """A key runs as many jobs in each turn as its overridden weight, until it is reset."""
        weight = Weights(state)["a"]
        assert (weight.weight, weight.code, weight.is_overridden) == (1, 1, False)
        weight = weight.override(3, ADA)
        assert (weight.weight, weight.code, weight.is_overridden) == (3, 1, True)
        assert (weight.overridden_by, weight.has_changed_since_override) == ("ada", False)
        for key in "ab":
            add(state, key, 12)
        assert collections.Counter(take(state, worker, 8)) == {"a": 6, "b": 2}
        assert weight.reset(ADA).weight == 1
        assert audited(state.store) == [("edit weight", "a"), ("reset weight", "a")]

    def test_twice(self, state: AppState) -> None:
        """A second override replaces the first; a reset without one changes nothing."""
        weight = Weights(state)["a"].override(3).override(0.5)
        assert weight.weight == 0.5
        assert not weight.reset(ADA).reset(ADA).is_overridden
        assert audited(state.store) == [("reset weight", "a")]

    def test_drift(self, state: AppState) -> None:
        """A weight says how it differs from the configuration, also when that has changed since."""
        object.__setattr__(state.config, "weights", {"acme": 2.0})
        weight = Weights(state)["acme"].override(5, ADA)
        at = f"{weight.overridden_at:%Y-%m-%d %H:%M:%S}"
        assert drift(weight) == (f"5, in the configuration 2 (overridden by ada at {at} UTC)")
        object.__setattr__(state.config, "weights", {"acme": 4.0})
        assert drift(weight.refresh()).endswith("UTC; the configuration has changed since)")
        assert drift(weight.reset()) == ""

    @pytest.mark.parametrize("weight", [0, -1, 1_001, float("nan"), "3", None, True])
    def test_invalid_weight(self, state: AppState, weight: Any) -> None:
        """A weight that is not valid is refused."""
        with pytest.raises(InvalidJob, match="a weight is a number from"):
            Weights(state)["a"].override(weight)

    @pytest.mark.parametrize("key", ["", "x" * 256, None, 5])
    def test_invalid_key(self, state: AppState, key: Any) -> None:
        """A key that no job can have is refused."""
        with pytest.raises(InvalidJob, match="a key is a str of 1 to 255 characters"):
            Weights(state)[key]

    @pytest.mark.parametrize("stored", [0, -1, 1e300])
    def test_invalid_row(self, state: AppState, worker: int, stored: float) -> None:
        """A stored weight that is not valid, as after an edit by hand, does not count."""
        Weights(state)["a"].override(3)
        update = sa.update(Weight).values(weight=stored)
        state.store.transaction(lambda c: c.execute(update))
        assert Weights(state)["a"].weight == 1
        for key in "ab":
            add(state, key, 2)
        assert take(state, worker, 4) == "abab"

    def test_collection(self, state: AppState) -> None:
        """``bgjobs.weights`` holds the configured and the overridden keys."""
        object.__setattr__(state.config, "weights", {"b": 2.0})
        bgjobs = BgJobs()
        bgjobs.weights["c"].override(3)
        bgjobs.weights["a\0"].override(4)
        assert len(bgjobs.weights) == 3
        assert list(bgjobs.weights) == [bgjobs.weights["a\0"].key, "b", "c"]
        assert "b" in bgjobs.weights
        assert "x" not in bgjobs.weights
        assert repr(bgjobs.weights["b"]) == "<WeightState b 2>"


class TestWaiting:
    def test_keys_with_turns(self, state: AppState, worker: int) -> None:
        """The keys with turns to come are read from all queues, those with the most first."""
        assert Weights(state).waiting() == []
        Weights(state)["b"].override(2)
        add(state, "a", 4)
        add(state, "b", 12)
        add(state, "c", 9, queue="mail", priority=5)
        add(state, "d", 1, queue="other")
        state.store.promote()
        assert Weights(state).waiting() == [
            KeyTurns("c", "mail", 5, 9),
            KeyTurns("b", "default", 0, 6),
            KeyTurns("a", "default", 0, 4),
            KeyTurns("d", "other", 0, 1),
        ]
        assert [each.key for each in Weights(state).waiting(2)] == ["c", "b"]

    def test_run_down(self, state: AppState, worker: int) -> None:
        """The turns to go are counted from the current one, also without a new promotion."""
        add(state, "a", 6)
        assert keys(claim(state, worker, 4, queues=("default",))) == "aaaa"
        assert [each.turns for each in Weights(state).waiting()] == [2]
        take(state, worker, 2)
        assert Weights(state).waiting() == []

    def test_jobs_that_wait_for_limits(self, state: AppState, worker: int) -> None:
        """Keys whose jobs wait for a limit have turns to come as well."""
        add(state, "a", 3, limits=Limit("one", concurrency=1))
        state.store.promote()
        assert [each.key for each in Weights(state).waiting()] == ["a"]


class TestCommands:
    def test_list(self, run: Any, state: AppState) -> None:
        """``weights`` lists the configured and overridden weights."""
        assert "All keys have the weight 1" in run("weights")
        object.__setattr__(state.config, "weights", {"acme": 2.0})
        run("weights", "override", "zoo", "0.5")
        lines = run("weights", "list").splitlines()
        assert lines[0].split() == ["KEY", "WEIGHT", "CONFIGURED", "OVERRIDDEN"]
        assert lines[1].split() == ["acme", "2", "2"]
        assert re.fullmatch(r"zoo   0.5     1           [\d-]{10} [\d:]{8} by \S+", lines[2])
        (acme, zoo) = json.loads(run("weights", "--json"))
        assert (acme["weight"], acme["is_overridden"], zoo["code"]) == (2, False, 1)

    def test_override_and_reset(self, run: Any, state: AppState) -> None:
        """``override`` and ``reset`` change a weight, and record who did."""
        said = run("weights", "override", "acme", "3")
        assert said.startswith("Weight of acme: 3, in the configuration 1 (overridden by ")
        assert Weights(state)["acme"].weight == 3
        said = run("weights", "reset", "acme")
        assert said == "Weight of acme is as in the configuration: 1\n"
        assert [action for action, _ in audited(state.store)] == ["edit weight", "reset weight"]

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (("override", "acme", "0"), 1, "a weight is a number from 0.01"),
            (("override", "acme", "nan"), 1, "a weight is a number from 0.01"),
            (("override", "acme", "much"), 2, "is not a valid float"),
            (("override", "", "1"), 1, "a key is a str of 1 to 255 characters"),
            (("reset",), 2, "Missing argument 'KEY'"),
        ],
    )
    def test_invalid(self, run: Any, words: tuple[str, ...], code: int, message: str) -> None:
        """A wrong argument is refused in one sentence."""
        assert message in run("weights", *words, code=code)


def filled(host: Host) -> Host:
    """The host, with jobs of two keys that take turns."""
    with host.app.app_context():
        register(host.state, "w-1")
        for key, jobs in (("acme", 3), ("zoo", 2)):
            for _ in range(jobs):
                run_background_job(SAMPLE, "execute", [key], fair="{message}")
        host.state.store.promote()
    return host


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return filled(make_host())


def rows_of(page: str) -> list[str]:
    """The texts of the rows of the table of keys."""
    table = re.search(r'<table class="bgj-table bgj-weights".*?</table>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table.group(), re.DOTALL) if table else []
    texts = [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", row)).split()) for row in rows]
    return texts[1:]


def follow(host: Host, response: Any) -> str:
    assert response.status_code == 303, response.text
    return html.unescape(host.client.get(response.headers["Location"]).text)


class TestPages:
    def test_list(self, host: Host) -> None:
        """The page of limits shows the keys that take turns, with their weights."""
        assert rows_of(host.get("/limits")) == ["acme default 0 3 1", "zoo default 0 2 1"]

    def test_without_keys(self, make_host: MakeHost) -> None:
        """Without keys, the page has no section about them."""
        page = make_host().get("/limits")
        assert "Fairness" not in page
        assert "Set a weight" not in page

    def test_configured(self, make_host: MakeHost) -> None:
        """Configured weights are listed before a job uses them."""
        page = make_host(BGJOBS_WEIGHTS={"acme": 2.5}).get("/limits")
        assert rows_of(page) == ["acme \N{EN DASH} \N{EN DASH} 0 2.5"]

    def test_override_and_reset(self, host: Host) -> None:
        """A weight is overridden and reset, and the audit trail says so."""
        page = follow(host, host.post("/weights/override", key="zoo", weight=" 2.5 "))
        assert "The weight of zoo is 2.5 now." in page
        assert "The configuration says 1 , overridden by anonymous" in rows_of(page)[1]
        page = follow(host, host.post("/weights/reset", key="zoo"))
        assert "The weight of zoo is as in the configuration: 1." in page
        assert audited(host.state.store) == [("edit weight", "zoo"), ("reset weight", "zoo")]

    @pytest.mark.parametrize(
        ("key", "weight", "message"),
        [
            ("zoo", "", "Give a number, such as 2 or 0.5."),
            ("zoo", "much", "Give a number, such as 2 or 0.5."),
            ("zoo", "0", "A weight is a number from 0.01 to 1,000, not 0.0."),
            ("zoo", "9" * 400, "A weight is a number from 0.01 to 1,000"),
            ("zoo", "nan", "A weight is a number from 0.01 to 1,000"),
            ("", "1", "A key is a str of 1 to 255 characters"),
            ("x" * 300, "1", "A key is a str of 1 to 255 characters"),
        ],
    )
    def test_invalid(self, host: Host, key: str, weight: str, message: str) -> None:
        """A value that is not valid is shown again with the reason."""
        response = host.post("/weights/override", key=key, weight=weight)
        assert response.status_code == 400
        assert message in html.unescape(response.text)
        assert audited(host.state.store) == []

    def test_invalid_reset(self, host: Host) -> None:
        """A reset without a key is refused."""
        assert host.post("/weights/reset").status_code == 400

    def test_keys_are_escaped(self, host: Host) -> None:
        """Keys are text, not markup."""
        with host.app.app_context():
            Weights(host.state)["<script>alert(1)</script>"].override(2)
        assert "<script>alert" not in host.get("/limits")

    @pytest.mark.parametrize("verb", ["override", "reset"])
    def test_changes_need_the_right(self, make_host: MakeHost, verb: str) -> None:
        """A change needs the right ``limit``; without it, there are no buttons."""
        host = filled(make_host(authorizer=lambda action, job: action == "view"))
        assert host.post(f"/weights/{verb}", key="zoo", weight="2").status_code == 403
        page = host.get("/limits")
        assert "/weights/" not in page
        assert len(rows_of(page)) == 2

    def test_names_of_people_need_the_right_audit(self, make_host: MakeHost) -> None:
        """Who has changed a weight is shown only to those who may see the audit trail."""
        host = filled(make_host(authorizer=lambda action, job: action != "audit"))
        with host.app.app_context():
            Weights(host.state)["zoo"].override(2, ADA)
        for path in ("/limits", "/api/v1/weights"):
            assert re.search(r"\bada\b", host.get(path)) is None

    def test_hidden_without_all_jobs(self, make_host: MakeHost) -> None:
        """A visitor who may not see all jobs sees no keys, because they come from jobs."""

        def allow(_action: str, job: Job | None) -> bool:
            return job is None or job.owner == "me"

        host = filled(make_host(authorizer=allow))
        for path in ("/limits", "/api/v1/weights"):
            assert "zoo" not in host.get(path, 403)
        assert host.post("/weights/override", key="zoo", weight="2").status_code == 403


class TestApi:
    def post(self, host: Host, verb: str, body: Any, code: int = 200) -> Any:
        response = host.client.post(
            f"{PREFIX}/api/v1/weights/{verb}", json=body, headers={"X-CSRFToken": host.token()}
        )
        assert response.status_code == code, response.text
        return response.json

    def test_changes_and_reads(self, host: Host) -> None:
        """The API overrides, resets and reads weights, and the turns of keys."""
        changed = self.post(host, "override", {"key": "zoo", "weight": 2})
        assert (changed["weight"], changed["is_overridden"]) == (2, True)
        data = json.loads(host.get("/api/v1/weights"))
        assert [each["key"] for each in data["weights"]] == ["zoo"]
        assert data["turns"][0] == {"key": "acme", "queue": "default", "priority": 0, "turns": 3}
        assert self.post(host, "reset", {"key": "zoo"})["weight"] == 1
        assert json.loads(host.get("/api/v1/weights"))["weights"] == []

    @pytest.mark.parametrize(
        ("verb", "body", "message"),
        [
            ("override", {"key": "zoo"}, "a weight is a number"),
            ("override", {"key": "zoo", "weight": "2"}, "a weight is a number"),
            ("override", {"weight": 2}, "a key is a str"),
            ("override", {"key": 5, "weight": 2}, "a key is a str"),
            ("override", {"key": "zoo", "speed": 2}, "there is no field 'speed'"),
            ("reset", {"key": "zoo", "weight": 2}, "there is no field 'weight'"),
        ],
    )
    def test_invalid(self, host: Host, verb: str, body: Any, message: str) -> None:
        """A wrong body is refused with the reason."""
        assert message in self.post(host, verb, body, 400)["error"]["message"]
