"""The dashboard in apps with changed Jinja, JSON, routing or layout."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import jinja2
import pytest
from flask import Flask
from flask.json.provider import JSONProvider

from flask_bgjobs.dashboard.assets import address
from tests.integration.test_dashboard_support import (
    PREFIX,
    RECEIPT,
    SECTIONS,
    Host,
    MakeHost,
)
from tests.integration.test_dashboard_support import host_maker as host_maker

PAGES = ("/", "/list", "/list?q=x", *SECTIONS, "/dispatch")
API_PAGES = ("stats", "jobs", "errors", "queues", "workers", "schedules", "audit", "jobs/1")


class OtherDelimiters(Flask):
    jinja_options: ClassVar[dict[str, Any]] = {
        "block_start_string": "<%",
        "block_end_string": "%>",
        "variable_start_string": "[[",
        "variable_end_string": "]]",
        "comment_start_string": "<#",
        "comment_end_string": "#>",
        "trim_blocks": True,
        "lstrip_blocks": True,
    }


@pytest.mark.parametrize("layout", [None, "site.html", "extended.html"])
def test_other_delimiters(make_host: MakeHost, layout: str | None) -> None:
    """Pages work in an app with other template delimiters, also with its own layout and with an
    extended one."""
    options = {} if layout is None else {"BGJOBS_BASE_TEMPLATE": layout}
    plain = make_host()
    host = make_host(app=OtherDelimiters(__name__), **options)
    host.app.jinja_loader = jinja2.DictLoader(
        {
            "site.html": "<html><body>[[ 1 + 1 ]] <% block content %><% endblock %></body></html>",
            "extended.html": "<% extends 'bgjobs/layout.html' %><% block footer %>"
            "{{ theirs }}<% endblock %>",
        }
    )
    job_id = host.add(status="failed", error="ValueError: {{ 7 }}")
    for path in (*PAGES, f"/job/{job_id}"):
        page = host.get(path)
        assert "<%" not in page
        assert "[[" not in page
        assert page.count("{{") == page.count("{{ 7 }}") + page.count("{{ theirs }}")
    if layout is None:
        assert _normalized(host.get("/list")) == _normalized(plain.get("/list"))
    assert "ValueError: {{ 7 }}" in host.get(f"/job/{job_id}")


def _normalized(page: str) -> str:
    """A page without varying values and without white space."""
    return re.sub(r'value="[^"]*"|\s+|<time[^>]*>[^<]*', "", page)


def test_values_are_escaped_without_autoescape(make_host: MakeHost) -> None:
    """Values of jobs are escaped even if the host has autoescape off."""
    host = make_host()
    host.app.jinja_env.autoescape = False
    job_id = host.add(status="failed", error="ValueError: <script>alert(1)</script>")
    for path in ("/list", f"/job/{job_id}", "/errors"):
        page = host.get(path)
        assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in host.get(f"/job/{job_id}")
    environment = host.app.extensions["bgjobs_jinja_env"]
    host.get("/list")
    assert host.app.extensions["bgjobs_jinja_env"] is environment, (
        "the environment, with its compiled templates, is kept"
    )


@pytest.mark.parametrize("escapes", [True, False])
def test_layout_keeps_settings_of_the_host(make_host: MakeHost, escapes: bool) -> None:
    """The host's layout keeps its direction characters and its autoescape setting; values of jobs
    are escaped."""
    host = make_host(BGJOBS_BASE_TEMPLATE="site.html")
    host.app.jinja_env.autoescape = escapes
    host.app.jinja_loader = jinja2.DictLoader(
        {
            "site.html": "<title>{% block title %}{% endblock %}</title>\u2068{{ '<b>shop</b>' }}"
            "\u2069{% include 'bgjobs/_messages.html' %}{% block content %}{% endblock %}"
        }
    )
    job_id = host.add(owner="a\u202eb", status="failed", error="E: <script>\u2067")
    with host.client.session_transaction() as session:
        session["_flashes"] = [("message", "<script>\u202e")]
    page = host.get(f"/job/{job_id}")
    assert f"\u2068{'&lt;b&gt;shop&lt;/b&gt;' if escapes else '<b>shop</b>'}\u2069" in page
    assert "a\\u202eb" in page
    assert "E: &lt;script&gt;\\u2067" in page
    assert "<script>" not in page
    assert "&lt;script&gt;\\u202e" in page


class StrictJSONProvider(JSONProvider):
    """Accepts exact types only, as orjson does, and parses numbers as strings."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        _require_exact(obj)
        return json.dumps(obj, **kwargs)

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return json.loads(s, parse_int=str, parse_float=str, **kwargs)


def _require_exact(value: Any) -> None:
    if type(value) is dict:
        if any(type(key) is not str for key in value):
            raise TypeError("Dict key must be str")
        value = list(value.values())
    if type(value) is list:
        for each in value:
            _require_exact(each)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")


def test_another_json_provider(make_host: MakeHost) -> None:
    """The API's answers do not depend on the host's JSON provider."""
    host, plain = make_host(), make_host()
    host.app.json = StrictJSONProvider(host.app)
    host.add()
    for path in API_PAGES:
        responses = [each.client.get(f"{PREFIX}/api/v1/{path}") for each in (host, plain)]
        assert [response.status_code for response in responses] == [200, 200]
        first, second = (json.loads(response.data) for response in responses)
        assert first.keys() == second.keys()
    token = host.client.get(f"{PREFIX}/api/v1/stats").headers["X-CSRFToken"]
    response = host.client.post(
        f"{PREFIX}/api/v1/queues/pause",
        data='{"queue": "default"}',
        content_type="application/json",
        headers={"X-CSRFToken": token},
    )
    assert json.loads(response.data) == {"queue": "default", "changed": True}
    response = host.client.post(
        f"{PREFIX}/api/v1/jobs",
        data=json.dumps({"target": RECEIPT, "parameters": [1], "priority": 3}),
        content_type="application/json",
        headers={"X-CSRFToken": token},
    )
    assert response.status_code == 201
    assert host.job(json.loads(response.data)["id"]).parameters == [1]
    for body in ("[", "[]", "nothing"):
        refused = host.client.post(
            f"{PREFIX}/api/v1/queues/pause",
            data=body,
            content_type="application/json",
            headers={"X-CSRFToken": token},
        )
        assert refused.status_code == 400


