"""The dispatch form: parses text for ``run_background_job``, and shows errors at their field."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import inspect
import json
import re
import zoneinfo
from collections.abc import Callable
from typing import Any

from flask_wtf import FlaskForm
from wtforms import Field, HiddenField, StringField, TextAreaField, ValidationError

from ..config import check_queue
from ..errors import BgJobsError, JobNotAllowed
from ..job import serialize
from ..job.redact import MASK
from ..job.text import sentence
from ..models import Job
from ..operations import actions
from ..options import priority_number
from ..registry import Registry
from ..state import AppState, current_state
from ..store import Actor

_UTC = "UTC"
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclasses.dataclass(frozen=True, slots=True)
class JobChoice:
    """An option of the job field: a function, or a class with one of its methods."""

    value: str
    """The dotted name; for a class followed by a colon and the method."""
    label: str
    """The dotted name with its parameters."""
    error: str | None = None
    """Why the job cannot be dispatched, such as a failed import."""


def job_choices(registry: Registry) -> list[JobChoice]:
    """The options of the job field: all functions and methods on the allow-list."""
    return [choice for name in registry.names() for choice in _choices_of(registry, name)]


def _choices_of(registry: Registry, name: str) -> list[JobChoice]:
    try:
        methods: list[str | None] = [*registry.methods(name)] or [None]
        return [_choice(registry, name, method) for method in methods]
    except BgJobsError as error:
        return [JobChoice(name, name, str(error))]


def _choice(registry: Registry, name: str, method: str | None) -> JobChoice:
    label = f"{name}.{method}" if method else name
    names = [_parameter_text(parameter) for parameter in _signature(registry, name, method)]
    return JobChoice(job_value(name, method), f"{label}({', '.join(names)})")


def _parameter_text(parameter: inspect.Parameter) -> str:
    """The name of a parameter, as in a signature without types and values."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}=…"


def _signature(registry: Registry, name: str, method: str | None) -> list[inspect.Parameter]:
    return list(registry.resolve(name, method).signature.parameters.values())


def job_value(target: str, method: str | None) -> str:
    """The value of the job field for a target and its method."""
    return target if method is None else f"{target}:{method}"


@functools.cache
def _zone_names() -> list[str]:
    """The time zones of this machine. Cached, because finding them reads many files."""
    return sorted(zoneinfo.available_timezones())


class DispatchForm(FlaskForm):  # type: ignore[misc]  # Flask-WTF has no types
    """The fields of the dispatch form. ``validate`` sets ``options`` and ``values``."""

    class Meta:
        # The blueprint has already checked the token.
        csrf = False

    job = StringField("Job")
    parameters = TextAreaField("Parameters", default="[]")
    queue = StringField("Queue")
    priority = StringField("Priority")
    delay = StringField("Delay in seconds")
    zone = StringField("Time zone", default=_UTC)
    run_at = StringField("Run at")
    retries = StringField("Retries")
    retry_delay = StringField("Retry delay in seconds")
    timeout = StringField("Timeout in seconds")
    again = HiddenField()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.values: Any = []
        """The parsed parameters."""
        self.options: dict[str, Any] = {}
        """The other arguments of ``run_background_job``."""

    def validate_job(self, field: Field) -> None:
        if not field.data:
            raise ValidationError("Choose a job.")

    def validate_parameters(self, field: Field) -> None:
        self.values = _parameters(field.data or "[]")

    def validate_queue(self, field: Field) -> None:
        text = (field.data or "").strip()
        if text:
            _check(check_queue, text)
        self._keep(field, text or None)

    def validate_priority(self, field: Field) -> None:
        text = (field.data or "").strip()
        value = int(text) if _NUMBER.fullmatch(text) else text
        if text:
            _check(priority_number, value, current_state().config.priorities)
        self._keep(field, value if text else None)

    def validate_delay(self, field: Field) -> None:
        self._keep(field, _seconds(field.data))

    def validate_zone(self, field: Field) -> None:
        _zone(field.data)

    def validate_run_at(self, field: Field) -> None:
        # An unknown zone is reported at its own field.
        zone = dt.UTC if self.zone.errors else _zone(self.zone.data)
        self._keep(field, _moment(field.data, zone))
        if field.data and self.delay.data:
            raise ValidationError("Give either a delay or a time, not both.")

    def validate_retries(self, field: Field) -> None:
        text = (field.data or "").strip()
        if text and not _NUMBER.fullmatch(text):
            raise ValidationError("Must be a whole number.")
        self._keep(field, int(text) if text else None)

    def validate_retry_delay(self, field: Field) -> None:
        texts = [text for text in (field.data or "").split(",") if text.strip()]
        delays = [_seconds(text) for text in texts]
        self._keep(field, delays[0] if len(delays) == 1 else delays or None)

    def validate_timeout(self, field: Field) -> None:
        self._keep(field, _seconds(field.data))

    def _keep(self, field: Field, value: Any) -> None:
        self.options[field.name] = value

    zones = staticmethod(_zone_names)

    @property
    def target(self) -> str:
        """The dotted name of the selected job."""
        return str(self.job.data).partition(":")[0]

    @property
    def method(self) -> str | None:
        """The method of the selected job; ``None`` for a function."""
        return str(self.job.data).partition(":")[2] or None

    def place_error(self, error: BgJobsError) -> None:
        """Show an error at the field that it is about, or above the form."""
        text = str(error)
        # Messages begin with the option's name: "priority 'x' is unknown …", "parameters[0]: …".
        named = re.match(r"(?:the |each )?([a-z_]+)", text)
        name = "job" if isinstance(error, JobNotAllowed) else named and named[1]
        place = self[name].errors if name in self else self.form_errors
        place.append(sentence(text))


