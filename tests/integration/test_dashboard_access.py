"""Access to the dashboard: who can see and change what."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import flask
import flask_login
import pytest
import sqlalchemy as sa
from flask_wtf import CSRFProtect
from flask_wtf.csrf import CSRFError

from flask_bgjobs import BgJobs, ConfigError, Job
from flask_bgjobs.dashboard.access import CONTENT_SECURITY_POLICY
from tests.integration.test_dashboard_support import (
    PREFIX,
    SAMPLE,
    Host,
    MakeHost,
    listed_ids,
    now,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

OPEN = {"bgjobs.static", "bgjobs.healthz"}
"""Endpoints that need no right."""


def addresses(host: Host, job_id: int) -> list[tuple[str, str]]:
    """Method and path of all routes of the blueprint that need a right."""
    found = []
    with host.app.test_request_context():
        for rule in host.app.url_map.iter_rules():
            if not rule.endpoint.startswith("bgjobs.") or rule.endpoint in OPEN:
                continue
            verbs = re.search(r"<any\((.*?)\):verb>", rule.rule)
            for verb in verbs[1].split(", ") if verbs else ("",):
                values = {"job_id": job_id, "verb": verb}
                path = flask.url_for(rule.endpoint, **{key: values[key] for key in rule.arguments})
                methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
                found += [(method, path) for method in sorted(methods)]
    return found


def sweep(host: Host, job_id: int, **fields: Any) -> dict[tuple[str, str], int]:
    return {
        (method, path): host.client.open(path, method=method, data=fields).status_code
        for method, path in addresses(host, job_id)
    }


def test_sweep_covers_every_route(make_host: MakeHost) -> None:
    """The routes that the other tests try are all routes of the blueprint that need a right."""
    host = make_host()
    endpoints = {rule.endpoint for rule in host.app.url_map.iter_rules()}
    assert endpoints >= OPEN
    assert set(addresses(host, 7)) == {
        ("GET", "/jobs/"),
        ("GET", "/jobs/list"),
        ("GET", "/jobs/list/new"),
        ("GET", "/jobs/job/7"),
        ("GET", "/jobs/errors"),
        ("GET", "/jobs/queues"),
        ("GET", "/jobs/workers"),
        ("GET", "/jobs/schedules"),
        ("GET", "/jobs/limits"),
        ("GET", "/jobs/audit"),
        ("GET", "/jobs/dispatch"),
        ("POST", "/jobs/dispatch"),
        ("POST", "/jobs/job/7/cancel"),
        ("POST", "/jobs/job/7/retry"),
        ("POST", "/jobs/job/7/delete"),
        ("POST", "/jobs/bulk/cancel"),
        ("POST", "/jobs/bulk/retry"),
        ("POST", "/jobs/bulk/delete"),
        ("POST", "/jobs/queues/pause"),
        ("POST", "/jobs/queues/resume"),
        ("POST", "/jobs/workers/drain"),
        ("POST", "/jobs/schedules/run"),
        ("POST", "/jobs/schedules/pause"),
        ("POST", "/jobs/schedules/resume"),
        ("POST", "/jobs/schedules/override"),
        ("POST", "/jobs/schedules/reset"),
        ("POST", "/jobs/limits/pause"),
        ("POST", "/jobs/limits/resume"),
        ("POST", "/jobs/limits/override"),
        ("POST", "/jobs/limits/reset"),
        ("POST", "/jobs/weights/override"),
        ("POST", "/jobs/weights/reset"),
        ("GET", "/jobs/api/v1/openapi.json"),
        ("GET", "/jobs/api/v1/stats"),
        ("GET", "/jobs/api/v1/jobs"),
        ("POST", "/jobs/api/v1/jobs"),
        ("GET", "/jobs/api/v1/jobs/7"),
        ("POST", "/jobs/api/v1/jobs/7/cancel"),
        ("POST", "/jobs/api/v1/jobs/7/retry"),
        ("POST", "/jobs/api/v1/jobs/7/delete"),
        ("GET", "/jobs/api/v1/errors"),
        ("GET", "/jobs/api/v1/queues"),
        ("POST", "/jobs/api/v1/queues/pause"),
        ("POST", "/jobs/api/v1/queues/resume"),
        ("GET", "/jobs/api/v1/workers"),
        ("POST", "/jobs/api/v1/workers/drain"),
        ("GET", "/jobs/api/v1/schedules"),
        ("GET", "/jobs/api/v1/schedule"),
        ("POST", "/jobs/api/v1/schedules/run"),
        ("POST", "/jobs/api/v1/schedules/pause"),
        ("POST", "/jobs/api/v1/schedules/resume"),
        ("POST", "/jobs/api/v1/schedules/override"),
        ("POST", "/jobs/api/v1/schedules/reset"),
        ("GET", "/jobs/api/v1/limits"),
        ("GET", "/jobs/api/v1/limit"),
        ("POST", "/jobs/api/v1/limits/pause"),
        ("POST", "/jobs/api/v1/limits/resume"),
        ("POST", "/jobs/api/v1/limits/override"),
        ("POST", "/jobs/api/v1/limits/reset"),
        ("GET", "/jobs/api/v1/weights"),
        ("POST", "/jobs/api/v1/weights/override"),
        ("POST", "/jobs/api/v1/weights/reset"),
        ("GET", "/jobs/api/v1/audit"),
    }


def test_dashboard_without_authorizer_is_closed(make_host: MakeHost) -> None:
    """Without an authorizer, every route answers 403, and the page names the decorator to use."""
    host = make_host(authorizer=None)
    job_id = host.add()
    assert set(sweep(host, job_id).values()) == {403}
    assert "@bgjobs.authorize_dashboard" in host.get("/", 403)
    assert host.job(job_id).status == "pending"


def test_falsy_answer_of_authorizer_closes_everything(make_host: MakeHost) -> None:
    """If the authorizer returns a falsy value, every page and every change answers 403."""
    host = make_host(authorizer=lambda action, job: None)
    assert set(sweep(host, host.add()).values()) == {403}
    assert "authorize_dashboard" not in host.get("/", 403)


def test_host_can_refuse_before_the_authorizer(
    make_host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """If a ``before_request`` function of the host refuses a request, the authorizer is not called,
    because the host does not know the visitor yet."""
    asked: list[str] = []

    def allow(action: str, job: Job | None) -> bool:
        asked.append(action)
        return bool(flask.g.user.is_admin)

    host = make_host(authorizer=allow)
    gate = host.app.before_request(lambda: flask.abort(401, "Who are you?"))
    assert gate is not None
    for path in ("/", "/list", "/job/1"):
        page = host.get(path, 401)
        assert "Who are you?" in page
        assert "Background jobs" not in page
    assert host.client.get(f"{PREFIX}/api/v1/stats").json == {
        "error": {"status": 401, "message": "Who are you?"}
    }
    assert asked == []
    assert "raised" not in caplog.text


@pytest.mark.parametrize("protected", [True, False])
def test_expired_token_links_back_to_the_page(make_host: MakeHost, protected: bool) -> None:
    """The error page for an expired token links to the form's page, also if the host's CSRFProtect
    refuses the token before the authorizer is called."""
    asked: list[str] = []

    def allow(action: str, job: Job | None) -> bool:
        asked.append(action)
        return True

    host = make_host(authorizer=allow)
    if protected:
        CSRFProtect(host.app)
    page = _send_old_token(host)
    assert page.status_code == 400
    assert f'href="{PREFIX}/list?status=failed">Open the page again' in page.text
    assert bool(asked) is not protected


@pytest.mark.parametrize("kind", [CSRFError, 400])
def test_error_handler_of_host_answers_its_own_refusal(make_host: MakeHost, kind: Any) -> None:
    """If the host's CSRFProtect refuses a request, the host's own error handler answers, although
    Flask would prefer the dashboard's."""
    host = make_host()
    CSRFProtect(host.app)
    host.app.register_error_handler(kind, lambda error: ("Too late.", 400))
    assert _send_old_token(host).text == "Too late."


