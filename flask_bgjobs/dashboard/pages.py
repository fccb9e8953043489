"""The pages. Each reads through :mod:`.queries`."""

from __future__ import annotations

import hashlib
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
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, ServiceUnavailable

from ..errors import DatabaseUnusable
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
"""On the overview."""
_TIME_TEXT = re.compile(r"(<time[^>]*>)[^<]*")


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
    for refusal in (InterfaceError, NoConnectionFree, OperationalError, ProgrammingError):
        blueprint.register_error_handler(refusal, _show_refusal)
    blueprint.register_error_handler(DatabaseUnusable, _show_unusable)


def overview() -> ResponseReturnValue:
    """What is broken, and how it goes: counts, warnings, queues, charts and recent failures."""
    state = current_state()
    service = queries.service_now(state)
    counts = _counts(state)
    queues = []
    if counts is not None:
        queues = queries.queues_of(state, service, most=queries.COUNTED_IN_QUEUES)
    return _live_page(
        "overview",
        counts=counts,
        service=service,
        queues=queries.urgent_first(queues, service),
        most_queues=_MOST_QUEUES,
        chart=counts and queries.chart(state, service.now, params.period()),
        failures=queries.recent_failures(state, visible=access.visible_filter()),
    )


def list_jobs() -> ResponseReturnValue:
    """A page of the jobs that the address filters."""
    state = current_state()
    is_first = not ({"after", "before"} & request.args.keys())
    page = wrong = late = None
    code = HTTPStatus.OK
    try:
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
        # Told beside the box, where it can be mended.
        wrong, code = f"{sentence(str(error))}.", HTTPStatus.BAD_REQUEST
    except QueryTimeout as error:
        late = f"{_too_long(error)} Narrow the filter, or try again."
        code = HTTPStatus.SERVICE_UNAVAILABLE
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    response = _live_page(
        "list",
        # Numbers of all jobs above a part of them would be taken for those of the part.
        counts=None if filters.is_narrowed else _counts(state),
        service=queries.service_now(state),
        filters=filters,
        page=page,
        wrong=wrong,
        late=late,
        q=params.text("q"),
        per=params.unusual_per_page(),
        is_first=is_first,
        news_url=None if page is None or is_first else _news_url(state, filters),
        # A search that reads many rows is not repeated every few seconds.
        is_live=is_first and page is not None and not filters.terms,
    )
    if page is None:
        response.status_code = code
    return response


def count_new() -> ResponseReturnValue:
    """How many jobs a list has got since one of its deeper pages was opened; only a fragment."""
    try:
        filters = params.filters()
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    if not _tells_new(filters):
        raise BadRequest("New jobs are told by no search, and in no order but that of their ids.")
    number = queries.count_new(
        current_state(), filters, params.number("above"), visible=access.visible_filter()
    )
    return _fragment("new", number=number, filters=filters, per=params.unusual_per_page())


def show_job(job_id: int) -> ResponseReturnValue:
    """One job, with all that is known of it."""
    detail = queries.job_detail(
        current_state(), access.requested_job(), with_totals=access.may_see_totals()
    )
    return _live_page("job", detail=detail)


def list_errors() -> ResponseReturnValue:
    """What fails, by job and exception."""
    return _live_page(
        "errors",
        errors=queries.errors_in(current_state(), params.period(), access.visible_filter()),
    )


def list_queues() -> ResponseReturnValue:
    """What each queue holds and does."""
    state = current_state()
    access.require_totals()
    service = queries.service_now(state)
    return _live_page(
        "queues",
        service=service,
        queues=queries.queues_of(state, service, most=queries.COUNTED_IN_QUEUES),
        lines=queries.finished_by_queue(state, service.now),
    )


def list_workers() -> ResponseReturnValue:
    """Who works, and on what."""
    state = current_state()
    with_ended = "ended" in request.args
    workers = queries.list_workers(state, ended=with_ended)
    return _live_page(
        "workers",
        service=queries.service_now(state),
        workers=workers,
        last=None if workers else queries.last_worker(state),
        with_ended=with_ended,
    )


def list_audit() -> ResponseReturnValue:
    """Who changed what."""
    try:
        page = queries.list_audit(current_state(), after=request.args.get("after"))
    except ValueError as error:
        raise BadRequest(f"{sentence(str(error))}.") from None
    return _live_page("audit", page=page, is_live="after" not in request.args)


def dispatch() -> ResponseReturnValue:
    """The form that enqueues a job, and what it sends."""
    state = current_state()
    again = _dispatched_again()
    form = DispatchForm() if request.method == "POST" or again is None else form_like(state, again)
    if request.method == "POST":
        job = dispatch_job(state, form, again, access.visitor())
        if job is not None:
            flash(f"Job {job.id} enqueued.", "success")
            return redirect(url_for(".show_job", job_id=job.id), HTTPStatus.SEE_OTHER)
    page = render("dispatch", form=form, again=again, jobs=job_choices(state.registry))
    return page, HTTPStatus.BAD_REQUEST if request.method == "POST" else HTTPStatus.OK


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


def answer_health_check() -> Response | None:
    """The answer of :func:`healthz`, where it is asked for; runs before each request of the app."""
    return healthz() if request.endpoint == "bgjobs.healthz" else None


