"""The schedules that a visitor of the dashboard may see."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

from ..errors import ScheduleNotFound
from ..flow.schedules.data import (
    SHOWN_RUNS,
    NextRun,
    ScheduleRow,
    Tick,
    detailed_data,
    next_runs,
    row_of,
)
from ..flow.schedules.manage import RecurringJob, find
from ..flow.schedules.pages import schedule_page
from ..job.text import storable
from ..state import AppState
from . import access

_MAX_NAME = 255


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
        row_of(state, each, live, ticks.get(each.id, ()), names_people=names_people)
        for each in shown
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
    ticks = state.store.last_ticks(ids, SHOWN_RUNS).get(schedule.id, [])
    return ScheduleDetail(
        state.store.clock(),
        row_of(state, schedule, live, ticks, names_people=access.is_allowed(access.AUDIT)),
        [Tick.of(each) for each in ticks],
        next_runs(schedule),
        bool(live),
    )


def detail_data(detail: ScheduleDetail) -> dict[str, Any]:
    """A schedule with its last ticks and next runs, as plain data for the API."""
    return detailed_data(detail.row, detail.ticks, detail.next_runs)
