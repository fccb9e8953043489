"""The dashboard in a real browser, under its own Content-Security-Policy."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
from flask import Response
from werkzeug.serving import make_server

from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.job.rollup import MINUTE, OUTCOMES, RUN, Cell
from flask_bgjobs.store import Actor
from tests.integration.test_dashboard_support import (
    RECEIPT,
    SAMPLE,
    SECTIONS,
    Host,
    MakeHost,
    now,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium is installed"
    ),
]

DEADLINE_MS = 30_000
REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  window.violated(`violation of ${event.violatedDirective}: ${event.blockedURI}`));
"""
FAST_REFRESH = """
try { localStorage.setItem("bgjobs-seconds", localStorage.getItem("bgjobs-seconds") ?? "0.2"); }
catch { /* a page without an origin */ }
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    return make_host()


@pytest.fixture
def address(host: Host) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, host.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/jobs"
    server.shutdown()
    thread.join()
    server.server_close()


class Browsing:
    """Opens pages of the dashboard, and collects all errors of the browser."""

    def __init__(self, browser: Any, address: str) -> None:
        self._browser = browser
        self.address = address
        self._contexts: list[Any] = []
        self.problems: list[str] = []
        """Violations of the policy, console messages, and requests to other hosts."""

    def __call__(self, path: str, **options: Any) -> Any:
        """A page in a browser context of its own."""
        context = self._browser.new_context(**options)
        self._contexts.append(context)
        context.expose_binding("violated", lambda _, text: self.problems.append(text))
        context.add_init_script(REPORT_VIOLATIONS)
        context.add_init_script(FAST_REFRESH)
        page = context.new_page()
        page.set_default_timeout(DEADLINE_MS)
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._note_foreign_request)
        page.goto(self.address + path)
        return page

    def _note_foreign_request(self, request: Any) -> None:
        if not request.url.startswith(self.address):
            self.problems.append(request.url)

    def forget_responses(self, *codes: int) -> None:
        """Forget the browser's messages about responses with these status codes."""
        written = tuple(f"status of {code} " for code in codes)
        self.problems[:] = [each for each in self.problems if not any(w in each for w in written)]

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Browsing]:
    """Opens pages. The test fails if the browser blocked, logged or requested anything
    unexpected."""
    browsing = Browsing(browser, address)
    yield browsing
    browsing.close()
    assert browsing.problems == []


def test_pages_comply_with_the_policy(host: Host, open_page: Browsing) -> None:
    """No page violates the Content-Security-Policy, logs an error or sends a request to another
    host."""
    job_id = host.add(status="failed", error="ValueError: x", progress=0.3)
    host.add_attempt(job_id, error="ValueError: x", traceback="Traceback …")
    host.add_worker()
    host.state.store.record(Actor("anna", "dashboard"), "cancel", jobs=[job_id])
    host.state.store.add_to_rollup({_cell(host, outcome): 7 for outcome in OUTCOMES})
    entry = {"job": RECEIPT, "parameters": [7], "every": 60}
    object.__setattr__(host.state.config, "schedule", {"poll": entry})
    paths = ("/", "/list?status=failed", f"/job/{job_id}", f"/dispatch?again={job_id}")
    for path in (*paths, "/schedules?name=poll", *SECTIONS):
        page = open_page(path)
        page.wait_for_function("document.documentElement.dataset.bsTheme")