def test_host_matching(make_host: MakeHost) -> None:
    """In an app with ``host_matching``, the dashboard answers on every host."""
    app = Flask(__name__, host_matching=True, static_host="static.shop.example")

    @app.get("/", host="shop.example")
    def start() -> str:
        return "shop"

    host = make_host(app=app)
    job_id = host.add(status="failed", error="ValueError: no")
    for name in ("shop.example", "admin.shop.example:8000", "127.0.0.1"):
        url = f"http://{name}"
        for path in (*PAGES, f"/job/{job_id}", "/healthz"):
            response = host.client.get(PREFIX + path, base_url=url)
            assert response.status_code == (503 if path == "/healthz" else 200)
            links = re.findall(r'(?:href|src|action|formaction)="([^"#]+)"', response.text)
            assert all(link.startswith(f"{PREFIX}/") for link in links)
        with app.test_request_context(base_url=url):
            script = address("bgjobs.js")
        assert host.client.get(script, base_url=url).status_code == 200
        page = host.client.get(f"{PREFIX}/job/{job_id}", base_url=url).text
        token = re.search(r'name="csrf_token" value="([^"]+)"', page)
        assert token is not None
        response = host.client.post(
            f"{PREFIX}/job/{job_id}/retry", base_url=url, data={"csrf_token": token[1]}
        )
        assert response.headers["Location"] == f"{PREFIX}/list"
    assert host.client.get("/", base_url="http://shop.example").text == "shop"
    assert host.client.get("/", base_url="http://other.example").status_code == 404


@pytest.mark.parametrize("path", ["/jobs/", "/jobs", "/jobs/list", "/jobs/api/v1/stats"])
def test_conflicting_route_is_logged(
    make_host: MakeHost, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A route that exists in both the app and the dashboard is logged once, with the key to set."""
    host = make_host()
    host.app.add_url_rule(path, "my_page", lambda: "mine")
    for _ in range(3):
        host.get("/errors")
    (message,) = [r.getMessage() for r in caplog.records if "Path in two places" in r.getMessage()]
    assert path in message
    assert "my_page" in message
    assert "BGJOBS_DASHBOARD_URL_PREFIX" in message


def test_other_routes_are_not_logged(make_host: MakeHost, caplog: pytest.LogCaptureFixture) -> None:
    """Routes for a single job, on another subdomain, or for POST only, do not conflict and are not
    logged."""
    host = make_host()
    host.app.add_url_rule("/jobs/", "of_tenant", lambda tenant: tenant, subdomain="<tenant>")
    host.app.add_url_rule("/jobs/", "create", lambda: "created", methods=["POST"])
    host.app.add_url_rule("/jobs/<int:number>", "status", lambda number: str(number))
    assert host.client.post("/jobs/").text == "created"
    host.get("/")
    assert host.get("/7") == "7"
    assert "Path in two places" not in caplog.text


def test_static_files_are_cached(make_host: MakeHost) -> None:
    """Static files are cached forever, because their address changes with their content."""
    host = make_host()
    for name in ("bgjobs.css", "vendor/bootstrap.min.css", "bootstrap-scoped.css"):
        with host.app.test_request_context():
            current = address(name)
        kept = host.client.get(current)
        assert kept.headers["Cache-Control"] == "private, immutable, max-age=31536000"
        for old in (f"{PREFIX}/static/{name}", f"{PREFIX}/static/{name}?v=0"):
            response = host.client.get(old)
            assert response.status_code == 200
            assert response.headers["Cache-Control"] == "no-cache"
            etag = {"If-None-Match": response.headers["ETag"]}
            assert host.client.get(old, headers=etag).status_code == 304
    for wrong in ("none.css", "../page.py", "vendor/../../page.py", "%2e%2e/page.py"):
        assert host.client.get(f"{PREFIX}/static/{wrong}").status_code == 404


def test_bootstrap_is_scoped_to_the_dashboard(make_host: MakeHost) -> None:
    """In a layout of the host, no rule of Bootstrap applies to the host's own elements."""
    host = make_host(BGJOBS_BASE_TEMPLATE="site.html")
    host.app.jinja_loader = jinja2.DictLoader(
        {"site.html": "<body>{% block content %}{% endblock %}</body>"}
    )
    assert "bootstrap-scoped.css" in host.get("/list")
    css = host.client.get(f"{PREFIX}/static/bootstrap-scoped.css").text
    start = css.index(":where(.bgj, .bgj-bar){")
    # Only animations come before it, which have no effect by themselves.
    assert re.fullmatch(r"(@keyframes [\w-]+\{(?:[^{}]*\{[^{}]*\})*\})+", css[:start])
    depth = 0
    for index, character in enumerate(css[start:], start):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth > 0 or character != "}" or index == len(css) - 1
    assert depth == 0
    assert ":root" not in css
    assert "charset" not in css


def test_pages_are_not_cached(make_host: MakeHost) -> None:
    """Pages are not cached, because they depend on the visitor's rights."""
    host: Host = make_host()
    assert host.client.get(f"{PREFIX}/list").headers["Cache-Control"] == "no-store"
