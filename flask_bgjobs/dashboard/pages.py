"""The views of the pages. They read through :mod:`flask_bgjobs.operations.queries`."""

from __future__ import annotations

import hashlib
import json
import re
from http import HTTPStatus
from typing import Any

from flask import (
    Blueprint,
    Response,
    current_app,
    flash,
    make_response,
    redirect,
    request,
    url_for,
)
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import CSRFError
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, ServiceUnavailable

from ..errors import DatabaseUnusable
from ..job.limits import uses_from_json
from ..job.text import one_line, sentence
from ..models import Job
from ..operations import queries
from ..state import AppState, current_state
from ..store import MAKE_TABLES, QueryTimeout, database_sentence, is_missing_table
from ..system.safe_logging import logger as _logger
from . import access, api, params
from .forms import DispatchForm, dispatch_job, form_like, job_choices
from .rendering import render
from .template_helpers import Helpers

_MOST_QUEUES = 8
"""How many queues the overview shows."""
_TIME_TEXT = re.compile(r"(<time[^>]*>)[^<]*")
"""The text of a ``<time>`` element, such as ``3 s ago``."""


def register(blueprint: Blueprint) -> None:
    """Add the pages to ``blueprint``."""
    blueprint.add_url_rule("/", view_func=overview)
    blueprint.add_url_rule("/list", view_func=list_jobs)
    blueprint.add_url_rule("/list/new", view_func=count_new)
    blueprint.add_url_rule("/job/<int:job_id>", view_func=show_job)
    blueprint.add_url_rule("/errors", view_func=list_errors)
    blueprint.add_url_rule("/queues", view_func=list_queues)
    blueprint.add_url_rule("/workers", view_func=list_workers)
    blueprint.add_url_rule("/audit", view_func=list_audit)
    blueprint.add_url_rule("/dispatch", view_func=dispatch, methods=["GET", "POST"])
    blueprint.add_url_rule("/healthz", view_func=healthz, provide_automatic_options=False)
    blueprint.context_processor(_template_values)
    for code in (400, 401, 403, 404, 413):
        blueprint.register_error_handler(code, _show_error)
    blueprint.register_error_handler(QueryTimeout, _show_timeout)
    for error in (InterfaceError, PoolTimeout, OperationalError, ProgrammingError):
        blueprint.register_error_handler(error, _show_database_error)
    blueprint.register_error_handler(DatabaseUnusable, _show_unusable)


def overview() -> ResponseReturnValue:
    """Show warnings, counts by status, charts, queues and recent failures."""
    state = current_state()
    service = queries.service_now(state)
    counts = _counts(state)
    queues = []
    if counts is not None:
        queues = queries.queues_of(state, service, most=queries.COUNTED_IN_QUEUES)
    return live_page(
        "overview",
        counts=counts,
        service=service,
        queues=queries.urgent_first(queues, service),
        most_queues=_MOST_QUEUES,
        chart=counts and queries.chart(state, service.now, params.period()),
        failures=queries.recent_failures(state, visible=access.visible_filter()),
    )


def list_jobs() -> ResponseReturnValue:
    """Show a page of the jobs that match the filters in the URL."""
    state = current_state()
    is_first = not ({"after", "before"} & request.args.keys())
    page = search_error = timeout_error = None
    code = HTTPStatus.OK
    try:
        # Without the search text first: if that is invalid, the page still has the other filters.
        filters = params.filters(with_words=False)
        filters = params.filters()
        page = queries.list_jobs(
            state,
            filters,
            after=request.args.get("after"),
            before=request.args.get("before"),
            per=params.per_page(),
            visible=access.visible_filter(),
        )
    except queries.InvalidSearch as error:
        # Shown below the search box, where the visitor can correct it.
        search_error, code = f"{sentence(str(error))}.", HTTPStatus.BAD_REQUEST
    except QueryTimeout as error:
        timeout_error = f"{_timeout_message(error)} Narrow the filter, or try again."
        code = HTTPStatus.SERVICE_UNAVAILABLE
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    response = live_page(
        "list",
        # Counts of all jobs above a filtered list would look like the counts of that list.
        counts=None if filters.is_narrowed else _counts(state),
        service=queries.service_now(state),
        filters=filters,
        page=page,
        search_error=search_error,
        timeout_error=timeout_error,
        q=params.text("q"),
        per=params.per_page_unless_default(),
        is_first=is_first,
        count_new_url=None if page is None or is_first else _count_new_url(state, filters),
        # No refresh of a search: it may read many rows.
        is_live=is_first and page is not None and not filters.terms,
    )
    if page is None:
        response.status_code = code
    return response