def test_layout_without_bootstrap_keeps_its_styles(host: Host, open_page: Browsing) -> None:
    """The styles of the dashboard and of the host's layout do not affect each other."""
    object.__setattr__(host.state.config, "base_template", "site.html")
    css = "* { padding: 0 } nav { background: teal } button { border: 3px dotted red }"
    host.app.add_url_rule("/jobs-site.css", "css", lambda: Response(css, mimetype="text/css"))
    site = """<!doctype html><html lang="en"><head><title>Shop</title>
        <link rel="icon" href="data:,"><link rel="stylesheet" href="/jobs-site.css"></head><body>
        <nav id="theirs"><button>Buy</button></nav>{% block content %}{% endblock %}
        </body></html>"""
    host.app.jinja_loader = jinja2.DictLoader({"site.html": site})
    host.add(status="failed")
    page = open_page("/list?status=failed")

    def style(selector: str, name: str) -> str:
        return str(page.eval_on_selector(selector, f"e => getComputedStyle(e).{name}"))

    assert style("#theirs", "backgroundColor") == "rgb(0, 128, 128)"
    assert style("#theirs button", "borderStyle") == "dotted"
    assert style("body", "marginTop") == "8px"
    assert style(".bgj-bar nav", "backgroundColor") == "rgba(0, 0, 0, 0)"
    assert style(".bgj button.btn", "borderStyle") == "solid"
    assert style(".bgj button.btn", "paddingLeft") != "0px"
    assert style(".bgj .visually-hidden", "position") == "absolute"
    page.evaluate("document.documentElement.dataset.bsTheme = 'dark'")
    assert style(".bgj", "backgroundColor") == "rgb(33, 37, 41)"
    assert style(".bgj", "color") == "rgb(222, 226, 230)"


def _cell(host: Host, outcome: str) -> Cell:
    return Cell(MINUTE, host.state.store.clock().replace(second=0, microsecond=0), "default",
                outcome, RUN, 12)  # fmt: skip


def test_violations_are_noticed(open_page: Browsing) -> None:
    """An inline script is blocked and noticed, so the other tests can fail."""
    page = open_page("/list")
    page.evaluate(
        "() => { const script = document.createElement('script');"
        " script.text = 'window.bad = 1'; document.body.append(script); }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.bad") is None
    assert any(problem.startswith("violation of script-src") for problem in open_page.problems)
    open_page.problems.clear()


def test_list_refreshes(host: Host, open_page: Browsing) -> None:
    """An open list shows new jobs and new statuses without a reload."""
    host.add(status="running", attempt=1)
    page = open_page("/list")
    page.wait_for_selector("#job-1 .bgj-running")
    host.add()
    page.wait_for_selector("#job-2 .bgj-pending")
    host.state.store.cancel([1, 2])
    page.wait_for_selector("#job-2 .bgj-cancelled")
    page.wait_for_selector("#job-1 .bgj-cancelling")


def test_later_page_links_to_new_jobs(host: Host, open_page: Browsing) -> None:
    """A later page of the list does not move, and links to the new jobs on the first page."""
    host.add(count=4)
    page = open_page("/list?per=2")
    page.click("text=Next page")
    page.wait_for_selector("#job-2")
    host.add(count=3)
    page.click("text=3 new jobs")
    page.wait_for_selector("#job-7")
    assert page.url.endswith("/list?per=2")


def test_refresh_keeps_input_and_focus(host: Host, open_page: Browsing) -> None:
    """A refresh keeps typed text, focus and open details."""
    job_id = host.add(status="failed", error="E: x")
    host.add_attempt(job_id, error="E: x", traceback="Traceback …")
    page = open_page("/list")
    page.fill('input[name="q"]', "half a wo")
    page.click(".bgj-choice summary")
    page.check('input[value="failed"]')
    page.focus('input[name="q"]')
    page.evaluate("document.querySelector('#job-1').isMarked = true")
    host.add(queue="never seen")
    page.wait_for_selector("#job-2")
    assert page.evaluate("document.querySelector('#job-1').isMarked")
    assert page.input_value('input[name="q"]') == "half a wo"
    assert page.is_checked('input[value="failed"]')
    assert page.evaluate("document.activeElement.name") == "q"
    assert page.evaluate("document.querySelector('.bgj-choice').open")

    page.goto(page.url.replace("/list", f"/job/{job_id}"))
    page.click(".bgj-attempts summary")
    assert not page.evaluate("document.querySelector('.bgj-attempts details').open")
    host.add_line(job_id, "a new line")
    page.wait_for_selector("text=a new line")
    assert not page.evaluate("document.querySelector('.bgj-attempts details').open")


def test_refresh_keeps_selected_queues(host: Host, open_page: Browsing) -> None:
    """If a new queue appears in the filter, the same queues stay selected."""
    host.add(queue="mail")
    page = open_page("/list")
    page.click("#bgjobs-by-queue summary")
    page.check('input[value="mail"]')
    host.add(queue="archive")
    page.wait_for_selector('input[value="archive"]')
    chosen = "() => [...document.querySelectorAll('[name=queue]:checked')].map((box) => box.value)"
    assert page.evaluate(chosen) == ["mail"]


