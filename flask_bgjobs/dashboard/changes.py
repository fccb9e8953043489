"""The POSTs: what people change. Each goes through the operations, and is audited."""

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
"""What can be done to jobs, by verb."""
_AT_ONCE = 1_000
"""Jobs per transaction, where all that match are meant."""
_MAX_CHOSEN = 1_000
_COUNT_SECONDS, _COUNTED_AT_ONCE = 2.0, 50
"""For counting jobs one by one, and how many are read at once for that."""
_FREE_OF_TYPING = 100
"""So many jobs are changed without typing their number."""
_BUDGET_SECONDS = 15.0
"""For one request: a proxy gives up after 30 s or more."""


def register(blueprint: Blueprint) -> None:
    """Add what changes something to ``blueprint``."""
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
    """Cancel, retry or delete a job, then go back to where the visitor came from."""
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
    """What is to be done to many jobs, before it is confirmed."""

    verb: str
    ids: tuple[int, ...]
    """The jobs that were chosen one by one; empty where all that match are meant."""
    filters: queries.JobFilters
    up_to: int
    """The highest id of all that match."""
    count: int
    has_more: bool = False
    """Whether there are more than were counted in time."""

    @property
    def must_be_typed(self) -> bool:
        """Whether the number of jobs has to be typed."""
        return self.verb == "delete" or self.has_more or self.count > _FREE_OF_TYPING


def bulk(verb: str) -> ResponseReturnValue:
    """Cancel, retry or delete many jobs: those that were chosen, or all that match.

    The first request asks for a confirmation, the second one acts.
    """
    state = current_state()
    plan = _plan(state, verb)
    if not plan.count:
        nothing = f"There is no job to {verb}." if "all" in request.form else "Choose jobs first."
        if plan.has_more:
            nothing = f"No job to {verb} was found in time: narrow the filter."
        flash(nothing, "warning")
        return redirect(params.next_page(), HTTPStatus.SEE_OTHER)
    wrong_number = None
    if "confirmed" in request.form:
        typed = re.sub(r"[\s.,']", "", request.form.get("typed", ""))
        if not plan.must_be_typed or typed == str(plan.count):
            _carry_out(state, plan)
            return redirect(params.next_page(), HTTPStatus.SEE_OTHER)
        wrong_number = f"{typed or 'No number'} is not {plan.count:,}: nothing was changed."
    page = render(
        "_confirm" if access.wants_fragment() else "confirm",
        plan=plan,
        wrong_number=wrong_number,
        next_page=params.next_page(),
    )
    return page, HTTPStatus.OK if wrong_number is None else HTTPStatus.BAD_REQUEST


def _plan(state: AppState, verb: str) -> Plan:
    if "all" not in request.form:
        ids = params.ids(_MAX_CHOSEN)
        return Plan(verb, ids, queries.JobFilters(), 0, len(ids))
    try:
        filters = params.filters()
    except ValueError as error:
        abort(400, f"{sentence(str(error))}.")
    if not filters.offers_all:
        abort(400, "All that match can be changed only where no words are searched for.")
    up_to = params.number("up_to") or queries.highest_id(state)
    plan = Plan(verb, (), filters, up_to, params.number("count"), "more" in request.form)
    if plan.count:
        # What was asked is answered, whatever workers have done to these jobs meanwhile.
        return plan
    if access.may_see_totals() and not filters.asks_for_texts:
        count = queries.count_matching(state, filters, verb, up_to)
        return dataclasses.replace(plan, count=count)
    return _counted_one_by_one(state, plan)


def _counted_one_by_one(state: AppState, plan: Plan) -> Plan:
    """The plan with the number of jobs that the visitor may change. The database would also count
    jobs that the authorizer refuses."""
    began = time.monotonic()
    count = 0
    for ids in queries.matching_ids(state, plan.filters, plan.verb, plan.up_to, _COUNTED_AT_ONCE):
        for job in _meant(state, plan, ids).values():
            count += access.is_allowed(plan.verb, job)
            seconds = time.monotonic() - began
            # The question needs a number: without one, counting goes on for longer.
            if seconds > (_COUNT_SECONDS if count else _BUDGET_SECONDS):
                return dataclasses.replace(plan, count=count, has_more=True)
    return dataclasses.replace(plan, count=count, has_more=False)


def _meant(state: AppState, plan: Plan, ids: Sequence[int]) -> dict[int, Job]:
    """Those of the jobs that the visitor may see, and that are shown to match."""
    jobs = queries.jobs_for_authorizer(state, ids)
    if plan.filters.asks_for_texts:
        jobs = {n: job for n, job in jobs.items() if queries.is_listed(state, job, plan.filters)}
    return {number: job for number, job in jobs.items() if access.visible(job)}


def _carry_out(state: AppState, plan: Plan) -> None:
    deadline = time.monotonic() + _BUDGET_SECONDS
    batches: Iterable[Sequence[int]] = [plan.ids]
    if not plan.ids:
        batches = queries.matching_ids(state, plan.filters, plan.verb, plan.up_to, _AT_ONCE)
    total = ActionResult()
    for ids in batches:
        result = _act_on_allowed(state, plan, ids)
        total.done += result.done
        total.requested += result.requested
        total.skipped |= result.skipped
        if time.monotonic() > deadline:
            flash("That is as much as one request does. Do it again for the rest.", "warning")
            break
    changed = total.done or total.requested
    if changed:
        flash(f"{total.in_words(DONE[plan.verb]).capitalize()}.", "success")
    reasons = collections.Counter(total.skipped.values())
    for reason, number in reasons.most_common(5):
        flash(f"{number:,} skipped: {reason}.", "warning")


def _act_on_allowed(state: AppState, plan: Plan, ids: Sequence[int]) -> ActionResult:
    """Do it to those of the jobs that the visitor may change; the others do not exist for them."""
    jobs = _meant(state, plan, ids)
    allowed = [number for number, job in jobs.items() if access.is_allowed(plan.verb, job)]
    reason = None if plan.ids else params.query_string(plan.filters) or "all jobs"
    result = ACTS[plan.verb](state, sorted(allowed), access.visitor(reason))
    refused = jobs.keys() - set(allowed)
    result.skipped |= dict.fromkeys(refused, "you are not allowed to")
    # Of all that match, nothing is said of those that the visitor may not see.
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
    """Ask a worker to finish what it runs, and to end."""
    worker_id = params.number("worker")
    asked_now = current_state().store.drain_worker(worker_id, access.visitor())
    if asked_now:
        flash("The worker was asked to finish what it runs, and to end.", "success")
    else:
        flash("The worker has ended, or was asked already.", "warning")
    return redirect(url_for(".list_workers"), HTTPStatus.SEE_OTHER)
