"""Who may do what, and that it was really they who asked.

Everything is closed until the host registers an authorizer. A view that stands in no line of
:data:`_ACTIONS` and is not in :data:`_OPEN` is closed as well, so that a new one cannot be
forgotten.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from flask import Blueprint, Response, abort, current_app, g, make_response, request, session
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import generate_csrf, validate_csrf
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException
from werkzeug.sansio.response import Response as WerkzeugResponse
from wtforms import ValidationError

from .. import hooks
from ..models import Job
from ..operations import queries
from ..state import AppState, Authorizer, current_state
from ..store import Actor
from ..system.safe_logging import logger as _logger
from . import params

VIEW, AUDIT, DISPATCH = "view", "audit", "dispatch"
_ACTIONS = {
    "overview": VIEW,
    "list_jobs": VIEW,
    "count_new": VIEW,
    "show_job": VIEW,
    "list_errors": VIEW,
    "list_queues": VIEW,
    "list_workers": VIEW,
    "list_audit": AUDIT,
    "dispatch": DISPATCH,
    "act": "",
    "bulk": "",
    "act_on_queue": "",
    "act_on_worker": "",
    "api_description": VIEW,
    "api_stats": VIEW,
    "api_jobs": VIEW,
    "api_job": VIEW,
    "api_errors": VIEW,
    "api_queues": VIEW,
    "api_workers": VIEW,
    "api_audit": AUDIT,
    "api_dispatch": DISPATCH,
    "api_act": "",
    "api_act_on_queue": "",
    "api_act_on_worker": "",
}
"""What the authorizer is asked for each view; the empty ones are named by the address."""
_OPEN = frozenset({"static", "healthz"})
"""Views for everybody: a load balancer has no login. They tell nothing of any job."""

QUERY_SECONDS = 2.0
"""For each query of a page: a visitor waits, and asks again."""
_READING = "bgjobs.reading"
"""Where the environment of a request holds what ends its reading."""
_RAISED = "bgjobs.raised"
"""Set in the environment of a request for which the authorizer has raised."""
_SAID = "bgjobs.said"
"""Where the environment of a request holds the errors that were logged for it."""
_GUARDED = "bgjobs.guarded"
"""Set in the environment of a request that our checks have seen."""
_MAY_SEE_TOTALS = "bgjobs.may_see_totals"
"""Where the environment of a request holds the answer of :func:`may_see_totals`."""
_TOLD_OF_TOTALS = "bgjobs_told_of_totals"
"""Set in an app whose log says why figures are hidden."""
_SAMPLES = "bgjobs_sampled_jobs"
"""Where an app keeps these jobs for :func:`may_see_totals`, and when it read them."""
_SAMPLES_KEPT_SECONDS = 10.0
_SAMPLE_SECONDS = 1.0
"""For asking about all of them; an authorizer that takes longer gets no figures of all jobs."""
_SAMPLED_QUEUES, _NEWEST = 50, 20
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FRAGMENT_HEADER = "X-Bgjobs-Fragment"
"""Sent by our script: the answer is the part of the page that changes."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def protect(blueprint: Blueprint) -> None:
    """Put every view of ``blueprint`` behind authorization, CSRF check and headers."""
    blueprint.before_request(_begin_reading)
    blueprint.before_request(_guard)
    blueprint.after_request(_add_headers)
    blueprint.after_request(_end_reading)
    blueprint.teardown_request(_release)


def is_allowed(action: str, job: Job | None = None) -> bool:
    """Whether the visitor may do ``action``, by configuration and the host's authorizer.

    Only ``True`` means yes. An authorizer that raises or aborts allows nothing. It is not asked
    where a function of the host's has refused the request: it may not know the visitor yet.
    """
    if not is_guarded():
        return False
    try:
        return _is_allowed(action, job)
    except HTTPException:
        return False


def _is_allowed(action: str, job: Job | None) -> bool:
    """The same, but what the authorizer aborts with is raised: it is the answer to the request."""
    state = current_state()
    if action == VIEW:
        if state.config.dashboard_public:
            return True
    elif action != AUDIT and state.config.read_only:
        return False
    authorizer = state.find_authorizer()
    if authorizer is None or _RAISED in request.environ:
        return False
    try:
        answer: object = authorizer(action, job)
    except HTTPException:
        raise
    except Exception as error:
        _logger.exception("The dashboard's authorizer raised for %r; access is refused", action)
        _roll_back_after(error)
        # Once is enough: the page that says so would ask for each of its links.
        request.environ[_RAISED] = True
        return False
    if not isinstance(answer, bool | None):
        hooks.discard(answer)
        _complain_once(
            f"The dashboard's authorizer returned {_kind_of(answer)} for {action!r}; only True "
            "allows anything"
        )
    return answer is True


def _complain_once(sentence: str) -> None:
    """Log an error once per request: a page asks for each job and button."""
    said: set[str] = request.environ.setdefault(_SAID, set())
    if sentence not in said:
        said.add(sentence)
        _logger.error(sentence)