def _counts(state: AppState) -> dict[str, queries.Count] | None:
    """How many jobs have each status; ``None`` where the visitor may not see all of them."""
    return queries.count_by_status(state) if access.may_see_totals() else None


def _plain(text: str, status: HTTPStatus) -> Response:
    return Response(text, status, mimetype="text/plain")


def _live_page(name: str, **values: Any) -> Response:
    """The page, or only the part of it that changes when our script asks for that."""
    if access.wants_fragment():
        return _fragment(name, **values)
    return make_response(render(name, **values))


def _fragment(name: str, **values: Any) -> Response:
    """The part of a page that changes; 304 when it has not."""
    fragment = render(f"_{name}", **values)
    response = make_response(fragment)
    # "3 s ago" is brought up to date by the script, and is no news.
    news = _TIME_TEXT.sub(r"\1", fragment)
    token = access.csrf_token()
    if token is not None:
        # The page's own would expire while it stays open.
        response.headers["X-CSRFToken"] = token
        # The token contains the time in seconds, so it is different for each request.
        news = news.replace(token, "")
    response.set_etag(hashlib.sha256(news.encode()).hexdigest()[:32], weak=True)
    response.make_conditional(request)
    return response


def _news_url(state: AppState, filters: queries.JobFilters) -> str | None:
    """Where to ask whether a list has got new jobs; ``None`` where it is not told."""
    if not _tells_new(filters):
        return None
    above = queries.highest_id(state)
    query = params.query_of(filters)
    return url_for(".count_new", above=above, per=params.unusual_per_page(), **query)


def _tells_new(filters: queries.JobFilters) -> bool:
    """Whether new jobs would come first, and are found without reading many."""
    return not filters.terms and filters.sort == queries.DEFAULT_ORDER


def _dispatched_again() -> Job | None:
    """The job that the form repeats, when there is one and the visitor may see it."""
    job = access.find_visible_job(params.number("again"))
    return job if job is not None and queries.is_readable(job) else None


def _show_error(error: HTTPException) -> ResponseReturnValue:
    if access.is_api():
        return api.answer_error(error)
    if not access.is_guarded():
        # A function of the host's that runs before each request has refused, and it knows why.
        answer = _answer_of_host(error)
        # Of CSRFProtect the visitor would read one sentence, and no way to go on.
        if answer is not None or not isinstance(error, CSRFError):
            return answer or error
    is_closed = error.code == HTTPStatus.FORBIDDEN and current_state().find_authorizer() is None
    if access.wants_fragment():
        return Response(str(error.description), error.code, mimetype="text/plain")
    # A form may have been open for too long: a fresh one is sent with that page.
    again = params.next_page() if request.method == "POST" and error.code == 400 else None
    page = render("error", error=error, is_closed=is_closed, again=again)
    return page, error.code or HTTPStatus.INTERNAL_SERVER_ERROR


def _answer_of_host(error: HTTPException) -> ResponseReturnValue | None:
    """What the app's own handler makes of ``error``; Flask asks those of a blueprint first."""
    for code in (error.code, None):
        handlers = current_app.error_handler_spec[None][code]
        for kind in type(error).__mro__:
            if kind in handlers:
                answer: ResponseReturnValue = current_app.ensure_sync(handlers[kind])(error)
                return answer
    return None


def _show_timeout(error: QueryTimeout) -> ResponseReturnValue:
    advice = "Narrow the filter, or try again." if access.is_api() else "Try again in a moment."
    return _show_error(ServiceUnavailable(f"{_too_long(error)} {advice}"))


def _show_refusal(error: SQLAlchemyError) -> ResponseReturnValue:
    """503 where the database is away, locked or without our tables, and 403 where its user lacks a
    right; other errors are bugs."""
    is_denied = isinstance(error, DBAPIError) and current_state().store.is_denied(error)
    if isinstance(error, ProgrammingError) and not (is_denied or is_missing_table(error)):
        raise error
    _logger.warning(
        "Database not usable | Path: %s | Error: %s", request.path, database_sentence(error)
    )
    # Not what it said: the visitor may not even be known, and it may name hosts and users.
    what = "The database does not answer. Try again in a moment; the app's log says more."
    if is_missing_table(error):
        what = f"The database lacks a table: {MAKE_TABLES}."
    answer: HTTPException = ServiceUnavailable(what)
    if is_denied:
        what = "The app's database user lacks the right to do this; the app's log says more."
        answer = Forbidden(what)
    try:
        return _show_error(answer)
    except SQLAlchemyError:
        # The page asks the host who the visitor is, and the host asks the database.
        return _plain(what, HTTPStatus(answer.code or HTTPStatus.SERVICE_UNAVAILABLE))


def _show_unusable(error: DatabaseUnusable) -> ResponseReturnValue:
    _logger.warning("Database not usable | Path: %s | Error: %s", request.path, error)
    return _show_error(ServiceUnavailable(f"{sentence(str(error))}."))


def _too_long(error: QueryTimeout) -> str:
    """What to tell the visitor; the operator reads in the log which query it was."""
    query = one_line(error.statement or "")
    _logger.warning("Query of the dashboard ended | Path: %s | Query: %s", request.path, query)
    return f"The database took longer than {access.QUERY_SECONDS:g} s."


def _template_values() -> dict[str, Any]:
    return {"bgjobs": Helpers(current_state())}
