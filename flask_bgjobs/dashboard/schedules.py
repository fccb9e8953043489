"""The page of schedules, the page of one schedule, and the changes of them."""

from __future__ import annotations

from http import HTTPStatus

from flask import Blueprint, abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from ..errors import BgJobsError, ScheduleNotFound
from ..flow.schedules.manage import RecurringJob
from ..job.text import sentence
from ..state import AppState, current_state
from . import access, params
from .pages import live_page
from .rendering import render
from .schedule_form import MISSED_WORDS, OVERLAP_WORDS, ScheduleForm, form_of
from .schedule_rows import ScheduleDetail, detail_of, find_visible, list_rows


def register(blueprint: Blueprint) -> None:
    """Add the pages to ``blueprint``."""
    blueprint.add_url_rule("/schedules", view_func=list_schedules)
    blueprint.add_url_rule(
        "/schedules/<any(run, pause, resume, override, reset):verb>",
        view_func=act_on_schedule,
        methods=["POST"],
    )


def list_schedules() -> ResponseReturnValue:
    """Show a page of schedules, or the schedule that the query parameter ``name`` names."""
    state = current_state()
    if "name" in request.args:
        return _show(state, _find(state, request.args["name"]))
    after, q = params.name("after"), params.name("q")
    page = list_rows(state, after=after, contains=q, limit=params.PER_PAGE)
    return live_page("schedules", page=page, q=q, is_first=not after)


def act_on_schedule(verb: str) -> ResponseReturnValue:
    """Run, pause, resume, override or reset the schedule in the form field ``schedule``."""
    state = current_state()
    schedule = _find(state, request.form.get("schedule", ""))
    if verb == "override":
        return _override(state, schedule)
    try:
        flash(*_change(schedule, verb))
    except BgJobsError as error:
        abort(400, f"{sentence(str(error))}.")
    return redirect(params.next_page(".list_schedules"), HTTPStatus.SEE_OTHER)


def _change(schedule: RecurringJob, verb: str) -> tuple[str, str]:
    """Change a schedule.

    :returns: a message for the visitor, and its category.
    """
    name, by = schedule.name, access.visitor()
    if verb == "run":
        job = schedule.run_now(by)
        if job.deduplicated:
            which = f"job {job.id}" if access.visible(job) else "another job"
            return f"Schedule {name} was not run: {which} holds its unique_key.", "warning"
        return f"Job {job.id} of schedule {name} enqueued.", "success"
    if verb == "pause":
        schedule.pause(by)
        is_changed, done, was = schedule.paused_at is None, "paused", "paused already"
    elif verb == "resume":
        schedule.resume(by)
        is_changed, done, was = schedule.paused_at is not None, "resumed", "not paused"
    else:
        schedule.reset(by)
        is_changed, done, was = schedule.overridden_at is not None, "reset", "not overridden"
    if is_changed:
        return f"Schedule {name} {done}.", "success"
    return f"Schedule {name} was {was}.", "warning"


def _override(state: AppState, schedule: RecurringJob) -> ResponseReturnValue:
    form = ScheduleForm()
    page = url_for(".list_schedules", name=schedule.name)
    try:
        if form.validate():
            if form.changes:
                schedule.override(access.visitor(), **form.changes)
                flash(f"Schedule {schedule.name} changed.", "success")
            else:
                flash("No value was different: nothing was changed.", "warning")
            return redirect(page, HTTPStatus.SEE_OTHER)
    except BgJobsError as error:
        form.place_error(error)
    detail = detail_of(state, schedule)
    return render("schedule", **_values(detail, form)), HTTPStatus.BAD_REQUEST


def _show(state: AppState, schedule: RecurringJob) -> ResponseReturnValue:
    detail = detail_of(state, schedule)
    return live_page("schedule", **_values(detail, form_of(schedule.recurrence)))


def _values(detail: ScheduleDetail, form: ScheduleForm) -> dict[str, object]:
    return {
        "detail": detail,
        "form": form,
        "missed_words": MISSED_WORDS,
        "overlap_words": OVERLAP_WORDS,
    }


def _find(state: AppState, name: str) -> RecurringJob:
    try:
        return find_visible(state, name)
    except ScheduleNotFound as error:
        abort(404, f"{sentence(str(error))}.")