def _send_old_token(host: Host) -> Any:
    form = {"csrf_token": "old", "next": f"{PREFIX}/list?status=failed"}
    return host.client.post(f"{PREFIX}/job/{host.add()}/cancel", data=form)


@pytest.mark.on("postgresql")
def test_failed_query_in_authorizer_is_rolled_back(
    make_host: MakeHost, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a query in the authorizer failed, its transaction is rolled back: PostgreSQL would
    refuse all later statements."""

    def allow(action: str, job: Job | None) -> bool:
        owner = {"owner": "7" if job is None else job.owner}
        return bool(host.db.session.execute(query, owner).scalar())

    query = sa.text("SELECT count(*) > 0 FROM bgjobs_job WHERE CAST(:owner AS INTEGER) = 7")
    host = make_host(authorizer=allow, SQLALCHEMY_DATABASE_URI=database_url)
    job_id = host.add(owner="7")
    for path in ("/list", f"/job/{job_id}"):
        assert "Cancel</button>" in host.get(path)
    assert "access is refused" not in caplog.text
    assert caplog.text.count("Figures hidden") == 1


def test_exception_without_failed_statement_keeps_the_transaction(make_host: MakeHost) -> None:
    """If the authorizer raises without a failed statement, uncommitted changes of the host are
    kept."""
    left: list[int] = []

    def allow(action: str, job: Job | None) -> bool:
        owner = {"owner": "7" if job is None else job.owner}
        return bool(host.db.session.execute(query, owner).scalar_one())

    query = sa.text("SELECT 1 FROM bgjobs_job WHERE owner = :owner")
    host = make_host(authorizer=allow)
    host.add(owner="7")
    mark = sa.text("UPDATE bgjobs_job SET progress = 0.5")
    count = sa.text("SELECT count(*) FROM bgjobs_job WHERE progress = 0.5")

    def change() -> None:
        host.db.session.execute(mark)

    def note(response: flask.Response) -> flask.Response:
        left.append(host.db.session.execute(count).scalar_one())
        return response

    host.app.before_request(change)
    host.app.after_request(note)
    host.get("/list")
    assert left == [1]


def test_failing_authorizer_is_called_once_per_request(
    make_host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """An authorizer that raises is called once, and not again for the links of the error page."""
    asked: list[str] = []

    def fail(action: str, job: Job | None) -> bool:
        asked.append(action)
        raise KeyError("user")

    host = make_host(authorizer=fail)
    for number in (1, 2):
        host.get("/", 403)
        assert len(asked) == number
    assert caplog.text.count("Traceback") == 2


class _Answer:
    """An object of a class without ``__bool__``, which is therefore truthy."""


async def _coroutine() -> bool:
    return True


def _generator() -> Iterator[bool]:
    yield True


@pytest.mark.parametrize(
    ("answer", "is_mistake"),
    [
        (lambda: False, False),
        (lambda: None, False),
        (lambda: "no", True),
        (lambda: 1, True),
        (lambda: [False], True),
        (lambda: lambda: False, True),
        (_Answer, True),
        (_coroutine, True),
        (_generator, True),
        (lambda: (True, "reason"), True),
    ],
    ids=[
        "False",
        "None",
        "str",
        "int",
        "list",
        "function",
        "object",
        "coroutine",
        "generator",
        "tuple",
    ],
)
def test_only_true_grants_access(
    make_host: MakeHost,
    caplog: pytest.LogCaptureFixture,
    answer: Callable[[], object],
    is_mistake: bool,
) -> None:
    """Any other value that an authorizer returns closes everything, and truthy values are
    logged."""
    host = make_host(authorizer=lambda action, job: answer())
    with caplog.at_level(logging.ERROR):
        assert set(sweep(host, host.add()).values()) == {403}
    logged = {record.getMessage().partition("; ")[2] for record in caplog.records}
    assert logged == ({"only True allows anything"} if is_mistake else set())


class _AsyncCallable:
    async def __call__(self, action: str, job: object) -> bool:
        return True


async def _async_authorizer(action: str, job: object) -> bool:
    return True


def _generator_authorizer(action: str, job: object) -> Iterator[bool]:
    yield True


async def _async_generator_authorizer(action: str, job: object) -> AsyncIterator[bool]:
    yield True


@functools.wraps(_async_authorizer)
def _wraps_async(*args: Any) -> Any:
    return _async_authorizer(*args)


@pytest.mark.parametrize(
    ("authorizer", "sentence"),
    [
        (_async_authorizer, "_async_authorizer is async"),
        (_generator_authorizer, "_generator_authorizer is a generator"),
        (_async_generator_authorizer, "_async_generator_authorizer is async"),
        (_AsyncCallable(), "_AsyncCallable is async"),
        (functools.partial(_async_authorizer), "partial is async"),
        (_wraps_async, "_async_authorizer is async"),
        (_AsyncCallable, "needs a function, not _AsyncCallable"),
        (True, "needs a function, not bool"),
        (None, "needs a function, not NoneType"),
        (lambda: True, r"calls its function with 2 arguments, but .*<lambda> takes \(\)"),
    ],
)
def test_unusable_authorizer_is_refused(
    make_host: MakeHost, authorizer: Any, sentence: str
) -> None:
    """An unusable authorizer raises when it is registered, and the dashboard stays closed."""
    host = make_host(authorizer=None)
    with pytest.raises(ConfigError, match=f"^authorize_dashboard .*{sentence}"):
        host.bgjobs.authorize_dashboard(authorizer)
    assert "@bgjobs.authorize_dashboard" in host.get("/", 403)


@pytest.mark.parametrize("identifier", [_coroutine, _generator, str, lambda user: user, "anna"])
def test_unusable_identifier_is_refused(identifier: Any) -> None:
    """An unusable ``identify_visitor`` function raises when it is registered."""
    with pytest.raises(ConfigError, match=r"^identify_visitor (needs|calls)"):
        BgJobs().identify_visitor(identifier)


def test_callables_of_all_kinds_are_accepted() -> None:
    """Methods, partials and callable objects are accepted, also with more parameters that have
    defaults."""

    class Rules:
        def allow(self, action: str, job: object) -> bool:
            return True

        def __call__(self, action: str, job: object = None, *, strict: bool = False) -> bool:
            return True

    bgjobs = BgJobs()
    for authorizer in (Rules().allow, Rules(), functools.partial(Rules(), strict=True)):
        assert bgjobs.authorize_dashboard(authorizer) is authorizer


@pytest.mark.parametrize(
    "name", [lambda: ["anna"], lambda: _coroutine()], ids=["list", "coroutine"]
)
def test_visitor_name_must_be_a_string(
    make_host: MakeHost, caplog: pytest.LogCaptureFixture, name: Callable[[], Any]
) -> None:
    """If ``identify_visitor`` returns anything but a string, the change is not made."""
    host = make_host()
    host.app.config["PROPAGATE_EXCEPTIONS"] = False
    host.bgjobs.identify_visitor(name)
    job_id = host.add()
    assert host.post(f"/job/{job_id}/cancel").status_code == 500
    assert host.job(job_id).status == "pending"
    assert "identify_visitor returned" in caplog.text


def test_authorizer_can_abort_with_its_own_response(make_host: MakeHost) -> None:
    """The authorizer can abort with a response, such as a basic auth challenge or a redirect to a
    login page; scripts get 401 instead of the redirect."""
    challenge = {"WWW-Authenticate": 'Basic realm="jobs"'}
    answers: dict[str, Callable[[], Any]] = {
        "basic": lambda: flask.abort(401, response=flask.Response("who?", 401, challenge)),
        "login": lambda: flask.abort(flask.redirect("/our/login")),
        "hidden": lambda: flask.abort(404),
    }
    how = ["basic"]
    host = make_host(authorizer=lambda action, job: answers[how[0]]())
    job_id = host.add()
    assert set(sweep(host, job_id).values()) == {401}
    answer = host.client.get("/jobs/list")
    assert answer.text == "who?"
    assert answer.headers["WWW-Authenticate"] == challenge["WWW-Authenticate"]
    how[0] = "hidden"
    assert set(sweep(host, job_id).values()) == {404}
    how[0] = "login"
    answer = host.client.get("/jobs/list")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/our/login")
    assert host.client.get("/jobs/list", headers={"X-Bgjobs-Fragment": "1"}).status_code == 401
    answer = host.client.get("/jobs/api/v1/jobs")
    assert (answer.status_code, answer.json["error"]["message"]) == (401, "Log in first.")
    assert host.job(job_id).status == "pending"


def test_failing_authorizer_closes_everything(
    make_host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """An authorizer that raises grants no access, and its error is logged."""

    def fail(action: str, job: object) -> bool:
        raise RuntimeError("no user table")

    host = make_host(authorizer=fail)
    with caplog.at_level(logging.ERROR):
        assert set(sweep(host, host.add()).values()) == {403}
    assert "no user table" in caplog.text


def test_viewer_cannot_change_anything(make_host: MakeHost) -> None:
    """A visitor with only the ``view`` right gets pages without buttons, and 403 for each
    change."""
    host = make_host(authorizer=lambda action, job: action == "view")
    job_id = host.add()
    answers = sweep(host, job_id, csrf_token=host.token())
    for (method, path), status in answers.items():
        may = method == "GET" and not path.endswith(("/dispatch", "/audit"))
        # These need a name.
        allowed = 400 if path.endswith(("/schedule", "/limit")) else 200
        assert status == (allowed if may else 403), path
    for page in (host.get("/list"), host.get(f"/job/{job_id}")):
        assert "formaction" not in page
        assert "/dispatch" not in page
    assert host.job(job_id).status == "pending"


def test_authorizer_gets_action_and_job(make_host: MakeHost) -> None:
    """For a POST, the authorizer is called with the requested action and job."""
    asked: list[tuple[str, int | None]] = []

    def allow(action: str, job: Any) -> bool:
        asked.append((action, job and job.id))
        return action != "cancel"

    host = make_host(authorizer=allow)
    job_id = host.add()
    assert host.post(f"/job/{job_id}/cancel").status_code == 403
    assert ("cancel", job_id) in asked
    assert host.job(job_id).status == "pending"


def test_public_dashboard_is_read_only(make_host: MakeHost) -> None:
    """With BGJOBS_DASHBOARD_PUBLIC, every visitor can view, and no visitor can change anything."""
    host = make_host(authorizer=None, BGJOBS_DASHBOARD_PUBLIC=True)
    job_id = host.add()
    answers = sweep(host, job_id, csrf_token=host.token())
    assert {path for (method, path), status in answers.items() if status == 200} == {
        "/jobs/",
        "/jobs/list",
        "/jobs/list/new",
        "/jobs/errors",
        "/jobs/queues",
        "/jobs/workers",
        "/jobs/schedules",
        "/jobs/limits",
        f"/jobs/job/{job_id}",
        "/jobs/api/v1/openapi.json",
        "/jobs/api/v1/stats",
        "/jobs/api/v1/jobs",
        f"/jobs/api/v1/jobs/{job_id}",
        "/jobs/api/v1/errors",
        "/jobs/api/v1/queues",
        "/jobs/api/v1/workers",
        "/jobs/api/v1/schedules",
        "/jobs/api/v1/limits",
        "/jobs/api/v1/weights",
    }
    assert {status for (method, _), status in answers.items() if method == "POST"} == {403}


def test_read_only_refuses_every_change(make_host: MakeHost) -> None:
    """BGJOBS_READ_ONLY refuses changes even if the authorizer allows them."""
    host = make_host(BGJOBS_READ_ONLY=True)
    job_id = host.add()
    token = host.token()
    for verb in ("cancel", "retry", "delete"):
        answer = host.client.post(f"{PREFIX}/job/{job_id}/{verb}", data={"csrf_token": token})
        assert answer.status_code == 403
        assert "BGJOBS_READ_ONLY" in answer.text
    assert host.get("/dispatch", 403)
    assert "formaction" not in host.get("/list")
    assert host.job(job_id).status == "pending"


def test_hidden_job_looks_like_a_missing_job(make_host: MakeHost) -> None:
    """A visitor without access to a job cannot distinguish it from a missing job, in pages, POSTs
    and lists."""
    host = make_host(authorizer=lambda action, job: job is None or job.owner == "me")
    hidden, mine = host.add(id=4710, owner="you"), host.add(owner="me")
    for owner in ("you", "me"):
        host.add(status="failed", finished_at=now(), owner=owner, error=f"E: of {owner}")
    missing = 4712
    token = host.token()
    assert host.get(f"/job/{hidden}", 404) == host.get(f"/job/{missing}", 404)
    for each in (hidden, missing):
        assert f"job {each} again" not in host.get(f"/dispatch?again={each}")
    for verb in ("cancel", "retry", "delete"):
        for each in (hidden, missing):
            data = {"csrf_token": token}
            assert host.client.post(f"{PREFIX}/job/{each}/{verb}", data=data).status_code == 404
    assert listed_ids(host.get("/list?status=pending")) == [mine]
    assert "E: of me" in host.get("/")
    assert "E: of you" not in host.get("/")
    assert host.job(hidden).status == "pending"


def test_visitor_without_view_right_gets_403_for_any_id(make_host: MakeHost) -> None:
    """For a visitor without the ``view`` right, an existing and a missing id give the same
    answer."""
    host = make_host(authorizer=lambda action, job: False)
    job_id = host.add()
    assert host.get(f"/job/{job_id}", 403) == host.get("/job/4711", 403)


class User(flask_login.UserMixin):  # type: ignore[misc]  # Flask-Login has no types
    id = "1"


def with_login(host: Host) -> flask_login.LoginManager:
    manager = flask_login.LoginManager(host.app)
    manager.user_loader(lambda user_id: User())
    host.app.add_url_rule("/login", "login", lambda: "log in here")
    manager.login_view = "login"
    return manager


def log_in(host: Host) -> None:
    with host.client.session_transaction() as session:
        session["_user_id"] = "1"


def only_users(action: str, job: object) -> bool:
    return bool(flask_login.current_user.is_authenticated)


def test_anonymous_visitor_is_redirected_to_login(make_host: MakeHost) -> None:
    """With Flask-Login and an authorizer, anonymous visitors are redirected to the login view; the
    API answers 401."""
    host = make_host(authorizer=only_users)
    with_login(host)
    job_id = host.add()
    for method, path in addresses(host, job_id):
        answer = host.client.open(path, method=method)
        if "/api/" in path:
            assert answer.status_code == 401
            assert answer.json["error"]["message"] == "Log in first."
            continue
        assert answer.status_code == 302
        assert answer.headers["Location"].startswith("/login?next=")
    log_in(host)
    assert listed_ids(host.get("/list")) == [job_id]


@pytest.mark.parametrize("in_session", [False, True])
def test_login_after_a_form_leads_back_to_its_page(make_host: MakeHost, in_session: bool) -> None:
    """If a logged-out visitor sends a form, the login leads back to the page of the form: a browser
    cannot open the form's POST address."""
    host = make_host(authorizer=only_users, USE_SESSION_FOR_NEXT=in_session)
    with_login(host)
    page = "/jobs/list?status=failed&q=a+b"
    answer = host.client.post(f"/jobs/job/{host.add()}/retry", data={"next": page})
    assert answer.status_code == 302
    assert urlsplit(answer.headers["Location"]).path == "/login"
    if in_session:
        with host.client.session_transaction() as session:
            assert session["next"] == page
    else:
        assert parse_qs(urlsplit(answer.headers["Location"]).query)["next"] == [page]
    # This address can also be opened with GET, so the login leads to it.
    answer = host.client.post("/jobs/dispatch")
    if not in_session:
        assert answer.headers["Location"] == "/login?next=%2Fjobs%2Fdispatch"


def test_lost_session_links_to_a_fresh_form(make_host: MakeHost) -> None:
    """A form without its session is refused, with a link to its page, whose new form works."""
    host = make_host()
    page = "/jobs/list?status=pending"
    token = host.token()
    host.client.delete_cookie("session")
    path, form = f"/jobs/job/{host.add()}/cancel", {"next": page, "csrf_token": token}
    answer = host.client.post(path, data=form)
    assert answer.status_code == 400
    assert f'<a href="{page}">Open the page again</a>' in answer.text
    assert host.client.get(page).status_code == 200
    assert host.client.post(path, data={**form, "csrf_token": host.token()}).status_code == 303


def test_script_without_login_gets_401(make_host: MakeHost) -> None:
    """A script that polls after the logout gets 401 and no login page."""
    host = make_host(authorizer=only_users)
    with_login(host)
    host.get("/list", 401, headers={"X-Bgjobs-Fragment": "1"})
    host.get("/list", 401, headers={"Accept": "application/json"})


def test_no_login_redirect_without_authorizer(make_host: MakeHost) -> None:
    """Without an authorizer, visitors get 403 and no redirect, because no login could open the
    dashboard."""
    host = make_host(authorizer=None)
    with_login(host)
    host.get("/list", 403)
    log_in(host)
    host.get("/list", 403)


@pytest.mark.parametrize("token", [None, "", "nonsense", "IjEi.Zz.zz"])
def test_change_needs_a_valid_token(make_host: MakeHost, token: str | None) -> None:
    """With a missing or wrong token, a change answers 400, and nothing changes."""
    host = make_host()
    job_id = host.add()
    host.get("/list")
    data = {} if token is None else {"csrf_token": token}
    for path in (f"/job/{job_id}/cancel", f"/job/{job_id}/delete", "/dispatch"):
        answer = host.client.post(PREFIX + path, data=data)
        assert answer.status_code == 400
        assert "Nothing was changed" in answer.text
    assert host.job(job_id).status == "pending"
    assert host.count() == 1


def test_token_of_another_session_is_refused(make_host: MakeHost) -> None:
    """A token is valid only in its own session."""
    host = make_host()
    job_id = host.add()
    token = host.token()
    other = host.app.test_client()
    other.get(f"{PREFIX}/list")
    answer = other.post(f"{PREFIX}/job/{job_id}/cancel", data={"csrf_token": token})
    assert answer.status_code == 400
    assert host.job(job_id).status == "pending"


def test_expired_token_is_refused(make_host: MakeHost) -> None:
    """A token older than WTF_CSRF_TIME_LIMIT is answered with a 400 page."""
    host = make_host(WTF_CSRF_TIME_LIMIT=-1)
    job_id = host.add()
    answer = host.post(f"/job/{job_id}/cancel")
    assert answer.status_code == 400
    assert "expired" in answer.text
    assert host.job(job_id).status == "pending"


def test_cross_site_request_is_refused(make_host: MakeHost) -> None:
    """A request with ``Sec-Fetch-Site: cross-site`` is refused even with a valid token."""
    host = make_host()
    job_id = host.add()
    answer = host.client.post(
        f"{PREFIX}/job/{job_id}/cancel",
        data={"csrf_token": host.token()},
        headers={"Sec-Fetch-Site": "cross-site"},
    )
    assert answer.status_code == 400
    assert host.job(job_id).status == "pending"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("protected", [True, False])
def test_csrf_check_is_independent_of_the_host(
    make_host: MakeHost, protected: bool, enabled: bool
) -> None:
    """The dashboard requires the same token with the host's CSRFProtect on, off or absent."""
    host = make_host(WTF_CSRF_ENABLED=enabled)
    if protected:
        CSRFProtect(host.app)
    job_id = host.add()
    assert host.client.post(f"{PREFIX}/job/{job_id}/cancel").status_code == 400
    assert host.job(job_id).status == "pending"
    assert host.post(f"/job/{job_id}/cancel").status_code == 303
    assert host.job(job_id).status == "cancelled"


def test_token_in_a_header(make_host: MakeHost) -> None:
    """Scripts can send the token as X-CSRFToken."""
    host = make_host()
    job_id = host.add()
    headers = {"X-CSRFToken": host.token()}
    assert host.client.post(f"{PREFIX}/job/{job_id}/cancel", headers=headers).status_code == 303
    assert host.job(job_id).status == "cancelled"


def test_no_get_changes_anything(make_host: MakeHost) -> None:
    """A GET on an action answers 405, and no page changes a job."""
    host = make_host()
    job_id = host.add()
    for verb in ("cancel", "retry", "delete"):
        host.get(f"/job/{job_id}/{verb}?csrf_token={host.token()}", 405)
    for path in ("/", "/list", f"/job/{job_id}", f"/dispatch?again={job_id}"):
        host.get(path)
    assert host.job(job_id).status == "pending"
    assert host.count() == 1


def test_app_without_secret_key_is_read_only(make_host: MakeHost) -> None:
    """Without SECRET_KEY, an app shows its jobs, and pages say what changes need."""
    host = make_host(SECRET_KEY=None)
    job_id = host.add()
    for path in ("/", "/list", f"/job/{job_id}", "/dispatch"):
        page = host.get(path)
        assert "Changes need a <code>SECRET_KEY</code>" in page
        assert "formaction" not in page
    answer = host.client.post(f"{PREFIX}/job/{job_id}/cancel")
    assert answer.status_code == 400
    assert host.job(job_id).status == "pending"


def test_pages_send_strict_headers(make_host: MakeHost) -> None:
    """The headers of pages, including error pages, forbid inline scripts, framing and caching."""
    host = make_host()
    for path, status in (("/list", 200), ("/job/4711", 404)):
        headers = host.client.get(PREFIX + path).headers
        assert host.client.get(PREFIX + path).status_code == status
        assert headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"


def test_headers_of_the_host_take_precedence(make_host: MakeHost) -> None:
    """A header set by the host is not replaced."""
    host = make_host()

    @host.app.after_request
    def own(response: flask.Response) -> flask.Response:
        response.headers["Content-Security-Policy"] = "default-src 'self'"
        return response

    headers = host.client.get(f"{PREFIX}/list").headers
    assert headers.getlist("Content-Security-Policy") == ["default-src 'self'"]


@pytest.mark.parametrize(
    "wanted",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "/jobs/../admin",
        "/jobs/%2e%2e/admin",
        "/jobs//evil.example",
        "/jobsters",
        "/jobs/list\r\nX: y",
        "javascript:alert(1)",
        "",
    ],
)
def test_next_outside_the_dashboard_is_ignored(make_host: MakeHost, wanted: str) -> None:
    """After a change, the visitor is redirected only to pages of this dashboard."""
    host = make_host()
    answer = host.post(f"/job/{host.add()}/cancel", next=wanted)
    assert answer.headers["Location"] == "/jobs/list"