def test_copy_button(host: Host, open_page: Browsing) -> None:
    """A button copies the masked parameters; if the clipboard is not available, it selects them."""
    job_id = host.add(parameters_json='{"order_id": 7, "password": "hunter2"}')
    page = open_page(f"/job/{job_id}")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    page.click("text=Copy parameters")
    page.wait_for_selector("button:has-text('Copied parameters')")
    page.wait_for_selector("[role=status]:text-is('Copied')", state="attached")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert json.loads(copied) == {"order_id": 7, "password": "***"}
    page.clock.fast_forward(2000)
    page.wait_for_selector("button:has-text('Copy parameters')")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
    page.click("text=Copy parameters")
    page.wait_for_function("getSelection().toString().includes('order_id')")


def test_failed_refresh_is_shown(host: Host, open_page: Browsing) -> None:
    """If the server does not answer, the page says so until it answers again."""
    host.add()
    page = open_page("/list")
    page.route("**/list", lambda route: route.fulfill(status=500))
    note = page.locator("[data-bgjobs-fresh]")
    playwright_api.expect(note).to_contain_text("the server does not answer", timeout=30_000)
    open_page.forget_responses(500)
    page.unroute("**/list")
    playwright_api.expect(note).to_be_empty(timeout=30_000)


def test_selected_rows_are_counted(host: Host, open_page: Browsing) -> None:
    """The page shows the number of selected rows, and that it is not refreshed meanwhile."""
    host.add(count=3)
    page = open_page("/list")
    number, note = page.locator("[data-bgjobs-chosen]"), page.locator("[data-bgjobs-fresh]")
    page.check("[data-bgjobs-all]")
    playwright_api.expect(number).to_have_text("3 selected")
    page.uncheck("#job-2 [name=id]")
    playwright_api.expect(number).to_have_text("2 selected")
    playwright_api.expect(note).to_contain_text("while jobs are selected")
    page.uncheck("#job-1 [name=id]")
    page.uncheck("#job-3 [name=id]")
    page.mouse.move(1, 1)
    playwright_api.expect(note).to_be_empty(timeout=30_000)


def test_escape_closes_a_menu(host: Host, open_page: Browsing) -> None:
    """Escape closes a menu, and the focus returns to the element that opened it."""
    host.add()
    page = open_page("/list")
    page.focus("#bgjobs-by-status summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.querySelector('#bgjobs-by-status').open")
    assert page.evaluate("document.activeElement.parentElement.id") == "bgjobs-by-status"


def test_keyboard_shortcuts_are_listed(host: Host, open_page: Browsing) -> None:
    """A button lists the keyboard shortcuts, which also reach rows without a link."""
    for name in ("first", "second"):
        host.add_worker(name, status="stopped")
    page = open_page("/workers?ended=1")
    page.click("[data-bgjobs-keys]")
    page.wait_for_selector("dialog[open] >> text=next row")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    for _ in range(2):
        page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "worker-2"
    # A refresh keeps the focus in the table.
    host.add_worker("third", status="stopped")
    page.wait_for_selector("#worker-3")
    assert page.evaluate("document.activeElement.id") == "worker-2"


def test_times_are_in_local_time_zone(host: Host, open_page: Browsing) -> None:
    """Times are shown in the browser's time zone."""
    moment = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    job_id = host.add(created_at=moment, run_at=moment)
    page = open_page(f"/job/{job_id}", timezone_id="America/New_York")
    clock = page.locator(".bgj-timeline li:first-child small time")
    playwright_api.expect(clock).to_contain_text("2026-01-01 22:04:05")
    assert "UTC" not in clock.inner_text()
    title = page.locator(".bgj-timeline li:first-child > time").get_attribute("title")
    assert title.startswith("2026-01-01 22:04:05")


def test_text_selection_pauses_the_refresh(host: Host, open_page: Browsing) -> None:
    """While text is selected, the page is not refreshed; afterwards it is."""
    host.add()
    page = open_page("/list")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#job-1'))")
    host.add()
    page.wait_for_timeout(1000)
    assert page.locator("#job-2").count() == 0
    page.evaluate("getSelection().removeAllRanges()")
    page.wait_for_selector("#job-2")


