"""Helpers for the templates: times and durations in words, URLs and permissions."""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
import re
from collections.abc import Collection
from typing import Any

from flask import request, url_for

from ..job import durations
from ..job.plain import time_text
from ..job.statuses import CAN_CHANGE, JobStatus
from ..models import Job
from ..operations import queries
from ..operations.queries import JobRow
from ..state import AppState
from . import access, assets, params, rendering

_MAX_DELAYS_CHARACTERS = 200
"""How much of a retry delay is shown when it cannot be read."""
_VERBS = ("retry", "cancel", "delete")
"""The actions on jobs, in the order of their buttons."""


class Helpers:
    """The object that every template of the dashboard has under the name ``bgjobs``."""

    statuses = tuple(status.value for status in JobStatus)
    iso = staticmethod(time_text)
    escape_bidi = staticmethod(rendering.escape_bidi)

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
        """The CSRF token for forms; ``None`` when the app has no ``SECRET_KEY``."""
        return access.csrf_token()

    def may(self, action: str, job: Job | None = None) -> bool:
        """Whether the visitor may do ``action``, so that its link or button is shown."""
        return access.is_allowed(action, job)

    @property
    def sees_totals(self) -> bool:
        """Whether the visitor may see facts about all jobs."""
        return access.may_see_totals()

    def actions(self, row: JobRow) -> list[str]:
        """The actions that the visitor may take on a job in its present status.

        The store checks again, because the status may have changed meanwhile.
        """
        if self.csrf_token is None or row.is_cancelling:
            return []
        can = (verb for verb in _VERBS if row.status in CAN_CHANGE[verb])
        return [verb for verb in can if self.may(verb, row.job)]

    @property
    def current_url(self) -> str:
        """The URL of this page, for coming back after a change."""
        return request.script_root + request.full_path.rstrip("?")

    def asset(self, filename: str) -> str:
        """The URL of a static file, which changes with its content."""
        return assets.address(filename)

    def list_url(self, filters: Any, **changes: Any) -> str:
        """The URL of the job list with ``filters``.

        :param changes: query parameters that replace or extend those of the filters.
        """
        return url_for(".list_jobs", **{**params.query_of(filters), **changes})

    @staticmethod
    def query_of(filters: Any) -> list[tuple[str, list[str]]]:
        """The names and values of the form fields that send ``filters``."""
        query = params.query_of(filters)
        return [
            (name, value if isinstance(value, list) else [value])
            for name, value in query.items()
            if value
        ]

    @staticmethod
    def filter_words(filters: Any) -> str:
        """The filters in the syntax of the search box, such as ``status:failed queue:a,b``."""
        query = Helpers.query_of(filters)
        return " ".join(f"{name}:{','.join(values)}" for name, values in query if name != "sort")

    @staticmethod
    def capped(number: int) -> queries.Count:
        """A number of jobs in a queue, shown as ``10k+`` when it exceeds what is counted."""
        return queries.Count(number, queries.COUNTED_IN_QUEUES)

    @property
    def orders(self) -> list[tuple[str, str]]:
        """The orders of the job list: names and labels."""
        return [(name, order.words) for name, order in queries.ORDERS.items()]

    @property
    def job_names(self) -> list[str]:
        """The names on the allow-list, for the job filter."""
        return self._state.registry.names()

    @property
    def period_names(self) -> list[tuple[str, str]]:
        """The periods of charts: names and labels."""
        return [(name, period.words) for name, period in queries.PERIODS.items()]

    def verbs_for(self, statuses: Collection[str]) -> list[str]:
        """The bulk actions that the visitor may take on jobs of these statuses.

        :param statuses: empty for all statuses.
        """
        if self.csrf_token is None:
            return []
        wanted = set(statuses or JobStatus)
        can = (verb for verb in _VERBS if wanted.intersection(CAN_CHANGE[verb]))
        return [verb for verb in can if self.may(verb)]

    @staticmethod
    def utc(when: dt.datetime) -> str:
        """A time such as ``2026-11-23 12:00:00 UTC``."""
        return f"{when:%Y-%m-%d %H:%M:%S} UTC"

    @staticmethod
    def relative(when: dt.datetime, now: dt.datetime) -> str:
        """``when`` relative to ``now``, such as ``3 min ago`` or ``in 2 h``."""
        seconds = (when - now).total_seconds()
        if abs(seconds) < 1:
            return "now"
        duration = durations.in_words(abs(seconds))
        return f"in {duration}" if seconds > 0 else f"{duration} ago"

    @staticmethod
    def linked(sentence: str, limits: Collection[str] = ()) -> list[tuple[str, str | None]]:
        """The parts of a sentence about jobs, each with its URL, or ``None`` where it has no link.

        :param limits: names of limits that the sentence may contain.
        """
        names = "|".join(re.escape(name) for name in sorted(limits, key=len, reverse=True))
        found = re.split(rf"(\bjob \d+\b|(?<=the limit )(?:{names}))", sentence)
        return [(part, _url_of(part, limits)) for part in found if part]

    @staticmethod
    def duration(seconds: float) -> str:
        """A duration such as ``250 ms``, ``1.5 s`` or ``2 h 5 min``."""
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
        """The delay before each retry, from the JSON in the row; other text is shown unchanged."""
        try:
            return ", ".join(f"{seconds:g}" for seconds in json.loads(text)) + " s"
        except (ValueError, TypeError, RecursionError):
            return text[:_MAX_DELAYS_CHARACTERS]


def _url_of(text: str, limits: Collection[str]) -> str | None:
    """The page of a job, such as ``job 7``, or of one of these limits."""
    if text in limits:
        return url_for(".list_limits", name=text)
    word, _, number = text.partition(" ")
    if word == "job" and number.isdecimal():
        return url_for(".show_job", job_id=int(number))
    return None