def test_next_leads_back_to_the_filtered_list(make_host: MakeHost) -> None:
    """After a change, the visitor is back on the list with its filters."""
    host = make_host()
    answer = host.post(f"/job/{host.add()}/cancel", next="/jobs/list?status=pending&q=a%20b")
    assert answer.headers["Location"] == "/jobs/list?status=pending&q=a%20b"


def test_forged_host_header_is_not_repeated(make_host: MakeHost) -> None:
    """A page does not contain the host name of a forged Host header."""
    host = make_host()
    host.add()
    page = host.get("/list", headers={"Host": "evil.example"})
    assert "evil.example" not in page


def test_static_files_need_no_rights(make_host: MakeHost) -> None:
    """Static files need no authorizer, so that the 403 page has its styles."""
    host = make_host(authorizer=None)
    assert "--bgj-line" in host.get("/static/bgjobs.css", buffered=True)


def test_dispatch_checks_the_allow_list(make_host: MakeHost) -> None:
    """A job name that the form does not offer is refused when it is posted."""
    host = make_host(BGJOBS_ALLOWED_JOBS={SAMPLE: ["execute"]})
    for forged in ("os.system", f"{SAMPLE}:__init__", f"{SAMPLE}:other", "a b", ":", "é"):
        answer = host.post("/dispatch", job=forged, parameters='["x"]')
        assert answer.status_code == 400, forged
    assert host.count() == 0