def test_button_in_a_refreshed_list(host: Host, open_page: Browsing) -> None:
    """Buttons of a refreshed list work, and lead back to the filtered list."""
    host.add()
    page = open_page("/list?status=pending")
    host.add()
    page.click('#job-2 button:has-text("Cancel")')
    page.wait_for_selector("text=Job 2 cancelled.")
    assert page.url.endswith("/list?status=pending")
    assert host.job(2).status == "cancelled"


def test_dashboard_works_without_javascript(host: Host, open_page: Browsing) -> None:
    """Filter, dispatch and delete work without JavaScript."""
    host.add(queue="mail")
    page = open_page("/list", java_script_enabled=False)
    page.click('summary:has-text("Queue")')
    page.check('input[value="mail"]')
    page.click('button:has-text("Filter")')
    assert "queue=mail" in page.url
    page.click("text=Dispatch")
    page.select_option("#job", f"{SAMPLE}:execute")
    page.fill("#parameters", '["Hi"]')
    page.click('main button:has-text("Dispatch")')
    page.wait_for_selector("text=Job 2 enqueued.")
    page.click('summary:has-text("Delete…")')
    page.click('button:has-text("Delete job 2")')
    page.wait_for_selector("text=Job 2 deleted.")
    assert host.count() == 1


def test_bulk_change_is_confirmed_in_a_dialog(host: Host, open_page: Browsing) -> None:
    """Selecting rows pauses the refresh; the confirmation is a dialog, and Escape closes it."""
    host.add(3)
    page = open_page("/list")
    page.check('[aria-label="Select job 2"]')
    page.check('[aria-label="Select job 3"]')
    host.add()
    page.wait_for_timeout(1000)
    assert page.locator("#job-4").count() == 0
    assert page.is_checked('[aria-label="Select job 2"]')
    page.click('#bgjobs-bulk button:has-text("Delete")')
    page.wait_for_selector("dialog[open] >> text=Delete 2 jobs?")
    assert page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert host.count() == 4
    page.click('#bgjobs-bulk button:has-text("Delete")')
    page.fill("dialog [name=typed]", "2")
    page.click('dialog button:has-text("Delete 2 jobs")')
    page.wait_for_selector("text=2 deleted.")
    assert host.count() == 2


def test_pointer_on_a_button_pauses_the_refresh(host: Host, open_page: Browsing) -> None:
    """While the pointer is on a row's button, a refresh does not move the row."""
    host.add(2)
    page = open_page("/list")
    button = page.locator("#job-1 .bgj-actions button")
    button.hover()
    host.add()
    page.wait_for_timeout(1_500)
    assert page.locator("#job-3").count() == 0
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("text=Job 1 cancelled.")
    assert [host.job(number).status for number in (1, 2, 3)] == ["cancelled", "pending", "pending"]
    host.add()
    page.locator("#job-1 a").first.hover()
    page.locator("#job-2 .bgj-actions button").hover()
    page.wait_for_selector("text=Not refreshed while the pointer is on a row")
    page.mouse.move(1, 1)
    page.wait_for_selector("#job-4")
    page.wait_for_selector("text=Not refreshed", state="detached")


def test_touch_does_not_pause_the_refresh(host: Host, open_page: Browsing) -> None:
    """A touched element counts as hovered in the browser, but does not pause the refresh."""
    host.add(2)
    page = open_page("/list", has_touch=True)
    box = page.locator('[aria-label="Select job 1"]')
    box.tap()
    page.wait_for_selector("text=1 selected")
    box.tap()
    assert box.evaluate("element => element.matches(':hover')")
    host.add()
    page.wait_for_selector("#job-3")


def test_unfinished_press_does_not_pause_the_refresh(host: Host, open_page: Browsing) -> None:
    """A press that opens the browser's context menu, and so never ends, does not pause the
    refresh."""
    host.add(2)
    page = open_page("/list")
    page.dispatch_event("h1", "pointerdown", {"bubbles": True})
    page.dispatch_event("h1", "contextmenu", {"bubbles": True})
    host.add()
    page.wait_for_selector("#job-3")


