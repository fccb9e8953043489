"""What the templates call: times and durations in words, addresses, and who may do what."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import pathlib
from typing import Any

from flask import request, url_for

from .. import durations
from ..app_state import AppState
from ..models import Job
from ..states import JobStatus
from . import access
from .queries import JobRow

_STATIC = pathlib.Path(__file__).parent / "static"
_ACTIONS_IN = {
    "scheduled": ("cancel", "delete"),
    "pending": ("cancel", "delete"),
    "retrying": ("retry", "cancel", "delete"),
    "running": ("cancel",),
    "cancelling": (),
    "completed": ("delete",),
    "failed": ("retry", "delete"),
    "cancelled": ("retry", "delete"),
}
"""What can be done to a job in each state; the store decides in the end."""


class Helpers:
    """The one name that every template of the dashboard sees, as ``bgjobs``."""

    statuses = tuple(status.value for status in JobStatus)

    def __init__(self, state: AppState) -> None:
        self._state = state
        self.read_only = state.config.read_only
        self.csrf_field = access.csrf_field_name()
        self.priority_names = list(state.config.priorities)
        self.priorities = ", ".join(
            f"{name} {number}" for name, number in state.config.priorities.items()
        )

    @functools.cached_property
    def csrf_token(self) -> str | None:
        """What forms send; ``None`` when the app has no ``SECRET_KEY``."""
        return access.csrf_token()

    def may(self, action: str, job: Job | None = None) -> bool:
        """Whether to show what the visitor would need for ``action``."""
        return access.is_allowed(action, job)

    def actions(self, row: JobRow) -> list[str]:
        """The verbs that the visitor may use on a job as it stands."""
        if self.csrf_token is None:
            return []
        return [verb for verb in _ACTIONS_IN[row.state] if self.may(verb, row.job)]

    @property
    def here(self) -> str:
        """The address of this page, to come back to."""
        return request.script_root + request.full_path.rstrip("?")

    def asset(self, filename: str) -> str:
        """The address of a static file, new whenever its content is."""
        return url_for(".static", filename=filename, v=_digest(filename))

    def list_url(self, filters: Any, **changes: Any) -> str:
        """The address of the list with ``filters``, and ``changes`` to its query."""
        query = {
            "status": list(filters.statuses),
            "queue": list(filters.queues),
            "q": filters.q or None,
        }
        return url_for(".list_jobs", **{**query, **changes})

    @staticmethod
    def iso(when: dt.datetime) -> str:
        """A UTC time for ``<time datetime>``."""
        return (
            when.replace(tzinfo=None, microsecond=when.microsecond // 1000 * 1000).isoformat(
                timespec="milliseconds"
            )
            + "Z"
        )

    @staticmethod
    def utc(when: dt.datetime) -> str:
        """A UTC time for people."""
        return f"{when:%Y-%m-%d %H:%M:%S} UTC"

    @staticmethod
    def relative(when: dt.datetime, now: dt.datetime) -> str:
        """``3 min ago`` or ``in 2 h``."""
        seconds = (when - now).total_seconds()
        if abs(seconds) < 1:
            return "now"
        duration = durations.in_words(abs(seconds))
        return f"in {duration}" if seconds > 0 else f"{duration} ago"

    @staticmethod
    def duration(seconds: float) -> str:
        """A duration in the unit that suits it."""
        if seconds < 1:
            return f"{seconds * 1000:.0f} ms"
        if seconds < 60:
            return f"{seconds:.1f} s"
        minutes, rest = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        parts = [f"{hours} h", f"{minutes} min", f"{rest} s"]
        return " ".join(part for part in parts if not part.startswith("0 "))

    @staticmethod
    def delays(text: str) -> str:
        """The seconds before each retry, from their JSON."""
        try:
            return ", ".join(f"{seconds:g}" for seconds in json.loads(text)) + " s"
        except (ValueError, TypeError):
            return text


@functools.cache
def _digest(filename: str) -> str:
    return hashlib.sha256((_STATIC / filename).read_bytes()).hexdigest()[:8]
