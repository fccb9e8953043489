"""The JSON API below ``api/v1``: the data and actions of the pages, with the same authorization
and masking.

It serves its description, ``openapi.json``. A change needs the session cookie, and the CSRF token
from the ``X-CSRFToken`` header of any successful response.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Response, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import BadRequest, HTTPException, NotFound

from ..errors import (
    BgJobsError,
    JobNotAllowed,
    LimitNotFound,
    QueueNotFound,
    ScheduleChanged,
    ScheduleNotFound,
)
from ..flow.fairness.data import turns_data, weight_data
from ..flow.fairness.manage import Weights, WeightState
from ..flow.fairness.manage import find as find_weight
from ..flow.limits.data import key_data, limit_data
from ..flow.limits.manage import LimitState, RuleValues, list_limits
from ..flow.limits.manage import find as find_limit
from ..flow.schedules.data import row_data
from ..flow.schedules.manage import RecurringJob
from ..job.limits import MAX_KEY
from ..job.plain import plain, time_text
from ..job.text import storable
from ..operations import actions, queries
from ..options import RECURRENCE_OPTIONS
from ..state import AppState, current_state
from . import access, params
from .changes import ACTS
from .limits import keys_of
from .rendering import json_response
from .schedule_rows import detail_data, detail_of, find_visible, list_rows
from .weights import SHOWN_KEYS

PREFIX = "/api/v1"
_OPENAPI = pathlib.Path(__file__).with_name("openapi.json")
_QUERY = {
    "api_stats": ("period",),
    "api_jobs": (
        *("status", "queue", "job", "tag", "owner", "error", "since", "until", "q", "sort"),
        *("after", "before", "per"),
    ),
    "api_errors": ("period",),
    "api_workers": ("ended",),
    "api_schedules": ("q", "after", "per"),
    "api_schedule": ("name",),
    "api_limit": ("name",),
    "api_audit": ("after", "per"),
}
"""The query parameters of each view; a view that is not listed has none."""
_OPTIONS = frozenset(
    {
        "retries", "priority", "delay", "retry_delay", "run_at", "backoff", "max_retry_delay",
        "jitter", "queue", "timeout", "unique_key", "tags", "owner",
    }
)  # fmt: skip
"""The optional fields of a dispatch, beside ``target``, ``method`` and ``parameters``."""


def register(blueprint: Blueprint) -> None:
    """Add the API to ``blueprint``."""
    for path, view, method in (
        ("/openapi.json", api_description, "GET"),
        ("/stats", api_stats, "GET"),
        ("/jobs", api_jobs, "GET"),
        ("/jobs", api_dispatch, "POST"),
        ("/jobs/<int:job_id>", api_job, "GET"),
        ("/jobs/<int:job_id>/<any(cancel, retry, delete):verb>", api_act, "POST"),
        ("/errors", api_errors, "GET"),
        ("/queues", api_queues, "GET"),
        ("/queues/<any(pause, resume):verb>", api_act_on_queue, "POST"),
        ("/workers", api_workers, "GET"),
        ("/workers/<any(drain):verb>", api_act_on_worker, "POST"),
        ("/schedules", api_schedules, "GET"),
        ("/schedule", api_schedule, "GET"),
        ("/schedules/<any(run, pause, resume, override, reset):verb>", api_act_on_schedule, "POST"),
        ("/limits", api_limits, "GET"),
        ("/limit", api_limit, "GET"),
        ("/limits/<any(pause, resume, override, reset):verb>", api_act_on_limit, "POST"),
        ("/weights", api_weights, "GET"),
        ("/weights/<any(override, reset):verb>", api_act_on_weight, "POST"),
        ("/audit", api_audit, "GET"),
    ):
        blueprint.add_url_rule(PREFIX + path, view_func=_checked(view), methods=[method])


def _checked(view: Callable[..., ResponseReturnValue]) -> Callable[..., ResponseReturnValue]:
    """``view``, which responds with 400 to query parameters that it does not read."""

    @functools.wraps(view)
    def wrapped(**values: Any) -> ResponseReturnValue:
        try:
            params.check_query(*_QUERY.get(view.__name__, ()))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return view(**values)

    return wrapped


def answer_error(error: HTTPException) -> Response:
    """The JSON response for an error."""
    code = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    # Shortened, because the message may quote a long value from the request.
    message = storable(str(error.description))
    response = json_response(error={"status": code, "message": message})
    response.status_code = code
    return response


def api_description() -> ResponseReturnValue:
    """Return the API's description, as OpenAPI 3.1."""
    return Response(_OPENAPI.read_bytes(), mimetype="application/json")