def _kind_of(answer: object) -> str:
    """What was returned, without its value, which may be a secret."""
    kind = type(answer)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def visible(job: Job) -> bool:
    """Whether the visitor may see ``job``."""
    return is_allowed(VIEW, job)


def visible_filter() -> Callable[[Job], bool] | None:
    """The same, to be asked for each job of a list; ``None`` where everybody sees all."""
    return None if current_state().config.dashboard_public else visible


def may_see_totals() -> bool:
    """Whether the visitor gets figures of all jobs, because the authorizer seems to allow all.

    It is asked about a made-up job with an owner and a queue that do not exist, about one in each
    queue, and about the newest jobs. If only existing jobs counted, a visitor could change the
    answer by enqueueing some.
    """
    state = current_state()
    if state.config.dashboard_public:
        return True
    authorizer = state.find_authorizer()
    if authorizer is None:
        return False
    known: bool | None = request.environ.get(_MAY_SEE_TOTALS)
    if known is None:
        made_up = [queries.job_of_nobody()]
        known = _may_see_each(authorizer, made_up) and _may_see_each(authorizer, _samples(state))
        request.environ[_MAY_SEE_TOTALS] = known
    return known


def _may_see_each(authorizer: Authorizer, jobs: Iterable[Job]) -> bool:
    deadline = time.monotonic() + _SAMPLE_SECONDS
    try:
        for job in jobs:
            answer: object = authorizer(VIEW, job)
            hooks.discard(answer)
            if answer is not True:
                return False
            if time.monotonic() > deadline:
                _tell_why_hidden(f"took longer than {_SAMPLE_SECONDS:g} s for a few jobs")
                return False
    except HTTPException:
        return False
    except Exception as error:
        # It may look for something that belongs to the job.
        _roll_back_after(error)
        _tell_why_hidden(f"raised {type(error).__name__} for a made-up job")
        return False
    return True


def _tell_why_hidden(reason: str) -> None:
    if not current_app.extensions.get(_TOLD_OF_TOTALS):
        current_app.extensions[_TOLD_OF_TOTALS] = True
        _logger.warning(
            "Figures hidden | The dashboard's authorizer %s: let it answer for any job at once, "
            "and visitors who may see all jobs get figures of all",
            reason,
        )


def _samples(state: AppState) -> Sequence[Job]:
    """A made-up job in each queue, and the newest jobs."""
    read_at, jobs = current_app.extensions.get(_SAMPLES, (-math.inf, ()))
    if time.monotonic() - read_at > _SAMPLES_KEPT_SECONDS:
        names = sorted(state.store.queue_names())[:_SAMPLED_QUEUES]
        in_queues = map(queries.job_of_nobody, names)
        jobs = (*in_queues, *queries.newest_jobs(state, _NEWEST))
        current_app.extensions[_SAMPLES] = time.monotonic(), jobs
    return cast("Sequence[Job]", jobs)


def _roll_back_after(error: Exception) -> None:
    """Let the host's session be used again, where a statement of the authorizer's has failed."""
    if isinstance(error, DBAPIError):
        current_state().db.session.rollback()


def require_totals() -> None:
    """Refuse numbers of all jobs to who may see only some of them."""
    if not may_see_totals():
        abort(403, "These figures cover all jobs, and you can see only some of them.")


def visitor(reason: str | None = None) -> Actor:
    """Who makes a change, for the audit trail.

    :param reason: by what many jobs were chosen.
    """
    return Actor(_visitor_name(), "api" if is_api() else "dashboard", reason)


def is_guarded() -> bool:
    """Whether the request has come as far as to this module's own checks."""
    return _GUARDED in request.environ


def is_api() -> bool:
    """Whether the request is for the JSON API."""
    return _view().startswith("api_")


def _view() -> str:
    return (request.endpoint or "").rpartition(".")[2]


def _visitor_name() -> str:
    """As the host's own function says, or the id that Flask-Login knows, or the address."""
    identify = current_state().find_identifier()
    if identify is not None:
        name: object = identify()
        if name is not None and not isinstance(name, str | int):
            hooks.discard(name)
            raise TypeError(
                f"the function of identify_visitor returned {_kind_of(name)}; it must return a "
                "string. Nothing was changed"
            )
        if name is not None:
            return str(name)
    if hasattr(current_app, "login_manager"):
        from flask_login import current_user

        if current_user.is_authenticated:
            return str(current_user.get_id())
    return f"anonymous ({request.remote_addr or 'unknown address'})"


def requested_job() -> Job:
    """The job that the address names; the guard found it and let the visitor see it."""
    job: Job = g.bgjobs_job
    return job


def find_visible_job(job_id: int) -> Job | None:
    """The job, when it exists and the visitor may see it."""
    if not queries.is_possible_id(job_id):
        return None
    job = current_state().store.get(job_id)
    return job if job is not None and visible(job) else None


def csrf_token() -> str | None:
    """The token that every form sends; ``None`` when the app cannot sign one."""
    return generate_csrf() if current_app.secret_key else None