def _delays_text(text: str) -> str:
    """Retry delays as the form takes them, such as ``5, 30``; empty when they cannot be read."""
    try:
        return ", ".join(f"{delay:g}" for delay in json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return ""


def form_like(state: AppState, job: Job) -> DispatchForm:
    """The form, filled in with the options and masked parameters of ``job``."""
    return DispatchForm(
        formdata=None,
        data={
            "job": job_value(job.target, job.method),
            "parameters": _editable(_masked(state, job)),
            "queue": job.queue,
            "priority": str(job.priority),
            "retries": str(job.retries),
            "retry_delay": _delays_text(job.retry_delay),
            "timeout": "" if job.timeout is None else f"{job.timeout:g}",
            "again": str(job.id),
        },
    )


def dispatch_job(state: AppState, form: DispatchForm, again: Job | None, by: Actor) -> Job | None:
    """Enqueue the job that the form describes.

    :param again: the job that filled in the form. Values that are still masked are copied from it
        here, so that they never leave the server.
    :returns: the job, or ``None`` when it is refused; the form then holds the errors.
    """
    if not form.validate():
        return None
    parameters = form.values
    more: dict[str, Any] = {}
    if again is not None and (again.target, again.method) == (form.target, form.method):
        # Only for the same target: another job may not mask these values.
        parameters = _unmask(parameters, _masked(state, again), again.parameters)
        more = {
            "backoff": again.backoff,
            "max_retry_delay": again.max_retry_delay,
            "jitter": again.jitter,
            "tags": again.tags or None,
            "owner": again.owner,
        }
    try:
        return actions.dispatch(
            state, by, form.target, form.method, parameters, **form.options, **more
        )
    except BgJobsError as error:
        form.place_error(error)
        return None


def _masked(state: AppState, job: Job) -> Any:
    masked = state.masked_parameters(job.target, job.method, job.parameters)
    return serialize.loads(serialize.dumps(masked))


def _editable(value: Any) -> str:
    """``value`` as JSON that can be read back; dates and the like are tagged objects."""
    return json.dumps(json.loads(serialize.dumps(value)), ensure_ascii=False, indent=2)


def _unmask(given: Any, masked: Any, original: Any) -> Any:
    """``given``, with values that are still masked replaced by those of ``original``.

    :param masked: ``original`` as the form showed it.
    """
    if given == MASK and masked == MASK:
        return original
    if isinstance(given, dict) and isinstance(masked, dict):
        return {
            key: _unmask(value, masked[key], original[key]) if key in masked else value
            for key, value in given.items()
        }
    if isinstance(given, list) and isinstance(masked, list):
        known = list(zip(masked, original, strict=True))
        items = [
            _unmask(value, *known[index]) if index < len(known) else value
            for index, value in enumerate(given)
        ]
        # Masking has turned tuples and sets into lists.
        with contextlib.suppress(TypeError):
            return type(original)(items)
        return items
    return given


def _parameters(text: str) -> Any:
    try:
        json.loads(text)
        value = serialize.loads(text)
    except json.JSONDecodeError as error:
        raise ValidationError(
            f"Not JSON: {error.msg}, line {error.lineno} column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"Not readable: {error}.") from None
    if not isinstance(value, list | dict):
        raise ValidationError("Must be a list [ … ] or an object { … }.")
    return value


def _check(check: Callable[..., object], *values: object) -> None:
    try:
        check(*values)
    except ValueError as error:
        raise ValidationError(sentence(str(error))) from None


def _seconds(text: str | None) -> float | None:
    text = (text or "").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValidationError(f"{text[:40]!r} is not a number of seconds.") from None


def _zone(text: str | None) -> dt.tzinfo:
    name = (text or "").strip() or _UTC
    if name == _UTC:
        # Works also on machines without a time zone database.
        return dt.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValidationError(
            f"{name[:40]!r} is not a known time zone; write it like Europe/Berlin."
        ) from None


def _moment(text: str | None, zone: dt.tzinfo) -> dt.datetime | None:
    """The time in an ISO 8601 text; ``None`` when it is empty.

    :param zone: used when the text has no time zone.
    """
    text = (text or "").strip()
    if not text:
        return None
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ValidationError("Must be a time such as 2026-11-23T20:00.") from None
    if when.tzinfo is not None:
        return when
    moment = when.replace(tzinfo=zone)
    with contextlib.suppress(OverflowError):
        if moment.astimezone(dt.UTC).astimezone(zone).replace(tzinfo=None) != when:
            raise ValidationError(
                f"There is no such time in {zone}: the clocks are set forward then."
            )
    return moment