def api_stats() -> ResponseReturnValue:
    """Return counts by status, workers, and the attempts that finished in a period."""
    state = current_state()
    service = queries.service_now(state)
    if not access.may_see_totals():
        return json_response(
            **_stats(service),
            **dict.fromkeys(
                ("jobs", "capped", "waiting_for_code", "ended", "wait_seconds", "run_seconds")
            ),
            period=params.period().name,
        )
    chart = queries.chart(state, service.now, params.period())
    counts = queries.count_by_status(state)
    return json_response(
        **_stats(service),
        jobs={status: min(count.number, count.limit) for status, count in counts.items()},
        waiting_for_code=service.waiting_for_code,
        capped=[status for status, count in counts.items() if count.number > count.limit],
        period=chart.period.name,
        ended=dict(chart.totals),
        wait_seconds={"p50": chart.wait_p50, "p95": chart.wait_p95},
        run_seconds={"p50": chart.run_p50, "p95": chart.run_p95},
    )


def _stats(service: queries.Service) -> dict[str, Any]:
    """The part that is also for visitors who may see only some of the jobs."""
    return {
        "now": time_text(service.now),
        "workers": {"alive": service.alive, "silent": service.silent},
        "unserved_queues": service.unserved,
    }


def api_jobs() -> ResponseReturnValue:
    """Return a page of the jobs that match the filters."""
    state = current_state()
    try:
        page = queries.list_jobs(
            state,
            params.filters(),
            after=request.args.get("after"),
            before=request.args.get("before"),
            per=params.per_page(),
            visible=access.visible_filter(),
        )
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return json_response(
        jobs=[queries.job_data(row) for row in page.jobs], newer=page.newer, older=page.older
    )


def api_job(job_id: int) -> ResponseReturnValue:
    """Return one job, with its attempts and log lines."""
    detail = queries.job_detail(
        current_state(), access.requested_job(), with_totals=access.may_see_totals()
    )
    return json_response(**queries.detail_data(detail))


def api_dispatch() -> ResponseReturnValue:
    """Enqueue a job."""
    state = current_state()
    body = _body()
    target, method = body.pop("target", None), body.pop("method", None)
    parameters = body.pop("parameters", [])
    if not isinstance(target, str) or not (method is None or isinstance(method, str)):
        raise BadRequest("target must be the name of a class or function, and method a name")
    if unknown := body.keys() - _OPTIONS:
        raise BadRequest(
            f"there is no field {min(unknown)!r}; the fields are {', '.join(sorted(_OPTIONS))}"
        )
    try:
        body["run_at"] = params.moment("run_at", body.get("run_at"))
        job = actions.dispatch(state, access.visitor(), target, method, parameters, **body)
    except (BgJobsError, params.InvalidTime) as error:
        code = HTTPStatus.FORBIDDEN if isinstance(error, JobNotAllowed) else HTTPStatus.BAD_REQUEST
        return _refused(code, str(error))
    if job.deduplicated and not access.visible(job):
        return _refused(HTTPStatus.CONFLICT, "another job holds this unique_key")
    response = json_response(id=job.id, status=job.status, deduplicated=job.deduplicated)
    response.status_code = HTTPStatus.CREATED
    return response


def api_act(job_id: int, verb: str) -> ResponseReturnValue:
    """Cancel, retry or delete a job."""
    result = ACTS[verb](current_state(), [job_id], access.visitor())
    if job_id in result.skipped:
        return _refused(HTTPStatus.CONFLICT, f"job {job_id}: {result.skipped[job_id]}")
    job = current_state().store.get(job_id)
    return json_response(
        id=job_id, requested=job_id in result.requested, status=None if job is None else job.status
    )


