"""Schedules as the pages and the API show them, with masked parameters."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import ScheduleNotFound
from ..flow.schedules.describe import in_words
from ..flow.schedules.manage import RecurringJob, find
from ..flow.schedules.pages import schedule_page
from ..flow.schedules.recurrence import Recurrence, shortest
from ..job.text import storable
from ..job.zones import read_zone
from ..models import ScheduleTick
from ..operations import queries
from ..operations.queries.shown import Shown
from ..state import AppState
from . import access

_MAX_NAME = 255
_NEXT_RUNS, _TICKS = 5, 5
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
class ScheduleList:
    """A page of schedules."""

    now: dt.datetime
    rows: list[ScheduleRow]
    unreadable: list[str]
    following: str | None
    """The ``after`` of the next page; ``None`` at the end."""
    has_live_worker: bool
    """Whether a live worker has any schedule in its code."""


@dataclasses.dataclass(frozen=True, slots=True)
class NextRun:
    """A future run of a schedule."""

    at: dt.datetime
    """In UTC, without ``tzinfo``."""
    local: str
    """The same time in the zone of the schedule, with the name of the zone."""


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduleDetail:
    """One schedule."""

    now: dt.datetime
    row: ScheduleRow
    ticks: list[Tick]
    """The newest first."""
    next_runs: list[NextRun]
    """Also while it is paused: those that it would have."""
    has_live_worker: bool


def list_rows(state: AppState, *, after: str, contains: str, limit: int) -> ScheduleList:
    """A page of the schedules that the visitor may see, by name."""
    page = schedule_page(state, after=after, contains=contains, limit=limit)
    shown = [each for each in page.schedules if access.may_see_example(each.example_job())]
    live = state.store.live_schedule_names()
    ticks = state.store.last_ticks([each.id for each in shown if each.id], 1)
    names_people = access.is_allowed(access.AUDIT)
    rows = [
        _row(state, each, live, ticks.get(each.id, ()), names_people=names_people) for each in shown
    ]
    unreadable = page.unreadable if access.may_see_totals() else []
    return ScheduleList(page.now, rows, unreadable, page.following, bool(live))


def find_visible(state: AppState, name: str) -> RecurringJob:
    """The schedule with this name, or with this last part of its name.

    :raises ScheduleNotFound: when there is none that the visitor may see.
    """
    try:
        found = find(state, storable(name[:_MAX_NAME]))
    except ScheduleNotFound:
        if access.may_see_totals():
            raise
        # Its message may name schedules that the visitor may not see.
        found = None
    if found is None or not access.may_see_example(found.example_job()):
        raise ScheduleNotFound("there is no such schedule, or you may not see it")
    return found


def detail_of(state: AppState, schedule: RecurringJob) -> ScheduleDetail:
    """A schedule with its last ticks and next runs."""
    live = state.store.live_schedule_names()
    ids = [schedule.id] if schedule.id else []
    ticks = state.store.last_ticks(ids, _TICKS).get(schedule.id, [])
    zone = read_zone(schedule.recurrence.timezone)
    return ScheduleDetail(
        state.store.clock(),
        _row(state, schedule, live, ticks, names_people=access.is_allowed(access.AUDIT)),
        [_tick(each) for each in ticks],
        [
            NextRun(tick.replace(tzinfo=None), f"{tick.astimezone(zone):%Y-%m-%d %H:%M:%S %Z}")
            for tick in schedule.next_ticks(_NEXT_RUNS)
        ],
        bool(live),
    )


def row_data(row: ScheduleRow) -> dict[str, Any]:
    """A schedule as plain data for the API."""
    data = queries.plain(row)
    recurrence = data.pop("recurrence")
    del data["is_retired"]
    return {
        **data,
        **recurrence,
        "parameters": None if row.parameters is None else _decoded(row.parameters),
        "overridden": list(row.overridden),
        "last_tick": None if row.last_tick is None else queries.plain(row.last_tick),
    }


def detail_data(detail: ScheduleDetail) -> dict[str, Any]:
    """A schedule with its last ticks and next runs, as plain data for the API."""
    return {
        **row_data(detail.row),
        "ticks": [queries.plain(tick) for tick in detail.ticks],
        "next_runs": [queries.plain(run) for run in detail.next_runs],
    }


def _row(
    state: AppState,
    schedule: RecurringJob,
    live: Collection[str],
    ticks: Sequence[ScheduleTick],
    *,
    names_people: bool,
) -> ScheduleRow:
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
        last_tick=_tick(ticks[0]) if ticks else None,
    )


# Cached, because building the words takes longer than everything else in a row.
_words = functools.lru_cache(1_000)(in_words)


def _parameters(state: AppState, schedule: RecurringJob) -> str | None:
    try:
        values = schedule.parameters
    except ValueError:
        return None
    return Shown(state, schedule.target, schedule.method, values, True).parameters()


def _tick(tick: ScheduleTick) -> Tick:
    return Tick(tick.tick_at, tick.outcome, tick.reason, tick.missed, tick.job_id)


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
        return text
