"""Authorization and CSRF protection of the dashboard's views.

Everything is closed until the host registers an authorizer. A view that is neither in
:data:`_ACTIONS` nor in :data:`_OPEN` is closed as well, so that a new view is never open by
mistake.
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

VIEW, AUDIT, DISPATCH, SCHEDULE, LIMIT = "view", "audit", "dispatch", "schedule", "limit"
_ACTIONS = {
    "overview": VIEW,
    "list_jobs": VIEW,
    "count_new": VIEW,
    "show_job": VIEW,
    "list_errors": VIEW,
    "list_queues": VIEW,
    "list_workers": VIEW,
    "list_schedules": VIEW,
    "list_limits": VIEW,
    "list_audit": AUDIT,
    "dispatch": DISPATCH,
    "act": "",
    "bulk": "",
    "act_on_queue": "",
    "act_on_worker": "",
    "act_on_schedule": SCHEDULE,
    "act_on_limit": LIMIT,
    "act_on_weight": LIMIT,
    "api_description": VIEW,
    "api_stats": VIEW,
    "api_jobs": VIEW,
    "api_job": VIEW,
    "api_errors": VIEW,
    "api_queues": VIEW,
    "api_workers": VIEW,
    "api_schedules": VIEW,
    "api_schedule": VIEW,
    "api_limits": VIEW,
    "api_limit": VIEW,
    "api_weights": VIEW,
    "api_audit": AUDIT,
    "api_dispatch": DISPATCH,
    "api_act": "",
    "api_act_on_queue": "",
    "api_act_on_worker": "",
    "api_act_on_schedule": SCHEDULE,
    "api_act_on_limit": LIMIT,
    "api_act_on_weight": LIMIT,
}
"""The action that the authorizer is asked about, by view; where it is empty, the URL names it."""
_OPEN = frozenset({"static", "healthz"})
"""Views without authorization: a load balancer cannot log in. They show nothing about jobs."""

QUERY_SECONDS = 2.0
"""Time limit of each query of a page: the visitor waits for it, and is likely to reload."""
_READING = "bgjobs.reading"
"""Key in the request's environment: the exit stack that closes its shared connection."""
_AUTHORIZER_RAISED = "bgjobs.authorizer_raised"
"""Key in the request's environment: set after the authorizer raised an exception."""
_LOGGED_ERRORS = "bgjobs.logged_errors"
"""Key in the request's environment: the error messages that were logged for it."""
_GUARDED = "bgjobs.guarded"
"""Key in the request's environment: set as soon as this module checks the request."""
_MAY_SEE_TOTALS = "bgjobs.may_see_totals"
"""Key in the request's environment: the result of :func:`may_see_totals`."""
_HIDDEN_TOTALS_LOGGED = "bgjobs_hidden_totals_logged"
"""Key in ``app.extensions``: set after the log has said why figures are hidden."""
_SAMPLES = "bgjobs_sampled_jobs"
"""Key in ``app.extensions``: when :func:`_samples` read its jobs, and the jobs."""
_SAMPLES_KEPT_SECONDS = 10.0
_SAMPLE_SECONDS = 1.0
"""Time for asking the authorizer about all samples; when it takes longer, totals are hidden."""
_SAMPLED_QUEUES, _NEWEST = 50, 20
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FRAGMENT_HEADER = "X-Bgjobs-Fragment"
"""Sent by the dashboard's script to get only the part of a page that changes."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def protect(blueprint: Blueprint) -> None:
    """Add authorization, CSRF check and security headers to every view of ``blueprint``."""
    blueprint.before_request(_begin_reading)
    blueprint.before_request(_guard)
    blueprint.after_request(_add_headers)
    blueprint.after_request(_end_reading)
    blueprint.teardown_request(_close_reading)


def is_allowed(action: str, job: Job | None = None) -> bool:
    """Whether configuration and authorizer allow the visitor to do ``action``.

    Only ``True`` from the authorizer allows it; an authorizer that raises or aborts denies it. The
    authorizer is not asked when a ``before_request`` function of the host has refused the request,
    because it may not know the visitor yet.
    """
    if not is_guarded():
        return False
    try:
        return _is_allowed(action, job)
    except HTTPException:
        return False


def _is_allowed(action: str, job: Job | None) -> bool:
    """Like :func:`is_allowed`, but lets an ``abort()`` of the authorizer end the request."""
    state = current_state()
    if action == VIEW:
        if state.config.dashboard_public:
            return True
    elif action != AUDIT and state.config.read_only:
        return False
    authorizer = state.find_authorizer()
    if authorizer is None or _AUTHORIZER_RAISED in request.environ:
        return False
    try:
        answer: object = authorizer(action, job)
    except HTTPException:
        raise
    except Exception as error:
        _logger.exception("The dashboard's authorizer raised for %r; access is refused", action)
        _roll_back_after(error)
        # Otherwise the error page would ask, and log the error, again for each of its links.
        request.environ[_AUTHORIZER_RAISED] = True
        return False
    if not isinstance(answer, bool | None):
        hooks.discard(answer)
        _log_error_once(
            f"The dashboard's authorizer returned {_type_name(answer)} for {action!r}; only True "
            "allows anything"
        )
    return answer is True


def _log_error_once(message: str) -> None:
    """Log an error once per request: a page asks the authorizer about each job and button."""
    logged: set[str] = request.environ.setdefault(_LOGGED_ERRORS, set())
    if message not in logged:
        logged.add(message)
        _logger.error(message)


def _type_name(value: object) -> str:
    """The type of ``value``, for a message that must not show the value: it may be a secret."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def visible(job: Job) -> bool:
    """Whether the visitor may see ``job``."""
    return is_allowed(VIEW, job)


