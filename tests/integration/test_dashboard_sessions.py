"""Open pages in a browser whose session changes, and pages behind a proxy."""

from __future__ import annotations

from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import pytest
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user
from werkzeug.exceptions import NotFound
from werkzeug.middleware.proxy_fix import ProxyFix

from tests.integration.test_dashboard_browser import Browsing, pytestmark
from tests.integration.test_dashboard_browser import address as address
from tests.integration.test_dashboard_browser import browser as browser
from tests.integration.test_dashboard_browser import open_page as open_page
from tests.integration.test_dashboard_support import Host, MakeHost
from tests.integration.test_dashboard_support import host_maker as host_maker

pytestmark = [*pytestmark]
TOKEN = "#bgjobs-act [data-bgjobs-token]"


class User(UserMixin):
    """The only user."""

    id = "ada"


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    """A host with Flask-Login."""
    host = make_host(authorizer=None)
    host.bgjobs.authorize_dashboard(lambda action, job: current_user.is_authenticated)
    login_manager = LoginManager(host.app)
    login_manager.login_view = "ask"
    login_manager.user_loader(lambda _: User())
    # Below the dashboard, so that these requests do not count as foreign ones.
    for name, view in (
        ("ask", lambda: "your login form"),
        ("enter", lambda: str(login_user(User()))),
        ("leave", lambda: str(logout_user())),
    ):
        host.app.add_url_rule(f"/jobs/{name}", name, view)
    # Browsers request this for a page without an icon.
    host.app.add_url_rule("/favicon.ico", "icon", lambda: "")
    return host


def test_refresh_renews_the_token(host: Host, open_page: Browsing) -> None:
    """An open page gets a new token with each refresh, so that its buttons keep working."""
    host.add()
    page = open_page("/enter")
    page.goto(f"{open_page.address}/list")
    first = page.input_value(TOKEN)
    # A token contains the time in seconds.
    page.wait_for_selector(f'{TOKEN}:not([value="{first}"])', state="attached")
    assert page.input_value(TOKEN) != first
    page.click('#job-1 button:has-text("Cancel")')
    page.wait_for_selector("text=Job 1 cancelled.")


def test_an_expired_token_changes_nothing(host: Host, open_page: Browsing) -> None:
    """On a page without refreshes the token expires; the error page links back to the form."""
    host.add()
    page = open_page("/enter", java_script_enabled=False)
    page.goto(f"{open_page.address}/list")
    host.app.config["WTF_CSRF_TIME_LIMIT"] = -1
    page.click('#job-1 button:has-text("Cancel")')
    page.wait_for_selector("text=The CSRF token has expired. Nothing was changed.")
    open_page.forget_responses(400)
    assert host.job(1).status == "pending"
    host.app.config["WTF_CSRF_TIME_LIMIT"] = 3600
    page.click('a:has-text("Open the page again")')
    page.click('#job-1 button:has-text("Cancel")')
    page.wait_for_selector("text=Job 1 cancelled.")


@pytest.mark.parametrize("path", ["/list", "/job/1"])
def test_open_page_goes_to_login_after_logout(host: Host, open_page: Browsing, path: str) -> None:
    """After a logout in another tab, an open page goes to the login, and comes back to the page,
    not to its fragment."""
    host.add()
    page = open_page("/enter")
    page.goto(open_page.address + path)
    page.wait_for_selector("text=Background jobs")
    page.context.new_page().goto(f"{open_page.address}/leave")
    page.wait_for_selector("text=your login form")
    assert "/ask?next=" in page.url
    open_page.forget_responses(401)


class Proxy:
    """A proxy that serves the app below a path, and removes that path from requests."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = ProxyFix(app, x_prefix=1)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if not path.startswith("/shop/"):
            return NotFound()(environ, start_response)
        environ.update(PATH_INFO=path.removeprefix("/shop"), HTTP_X_FORWARDED_PREFIX="/shop")
        return self.app(environ, start_response)


class TestBehindProxy:
    @pytest.fixture
    def host(self, make_host: MakeHost) -> Host:
        host = make_host()
        host.app.wsgi_app = Proxy(host.app.wsgi_app)  # type: ignore[method-assign]
        return host

    @pytest.fixture
    def address(self, address: str) -> str:
        return address.replace("/jobs", "/shop/jobs")

    def test_pages_work_below_the_path(self, host: Host, open_page: Browsing) -> None:
        """Links, forms, refreshes and confirmations stay below the path."""
        host.add(count=3)
        page = open_page("/")
        page.click("nav a:text-is('Jobs')")
        host.add()
        page.wait_for_selector("#job-4")
        page.click('#job-4 button:has-text("Cancel")')
        page.wait_for_selector("text=Job 4 cancelled.")
        page.check('[aria-label="Select job 1"]')
        page.click('#bgjobs-bulk button:has-text("Cancel")')
        page.click('dialog button:has-text("Cancel 1 job")')
        page.wait_for_selector("text=1 cancelled.")
        page.click("#job-2 a")
        page.click("text=Dispatch again")
        page.click('main button:has-text("Dispatch")')
        page.wait_for_selector("text=Job 5 enqueued.")
        assert page.url == f"{open_page.address}/job/5"
