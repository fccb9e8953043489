"""What the templates call: times and durations in words, addresses, and who may do what."""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
from collections.abc import Collection
from typing import Any

from flask import request, url_for

from ..job import durations
from ..job.statuses import CAN_CHANGE, JobStatus
from ..models import Job
from ..operations import queries
from ..operations.queries import JobRow
from ..state import AppState
from . import access, assets, params, rendering

_MAX_DELAYS_CHARACTERS = 200
_VERBS = ("retry", "cancel", "delete")
"""In the order of their buttons."""


class Helpers:
    """The one name that every template of the dashboard sees, as ``bgjobs``."""

    statuses = tuple(status.value for status in JobStatus)
    iso = staticmethod(queries.time_text)
    visible = staticmethod(rendering.visible)

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
        """The verbs that the visitor may use on a job as it stands. The store has the last word."""
        if self.csrf_token is None or row.is_cancelling:
            return []
        can = (verb for verb in _VERBS if row.status in CAN_CHANGE[verb])
        return [verb for verb in can if self.may(verb, row.job)]

    @property
    def here(self) -> str:
        """The address of this page, to come back to."""
        return request.script_root + request.full_path.rstrip("?")

    def asset(self, filename: str) -> str:
        """The address of a static file, new whenever its content is."""
        return assets.address(filename)

    def list_url(self, filters: Any, **changes: Any) -> str:
        """The address of the list with ``filters``, and ``changes`` to its query."""
        return url_for(".list_jobs", **{**params.query_of(filters), **changes})

    @staticmethod
    def query_of(filters: Any) -> list[tuple[str, list[str]]]:
        """The names and values that a form sends for ``filters``."""
        query = params.query_of(filters)
        return [
            (name, value if isinstance(value, list) else [value])
            for name, value in query.items()
            if value
        ]

    @staticmethod
    def filter_words(filters: Any) -> str:
        """The filters as people may read them."""
        query = Helpers.query_of(filters)
        return " ".join(f"{name}:{','.join(values)}" for name, values in query if name != "sort")

    @staticmethod
    def capped(number: int) -> queries.Count:
        """What waits in a queue, which is counted up to a limit only."""
        return queries.Count(number, queries.COUNTED_IN_QUEUES)

    @property
    def orders(self) -> list[tuple[str, str]]:
        """How a list can be sorted: names and words."""
        return [(name, order.words) for name, order in queries.ORDERS.items()]

    @property
    def job_names(self) -> list[str]:
        """What the allow-list holds, to choose from."""
        return self._state.registry.names()

    @property
    def period_names(self) -> list[tuple[str, str]]:
        """The periods of charts: names and words."""
        return [(name, period.words) for name, period in queries.PERIODS.items()]

    def verbs_for(self, statuses: Collection[str]) -> list[str]:
        """What the visitor may do to many jobs of these statuses; of all where none is given."""
        if self.csrf_token is None:
            return []
        wanted = set(statuses or JobStatus)
        can = (verb for verb in _VERBS if wanted.intersection(CAN_CHANGE[verb]))
        return [verb for verb in can if self.may(verb)]

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
        if not math.isfinite(seconds):
            return str(seconds)
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
        """The seconds before each retry, from their JSON; other text is shown as it is."""
        try:
            return ", ".join(f"{seconds:g}" for seconds in json.loads(text)) + " s"
        except (ValueError, TypeError, RecursionError):
            return text[:_MAX_DELAYS_CHARACTERS]
