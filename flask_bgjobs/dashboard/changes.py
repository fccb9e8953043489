"""The POST requests that change jobs, queues and workers. All changes are audited."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus

from flask import Blueprint, abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from ..errors import BgJobsError
from ..job.text import sentence
from ..models import Job
from ..operations import actions, queries
from ..state import AppState, current_state
from ..store import DONE, ActionResult
from . import access, params
from .rendering import render

ACTS: dict[str, actions.Act] = {
    "cancel": actions.cancel,
    "retry": actions.retry,
    "delete": actions.delete,
}
"""The actions on jobs, by verb."""
_BATCH_JOBS = 1_000
"""Jobs per transaction when all matching jobs are changed."""
_MAX_SELECTED = 1_000
"""Highest number of jobs that can be selected one by one."""
_COUNT_SECONDS, _COUNT_BATCH_JOBS = 2.0, 50
"""Time for counting the jobs that the visitor may change, and jobs that one query reads for it."""
_MAX_UNTYPED = 100
"""Highest number of jobs that are changed without typing their number."""
_REQUEST_SECONDS = 15.0
"""Time for one request. Proxies wait for 30 s or more."""


def register(blueprint: Blueprint) -> None:
    """Add the views that change something to ``blueprint``."""
    blueprint.add_url_rule(
        "/job/<int:job_id>/<any(cancel, retry, delete):verb>", view_func=act, methods=["POST"]
    )
    blueprint.add_url_rule(
        "/bulk/<any(cancel, retry, delete):verb>", view_func=bulk, methods=["POST"]
    )
    blueprint.add_url_rule(
        "/queues/<any(pause, resume):verb>", view_func=act_on_queue, methods=["POST"]
    )
    blueprint.add_url_rule("/workers/<any(drain):verb>", view_func=act_on_worker, methods=["POST"])


def act(job_id: int, verb: str) -> ResponseReturnValue:
    """Cancel, retry or delete a job, and redirect to the page that the visitor came from."""
    result = ACTS[verb](current_state(), [job_id], access.visitor())
    for number in result.done:
        flash(f"Job {number} {DONE[verb]}.", "success")
    for number in result.requested:
        flash(f"Job {number} was asked to stop.", "success")
    for number, reason in result.skipped.items():
        flash(f"Job {number} skipped: {reason}.", "warning")
    following = params.next_page()
    if verb == "delete" and result.done and following == url_for(".show_job", job_id=job_id):
        following = url_for(".list_jobs")
    return redirect(following, HTTPStatus.SEE_OTHER)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """An action on many jobs that waits for its confirmation."""

    verb: str
    ids: tuple[int, ...]
    """The jobs selected one by one; empty when all matching jobs are meant."""
    filters: queries.JobFilters
    up_to: int
    """The highest job id at the time of the confirmation; later jobs are not changed."""
    count: int
    has_more: bool = False
    """Whether the count stopped early because it took too long."""

    @property
    def must_be_typed(self) -> bool:
        """Whether the visitor has to type the number of jobs to confirm."""
        return self.verb == "delete" or self.has_more or self.count > _MAX_UNTYPED


def bulk(verb: str) -> ResponseReturnValue:
    """Cancel, retry or delete many jobs: the selected ones, or all matching ones.

    The first request shows a confirmation, the second one makes the change.
    """
    state = current_state()
    plan = _plan(state, verb)
    if not plan.count:
        warning = f"There is no job to {verb}." if "all" in request.form else "Select jobs first."
        if plan.has_more:
            warning = f"No job to {verb} was found in time: narrow the filter."
        flash(warning, "warning")
        return redirect(params.next_page(), HTTPStatus.SEE_OTHER)
    wrong_number = None
    if "confirmed" in request.form:
        typed = re.sub(r"[\s.,']", "", request.form.get("typed", ""))
        if not plan.must_be_typed or typed == str(plan.count):
            _execute(state, plan)
            return redirect(params.next_page(), HTTPStatus.SEE_OTHER)
        entered = f"You typed {typed}, not {plan.count:,}" if typed else "You typed no number"
        wrong_number = f"{entered}: nothing was changed."
    page = render(
        "_confirm" if access.wants_fragment() else "confirm",
        plan=plan,
        wrong_number=wrong_number,
        next_page=params.next_page(),
    )
    return page, HTTPStatus.OK if wrong_number is None else HTTPStatus.BAD_REQUEST


def _plan(state: AppState, verb: str) -> Plan:
    if "all" not in request.form:
        ids = params.ids(_MAX_SELECTED)
        return Plan(verb, ids, queries.JobFilters(), 0, len(ids))
    try:
        filters = params.filters()
    except ValueError as error:
        abort(400, f"{sentence(str(error))}.")
    if not filters.offers_all:
        abort(400, "All matching jobs can be changed only if the filter has no search text.")
    up_to = params.number("up_to") or queries.highest_id(state)
    plan = Plan(verb, (), filters, up_to, params.number("count"), "more" in request.form)
    if plan.count:
        # The confirmation showed this count. A new one could differ, as workers go on running jobs.
        return plan
    if access.may_see_totals() and not filters.has_maskable_fields:
        count = queries.count_matching(state, filters, verb, up_to)
        return dataclasses.replace(plan, count=count)
    return _count_allowed(state, plan)


def _count_allowed(state: AppState, plan: Plan) -> Plan:
    """The plan with the number of jobs that the visitor may change.

    The authorizer is asked about each job. A count in SQL would include jobs that it refuses.
    """
    began = time.monotonic()
    count = 0
    for ids in queries.matching_ids(state, plan.filters, plan.verb, plan.up_to, _COUNT_BATCH_JOBS):
        for job in _visible_matches(state, plan, ids).values():
            count += access.is_allowed(plan.verb, job)
            elapsed_seconds = time.monotonic() - began
            # The confirmation needs a number: as long as it is 0, count for longer.
            if elapsed_seconds > (_COUNT_SECONDS if count else _REQUEST_SECONDS):
                return dataclasses.replace(plan, count=count, has_more=True)
    return dataclasses.replace(plan, count=count, has_more=False)


def _visible_matches(state: AppState, plan: Plan, ids: Sequence[int]) -> dict[int, Job]:
    """The jobs of ``ids`` that the visitor may see, and whose masked values match the filter."""
    jobs = queries.jobs_for_authorizer(state, ids)
    if plan.filters.has_maskable_fields:
        jobs = {n: job for n, job in jobs.items() if queries.is_listed(state, job, plan.filters)}
    return {number: job for number, job in jobs.items() if access.visible(job)}


def _execute(state: AppState, plan: Plan) -> None:
    """Make the change, in batches, until the time of one request is used up."""
    deadline = time.monotonic() + _REQUEST_SECONDS
    batches: Iterable[Sequence[int]] = [plan.ids]
    if not plan.ids:
        batches = queries.matching_ids(state, plan.filters, plan.verb, plan.up_to, _BATCH_JOBS)
    total = ActionResult()
    for ids in batches:
        result = _act_on_allowed(state, plan, ids)
        total.done += result.done
        total.requested += result.requested
        total.skipped |= result.skipped
        if time.monotonic() > deadline:
            flash("The time for one request is up. Repeat the action for the rest.", "warning")
            break
    changed = total.done or total.requested
    if changed:
        flash(f"{total.in_words(DONE[plan.verb]).capitalize()}.", "success")
    reasons = collections.Counter(total.skipped.values())
    for reason, number in reasons.most_common(5):
        flash(f"{number:,} skipped: {reason}.", "warning")


def _act_on_allowed(state: AppState, plan: Plan, ids: Sequence[int]) -> ActionResult:
    """Change the jobs that the visitor may change, and report the others as skipped."""
    jobs = _visible_matches(state, plan, ids)
    allowed = [number for number, job in jobs.items() if access.is_allowed(plan.verb, job)]
    reason = None if plan.ids else params.query_string(plan.filters) or "all jobs"
    result = ACTS[plan.verb](state, sorted(allowed), access.visitor(reason))
    refused = jobs.keys() - set(allowed)
    result.skipped |= dict.fromkeys(refused, "you are not allowed to")
    # Hidden jobs are reported only if they were selected by id, and then as missing ones.
    result.skipped |= {n: "it does not exist" for n in plan.ids if n not in jobs}
    return result


def act_on_queue(verb: str) -> ResponseReturnValue:
    """Pause or resume a queue."""
    state = current_state()
    name = request.form.get("queue", "")
    change: Callable[..., bool] = {"pause": actions.pause, "resume": actions.resume}[verb]
    try:
        changed = change(state, name, access.visitor())
    except BgJobsError as error:
        abort(400, f"{sentence(str(error))}.")
    now = {"pause": "paused", "resume": "resumed"}[verb]
    was = {"pause": "paused already", "resume": "not paused"}[verb]
    if changed:
        flash(f"Queue {name} {now}.", "success")
    else:
        flash(f"Queue {name} was {was}.", "warning")
    return redirect(url_for(".list_queues"), HTTPStatus.SEE_OTHER)


def act_on_worker(verb: str) -> ResponseReturnValue:
    """Ask a worker to finish its running jobs and stop."""
    worker_id = params.number("worker")
    changed = current_state().store.drain_worker(worker_id, access.visitor())
    if changed:
        flash("The worker was asked to finish its running jobs and stop.", "success")
    else:
        flash("The worker has stopped, or is already draining.", "warning")
    return redirect(url_for(".list_workers"), HTTPStatus.SEE_OTHER)
