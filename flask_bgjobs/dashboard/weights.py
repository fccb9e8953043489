"""The weights of keys on the page of limits, and the changes of them."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus

from flask import Blueprint, abort, flash, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_wtf import FlaskForm
from wtforms import Field, StringField, ValidationError

from ..errors import BgJobsError
from ..flow.fairness.manage import Weights, WeightState, find
from ..job.text import sentence
from ..job.turns import check_weight
from ..state import AppState, current_state
from ..store import KeyTurns
from . import access, params
from .rendering import render

SHOWN_KEYS = 50
"""Most keys with turns on a page."""


class WeightForm(FlaskForm):  # type: ignore[misc]  # Flask-WTF has no types
    """A key and its weight."""

    class Meta:
        # The blueprint has already checked the token.
        csrf = False

    key = StringField("Key")
    weight = StringField("Weight")

    def number(self) -> float:
        """The valid weight."""
        return _number(self.weight)

    def validate_key(self, field: Field) -> None:
        try:
            find(current_state(), field.data or "")
        except BgJobsError as error:
            raise ValidationError(f"{sentence(str(error))}.") from None

    def validate_weight(self, field: Field) -> None:
        _number(field)


@dataclasses.dataclass(frozen=True, slots=True)
class WeightedKey:
    """A key with its weight, and its turns in one queue."""

    weight: WeightState
    turns: KeyTurns | None
    """``None`` if it has no turns that are still to come."""


def register(blueprint: Blueprint) -> None:
    """Add the changes to ``blueprint``."""
    blueprint.add_url_rule(
        "/weights/<any(override, reset):verb>", view_func=act_on_weight, methods=["POST"]
    )


def weighted_keys(state: AppState) -> list[WeightedKey]:
    """The keys with turns that are still to come, and then the other keys whose weight is
    configured or overridden."""
    weights = Weights(state)
    known = {each.key: each for each in weights.all()}
    waiting = weights.waiting(SHOWN_KEYS)
    found = [
        WeightedKey(known.get(each.key) or WeightState(state, each.key, None), each)
        for each in waiting
    ]
    others = known.keys() - {each.key for each in waiting}
    return [*found, *(WeightedKey(known[key], None) for key in sorted(others))]


def act_on_weight(verb: str) -> ResponseReturnValue:
    """Override or reset the weight of the key in the form field ``key``."""
    state = current_state()
    access.require_totals()
    return _override(state) if verb == "override" else _reset(state)


def _override(state: AppState) -> ResponseReturnValue:
    form = WeightForm()
    if not form.validate():
        return render("weight", form=form), HTTPStatus.BAD_REQUEST
    changed = find(state, form.key.data or "").override(form.number(), access.visitor())
    flash(f"The weight of {changed.key} is {changed.weight:g} now.", "success")
    return redirect(url_for(".list_limits"), HTTPStatus.SEE_OTHER)


def _reset(state: AppState) -> ResponseReturnValue:
    try:
        weight = find(state, request.form.get("key", "")).reset(access.visitor())
    except BgJobsError as error:
        abort(400, f"{sentence(str(error))}.")
    flash(f"The weight of {weight.key} is as in the configuration: {weight.weight:g}.", "success")
    return redirect(params.next_page(".list_limits"), HTTPStatus.SEE_OTHER)


def _number(field: Field) -> float:
    try:
        return check_weight(float((field.data or "").strip()))
    except ValueError as error:
        text = str(error) if "weight" in str(error) else "give a number, such as 2 or 0.5"
        raise ValidationError(f"{sentence(text)}.") from None
