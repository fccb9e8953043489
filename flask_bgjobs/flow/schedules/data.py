"""Schedules as people see them, with masked parameters: on the dashboard, in its API, and on the
command line."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from collections.abc import Collection, Sequence
from typing import Any

from ...job import serialize
from ...job.plain import plain
from ...job.text import storable
from ...job.zones import read_zone
from ...models import ScheduleTick
from ...state import AppState
from .describe import in_words
from .manage import RecurringJob
from .recurrence import Recurrence, shortest

SHOWN_RUNS = 5
"""Number of past and of future runs that are shown."""
_MAX_PARAMETERS = 64 * 1024
"""Maximum number of characters of the parameters."""
_OPTION_LABELS = {
    "timezone": "time zone",
    "missed": "missed runs",
    "grace": "grace",
    "overlap": "overlap",
    "jitter": "jitter",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """A time at which a schedule ran or was skipped."""

    tick_at: dt.datetime
    outcome: str
    """``fired``, ``skipped`` or ``by hand``."""
    reason: str | None
    """Why it was skipped."""
    missed: int
    """Number of earlier ticks for which this one stands."""
    job_id: int | None
    """Its job or, if it was skipped because of another job, that one."""

    @classmethod
    def of(cls, tick: ScheduleTick) -> Tick:
        """The tick of a row."""
        return cls(tick.tick_at, tick.outcome, tick.reason, tick.missed, tick.job_id)


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """An option of a schedule that a person has overridden."""

    label: str | None
    """The name of the option; ``None`` for cron and interval, which need no name."""
    code: str
    """The value in the code."""
    now: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRow:
    """A schedule in a list."""

    name: str
    target: str
    method: str | None
    parameters: str | None
    """JSON on one line, masked; ``None`` when they cannot be decoded."""
    queue: str
    expression: str
    words: str
    """When it runs, such as ``At 03:00, only on Sunday``."""
    recurrence: Recurrence
    """How it recurs now."""
    code: Recurrence
    """How it recurs according to the code."""
    overridden: tuple[str, ...]
    """The options that are overridden."""
    overridden_at: dt.datetime | None
    overridden_by: str | None
    """``None`` also for visitors without the right ``audit``, like ``paused_by``."""
    has_changed_since_override: bool
    is_registered: bool
    is_in_live_code: bool
    """Whether the code of any live worker has it. Otherwise it does not run."""
    is_retired: bool
    paused_at: dt.datetime | None
    paused_by: str | None
    held_at: dt.datetime | None
    last_job_id: int | None
    next_run_at: dt.datetime | None
    """``None`` while it is paused or stopped."""
    last_tick: Tick | None

    @property
    def job_name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    @property
    def state(self) -> str:
        """The state in words."""
        if self.paused_at is not None:
            return f"paused by {self.paused_by}" if self.paused_by else "paused"
        if not self.is_registered:
            return "waits for the first worker"
        if not self.is_in_live_code:
            return "no live worker has it in its code"
        if self.held_at is not None:
            return f"waits for job {self.last_job_id}"
        return "active"

    @property
    def differences(self) -> list[Difference]:
        """The overridden options, with their values in the code and now."""
        found = []
        if {"cron", "every"} & set(self.overridden):
            found.append(Difference(None, self.code.expression, self.recurrence.expression))
        for name, label in _OPTION_LABELS.items():
            if name in self.overridden:
                code, now = (_option_text(each, name) for each in (self.code, self.recurrence))
                found.append(Difference(label, code, now))
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class NextRun:
    """A future run of a schedule."""

    at: dt.datetime
    """In UTC, without ``tzinfo``."""
    local: str
    """The same time in the zone of the schedule, with the name of the zone."""


def row_of(
    state: AppState,
    schedule: RecurringJob,
    live: Collection[str],
    ticks: Sequence[ScheduleTick],
    *,
    names_people: bool = True,
) -> ScheduleRow:
    """A schedule for a list, with masked parameters.

    :param live: the names of the schedules that the code of any live worker has.
    :param ticks: its last ticks, the newest first.
    :param names_people: whether to name those who paused or overrode it.
    """
    is_stopped = schedule.is_retired or (bool(live) and schedule.name not in live)
    return ScheduleRow(
        name=schedule.name,
        target=schedule.target,
        method=schedule.method,
        parameters=_parameters(state, schedule),
        queue=schedule.queue,
        expression=schedule.recurrence.expression,
        words=_words(schedule.recurrence),
        recurrence=schedule.recurrence,
        code=schedule.code,
        overridden=tuple(schedule.overrides),
        overridden_at=_naive(schedule.overridden_at),
        overridden_by=schedule.overridden_by if names_people else None,
        has_changed_since_override=schedule.has_changed_since_override,
        is_registered=schedule.is_registered,
        is_in_live_code=schedule.name in live,
        is_retired=schedule.is_retired,
        paused_at=_naive(schedule.paused_at),
        paused_by=schedule.paused_by if names_people else None,
        held_at=_naive(schedule.held_at),
        last_job_id=schedule.last_job_id,
        next_run_at=None if is_stopped else _naive(schedule.next_tick_at),
        last_tick=Tick.of(ticks[0]) if ticks else None,
    )


def next_runs(schedule: RecurringJob) -> list[NextRun]:
    """The next five runs, also while it is paused: those that it would have."""
    zone = read_zone(schedule.recurrence.timezone)
    return [
        NextRun(tick.replace(tzinfo=None), f"{tick.astimezone(zone):%Y-%m-%d %H:%M:%S %Z}")
        for tick in schedule.next_ticks(SHOWN_RUNS)
    ]


def row_data(row: ScheduleRow) -> dict[str, Any]:
    """A schedule as plain data for the API."""
    data = plain(row)
    recurrence = data.pop("recurrence")
    del data["is_retired"]
    return {
        **data,
        **recurrence,
        "state": row.state,
        "parameters": None if row.parameters is None else _decoded(row.parameters),
        "overridden": list(row.overridden),
        "last_tick": None if row.last_tick is None else plain(row.last_tick),
    }


def detailed_data(
    row: ScheduleRow, ticks: Sequence[Tick], runs: Sequence[NextRun]
) -> dict[str, Any]:
    """A schedule with its last ticks and next runs, as plain data."""
    return {
        **row_data(row),
        "ticks": [plain(tick) for tick in ticks],
        "next_runs": [plain(run) for run in runs],
    }


# Cached, because building the words takes longer than everything else in a row.
_words = functools.lru_cache(1_000)(in_words)


def _parameters(state: AppState, schedule: RecurringJob) -> str | None:
    try:
        values = schedule.parameters
    except ValueError:
        return None
    masked = state.masked_parameters(schedule.target, schedule.method, values)
    return storable(serialize.dumps_plain(masked), _MAX_PARAMETERS)


def _option_text(recurrence: Recurrence, name: str) -> str:
    value = getattr(recurrence, name)
    if name in ("grace", "jitter"):
        return f"{shortest(value)} s" if value else "none"
    return str(value)


def _naive(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.replace(tzinfo=None)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        # It was cut.
        return text