def may_see_example(job: Job) -> bool:
    """Whether the visitor may see ``job``, which is not in the database.

    An authorizer that raises denies it: it may look up a row that belongs to the job.
    """
    state = current_state()
    if state.config.dashboard_public:
        return True
    authorizer = state.find_authorizer()
    return authorizer is not None and _may_see_each(authorizer, [job])


def visible_filter() -> Callable[[Job], bool] | None:
    """:func:`visible`, to filter a list with; ``None`` where every visitor may see all jobs."""
    return None if current_state().config.dashboard_public else visible


def may_see_totals() -> bool:
    """Whether the visitor gets totals of all jobs, because the authorizer seems to allow them all.

    The authorizer is asked about a made-up job whose owner and queue do not exist, about a made-up
    job in each queue, and about the newest jobs. If it were asked about existing jobs only, a
    visitor could change the result by enqueueing some.
    """
    state = current_state()
    if state.config.dashboard_public:
        return True
    authorizer = state.find_authorizer()
    if authorizer is None:
        return False
    known: bool | None = request.environ.get(_MAY_SEE_TOTALS)
    if known is None:
        made_up = [queries.placeholder_job()]
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
                _warn_totals_hidden(f"took longer than {_SAMPLE_SECONDS:g} s for a few jobs")
                return False
    except HTTPException:
        return False
    except Exception as error:
        # Not an error: it may look up a row that belongs to the job, and a made-up job has none.
        _roll_back_after(error)
        _warn_totals_hidden(f"raised {type(error).__name__} for a made-up job")
        return False
    return True


def _warn_totals_hidden(reason: str) -> None:
    if not current_app.extensions.get(_HIDDEN_TOTALS_LOGGED):
        current_app.extensions[_HIDDEN_TOTALS_LOGGED] = True
        _logger.warning(
            "Figures hidden | The dashboard's authorizer %s. Visitors who may see all jobs get "
            "totals only if it answers at once for any job, also for one that does not exist",
            reason,
        )


def _samples(state: AppState) -> Sequence[Job]:
    """A made-up job in each queue, and the newest jobs."""
    read_at, jobs = current_app.extensions.get(_SAMPLES, (-math.inf, ()))
    if time.monotonic() - read_at > _SAMPLES_KEPT_SECONDS:
        names = sorted(state.store.queue_names())[:_SAMPLED_QUEUES]
        in_queues = map(queries.placeholder_job, names)
        jobs = (*in_queues, *queries.newest_jobs(state, _NEWEST))
        current_app.extensions[_SAMPLES] = time.monotonic(), jobs
    return cast("Sequence[Job]", jobs)


def _roll_back_after(error: Exception) -> None:
    """Make the host's session usable again after a statement of the authorizer failed."""
    if isinstance(error, DBAPIError):
        current_state().db.session.rollback()


def require_totals() -> None:
    """Abort with 403 where the visitor may see only some of the jobs."""
    if not may_see_totals():
        abort(403, "These figures cover all jobs, and you may see only some of them.")


def visitor(reason: str | None = None) -> Actor:
    """The person who makes a change, for the audit trail.

    :param reason: the filter that selected the jobs, when many are changed.
    """
    return Actor(_visitor_name(), "api" if is_api() else "dashboard", reason)


def is_guarded() -> bool:
    """Whether the request has reached the checks of this module."""
    return _GUARDED in request.environ


def is_api() -> bool:
    """Whether the request is for the JSON API."""
    return _view().startswith("api_")


def _view() -> str:
    return (request.endpoint or "").rpartition(".")[2]


