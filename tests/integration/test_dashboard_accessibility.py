"""Accessibility of the dashboard: the rules of axe, and the tree for screen readers."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

import axe_playwright_python
import pytest
import sqlalchemy as sa

from flask_bgjobs import Limit, run_background_job
from flask_bgjobs.flow.fairness.manage import Weights
from flask_bgjobs.flow.limits.manage import find as find_limit
from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.flow.schedules.ticker import Ticker
from flask_bgjobs.job.rollup import MINUTE, OUTCOMES, RUN, WAIT, Cell
from flask_bgjobs.models import Schedule, ScheduleTick
from flask_bgjobs.store import Actor
from tests.integration.test_dashboard_browser import Browsing, pytestmark
from tests.integration.test_dashboard_browser import address as address
from tests.integration.test_dashboard_browser import browser as browser
from tests.integration.test_dashboard_browser import host as host
from tests.integration.test_dashboard_browser import open_page as open_page
from tests.integration.test_dashboard_support import RECEIPT, SECTIONS, Host, now
from tests.integration.test_dashboard_support import host_maker as host_maker

pytestmark = [*pytestmark, pytest.mark.filterwarnings("default")]
_AXE = pathlib.Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_SNAPSHOTS = pathlib.Path(__file__).with_name("snapshots")
_UPDATES = "BGJOBS_UPDATE_SNAPSHOTS" in os.environ
"""Whether to write new snapshots instead of comparing."""

PAGES = {
    "overview": "/",
    "list": "/list",
    "filtered": "/list?status=failed&status=retrying",
    "nothing": "/list?q=nothing",
    "wrong": "/list?q=colour:red",
    "failed": "/job/2",
    "running": "/job/3",
    "waiting": "/job/1",
    "errors": "/errors",
    "queues": "/queues",
    "workers": "/workers?ended=1",
    "schedules": "/schedules",
    "schedule": "/schedules?name=nightly",
    "limits": "/limits",
    "limit": "/limits?name=sync",
    "limited": "/job/9",
    "audit": "/audit",
    "dispatch": "/dispatch?again=2",
    "missing": "/job/4711",
}


SCHEDULES = {
    "nightly": {"job": RECEIPT, "parameters": [7], "cron": "0 3 * * *"},
    "paused": {"job": RECEIPT, "parameters": [7], "cron": "*/15 * * * MON-FRI"},
    "gone": {"job": RECEIPT, "parameters": [7], "cron": "@monthly"},
    "held": {"job": RECEIPT, "parameters": [7], "every": 86_400, "overlap": "queue"},
}
LIVE = ["held", "nightly", "paused"]
"""The schedules in the code of a live worker."""


def add_schedules(host: Host) -> None:
    """Add a schedule in each state that looks different."""
    object.__setattr__(host.state.config, "schedule", SCHEDULES)
    ada = Actor("ada", "dashboard")
    with host.app.app_context():
        Ticker(host.state, host.state.store).register()
        find(host.state, "paused").pause(ada)
        nightly = find(host.state, "nightly").override(ada, cron="0 4 * * *", timezone="Asia/Tokyo")
    for number, outcome in enumerate(("by hand", "skipped", "fired")):
        host._insert(
            ScheduleTick, schedule_id=nightly.id, tick_at=now(-60 * number - 90), outcome=outcome,
            missed=number, job_id=1, created_at=now(),
            reason="job 1 is not finished" if outcome == "skipped" else None,
        )  # fmt: skip
    held = sa.update(Schedule).where(Schedule.name == "held")
    with host.state.store.engine.begin() as connection:
        connection.execute(held.values(held_at=now(-40), last_job_id=1))


def add_limits(host: Host) -> None:
    """Add limits and keys in each state that looks different."""
    ada = Actor("ada", "dashboard")
    sync = Limit("sync", concurrency=1, key="{order_id}")
    mailgun = Limit("mailgun", rate=100, per=3_600)
    with host.app.app_context():
        jobs = [run_background_job(RECEIPT, parameters=[n], limits=sync) for n in (7, 7, 8)]
        run_background_job(RECEIPT, parameters=[9], limits=mailgun)
        while host.state.store.admit().more:
            pass
        find_limit(host.state, "mailgun").override(ada, rate=50)
        find_limit(host.state, "sync").pause("9", ada)
    assert [job.id for job in jobs] == [8, 9, 10]


def add_turns(host: Host) -> None:
    """Add keys that take turns, one of them with an overridden weight."""
    with host.app.app_context():
        for number in (7, 7, 7, 8):
            run_background_job(RECEIPT, parameters=[number], fair="tenant {order_id}")
        host.state.store.promote()
        Weights(host.state)["tenant 8"].override(2.5, Actor("ada", "dashboard"))


@pytest.fixture
def populated_host(host: Host) -> Host:
    """A host with a job in each state that looks different, and content on every page."""
    host.add(queue="mail")
    failed = host.add(
        target=RECEIPT,
        method=None,
        parameters_json="[7]",
        status="failed",
        error="ValueError: no price",
        error_type="ValueError",
        retry_count=3,
        attempt=4,
        started_at=now(-9),
        finished_at=now(-4),
        tags_json='["vip"]',
        owner="42",
    )
    host.add_attempt(failed, error="ValueError: no price", error_type="ValueError",
                     traceback="Traceback …", worker_name="worker-1")  # fmt: skip
    running = host.add(status="running", progress=0.4, progress_note="4 of 10", attempt=1,
                       started_at=now(-3), worker_id=1)  # fmt: skip
    host.add_line(running, "page 4 imported")
    for status in ("scheduled", "retrying", "completed", "cancelled"):
        host.add(status=status, run_at=now(600))
    host.add_worker(schedules=json.dumps(LIVE))
    host.add_worker("worker-2", status="dead", heartbeat_at=now(-900), stopped_at=now(-800))
    host.pause("reports")
    store = host.state.store
    store.record(Actor("anna", "dashboard"), "cancel", jobs=[failed])
    add_schedules(host)
    add_limits(host)
    add_turns(host)
    minute = store.clock().replace(second=0, microsecond=0)
    store.add_to_rollup(
        {
            Cell(MINUTE, minute, "mail", outcome, measure, 12): 7
            for outcome in OUTCOMES
            for measure in (RUN, WAIT)
        }
    )
    return host


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_pages_pass_axe(populated_host: Host, open_page: Browsing, width: int, scheme: Any) -> None:
    """No page violates a rule of WCAG 2.2 AA that axe can check."""
    found = []
    page = open_page("/", viewport={"width": width, "height": 800}, color_scheme=scheme)
    for name, path in PAGES.items():
        page.goto(open_page.address + path)
        found += violations_on(page, name)
    open_page.forget_responses(400, 404)
    assert found == []


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_dialogs_and_menus_pass_axe(
    populated_host: Host, open_page: Browsing, width: int, scheme: Any
) -> None:
    """Dialogs and open menus violate no rule."""
    page = open_page("/list", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.click("#bgjobs-by-more summary")
    found = violations_on(page, "filter")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open] >> text=go to the search box")
    found += violations_on(page, "keys")
    page.keyboard.press("Escape")
    page.check('[aria-label="Select job 2"]')
    page.click('#bgjobs-bulk button:has-text("Delete")')
    page.wait_for_selector("dialog[open] >> text=Delete 1 job?")
    found += violations_on(page, "question")
    page.goto(f"{open_page.address}/job/2")
    page.click('summary:has-text("Delete…")')
    found += violations_on(page, "delete")
    page.goto(f"{open_page.address}/schedules")
    page.click('summary:has-text("Run now") >> nth=0')
    found += violations_on(page, "run now")
    page.goto(f"{open_page.address}/schedules?name=nightly")
    page.fill("#cron", "0 3 x * *")
    page.click("text=Save")
    page.wait_for_selector("text=is not a day of the month")
    found += violations_on(page, "edit")
    open_page.forget_responses(400)
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_empty_pages_pass_axe(host: Host, open_page: Browsing, scheme: Any) -> None:
    """Pages without content, which show hints, violate no rule."""
    found = []
    page = open_page("/", color_scheme=scheme)
    for path in ("/", "/list", "/list?status=failed", *SECTIONS):
        page.goto(open_page.address + path)
        found += violations_on(page, path)
    assert found == []


def violations_on(page: Any, name: str) -> list[str]:
    """The violations that axe finds on a page, as text."""
    # Hover colours have a transition.
    page.evaluate("Promise.allSettled(document.getAnimations().map((each) => each.finished))")
    page.evaluate(_AXE)
    results = page.evaluate(
        "(tags) => axe.run(document, { runOnly: { type: 'tag', values: tags } })", _RULES
    )
    return [
        f"{name}: {violation['id']}: {node['html'][:200]}"
        for violation in results["violations"]
        for node in violation["nodes"]
    ]


def test_axe_detects_violations(populated_host: Host, open_page: Browsing) -> None:
    """axe detects a button without a name."""
    page = open_page("/")
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    page.evaluate(_AXE)
    violations = page.evaluate("axe.run()")["violations"]
    assert "button-name" in {violation["id"] for violation in violations}


@pytest.mark.parametrize(("name", "path"), PAGES.items(), ids=PAGES)
def test_accessibility_tree(
    populated_host: Host, open_page: Browsing, name: str, path: str
) -> None:
    """The tree of roles and names of each page equals its snapshot.

    ``BGJOBS_UPDATE_SNAPSHOTS=1`` writes new snapshots: review the difference before you commit it.
    """
    page = open_page(path)
    tree = _without_times(page.locator("body").aria_snapshot())
    open_page.forget_responses(400, 404)
    file = _SNAPSHOTS / f"{name}.yml"
    if _UPDATES:
        file.parent.mkdir(exist_ok=True)
        file.write_text(tree)
    assert file.read_text() == tree


def _without_times(tree: str) -> str:
    """The tree without times."""
    tree = re.sub(r"\b(now|(in )?\d+(\.\d+)? (ms|s|min|h|d)( ago)?)(?=[\s\".]|$)", "…", tree)
    tree = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (UTC|JST)", "…", tree)
    tree = re.sub(r"since=[\dT:-]+", "since=…", tree)
    return tree.rstrip() + "\n"
