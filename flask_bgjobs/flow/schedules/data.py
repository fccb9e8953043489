"""Schedules as plain data, for the API and for ``--json`` of the command line."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from ...models import ScheduleTick
from ...state import AppState
from .describe import in_words
from .manage import RecurringJob

SHOWN_TICKS = 5
"""Number of past and of future ticks that are shown."""


def state_in_words(schedule: RecurringJob, live: set[str]) -> str:
    """The state of a schedule in a few words.

    :param live: the names of the schedules that the code of any live worker has.
    """
    if schedule.paused_at is not None:
        by = f" by {schedule.paused_by}" if schedule.paused_by else ""
        return f"paused{by}"
    if not schedule.is_registered:
        return "waits for the first worker"
    if schedule.name not in live:
        return "no live worker has it in its code"
    if schedule.held_at is not None:
        return f"waits for job {schedule.last_job_id}"
    return "active"


def drift_in_words(schedule: RecurringJob) -> str:
    """How a schedule differs from the code; empty if it is not overridden."""
    if not schedule.overrides:
        return ""
    code = schedule.code.values()
    changes = ", ".join(
        f"{name} is {value}, in the code {code[name]}" for name, value in schedule.overrides.items()
    )
    by = f" by {schedule.overridden_by}" if schedule.overridden_by else ""
    later = "; the code has changed since" if schedule.has_changed_since_override else ""
    when = "" if schedule.overridden_at is None else f" on {schedule.overridden_at:%Y-%m-%d %H:%M}"
    return f"{changes} (overridden{by}{when} UTC{later})"


def schedule_data(state: AppState, schedule: RecurringJob, live: set[str]) -> dict[str, Any]:
    """A schedule, with masked parameters and times as ISO 8601 text.

    :param live: the names of the schedules that the code of any live worker has.
    """
    recurrence = schedule.recurrence
    return {
        "name": schedule.name,
        "job": schedule.job_name,
        "parameters": state.masked_parameters(
            schedule.target, schedule.method, schedule.parameters
        ),
        "queue": schedule.queue,
        "state": state_in_words(schedule, live),
        "in_words": in_words(recurrence),
        **recurrence.values(),
        "next_tick_at": _text(schedule.next_tick_at),
        "last_tick_at": _text(schedule.last_tick_at),
        "last_job_id": schedule.last_job_id,
        "paused_at": _text(schedule.paused_at),
        "paused_by": schedule.paused_by,
        "override": dict(schedule.overrides) or None,
        "overridden_at": _text(schedule.overridden_at),
        "overridden_by": schedule.overridden_by,
        "code": schedule.code.values(),
        "code_changed_since_override": schedule.has_changed_since_override,
        "in_live_code": schedule.name in live,
    }


def detail_data(
    state: AppState, schedule: RecurringJob, live: set[str], ticks: Iterable[ScheduleTick]
) -> dict[str, Any]:
    """A schedule with its last and its next ticks.

    :param live: the names of the schedules that the code of any live worker has.
    :param ticks: its last ticks.
    """
    last = [
        {
            "tick_at": _text(tick.tick_at.replace(tzinfo=dt.UTC)),
            "outcome": tick.outcome,
            "missed": tick.missed,
            "reason": tick.reason,
            "job_id": tick.job_id,
        }
        for tick in ticks
    ]
    following = [_text(tick) for tick in schedule.next_ticks(SHOWN_TICKS)]
    return {**schedule_data(state, schedule, live), "last_ticks": last, "next_ticks": following}


def _text(time: dt.datetime | None) -> str | None:
    """A UTC time as ISO 8601 text with milliseconds."""
    return (
        None if time is None else f"{time.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
    )