def api_errors() -> ResponseReturnValue:
    """Return the failed attempts, grouped by job and exception."""
    errors = queries.errors_in(current_state(), params.period(), access.visible_filter())
    return json_response(
        period=errors.period.name,
        errors=[plain(group) for group in errors.groups],
        is_complete=errors.is_complete,
    )


def api_queues() -> ResponseReturnValue:
    """Return the number of jobs and workers of each queue."""
    access.require_totals()
    stats = queries.queue_stats(current_state(), most=queries.COUNTED_IN_QUEUES)
    return json_response(queues=[plain(queue) for queue in stats])


def api_act_on_queue(verb: str) -> ResponseReturnValue:
    """Pause or resume a queue."""
    name = _body().get("queue")
    if not isinstance(name, str):
        raise BadRequest("queue must be the name of a queue")
    change = {"pause": actions.pause, "resume": actions.resume}[verb]
    try:
        changed = change(current_state(), name, access.visitor())
    except QueueNotFound as error:
        raise NotFound(str(error)) from None
    return json_response(queue=name, changed=changed)


def api_workers() -> ResponseReturnValue:
    """Return the workers; with ``ended=1`` also stopped and dead ones."""
    workers = queries.list_workers(current_state(), ended=params.includes_ended())
    return json_response(workers=[plain(worker) for worker in workers])


def api_act_on_worker(verb: str) -> ResponseReturnValue:
    """Ask a worker to finish its running jobs and stop."""
    worker_id = _body().get("worker")
    if type(worker_id) is not int or not queries.is_possible_id(worker_id):
        raise BadRequest("worker must be the id of a worker")
    changed = current_state().store.drain_worker(worker_id, access.visitor())
    return json_response(worker=worker_id, changed=changed)


def api_schedules() -> ResponseReturnValue:
    """Return a page of the schedules, by name."""
    page = list_rows(
        current_state(),
        after=params.name("after"),
        contains=params.name("q"),
        limit=params.per_page(),
    )
    return json_response(schedules=[row_data(row) for row in page.rows], following=page.following)


def api_schedule() -> ResponseReturnValue:
    """Return one schedule, with its last and next runs."""
    if "name" not in request.args:
        raise BadRequest("name must be the name of a schedule")
    state = current_state()
    return json_response(**detail_data(detail_of(state, _schedule(request.args["name"]))))


def api_act_on_schedule(verb: str) -> ResponseReturnValue:
    """Run, pause, resume, override or reset a schedule."""
    body = _body()
    name = body.pop("schedule", None)
    if not isinstance(name, str):
        raise BadRequest("schedule must be the name of a schedule")
    schedule = _schedule(name)
    options = RECURRENCE_OPTIONS if verb == "override" else ()
    if unknown := body.keys() - set(options):
        fields = ", ".join(("schedule", *options))
        raise BadRequest(f"there is no field {min(unknown)!r}; the fields are {fields}")
    try:
        return _change_schedule(schedule, verb, body)
    except JobNotAllowed as error:
        return _refused(HTTPStatus.FORBIDDEN, str(error))
    except ScheduleChanged as error:
        return _refused(HTTPStatus.CONFLICT, str(error))
    except (BgJobsError, TypeError) as error:
        return _refused(HTTPStatus.BAD_REQUEST, str(error))


def _change_schedule(schedule: RecurringJob, verb: str, values: dict[str, Any]) -> Response:
    by = access.visitor()
    is_changed, job_id = True, None
    if verb == "run":
        job = schedule.run_now(by)
        if job.deduplicated and not access.visible(job):
            return _refused(HTTPStatus.CONFLICT, "another job holds its unique_key")
        is_changed, job_id = not job.deduplicated, job.id
    elif verb == "override":
        schedule.override(by, **values)
    elif verb == "pause":
        schedule.pause(by)
        is_changed = schedule.paused_at is None
    elif verb == "resume":
        schedule.resume(by)
        is_changed = schedule.paused_at is not None
    else:
        schedule.reset(by)
        is_changed = schedule.overridden_at is not None
    return json_response(schedule=schedule.name, changed=is_changed, job=job_id)


def _schedule(name: str) -> RecurringJob:
    try:
        return find_visible(current_state(), name)
    except ScheduleNotFound as error:
        raise NotFound(str(error)) from None


