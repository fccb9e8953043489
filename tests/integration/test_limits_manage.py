"""Limits at run time: configuration, overrides, pauses, the command line, and why a job waits."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import (
    BgJobs,
    ConfigError,
    InvalidJob,
    Job,
    Limit,
    LimitNotFound,
    run_background_job,
)
from flask_bgjobs.flow.limits.definition import rules
from flask_bgjobs.flow.limits.keeper import LimitKeeper
from flask_bgjobs.flow.limits.manage import Limits
from flask_bgjobs.job.limits import Rule, uses_from_json
from flask_bgjobs.job.records import Outcome
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.models import AuditEntry, LimitKey, LimitRow, Seat
from flask_bgjobs.operations.queries import job_detail
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import Actor
from flask_bgjobs.worker.registration import register
from tests.conftest import stored
from tests.integration.test_limits import (
    ONE,
    PER_VALUE,
    admit,
    check_seats,
    enqueue,
    execute,
    rows,
    statuses,
)

pytestmark = pytest.mark.usefixtures("worker")
ADA = Actor("ada", "command line")


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


class TestOverride:
    def test_acts_at_once(self, state: AppState, app: Flask) -> None:
        """A higher number admits more jobs, a lower one takes seats from pending jobs."""
        for _ in range(5):
            enqueue()
        assert admit(state) == 1
        limit = Limits(state)["one"].override(ADA, concurrency=3)
        assert (limit.rule, limit.code) == (Rule(concurrency=3), Rule(concurrency=1))
        assert (limit.overridden_by, limit.overrides) == ("ada", {"concurrency": 3})
        assert admit(state) == 2
        limit.override(concurrency=2)
        admit(state)
        assert statuses(state) == {"pending": 2, "waiting": 3}
        reset = limit.reset(ADA)
        assert (reset.rule, reset.overridden_at) == (Rule(concurrency=1), None)
        admit(state)
        assert statuses(state) == {"pending": 1, "waiting": 4}
        check_seats(state)
        actions = [row.action for row in rows(state, AuditEntry)]
        assert actions == ["edit limit", "reset limit"]

    def test_running_jobs_go_on(self, state: AppState, worker: int) -> None:
        """With a lower number, running jobs keep their seats, and no other starts."""
        for _ in range(3):
            enqueue(limits=Limit("two", concurrency=2))
        admit(state)
        assert len(state.store.claim(worker, 5)) == 2
        Limits(state)["two"].override(concurrency=1)
        assert admit(state) == 0
        assert statuses(state) == {"running": 2, "waiting": 1}

    def test_a_rate_can_be_added_and_removed(self, state: AppState) -> None:
        """An override may add a rate to a limit, or remove it."""
        for _ in range(3):
            enqueue(limits=Limit("two", concurrency=2))
        admit(state)
        limit = Limits(state)["two"].override(concurrency=3, rate=1, per=3600)
        assert admit(state) == 0
        limit.override(rate=None, per=None)
        assert admit(state) == 1

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"concurrency": 0}, "concurrency must be a whole number"),
            ({"rate": 5}, "rate and per need each other"),
            ({"concurrency": None}, "give concurrency, or rate with per"),
            ({"rate": 5, "per": "1m"}, "per must be seconds"),
            ({"rate": 5, "per": 1, "burst": 6}, "burst must be a whole number from 1 to rate"),
        ],
    )
    def test_invalid_values(self, state: AppState, values: Any, message: str) -> None:
        """A value that is not valid is refused, and changes nothing."""
        enqueue()
        admit(state)
        with pytest.raises(InvalidJob, match=message):
            Limits(state)["one"].override(**values)
        assert not Limits(state)["one"].overrides

    def test_wrong_names(self, state: AppState) -> None:
        """Unknown values and limits are refused with a suggestion."""
        enqueue(limits=Limit("shop.mailgun", concurrency=1))
        admit(state)
        limits = Limits(state)
        with pytest.raises(TypeError, match="it has concurrency, rate, per, burst"):
            limits["mailgun"].override(speed=2)  # type: ignore[call-arg]  # wrong on purpose
        with pytest.raises(TypeError, match="needs a value"):
            limits["mailgun"].override()
        with pytest.raises(LimitNotFound, match="did you mean 'mailgun'"):
            limits["mailgum"]
        enqueue(limits=Limit("other.mailgun", concurrency=1))
        admit(state)
        with pytest.raises(LimitNotFound, match="give one of"):
            limits["mailgun"]
        assert list(limits) == ["other.mailgun", "shop.mailgun"]
        assert (len(limits), "mailgun" in limits, "shop.mailgun" in limits) == (2, False, True)

    def test_drift(self, state: AppState) -> None:
        """An override stays when the code changes, and says that it has."""
        keeper = LimitKeeper(state, state.store, "w")
        state.store.define_limits({"one": Rule(concurrency=1)})
        limit = Limits(state)["one"].override(concurrency=5)
        assert not limit.has_changed_since_override
        state.store.define_limits({"one": Rule(concurrency=2)})
        limit = limit.refresh()
        assert limit.has_changed_since_override
        assert (limit.code, limit.rule) == (Rule(concurrency=2), Rule(concurrency=5))
        keeper.register()


class TestPause:
    def test_limit(self, state: AppState) -> None:
        """A paused limit takes seats from pending jobs, and admits none until it is resumed."""
        for _ in range(2):
            enqueue()
        admit(state)
        paused = Limits(state)["one"].pause(by=ADA)
        assert (paused.paused_by, paused.paused_at is not None) == ("ada", True)
        admit(state)
        assert statuses(state) == {"waiting": 2}
        assert Limits(state)["one"].resume().paused_at is None
        assert admit(state) == 1
        check_seats(state)

    def test_key(self, state: AppState) -> None:
        """Only jobs with the paused key wait; a key can be paused before any job has it."""
        limit = PER_VALUE
        enqueue(1, limit)
        admit(state)
        Limits(state)["value"].pause("2", ADA)
        for value in (2, 3):
            enqueue(value, limit)
        admit(state)
        assert statuses(state) == {"pending": 2, "waiting": 1}
        (key,) = [each for each in Limits(state)["value"].busy_keys() if each.paused_at]
        assert (key.name, key.held, key.waiting, key.paused_by) == ("2", 0, 1, "ada")
        Limits(state)["value"].resume("2")
        assert admit(state) == 1
        (entry,) = rows(state, AuditEntry)
        assert (entry.action, entry.subject) == ("pause limit", "value [2]")


class TestKeys:
    def test_keys_of_a_limit(self, state: AppState) -> None:
        """Keys at which jobs wait come first; each tells how many hold seats and wait."""
        for value in ("b", "b", "b", "a", "c", "c"):
            enqueue(value, PER_VALUE)
        admit(state)
        found = [(k.name, k.held, k.waiting) for k in Limits(state)["value"].busy_keys()]
        assert found == [("b", 1, 2), ("c", 1, 1), ("a", 1, 0)]
        (only,) = Limits(state)["value"].busy_keys(key="a")
        assert only.name == "a"
        assert len(Limits(state)["value"].busy_keys(2)) == 2

    def test_rate_left(self, state: AppState) -> None:
        """Of a rate, the number of starts that are left in the period."""
        enqueue(limits=Limit("rated", rate=5, per=60, burst=2))
        admit(state)
        limit = Limits(state)["rated"]
        (key,) = limit.busy_keys()
        assert limit.rate_left(key) == 4

    def test_unused_keys_are_pruned(self, state: AppState) -> None:
        """The row of a key that no job uses is deleted after a day, unless a rate still counts."""
        rated = Limit("rated", rate=5, per=10 * 86_400, key="{value}")
        for limit in (PER_VALUE, rated):
            for value in (1, 2):
                enqueue(value, limit)
        admit(state)
        assert state.store.prune_limit_keys(10) == 0
        jobs = [row.id for row in rows(state, Job)]
        state.store.cancel(jobs)
        admit(state)
        old = state.store.after(sa.literal(-2 * 86_400.0))
        execute(state, sa.update(LimitKey).values(used_at=old))
        start = json.dumps([[2**53, 1]])
        execute(
            state,
            sa.update(LimitKey).where(LimitKey.name == "1").values(starts=start),
        )
        assert state.store.prune_limit_keys(10) == 3
        (left,) = rows(state, LimitKey)
        assert left.name == "1"

    def test_unused_limits_are_pruned(self, state: AppState) -> None:
        """The row of a limit is deleted if it has no key, is not in the code, and nobody has
        changed it."""
        old = state.store.after(sa.literal(-2 * 86_400.0))
        names = ["gone", "in the code", "overridden", "paused", "used", "new"]
        state.store.define_limits(dict.fromkeys(names, Rule(concurrency=2)))
        enqueue(limits=Limit("used", concurrency=2))
        admit(state)
        Limits(state)["overridden"].override(concurrency=1)
        Limits(state)["paused"].pause()
        execute(state, sa.update(LimitRow).where(LimitRow.name != "new").values(defined_at=old))
        assert state.store.prune_limits(10, ["in the code"]) == 1
        assert sorted(row.name for row in rows(state, LimitRow)) == sorted(names[1:])

    def test_deleted_limit(self, state: AppState, worker: int) -> None:
        """If the row of a limit is gone, it is inserted again."""
        for _ in range(3):
            enqueue(limits=Limit("two", concurrency=2))
        admit(state)
        execute(state, sa.delete(LimitRow))
        spec, _ = state.store.claim(worker, 10)
        done = Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED, wait_seconds=0.0)
        state.store.hand_over(worker, [(spec, done)], 10)
        admit(state)
        assert rows(state, LimitRow)[0].name == "two"
        assert statuses(state) == {"completed": 1, "pending": 1, "running": 1}


class TestReasons:
    def reasons(self, state: AppState, job: Job) -> str:
        return " ".join(job_detail(state, stored(state.app, job)).reasons)

    def test_concurrency(self, state: AppState, worker: int) -> None:
        """The page of a job names the limit, the jobs ahead, and those that hold the seats."""
        first, second = enqueue(7, PER_VALUE), enqueue(7, PER_VALUE)
        last = enqueue(7, PER_VALUE)
        admit(state)
        text = self.reasons(state, last)
        assert "It waits for the limit value, key 7 (1 at once): 1 job is ahead of it." in text
        assert f"The seats are taken: job {first.id} is pending." in text
        state.store.claim(worker, 1)
        assert f"job {first.id} has run for 0 s" in self.reasons(state, second)

    def test_rate(self, state: AppState) -> None:
        """Of a rate, the page says when the next start is allowed."""
        limit = Limit("rated", rate=1, per=3600)
        enqueue(limits=limit)
        job = enqueue(limits=limit)
        admit(state)
        text = self.reasons(state, job)
        assert "It waits for the limit rated (1 in 3600 s)" in text

    def test_pause_and_queue(self, state: AppState) -> None:
        """A paused limit and a paused queue are named."""
        job = enqueue()
        admit(state)
        Limits(state)["one"].pause(by=ADA)
        admit(state)
        assert "the limit one is paused by ada" in self.reasons(state, job)
        Limits(state)["one"].resume()
        state.store.pause("default")
        admit(state)
        text = self.reasons(state, job)
        assert "it holds no seat at its limits" in text
        assert "The queue default is paused." in text

    def test_without_a_seat(self, state: AppState) -> None:
        """A job whose seat was deleted by hand is explained as well."""
        job = enqueue()
        execute(state, sa.delete(Seat))
        assert "It waits for one of its limits." in self.reasons(state, job)


CONFIGURED = {
    "mailgun": {"rate": 100, "per": dt.timedelta(minutes=1), "burst": 10},
    "tests.jobs.echo": {"concurrency": 2, "key": "{value}"},
    "classes": {"concurrency": 3, "jobs": ["tests.jobs.SampleJob"]},
    "given": Limit(concurrency=4),
}


@pytest.mark.on("sqlite")
class TestConfiguration:
    @pytest.fixture
    def app(self, make_app: Callable[..., Flask]) -> Flask:
        return make_app(BGJOBS_LIMITS=CONFIGURED)

    def names(self, state: AppState, job: Job) -> list[tuple[str, str]]:
        return [(use.name, use.key) for use in uses_from_json(job.limits_json)]

    def test_limits_of_names(self, state: AppState) -> None:
        """A limit in the configuration applies to the jobs that it names, and to those that name
        it."""
        echo = run_background_job("tests.jobs.echo", parameters=[5])
        assert self.names(state, echo) == [("tests.jobs.echo", "5")]
        both = run_background_job("tests.jobs.echo", parameters=[5], limits="mailgun")
        assert self.names(state, both) == [("tests.jobs.echo", "5"), ("mailgun", "")]
        sample = run_background_job("tests.jobs.SampleJob", "execute")
        assert self.names(state, sample) == [("classes", "")]
        assert run_background_job("tests.jobs.fail").limits_json is None

    def test_a_worker_stores_them(self, state: AppState) -> None:
        """A worker that starts stores the numbers in its code."""
        LimitKeeper(state, state.store, "w").register()
        found = {row.name: json.loads(row.definition) for row in rows(state, LimitRow)}
        assert found["mailgun"] == {"rate": 100, "per_seconds": 60.0, "burst": 10}
        assert set(found) == set(CONFIGURED)

    def test_numbers_of_the_configuration_apply(self, state: AppState) -> None:
        """The numbers in the configuration replace those in the code; the key stays."""
        job = enqueue(3, Limit("given", concurrency=1, key="{value}"))
        (use,) = (each for each in uses_from_json(job.limits_json) if each.name == "given")
        assert (use.rule, use.key) == (Rule(concurrency=4), "3")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["mailgun"], "must be a dict of name to dict"),
        ({7: {}}, "is not a name of a limit"),
        ({"a": {}}, "give concurrency, or rate with per"),
        ({"a": {"rat": 1}}, "'a' has no 'rat'; its keys are concurrency, rate"),
        ({"a": {"concurrency": True}}, "concurrency must be a whole number"),
        ({"a": {"concurrency": 1, "jobs": "x"}}, "'jobs' of 'a' must be a list"),
        ({"a": 5}, "'a' must be a dict or a Limit"),
        ({"a": {"concurrency": 1, "burst": 2}}, "burst needs rate"),
        ({"a": {"rate": 1, "per": 0}}, "per must be"),
    ],
)
@pytest.mark.on("sqlite")
def test_invalid_configuration(make_app: Callable[..., Flask], value: Any, message: str) -> None:
    """BGJOBS_LIMITS is checked when the app is set up."""
    with pytest.raises(ConfigError, match="BGJOBS_LIMITS") as refusal:
        make_app(BGJOBS_LIMITS=value)
    assert message in str(refusal.value)


class TestDecorator:
    def test_key_is_checked(self) -> None:
        """A key must name parameters of the function."""
        bgjobs = BgJobs()
        with pytest.raises(ConfigError, match="names the parameter 'account'"):

            @bgjobs.job(name="sync", limits=Limit(concurrency=1, key="{account}"))
            def sync(account_id: int) -> None: ...

    @pytest.mark.on("sqlite")
    def test_two_definitions(self, make_app: Callable[..., Flask]) -> None:
        """Two limits with one name must have the same numbers, but may have different keys."""
        state = state_of(make_app())
        bgjobs = BgJobs()

        @bgjobs.job(name="one", limits=Limit("same", concurrency=1, key="{a}"))
        def one(a: int) -> None: ...

        @bgjobs.job(name="two", limits=Limit("same", concurrency=1, key="{b}"))
        def two(b: int) -> None: ...

        state.registry = type(state.registry)({}, bgjobs._decorated)
        assert rules(state) == {"same": Rule(concurrency=1)}

        @bgjobs.job(name="three", limits=Limit("same", concurrency=2))
        def three() -> None: ...

        with pytest.raises(ConfigError, match="two limits are named 'same'"):
            rules(state)

    @pytest.mark.on("sqlite")
    def test_unknown_name(self, make_app: Callable[..., Flask]) -> None:
        """A function cannot name a limit that the configuration does not have."""
        state = state_of(make_app())
        bgjobs = BgJobs()

        @bgjobs.job(name="one", limits="mailgun")
        def one() -> None: ...

        state.registry = type(state.registry)({}, bgjobs._decorated)
        with pytest.raises(ConfigError, match="BGJOBS_LIMITS has no limit 'mailgun'"):
            rules(state)


@pytest.mark.on("sqlite")
class TestCommands:
    def test_list_and_show(self, state: AppState, run: Any) -> None:
        """The list shows what each limit allows; a limit shows its keys."""
        assert "No limits" in run("limits")
        for value in (1, 1, 2):
            enqueue(value, [PER_VALUE, Limit("rated", rate=5, per=60)])
        admit(state)
        lines = run("limits", "list").splitlines()
        assert [line.split("  ")[0] for line in lines] == ["NAME", "rated", "value"]
        assert "5 in 60 s" in lines[1]
        shown = run("limits", "show", "value")
        assert "1 at once" in shown
        data = json.loads(run("limits", "show", "value", "--json"))
        assert [(k["key"], k["held"], k["waiting"]) for k in data["keys"]] == [
            ("1", 1, 1),
            ("2", 1, 0),
        ]
        (only,) = json.loads(run("limits", "show", "value", "--key", "2", "--json"))["keys"]
        assert only["key"] == "2"
        assert [each["name"] for each in json.loads(run("limits", "--json"))] == ["rated", "value"]

    def test_changes(self, state: AppState, run: Any) -> None:
        """Overrides and pauses act, and say what applies now."""
        enqueue()
        admit(state)
        assert "3 at once, in the code 1 at once" in run(
            "limits", "override", "one", "--concurrency", "3"
        )
        assert "overridden" in run("limits", "show", "one")
        assert "as in the code: 1 at once" in run("limits", "reset", "one")
        assert run("limits", "pause", "one").startswith("Limit one is paused")
        assert "paused since" in run("limits", "show", "one")
        assert "is not paused" in run("limits", "resume", "one")
        assert "key 5 is paused" in run("limits", "pause", "one", "--key", "5")
        assert "key 5 is not paused" in run("limits", "resume", "one", "--key", "5")
        actors = {row.source for row in rows(state, AuditEntry)}
        assert actors == {"command line"}

    def test_errors(self, state: AppState, run: Any) -> None:
        """Errors are one sentence."""
        assert "there is no limit 'x'" in run("limits", "show", "x", code=1)
        enqueue()
        admit(state)
        assert "give at least one number" in run("limits", "override", "one", code=2)
        assert "must be a whole number" in run(
            "limits", "override", "one", "--concurrency", "0", code=1
        )
        assert ONE.name == "one"