def _visitor_name() -> str:
    """The name from the host's own function, else Flask-Login's user id, else the IP address."""
    identify = current_state().find_identifier()
    if identify is not None:
        name: object = identify()
        if name is not None and not isinstance(name, str | int):
            hooks.discard(name)
            raise TypeError(
                f"the function of identify_visitor returned {_type_name(name)}; it must return a "
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
    """The job in the request's URL. The guard has loaded it, and the visitor may see it."""
    job: Job = g.bgjobs_job
    return job


def find_visible_job(job_id: int) -> Job | None:
    """The job with this id; ``None`` when there is none, or the visitor may not see it."""
    if not queries.is_possible_id(job_id):
        return None
    job = current_state().store.get(job_id)
    return job if job is not None and visible(job) else None


def csrf_token() -> str | None:
    """The CSRF token for forms; ``None`` when the app has no ``SECRET_KEY`` to sign it with."""
    return generate_csrf() if current_app.secret_key else None


def csrf_field_name() -> str:
    """The name of the form field with the token, as the host's ``CSRFProtect`` expects it."""
    return str(current_app.config.get("WTF_CSRF_FIELD_NAME", "csrf_token"))


def wants_fragment() -> bool:
    """Whether the dashboard's script asks for only the part of a page that changes."""
    return FRAGMENT_HEADER in request.headers


def _begin_reading() -> None:
    """Read all of a page through one connection, with a time limit for each query."""
    if request.method in _SAFE_METHODS and _view() not in _OPEN:
        # Not in `g`: a nested request would share it.
        reading = request.environ[_READING] = contextlib.ExitStack()
        reading.enter_context(current_state().store.reading(QUERY_SECONDS))


def _end_reading(response: Response) -> Response:
    # The host's `after_request` functions run next, and may write.
    _close_reading()
    return response


def _close_reading(_error: BaseException | None = None) -> None:
    reading = request.environ.pop(_READING, None)
    if reading is not None:
        reading.close()


def _guard() -> ResponseReturnValue | None:
    """Check authorization and CSRF token; returns the response that refuses the request."""
    view = _view()
    request.environ[_GUARDED] = True
    if view in _OPEN:
        return None
    values: dict[str, Any] = request.view_args or {}
    action = _ACTIONS.get(view) or values.get("verb")
    if action is None:
        abort(403)
    refusal = _job_refusal(action, values["job_id"]) if "job_id" in values else _refusal(action)
    if refusal is not None:
        return refusal
    if request.method not in _SAFE_METHODS:
        _check_csrf()
    return None


def _job_refusal(action: str, job_id: int) -> ResponseReturnValue | None:
    job = find_visible_job(job_id)
    if job is None:
        # The same response for a hidden job and a missing one, so that they cannot be told apart.
        refusal = _refusal(VIEW)
        if refusal is None:
            abort(404, "there is no such job, or you may not see it")
        return refusal
    g.bgjobs_job = job
    return None if action == VIEW else _refusal(action, job)


def _refusal(action: str, job: Job | None = None) -> ResponseReturnValue | None:
    """The response to a visitor who may not do ``action``; ``None`` when it is allowed."""
    try:
        if _is_allowed(action, job):
            return None
    except HTTPException as error:
        if error.response is None:
            raise
        return _authorizer_response(error.response)
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
    """Make the login page lead back to ``page``.

    Flask-Login would lead back to the URL of the request, which takes only POST.
    """
    if "next" in session:
        session["next"] = page
    url = urlsplit(answer.headers.get("Location", ""))
    query = parse_qsl(url.query, keep_blank_values=True)
    if any(name == "next" for name, _ in query):
        back = [(name, page if name == "next" else value) for name, value in query]
        answer.headers["Location"] = url._replace(query=urlencode(back)).geturl()


def _authorizer_response(response: WerkzeugResponse) -> ResponseReturnValue:
    """The response that an authorizer has aborted with, such as a redirect to its login page.

    Scripts and API clients get 401 instead of a redirect: they would follow it, and take the login
    page for the data that they asked for.
    """
    is_redirect = HTTPStatus.MULTIPLE_CHOICES <= response.status_code < HTTPStatus.BAD_REQUEST
    if is_redirect and (is_api() or wants_fragment()):
        abort(401, "Log in first.")
    return response


def _is_anonymous() -> bool:
    """Whether the host uses Flask-Login and the visitor is not logged in."""
    if not hasattr(current_app, "login_manager"):
        return False
    from flask_login import current_user

    return not current_user.is_authenticated


def _prefers_json() -> bool:
    return request.accept_mimetypes.best_match(["text/html", "application/json"]) == (
        "application/json"
    )


def _check_csrf() -> None:
    """Abort with 400 when another site may have made the visitor's browser send the request.

    Checked whether or not the host has ``CSRFProtect``, and also when that is switched off.
    """
    if not current_app.secret_key:
        abort(400, "Changes need a SECRET_KEY in the app's configuration.")
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        abort(400, "The request came from another site.")
    token = request.form.get(csrf_field_name()) or request.headers.get("X-CSRFToken")
    try:
        validate_csrf(token)
    except ValidationError as error:
        abort(400, f"{error} Nothing was changed. Open the page again and repeat the change.")


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