@pytest.mark.parametrize("width", [1280, 320])
def test_selecting_a_row_moves_nothing(host: Host, open_page: Browsing, width: int) -> None:
    """Selecting a row moves no button and no row, so that the next click hits its target."""
    host.add(3)
    page = open_page("/list", viewport={"width": width, "height": 900})
    watched = "#bgjobs-bulk button, #bgjobs-bulk label, #job-1, #job-2"
    places = (
        f"() => [...document.querySelectorAll('{watched}')]"
        ".map((element) => element.getBoundingClientRect().toJSON())"
    )
    before = page.evaluate(places)
    page.check('[aria-label="Select job 3"]')
    page.wait_for_selector("text=1 selected")
    assert page.evaluate(places) == before


def test_filter_times_are_in_local_time_zone(host: Host, open_page: Browsing) -> None:
    """Filter times are shown in the browser's time zone and sent in UTC."""
    host.add(created_at=dt.datetime(2026, 6, 1, 12, 30))
    page = open_page("/list?since=2026-06-01T12:00:00", timezone_id="Asia/Tokyo")
    page.click("#bgjobs-by-more summary")
    assert page.input_value('[name="since"]') == "2026-06-01T21:00"
    assert page.is_visible("text=From")
    host.add(created_at=dt.datetime(2026, 6, 1, 12, 35))
    page.wait_for_selector("#job-2")
    assert page.locator("text=From (UTC)").count() == 0
    assert page.input_value('[name="since"]') == "2026-06-01T21:00"
    page.fill('[name="until"]', "2026-06-01T21:40")
    page.click('button:has-text("Filter")')
    page.wait_for_url("**until=**")
    assert "since=2026-06-01T12%3A00%3A00" in page.url
    assert "until=2026-06-01T12%3A40%3A00" in page.url
    assert page.is_visible("#job-1")


@pytest.mark.parametrize(
    ("since", "until", "shown"),
    [
        ("2026-10-25T00:30:00", "2026-10-25T01:30:00", "2026-10-25T02:30"),
        ("0001-01-01T12:00:00", "0999-06-01T00:00:00", None),
    ],
)
def test_unchanged_filter_times_are_kept(
    host: Host, open_page: Browsing, since: str, until: str, shown: str | None
) -> None:
    """Unchanged filter times are sent as they were, also in the hour that occurs twice when clocks
    are set back."""
    host.add()
    page = open_page(f"/list?since={since}&until={until}", timezone_id="Europe/Berlin")
    page.click("#bgjobs-by-more summary")
    if shown is not None:
        assert [page.input_value(f'[name="{name}"]') for name in ("since", "until")] == [shown] * 2
    page.fill('[name="tag"]', "tests")
    page.click('button:has-text("Filter")')
    page.wait_for_url("**tag=tests**")
    assert f"since={since.replace(':', '%3A')}&until={until.replace(':', '%3A')}" in page.url


def test_select_all_rows_of_the_page(host: Host, open_page: Browsing) -> None:
    """One checkbox selects and deselects all rows of the page."""
    host.add(4)
    page = open_page("/list")
    page.check("[data-bgjobs-all]")
    assert page.locator('[name="id"]:checked').count() == 4
    page.uncheck("[data-bgjobs-all]")
    assert page.locator('[name="id"]:checked').count() == 0
    host.add()
    page.wait_for_selector("#job-5")
    assert page.is_visible("[data-bgjobs-all]")


def test_bulk_change_without_javascript(host: Host, open_page: Browsing) -> None:
    """Without JavaScript, the confirmation is a separate page."""
    host.add(2)
    page = open_page("/list", java_script_enabled=False)
    page.check('[aria-label="Select job 1"]')
    page.click('#bgjobs-bulk button:has-text("Cancel")')
    page.wait_for_selector("h1:has-text('Cancel 1 job?')")
    page.click('button:has-text("Cancel 1 job")')
    page.wait_for_selector("text=1 cancelled.")
    assert [host.job(each).status for each in (1, 2)] == ["cancelled", "pending"]


