"""The form that overrides the numbers of a limit."""

from __future__ import annotations

import functools
import json
from typing import Any

from flask_wtf import FlaskForm
from wtforms import Field, HiddenField, StringField, ValidationError

from ..errors import BgJobsError
from ..job import durations
from ..job.limits import Rule
from ..job.text import sentence

_MOST_DIGITS = 12
"""A longer number is out of range in any case."""


class LimitForm(FlaskForm):  # type: ignore[misc]  # Flask-WTF has no types
    """The numbers of a limit. ``validate`` sets ``changes``."""

    class Meta:
        # The blueprint has already checked the token.
        csrf = False

    concurrency = StringField("At once")
    rate = StringField("Starts")
    per = StringField("In a period of")
    burst = StringField("Burst")
    before = HiddenField()
    """JSON of the values that the form showed. Only the fields that the visitor has changed become
    overrides, so that the others go on following the code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes: dict[str, Any] = {}
        """The values to override, by name; ``None`` for an emptied field."""

    def validate_concurrency(self, field: Field) -> None:
        self._note(field, _number(field))

    def validate_rate(self, field: Field) -> None:
        self._note(field, _number(field))

    def validate_per(self, field: Field) -> None:
        text = _text(field)
        try:
            self._note(field, durations.parse(text, "the period") if text else None)
        except ValueError as error:
            raise ValidationError(f"{sentence(str(error))}.") from None

    def validate_burst(self, field: Field) -> None:
        self._note(field, _number(field))

    def place_error(self, error: BgJobsError) -> None:
        """Show an error above the form."""
        self.form_errors.append(f"{sentence(str(error))}.")

    def _note(self, field: Field, value: Any) -> None:
        if _text(field) != self._before.get(field.name, ""):
            self.changes[field.name] = value

    @functools.cached_property
    def _before(self) -> dict[str, Any]:
        try:
            before = json.loads(self.before.data or "{}")
        except (ValueError, RecursionError):
            return {}
        return before if isinstance(before, dict) else {}


def form_of(rule: Rule) -> LimitForm:
    """The form, filled in with the present numbers."""
    values = {
        "concurrency": _shown(rule.concurrency),
        "rate": _shown(rule.rate),
        "per": "" if rule.per_seconds is None else f"{rule.per_seconds:g}s",
        "burst": _shown(rule.burst if rule.burst > 1 else None),
    }
    return LimitForm(formdata=None, data={**values, "before": json.dumps(values)})


def _shown(number: int | None) -> str:
    return "" if number is None else str(number)


def _text(field: Field) -> str:
    return (field.data or "").strip()


def _number(field: Field) -> int | None:
    text = _text(field)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise ValidationError("Give a whole number, such as 5.")
    return int(text)
