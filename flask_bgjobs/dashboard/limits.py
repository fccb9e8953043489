"""The page of limits, the page of one limit, and the changes of them."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus

from flask import Blueprint, abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue

from ..errors import BgJobsError, LimitNotFound
from ..flow.limits.manage import LimitState, busy_keys, find, list_limits
from ..job.limits import MAX_KEY
from ..job.text import sentence, storable
from ..operations.queries import Count
from ..state import AppState, current_state
from ..store import MAX_COUNTED, KeyRow
from . import access, params
from .limit_form import LimitForm, form_of
from .pages import live_page
from .rendering import render
from .weights import WeightForm, weighted_keys

SHOWN_KEYS = 50
"""Most keys on a page."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeyOfLimit:
    """A key with its limit."""

    limit: LimitState
    key: KeyRow

    @property
    def rate_left(self) -> int | None:
        """How many jobs may start within the current period; ``None`` without a rate."""
        return self.limit.rate_left(self.key)

    @property
    def waiting(self) -> Count:
        """How many jobs wait, also those that wait for their queue."""
        return Count(self.key.waiting + self.key.parked, MAX_COUNTED)

    @property
    def parked(self) -> Count:
        """How many jobs wait for their queue."""
        return Count(self.key.parked, MAX_COUNTED)

    @property
    def is_full(self) -> bool:
        """Whether all of its seats are taken."""
        concurrency = self.limit.rule.concurrency
        return concurrency is not None and self.key.held >= concurrency


def register(blueprint: Blueprint) -> None:
    """Add the pages to ``blueprint``."""
    blueprint.add_url_rule("/limits", view_func=list_limits_page, endpoint="list_limits")
    blueprint.add_url_rule(
        "/limits/<any(pause, resume, override, reset):verb>",
        view_func=act_on_limit,
        methods=["POST"],
    )


def list_limits_page() -> ResponseReturnValue:
    """Show all limits, or the limit that the query parameter ``name`` names."""
    state = current_state()
    # Limits have names of jobs, and keys are made of their parameters.
    access.require_totals()
    if "name" in request.args:
        limit = _find(state, request.args["name"])
        return live_page("limit", **_values(state, limit, form_of(limit.rule)))
    limits = list_limits(state)
    return live_page(
        "limits",
        limits=limits,
        keys=keys_of(state, limits),
        most=SHOWN_KEYS,
        weights=weighted_keys(state),
        form=WeightForm(formdata=None),
        now=limits[0].now.replace(tzinfo=None) if limits else state.store.clock(),
    )


def act_on_limit(verb: str) -> ResponseReturnValue:
    """Pause, resume, override or reset the limit in the form field ``limit``, or pause or resume
    the key in the form field ``key``."""
    state = current_state()
    access.require_totals()
    limit = _find(state, request.form.get("limit", ""))
    if verb == "override":
        return _override(state, limit)
    key = request.form.get("key")
    try:
        flash(*_change(limit, verb, key))
    except BgJobsError as error:
        abort(400, f"{sentence(str(error))}.")
    return redirect(params.next_page(".list_limits"), HTTPStatus.SEE_OTHER)


def keys_of(state: AppState, limits: list[LimitState]) -> list[KeyOfLimit]:
    """The keys at which jobs wait, that are paused or that jobs use."""
    by_id = {limit.id: limit for limit in limits}
    found = busy_keys(state, SHOWN_KEYS, limits[0] if len(limits) == 1 else None)
    return [KeyOfLimit(by_id[key.limit_id], key) for key in found if key.limit_id in by_id]


def _find(state: AppState, name: str) -> LimitState:
    """The limit with this name; the request ends with 404 if there is none."""
    try:
        return find(state, storable(name, MAX_KEY))
    except LimitNotFound as error:
        abort(404, f"{sentence(str(error))}.")


def _change(limit: LimitState, verb: str, key: str | None) -> tuple[str, str]:
    """Change a limit or one of its keys.

    :returns: a message for the visitor, and its category.
    """
    by = access.visitor()
    name = f"Limit {limit.name}" if key is None else f"Key {key} of limit {limit.name}"
    if verb == "pause":
        limit.pause(key, by)
        return f"{name} is paused. Running jobs go on.", "success"
    if verb == "resume":
        limit.resume(key, by)
        return f"{name} is not paused.", "success"
    limit.reset(by)
    return f"{name} is as in the code: {limit.code.in_words()}.", "success"


def _override(state: AppState, limit: LimitState) -> ResponseReturnValue:
    form = LimitForm()
    try:
        if form.validate():
            if form.changes:
                changed = limit.override(access.visitor(), **form.changes)
                flash(f"Limit {limit.name} allows {changed.rule.in_words()} now.", "success")
            else:
                flash("No value was different: nothing was changed.", "warning")
            return redirect(url_for(".list_limits", name=limit.name), HTTPStatus.SEE_OTHER)
    except BgJobsError as error:
        form.place_error(error)
    return render("limit", **_values(state, limit, form)), HTTPStatus.BAD_REQUEST


def _values(state: AppState, limit: LimitState, form: LimitForm) -> dict[str, object]:
    return {
        "limit": limit,
        "keys": keys_of(state, [limit]),
        "form": form,
        "most": SHOWN_KEYS,
    }