def csrf_field_name() -> str:
    """The name under which forms send the token, as the host's own protection expects it."""
    return str(current_app.config.get("WTF_CSRF_FIELD_NAME", "csrf_token"))


def wants_fragment() -> bool:
    """Whether our script asks for the changing part of a page."""
    return FRAGMENT_HEADER in request.headers


def _begin_reading() -> None:
    if request.method in _SAFE_METHODS and _view() not in _OPEN:
        # Not in `g`, which a request within this one would share.
        reading = request.environ[_READING] = contextlib.ExitStack()
        reading.enter_context(current_state().store.reading(QUERY_SECONDS))


def _end_reading(response: Response) -> Response:
    # Before functions of the host's run, which may write.
    _release()
    return response


def _release(_error: BaseException | None = None) -> None:
    reading = request.environ.pop(_READING, None)
    if reading is not None:
        reading.close()


def _guard() -> ResponseReturnValue | None:
    view = _view()
    request.environ[_GUARDED] = True
    if view in _OPEN:
        return None
    values: dict[str, Any] = request.view_args or {}
    action = _ACTIONS.get(view) or values.get("verb")
    if action is None:
        abort(403)
    refusal = _refuse_job(action, values["job_id"]) if "job_id" in values else _refuse(action)
    if refusal is not None:
        return refusal
    if request.method not in _SAFE_METHODS:
        _check_request_is_ours()
    return None


def _refuse_job(action: str, job_id: int) -> ResponseReturnValue | None:
    job = find_visible_job(job_id)
    if job is None:
        # The same answers as to an id that does not exist, whichever it is.
        refusal = _refuse(VIEW)
        if refusal is None:
            abort(404, "there is no such job, or none that you may see")
        return refusal
    g.bgjobs_job = job
    return None if action == VIEW else _refuse(action, job)


def _refuse(action: str, job: Job | None = None) -> ResponseReturnValue | None:
    """The answer to who may not; ``None`` when the visitor may."""
    try:
        if _is_allowed(action, job):
            return None
    except HTTPException as error:
        if error.response is None:
            raise
        return _given(error.response)
    if current_state().find_authorizer() is not None and _is_anonymous():
        if is_api():
            abort(401, "Log in first.")
        if wants_fragment() or _prefers_json():
            return Response("Log in first.", 401, mimetype="text/plain")
        answer = make_response(current_app.login_manager.unauthorized())  # type: ignore[attr-defined]  # set by Flask-Login
        if request.url_rule is not None and "GET" not in (request.url_rule.methods or ()):
            _return_to(params.next_page(), answer)
        return answer
    if current_state().config.read_only and action not in (VIEW, AUDIT):
        abort(403, "BGJOBS_READ_ONLY is set: nothing can be changed here.")
    abort(403, "You are not allowed to do this.")


def _return_to(page: str, answer: Response) -> None:
    """Let a login lead back to a page: Flask-Login knows only the address that was asked for, which
    a browser cannot open after a form was sent to it."""
    if "next" in session:
        session["next"] = page
    url = urlsplit(answer.headers.get("Location", ""))
    query = parse_qsl(url.query, keep_blank_values=True)
    if any(name == "next" for name, _ in query):
        back = [(name, page if name == "next" else value) for name, value in query]
        answer.headers["Location"] = url._replace(query=urlencode(back)).geturl()


def _given(response: WerkzeugResponse) -> ResponseReturnValue:
    """The answer that an authorizer has aborted with, such as a redirect to its login page.

    A script would take that page for what it asked for.
    """
    is_redirect = HTTPStatus.MULTIPLE_CHOICES <= response.status_code < HTTPStatus.BAD_REQUEST
    if is_redirect and (is_api() or wants_fragment()):
        abort(401, "Log in first.")
    return response


def _is_anonymous() -> bool:
    """Whether the host has Flask-Login and nobody is logged in."""
    if not hasattr(current_app, "login_manager"):
        return False
    from flask_login import current_user

    return not current_user.is_authenticated


def _prefers_json() -> bool:
    return request.accept_mimetypes.best_match(["text/html", "application/json"]) == (
        "application/json"
    )


def _check_request_is_ours() -> None:
    """Refuse a change that another site made the visitor's browser send.

    Checked here whether or not the host has ``CSRFProtect``, and also where it switched that
    off: a dashboard cannot rely on either.
    """
    if not current_app.secret_key:
        abort(400, "Changes need a SECRET_KEY in the app's configuration.")
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        abort(400, "The request came from another site.")
    token = request.form.get(csrf_field_name()) or request.headers.get("X-CSRFToken")
    try:
        validate_csrf(token)
    except ValidationError as error:
        abort(400, f"{error} Open the page again and repeat the change; nothing was changed.")


def _add_headers(response: Response) -> Response:
    headers = response.headers
    headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "same-origin")
    if _view() != "static":
        headers.setdefault("Cache-Control", "no-store")
    if is_api() and response.status_code == HTTPStatus.OK and (token := csrf_token()):
        headers["X-CSRFToken"] = token
    return response