def count_new() -> ResponseReturnValue:
    """Return, as a fragment, how many new jobs a list has since one of its later pages was opened.

    The query parameter ``above`` is the highest job id at that time.
    """
    try:
        filters = params.filters()
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    if not _can_count_new(filters):
        raise BadRequest("New jobs are counted only in a list without a search, newest first.")
    number = queries.count_new(
        current_state(), filters, params.number("above"), visible=access.visible_filter()
    )
    return _fragment("new", number=number, filters=filters, per=params.per_page_unless_default())


def show_job(job_id: int) -> ResponseReturnValue:
    """Show one job, with its attempts, log lines and changes."""
    job = access.requested_job()
    detail = queries.job_detail(current_state(), job, with_totals=access.may_see_totals())
    limits = {use.name for use in uses_from_json(job.limits_json)}
    return live_page("job", detail=detail, schedule=_schedule_name(detail), limits=sorted(limits))


def _schedule_name(detail: queries.JobDetail) -> str | None:
    """The name of the schedule that made the job, if its meta says so."""
    try:
        name = json.loads(detail.meta or "{}")["schedule"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def list_errors() -> ResponseReturnValue:
    """Show the failed attempts, grouped by job and exception."""
    return live_page(
        "errors",
        errors=queries.errors_in(current_state(), params.period(), access.visible_filter()),
    )


def list_queues() -> ResponseReturnValue:
    """Show the queues: their jobs, workers, and finished attempts of the last hour."""
    state = current_state()
    access.require_totals()
    service = queries.service_now(state)
    return live_page(
        "queues",
        service=service,
        queues=queries.queues_of(state, service, most=queries.COUNTED_IN_QUEUES),
        lines=queries.finished_by_queue(state, service.now),
    )


def list_workers() -> ResponseReturnValue:
    """Show the workers and their running jobs."""
    state = current_state()
    with_ended = params.includes_ended()
    workers = queries.list_workers(state, ended=with_ended)
    return live_page(
        "workers",
        service=queries.service_now(state),
        workers=workers,
        last=None if workers else queries.last_worker(state),
        with_ended=with_ended,
    )


def list_audit() -> ResponseReturnValue:
    """Show the audit trail."""
    try:
        page = queries.list_audit(current_state(), after=request.args.get("after"))
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    return live_page("audit", page=page, is_live="after" not in request.args)


def dispatch() -> ResponseReturnValue:
    """Show the form that enqueues a job, and enqueue the job when it is sent."""
    state = current_state()
    again = _job_to_repeat()
    form = DispatchForm() if request.method == "POST" or again is None else form_like(state, again)
    if request.method == "POST":
        job = dispatch_job(state, form, again, access.visitor())
        if job is not None:
            flash(f"Job {job.id} enqueued.", "success")
            return redirect(url_for(".show_job", job_id=job.id), HTTPStatus.SEE_OTHER)
    page = render("dispatch", form=form, again=again, jobs=job_choices(state.registry))
    return page, HTTPStatus.BAD_REQUEST if request.method == "POST" else HTTPStatus.OK


def healthz() -> Response:
    """Respond to a health check with 200 when a worker is alive, else with 503.

    The response has no detail, because it needs no login.
    """
    try:
        alive = queries.count_live_workers(current_state())
    except SQLAlchemyError as error:
        _logger.warning("Health check failed | Error: %s", one_line(str(error)))
        return _plain_text("the database does not answer", HTTPStatus.SERVICE_UNAVAILABLE)
    if not alive:
        return _plain_text("no worker is alive", HTTPStatus.SERVICE_UNAVAILABLE)
    return _plain_text("ok", HTTPStatus.OK)


def answer_health_check() -> Response | None:
    """The response to a health check; ``None`` for other requests. Runs before every request."""
    return healthz() if request.endpoint == "bgjobs.healthz" else None


def _counts(state: AppState) -> dict[str, queries.Count] | None:
    """The number of jobs by status; ``None`` where the visitor may not see all jobs."""
    return queries.count_by_status(state) if access.may_see_totals() else None


def _plain_text(text: str, status: HTTPStatus) -> Response:
    return Response(text, status, mimetype="text/plain")


def live_page(name: str, **values: Any) -> Response:
    """A page; only the part that changes when the dashboard's script refreshes it."""
    if access.wants_fragment():
        return _fragment(name, **values)
    return make_response(render(name, **values))


def _fragment(name: str, **values: Any) -> Response:
    """The part of a page that changes, or 304 when it is unchanged."""
    fragment = render(f"_{name}", **values)
    response = make_response(fragment)
    # Texts such as "3 s ago" do not count as a change: the script updates them by itself.
    comparable = _TIME_TEXT.sub(r"\1", fragment)
    token = access.csrf_token()
    if token is not None:
        # A new token, because the page's first one expires while the page stays open.
        response.headers["X-CSRFToken"] = token
        # The token contains the time in seconds, so it is different for each request.
        comparable = comparable.replace(token, "")
    response.set_etag(hashlib.sha256(comparable.encode()).hexdigest()[:32], weak=True)
    response.make_conditional(request)
    return response


def _count_new_url(state: AppState, filters: queries.JobFilters) -> str | None:
    """The URL that counts new jobs of a list; ``None`` for lists where they are not counted."""
    if not _can_count_new(filters):
        return None
    above = queries.highest_id(state)
    query = params.query_of(filters)
    return url_for(".count_new", above=above, per=params.per_page_unless_default(), **query)


def _can_count_new(filters: queries.JobFilters) -> bool:
    """Whether new jobs would be first in the list, and can be found without reading many rows."""
    return not filters.terms and filters.sort == queries.DEFAULT_ORDER


def _job_to_repeat() -> Job | None:
    """The job that fills in the form; ``None`` when there is none or the visitor may not see it."""
    job = access.find_visible_job(params.number("again"))
    return job if job is not None and queries.is_readable(job) else None


def _show_error(error: HTTPException) -> ResponseReturnValue:
    if access.is_api():
        return api.answer_error(error)
    if not access.is_guarded():
        # A `before_request` function of the host has refused: its own error page says why.
        response = _host_response(error)
        # The default page for CSRFProtect's error has no link back, so use the dashboard's.
        if response is not None or not isinstance(error, CSRFError):
            return response or error
    is_closed = error.code == HTTPStatus.FORBIDDEN and current_state().find_authorizer() is None
    if access.wants_fragment():
        return Response(str(error.description), error.code, mimetype="text/plain")
    # The token may have expired in an open form: link to the page, which has a new token.
    again = params.next_page() if request.method == "POST" and error.code == 400 else None
    page = render("error", error=error, is_closed=is_closed, again=again)
    return page, error.code or HTTPStatus.INTERNAL_SERVER_ERROR


def _host_response(error: HTTPException) -> ResponseReturnValue | None:
    """The response of the app's own error handler; ``None`` when it has none.

    Flask itself calls the blueprint's handler first.
    """
    for code in (error.code, None):
        handlers = current_app.error_handler_spec[None][code]
        for kind in type(error).__mro__:
            if kind in handlers:
                response: ResponseReturnValue = current_app.ensure_sync(handlers[kind])(error)
                return response
    return None


def _show_timeout(error: QueryTimeout) -> ResponseReturnValue:
    advice = "Narrow the filter, or try again." if access.is_api() else "Try again in a moment."
    return _show_error(ServiceUnavailable(f"{_timeout_message(error)} {advice}"))


def _show_database_error(error: SQLAlchemyError) -> ResponseReturnValue:
    """Respond with 503 when the database is down, locked or lacks the tables, and with 403 when
    its user lacks a right. Other errors are bugs, and are raised again."""
    is_denied = isinstance(error, DBAPIError) and current_state().store.is_denied(error)
    if isinstance(error, ProgrammingError) and not (is_denied or is_missing_table(error)):
        raise error
    _logger.warning(
        "Database not usable | Path: %s | Error: %s", request.path, database_sentence(error)
    )
    # Not the database's own message: it may name hosts and users, and the visitor may be anonymous.
    message = "The database does not answer. Try again in a moment; the app's log has the details."
    if is_missing_table(error):
        message = f"The database lacks a table: {MAKE_TABLES}."
    http_error: HTTPException = ServiceUnavailable(message)
    if is_denied:
        message = "The app's database user lacks the right to do this; see the app's log."
        http_error = Forbidden(message)
    try:
        return _show_error(http_error)
    except SQLAlchemyError:
        # The error page calls the authorizer, which may need the database to know the visitor.
        return _plain_text(message, HTTPStatus(http_error.code or HTTPStatus.SERVICE_UNAVAILABLE))


def _show_unusable(error: DatabaseUnusable) -> ResponseReturnValue:
    _logger.warning("Database not usable | Path: %s | Error: %s", request.path, error)
    return _show_error(ServiceUnavailable(f"{sentence(str(error))}."))


def _timeout_message(error: QueryTimeout) -> str:
    """Log the query that timed out, and return the sentence for the visitor."""
    query = one_line(error.statement or "")
    _logger.warning("Dashboard query timed out | Path: %s | Query: %s", request.path, query)
    return f"The database took longer than {access.QUERY_SECONDS:g} s."


def _template_values() -> dict[str, Any]:
    return {"bgjobs": Helpers(current_state())}
