"""The pages. Each reads through :mod:`.queries`, or acts through :mod:`flask_bgjobs.actions`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from flask import (
    Blueprint,
    Response,
    flash,
    make_response,
    redirect,
    render_template,
    request,
    url_for,
)
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException

from .. import actions
from ..app_state import AppState, current_state
from ..models import Job
from ..store import ActionResult
from ..text import one_line, storable
from . import access, queries
from .forms import DispatchForm, dispatch_job, form_like, job_choices
from .page import Helpers

_logger = logging.getLogger("flask_bgjobs")

_PER_PAGE = 50
_MAX_QUERY = 200
_MAX_CHOSEN = 50
_ACTS = {"cancel": actions.cancel, "retry": actions.retry, "delete": actions.delete}
_DONE = {"cancel": "cancelled", "retry": "is pending again", "delete": "deleted"}
_LOCAL_PATH = re.compile(r"(?:[a-z0-9]+(?:/[a-z0-9]+)*)?")
_TIME_TEXT = re.compile(r"(<time[^>]*>)[^<]*")


def register(blueprint: Blueprint) -> None:
    """Add the pages to ``blueprint``."""
    blueprint.add_url_rule("/", view_func=overview)
    blueprint.add_url_rule("/list", view_func=list_jobs)
    blueprint.add_url_rule("/job/<int:job_id>", view_func=show_job)
    blueprint.add_url_rule("/dispatch", view_func=dispatch, methods=["GET", "POST"])
    blueprint.add_url_rule(
        "/job/<int:job_id>/<any(cancel, retry, delete):verb>", view_func=act, methods=["POST"]
    )
    blueprint.add_url_rule("/healthz", view_func=healthz, provide_automatic_options=False)
    blueprint.context_processor(_template_values)
    for code in (400, 403, 404, 413):
        blueprint.register_error_handler(code, _show_error)


def overview() -> ResponseReturnValue:
    """Counts, warnings, recent failures and the newest jobs."""
    state = current_state()
    return _live_page(
        "overview",
        counts=queries.count_by_status(state),
        service=queries.service_now(state),
        failures=queries.recent_failures(state, visible=_visible(state)),
        newest=queries.list_jobs(state, per=10, visible=_visible(state)).jobs,
        is_live=True,
    )


def list_jobs() -> ResponseReturnValue:
    """A page of the jobs that the address filters."""
    state = current_state()
    try:
        filters = _filters()
        page = queries.list_jobs(
            state,
            filters,
            after=request.args.get("after"),
            before=request.args.get("before"),
            per=_per_page(),
            visible=_visible(state),
        )
    except ValueError as error:
        raise BadRequest(f"{str(error)[0].upper()}{str(error)[1:]}.") from None
    is_first = not ({"after", "before"} & request.args.keys())
    return _live_page(
        "list",
        counts=queries.count_by_status(state),
        service=queries.service_now(state),
        filters=filters,
        page=page,
        per=None if _per_page() == _PER_PAGE else _per_page(),
        is_first=is_first,
        is_live=is_first,
    )


def show_job(job_id: int) -> ResponseReturnValue:
    """One job, with all that is known of it."""
    detail = queries.job_detail(current_state(), access.requested_job())
    return _live_page("job", detail=detail, is_live=True)


def dispatch() -> ResponseReturnValue:
    """The form that enqueues a job, and what it sends."""
    state = current_state()
    again = _dispatched_again()
    form = DispatchForm() if request.method == "POST" or again is None else form_like(state, again)
    if request.method == "POST":
        job = dispatch_job(state, form, again)
        if job is not None:
            flash(f"Job {job.id} enqueued.", "success")
            return redirect(url_for(".show_job", job_id=job.id), HTTPStatus.SEE_OTHER)
    page = render_template(
        "bgjobs/dispatch.html", form=form, again=again, jobs=job_choices(state.registry)
    )
    return page, HTTPStatus.BAD_REQUEST if request.method == "POST" else HTTPStatus.OK


def act(job_id: int, verb: str) -> ResponseReturnValue:
    """Cancel, retry or delete a job, then go back to where the visitor came from."""
    result = _ACTS[verb](current_state(), [job_id])
    for message, category in _told(verb, result):
        flash(message, category)
    following = _next_page()
    if verb == "delete" and result.done and following == url_for(".show_job", job_id=job_id):
        following = url_for(".list_jobs")
    return redirect(following, HTTPStatus.SEE_OTHER)


def healthz() -> Response:
    """Whether a worker is alive, for load balancers: 200 or 503, and no detail."""
    try:
        alive = queries.count_live_workers(current_state())
    except SQLAlchemyError as error:
        _logger.warning("Health check failed | Error: %s", one_line(str(error)))
        return _plain("the database does not answer", HTTPStatus.SERVICE_UNAVAILABLE)
    if not alive:
        return _plain("no worker is alive", HTTPStatus.SERVICE_UNAVAILABLE)
    return _plain("ok", HTTPStatus.OK)


def _plain(text: str, status: HTTPStatus) -> Response:
    return Response(text, status, mimetype="text/plain")


def _live_page(name: str, **values: Any) -> Response:
    """The page, or only the part of it that changes when our script asks for that."""
    if not access.wants_fragment():
        return make_response(render_template(f"bgjobs/{name}.html", **values))
    fragment = render_template(f"bgjobs/_{name}.html", **values)
    response = make_response(fragment)
    # "3 s ago" is brought up to date by the script, and is no news.
    unaged = _TIME_TEXT.sub(r"\1", fragment)
    token = access.csrf_token()
    if token is not None:
        # The page's own would expire while it stays open.
        response.headers["X-CSRFToken"] = token
    response.set_etag(hashlib.sha256(unaged.encode()).hexdigest()[:32], weak=True)
    response.make_conditional(request)
    return response


def _filters() -> queries.JobFilters:
    return queries.JobFilters(
        statuses=_chosen("status"),
        queues=_chosen("queue"),
        q=storable(request.args.get("q", "").strip()[:_MAX_QUERY]),
    )


def _chosen(name: str) -> tuple[str, ...]:
    """The values of a filter that may be given several times."""
    values = (storable(value.strip()[:_MAX_QUERY]) for value in request.args.getlist(name))
    return tuple(dict.fromkeys(value for value in values if value))[:_MAX_CHOSEN]


def _per_page() -> int:
    text = request.args.get("per", "")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        return _PER_PAGE
    return min(max(int(text), 1), queries.MAX_PER_PAGE)


def _visible(state: AppState) -> Callable[[Job], bool] | None:
    return None if state.config.dashboard_public else access.visible


def _dispatched_again() -> Job | None:
    """The job that the form repeats, when there is one and the visitor may see it."""
    text = request.values.get("again", "")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        return None
    job = access.find_visible_job(int(text))
    return job if job is not None and queries.is_readable(job) else None


def _told(verb: str, result: ActionResult) -> list[tuple[str, str]]:
    return [
        *((f"Job {job_id} {_DONE[verb]}.", "success") for job_id in result.done),
        *((f"Job {job_id} was asked to stop.", "success") for job_id in result.requested),
        *(
            (f"Job {job_id} skipped: {reason}.", "warning")
            for job_id, reason in result.skipped.items()
        ),
    ]


def _next_page() -> str:
    """Where the form wants to go next, when that is a page of this dashboard."""
    root = url_for(".overview")
    wanted = request.form.get("next", "")
    below = wanted.partition("?")[0].removeprefix(root)
    is_ours = (
        wanted.startswith(root)
        and _LOCAL_PATH.fullmatch(below) is not None
        and wanted.isprintable()
    )
    return wanted if is_ours else url_for(".list_jobs")


def _show_error(error: HTTPException) -> ResponseReturnValue:
    is_closed = error.code == HTTPStatus.FORBIDDEN and current_state().find_authorizer() is None
    if access.wants_fragment():
        return Response(str(error.description), error.code, mimetype="text/plain")
    page = render_template("bgjobs/error.html", error=error, is_closed=is_closed)
    return page, error.code or HTTPStatus.INTERNAL_SERVER_ERROR


def _template_values() -> dict[str, Any]:
    state = current_state()
    return {
        "bgjobs_base_template": state.config.base_template,
        "bgjobs": Helpers(state),
    }