def api_limits() -> ResponseReturnValue:
    """Return all limits, by name."""
    access.require_totals()
    return json_response(limits=[_limit_data(limit) for limit in list_limits(current_state())])


def api_limit() -> ResponseReturnValue:
    """Return one limit, with its keys at which jobs wait, that are paused or that jobs use."""
    if "name" not in request.args:
        raise BadRequest("name must be the name of a limit")
    state = current_state()
    access.require_totals()
    limit = _limit(state, request.args["name"])
    names_people = access.is_allowed(access.AUDIT)
    found = (each.key for each in keys_of(state, [limit]))
    keys = [key_data(limit, key, names_people=names_people) for key in found]
    return json_response(**_limit_data(limit), keys=keys)


def api_act_on_limit(verb: str) -> ResponseReturnValue:
    """Pause, resume, override or reset a limit, or pause or resume one of its keys."""
    body = _body()
    name, key = body.pop("limit", None), None
    if not isinstance(name, str):
        raise BadRequest("limit must be the name of a limit")
    access.require_totals()
    limit = _limit(current_state(), name)
    if verb in ("pause", "resume"):
        key = body.pop("key", None)
    options = tuple(RuleValues.__annotations__) if verb == "override" else ()
    if unknown := body.keys() - set(options):
        fields = ", ".join(("limit", *(options or ("key",) * (verb != "reset"))))
        raise BadRequest(f"there is no field {min(unknown)!r}; the fields are {fields}")
    by = access.visitor()
    try:
        if verb == "override":
            limit = limit.override(by, **body)
        elif verb == "reset":
            limit = limit.reset(by)
        else:
            limit = limit.pause(key, by) if verb == "pause" else limit.resume(key, by)
    except (BgJobsError, TypeError) as error:
        return _refused(HTTPStatus.BAD_REQUEST, str(error))
    return json_response(**_limit_data(limit))


def _limit_data(limit: LimitState) -> dict[str, Any]:
    return limit_data(limit, names_people=access.is_allowed(access.AUDIT))


def _limit(state: AppState, name: str) -> LimitState:
    try:
        return find_limit(state, storable(name, MAX_KEY))
    except LimitNotFound as error:
        raise NotFound(str(error)) from None


def api_weights() -> ResponseReturnValue:
    """Return the weights that are configured or overridden, and the keys with jobs whose turn is
    still to come."""
    access.require_totals()
    weights = Weights(current_state())
    return json_response(
        weights=[_weight_data(each) for each in weights.all()],
        turns=[turns_data(each) for each in weights.waiting(SHOWN_KEYS)],
    )


def api_act_on_weight(verb: str) -> ResponseReturnValue:
    """Override or reset the weight of a key."""
    body = _body()
    fields = ("key", "weight") if verb == "override" else ("key",)
    if unknown := body.keys() - set(fields):
        raise BadRequest(f"there is no field {min(unknown)!r}; the fields are {', '.join(fields)}")
    access.require_totals()
    by = access.visitor()
    number: Any = body.get("weight")
    try:
        weight = find_weight(current_state(), body.get("key", ""))
        weight = weight.override(number, by) if verb == "override" else weight.reset(by)
    except BgJobsError as error:
        return _refused(HTTPStatus.BAD_REQUEST, str(error))
    return json_response(**_weight_data(weight))


def _weight_data(weight: WeightState) -> dict[str, Any]:
    return weight_data(weight, names_people=access.is_allowed(access.AUDIT))


def api_audit() -> ResponseReturnValue:
    """Return a page of the audit trail."""
    try:
        page = queries.list_audit(
            current_state(), after=request.args.get("after"), per=params.per_page()
        )
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return json_response(entries=[plain(row) for row in page.rows], older=page.older)


def _body() -> dict[str, Any]:
    try:
        # Not the host's JSON provider, which may convert numbers and times to its own types.
        body = json.loads(request.get_data()) if request.is_json else None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object, sent as application/json")
    return body


def _refused(code: HTTPStatus, message: str) -> Response:
    response = json_response(error={"status": code, "message": message})
    response.status_code = code
    return response
