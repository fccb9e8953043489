"""The form that overrides how a schedule recurs."""

from __future__ import annotations

import functools
import json
import re
import zoneinfo
from typing import Any

from flask_wtf import FlaskForm
from wtforms import Field, HiddenField, StringField, ValidationError

from ..errors import BgJobsError
from ..flow.schedules.recurrence import Recurrence, checked, shortest
from ..job import durations
from ..job.text import sentence

MISSED_WORDS = {
    "once": "one run for all of them",
    "skip": "none of them runs",
    "all": "each of them, at most 100",
}
"""What runs for times at which no worker was there, by the value of ``missed``."""
OVERLAP_WORDS = {
    "skip": "the run is skipped",
    "queue": "the run waits until that job has finished",
    "allow": "it runs anyway",
}
"""What happens while the last job is not finished, by the value of ``overlap``."""


class ScheduleForm(FlaskForm):  # type: ignore[misc]  # Flask-WTF has no types
    """The options of a recurrence. ``validate`` sets ``changes``."""

    class Meta:
        # The blueprint has already checked the token.
        csrf = False

    cron = StringField("Cron expression")
    every = StringField("Interval")
    timezone = StringField("Time zone")
    missed = StringField("Missed runs")
    grace = StringField("Grace")
    overlap = StringField("Overlap")
    jitter = StringField("Jitter")
    before = HiddenField()
    """JSON of the values that the form showed. Only the fields that the visitor has changed become
    overrides, so that the others go on following the code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changes: dict[str, Any] = {}
        """The values to override, by the name of the option."""

    @property
    def missed_choices(self) -> dict[str, str]:
        """The values of ``missed`` with their labels."""
        return _labels(MISSED_WORDS)

    @property
    def overlap_choices(self) -> dict[str, str]:
        """The values of ``overlap`` with their labels."""
        return _labels(OVERLAP_WORDS)

    zones = staticmethod(functools.cache(lambda: sorted(zoneinfo.available_timezones())))

    def validate_cron(self, field: Field) -> None:
        self._check(field, _text(field) or None)

    def validate_every(self, field: Field) -> None:
        if _text(field) and _text(self.cron):
            raise ValidationError("Give either a cron expression or an interval, not both.")
        if not (_text(field) or _text(self.cron)):
            raise ValidationError("Give a cron expression or an interval.")
        self._check(field, _seconds(field))

    def validate_timezone(self, field: Field) -> None:
        self._check(field, _text(field))

    def validate_missed(self, field: Field) -> None:
        self._check(field, _text(field))

    def validate_grace(self, field: Field) -> None:
        self._check(field, _seconds(field))
        if self._is_changed(field) and not _text(field):
            self.changes["grace"] = None

    def validate_overlap(self, field: Field) -> None:
        self._check(field, _text(field))

    def validate_jitter(self, field: Field) -> None:
        self._check(field, _seconds(field) or 0.0)

    def place_error(self, error: BgJobsError) -> None:
        """Show an error at the field that it is about, or above the form."""
        text = str(error)
        named = re.match(r"[a-z]+", text)
        place = self[named[0]].errors if named and named[0] in self else self.form_errors
        place.append(_sentence(error))

    def _check(self, field: Field, value: Any) -> None:
        try:
            values = checked({field.name: value})
        except ValueError as error:
            raise ValidationError(_sentence(error)) from None
        if self._is_changed(field):
            self.changes.update(values)

    def _is_changed(self, field: Field) -> bool:
        return bool(_text(field) != self._before.get(field.name, ""))

    @functools.cached_property
    def _before(self) -> dict[str, Any]:
        try:
            before = json.loads(self.before.data or "{}")
        except (ValueError, RecursionError):
            return {}
        return before if isinstance(before, dict) else {}


def form_of(recurrence: Recurrence) -> ScheduleForm:
    """The form, filled in with the present values."""
    values = {
        "cron": recurrence.cron or "",
        "every": shortest(recurrence.every),
        "timezone": recurrence.timezone,
        "missed": recurrence.missed,
        "grace": shortest(recurrence.grace),
        "overlap": recurrence.overlap,
        "jitter": shortest(recurrence.jitter),
    }
    return ScheduleForm(formdata=None, data={**values, "before": json.dumps(values)})


def _labels(words: dict[str, str]) -> dict[str, str]:
    return {value: f"{value}: {text}" for value, text in words.items()}


def _sentence(error: Exception) -> str:
    text = sentence(str(error))
    # It may end with a question: "did you mean …?"
    return text if text.endswith("?") else f"{text}."


def _text(field: Field) -> str:
    return (field.data or "").strip()


def _seconds(field: Field) -> float | None:
    text = _text(field)
    if not text:
        return None
    try:
        return durations.parse(text, field.name)
    except ValueError as error:
        raise ValidationError(_sentence(error)) from None