def test_keyboard_shortcuts(host: Host, open_page: Browsing) -> None:
    """Keys move to the search box and through the rows, select a row, and list the shortcuts."""
    host.add(3)
    page = open_page("/list")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.type("j")
    assert page.input_value('[name="q"]') == "j"
    page.evaluate("document.activeElement.blur()")
    for key, row in (("j", 3), ("j", 2), ("j", 1), ("j", 1), ("k", 2)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.closest('tr')?.id") == f"job-{row}"
    page.keyboard.press("x")
    assert page.is_checked('[aria-label="Select job 2"]')
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open] >> text=go to the search box")


def test_refresh_interval_is_kept(host: Host, open_page: Browsing) -> None:
    """The refresh interval can be set on the page, also to never, and is kept for the next page."""
    page = open_page("/list")
    page.select_option("[data-bgjobs-interval]", "0")
    page.wait_for_timeout(500)
    host.add()
    page.wait_for_timeout(800)
    assert page.locator("#job-1").count() == 0
    page.reload()
    page.wait_for_selector("#job-1")
    assert page.input_value("[data-bgjobs-interval]") == "0"


def test_open_page_shows_lost_rights(host: Host, open_page: Browsing) -> None:
    """If the visitor loses the right to see an open page, the page says so."""
    host.add()
    page = open_page("/list")
    host.bgjobs.authorize_dashboard(lambda action, job: False)
    page.wait_for_selector("text=You are not allowed to do this.")
    # The browser logs the responses with 403.
    open_page.problems.clear()


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_pages_fit_any_screen(host: Host, open_page: Browsing, width: int, scheme: Any) -> None:
    """No page is wider than the screen, and the theme follows the system."""
    word = "very_long_name_" * 12
    job_id = host.add(
        target=f"{word}.{word}",
        method=word,
        queue=("q" * 64),
        parameters_json=f'["{word}"]',
        status="failed",
        error=f"Error: {word}",
        started_at=now(-3),
    )
    host.add_attempt(job_id, error=word, traceback=word * 5, worker_name=word)
    host.add(target=RECEIPT, method=None, parameters_json="[7]")
    host.add_worker(word, host=word)
    host.pause("q" * 64)
    host.state.store.record(Actor(word, "dashboard", word), "cancel", subject=word, jobs=[job_id])
    schedule = {
        "job": RECEIPT,
        "parameters": [word],
        "cron": f"{','.join(map(str, range(60)))} * * * *",
    }
    object.__setattr__(host.state.config, "schedule", {word: schedule})
    with host.app.app_context():
        find(host.state, word).override(cron=schedule["cron"].replace("0,1", "1", 1)).pause(
            Actor(word, "dashboard")
        )
    more = (f"/schedules?name={word}", *SECTIONS)
    for path in ("/", "/list", f"/job/{job_id}", "/dispatch", *more):
        page = open_page(path, viewport={"width": width, "height": 700}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.evaluate("document.documentElement.dataset.bsTheme") == scheme


@pytest.mark.parametrize("width", [320, 1280])
def test_schedule_is_run_after_a_confirmation(host: Host, open_page: Browsing, width: int) -> None:
    """The confirmation of "Run now" is inside the screen, holds the refresh, and runs the job."""
    entry = {"job": RECEIPT, "parameters": [7], "every": 86_400}
    object.__setattr__(host.state.config, "schedule", {"poll": entry})
    page = open_page("/schedules", viewport={"width": width, "height": 700})
    page.click("summary:has-text('Run now')")
    box = page.locator(".bgj-confirm form").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert host.count() == 0
    playwright_api.expect(page.locator("[data-bgjobs-fresh]")).to_contain_text("a dialog is open")
    page.click(".bgj-confirm form >> text=Run now")
    page.wait_for_selector("text=Job 1 of schedule poll enqueued.")
    page.wait_for_selector("text=run by hand")
    assert host.count() == 1


def test_refresh_keeps_the_form_of_a_schedule(host: Host, open_page: Browsing) -> None:
    """What was typed into the form of a schedule stays while the page above it refreshes."""
    entry = {"job": RECEIPT, "parameters": [7], "every": 86_400}
    object.__setattr__(host.state.config, "schedule", {"poll": entry})
    page = open_page("/schedules?name=poll")
    page.fill("#every", "15")
    with host.app.app_context():
        find(host.state, "poll").run_now()
    page.wait_for_selector("text=run by hand")
    assert page.input_value("#every") == "15"
    assert page.evaluate("document.activeElement.id") == "every"
