"""A worker's part in schedules: it registers those of its code, and enqueues the jobs of due
ticks."""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Iterable
from typing import Any

from ...job.zones import read_zone
from ...models import Schedule
from ...signals import job_enqueued, schedule_fired, schedule_skipped
from ...state import AppState
from ...store import Fired, Plan, ScheduleChange, Store
from ...system.safe_logging import logger as _logger
from .definition import Definition, current_recurrence, definitions, stored_definition
from .due import next_tick, plan
from .recurrence import Recurrence
from .timing import Timing

_READ = 100
"""Due schedules that are read at once."""
_AT_ONCE = 20
"""Schedules whose due ticks one transaction handles. Meanwhile the worker claims no jobs."""
_REGISTRATION_TRIES = 10
_CLOCK = "%Y-%m-%d %H:%M:%S"
_CLOCK_SECONDS = 1.0
"""By how much a clock may be set back without effect."""


class Ticker:
    """The schedules of one worker.

    :param state: the app, whose modules with jobs are imported already.
    :param store: the worker's store.
    :raises ConfigError: when the definition of a schedule is not valid.
    """

    def __init__(self, state: AppState, store: Store) -> None:
        self._state = state
        self._store = store
        self._definitions = definitions(state)
        self._clock_offset: float | None = None
        """The database's clock minus the monotonic clock, in seconds."""

    def __bool__(self) -> bool:
        """Whether there is any schedule."""
        return bool(self._definitions)

    @property
    def names(self) -> list[str]:
        """The names of the schedules, sorted."""
        return sorted(self._definitions)

    def upcoming(self, number: int) -> list[str]:
        """The first ``number`` schedules by name, each with its expression and its next tick, in
        words."""
        now, rows = self._store.schedules()
        known = {row.name: row for row in rows}
        chosen = (self._definitions[name] for name in self.names[:number])
        return [_in_words(each, known.get(each.name), now) for each in chosen]

    def register(self) -> None:
        """Write the definitions to the database. They replace those of workers that started
        before."""
        missing, changes = self._differences()
        for _ in range(_REGISTRATION_TRIES):
            if not (missing or changes):
                break
            self._store.add_schedules(missing)
            self._store.change_schedules(changes)
            missing, changes = self._differences()

    def take_back(self) -> None:
        """Continue with schedules that were retired while this worker was taken for dead."""
        _, rows = self._store.schedules()
        retired = (r for r in rows if r.name in self._definitions and r.retired_at is not None)
        self._store.change_schedules([ScheduleChange(row, _unretired(row)) for row in retired])

    def fire(self) -> bool:
        """Enqueue the jobs of due ticks.

        :returns: whether there may be more of them.
        """
        now, due = self._store.due_schedules(_READ)
        mine = [row for row in due if row.name in self._definitions]
        self._retire([row for row in due if row.name not in self._definitions], now)
        # At random, so that several workers do not wait for each other.
        chosen = random.sample(mine, min(_AT_ONCE, len(mine)))
        plans = [each for row in chosen if (each := self._plan(row, now)) is not None]
        fired = self._store.fire(plans) if plans else []
        for result in fired:
            self._announce(result)
        return bool(fired) or len(mine) > _AT_ONCE

    def note_time(self, now: dt.datetime) -> None:
        """Continue at once with intervals when the database's clock was set back.

        :param now: the time of the database's clock, in UTC, without ``tzinfo``.
        """
        offset = now.replace(tzinfo=dt.UTC).timestamp() - time.monotonic()
        before, self._clock_offset = self._clock_offset, offset
        if before is not None and offset < before - _CLOCK_SECONDS:
            now, rows = self._store.schedules()
            mine = [row for row in rows if row.name in self._definitions]
            self._store.change_schedules(_set_back(mine, now))

    def _differences(self) -> tuple[list[dict[str, Any]], list[ScheduleChange]]:
        """The rows to insert, and the changes to rows whose definition is another one."""
        now, rows = self._store.schedules()
        known = {row.name: row for row in rows}
        missing, changes = [], []
        for name, definition in sorted(self._definitions.items()):
            row = known.get(name)
            if row is None:
                missing.append({**new_row(definition, now), "registered_at": now})
            elif values := _registered(row, definition, now):
                changes.append(ScheduleChange(row, values))
        changed = {change.schedule.name for change in changes}
        unchanged = [r for r in rows if r.name in self._definitions and r.name not in changed]
        return missing, [*changes, *_set_back(unchanged, now)]

    def _retire(self, foreign: list[Schedule], now: dt.datetime) -> None:
        """Stop the ticks of due schedules that the code of no live worker has."""
        if not foreign:
            return
        live = self._store.live_schedule_names()
        gone = [row for row in foreign if row.name not in live]
        values = {"retired_at": now, "due_at": None}
        self._store.change_schedules([ScheduleChange(row, values) for row in gone])
        for row in gone:
            _logger.warning(
                "Schedule stopped | Schedule: %s | The code of no live worker has it", row.name
            )

    def _plan(self, row: Schedule, now: dt.datetime) -> Plan | None:
        """What to do with the due ticks of a schedule; ``None`` if its row is not valid."""
        try:
            definition = stored_definition(row)
            return plan(row, definition, current_recurrence(row, definition), now)
        except Exception as error:
            values = {"retired_at": now, "due_at": None}
            self._store.change_schedules([ScheduleChange(row, values)])
            _logger.error(
                "Schedule stopped | Schedule: %s | Its row is not valid: %s: %s | Restart a worker "
                "whose code has it: the worker writes the row again",
                row.name,
                type(error).__name__,
                error,
            )
            return None

    def _announce(self, fired: Fired) -> None:
        emit = self._state.emit_in_worker
        for skip in fired.skips:
            tick = skip.tick_at.replace(tzinfo=dt.UTC)
            emit(schedule_skipped, schedule=fired.name, tick=tick, reason=skip.reason)
        for run, job in fired.jobs:
            emit(job_enqueued, job=job)
            tick = run.tick_at.replace(tzinfo=dt.UTC)
            emit(schedule_fired, schedule=fired.name, tick=tick, job=job)


def new_row(definition: Definition, now: dt.datetime) -> dict[str, Any]:
    """The values of the row of a new schedule, by column name."""
    following = next_tick(definition.recurrence.timing, now)
    return {
        "name": definition.name,
        "definition": definition.to_json(),
        "defined_at": now,
        "next_tick_at": following,
        "due_at": following,
    }


def rescheduled(timing: Timing, now: dt.datetime, *, is_off: bool) -> dict[str, Any]:
    """The values of a schedule that starts anew, at its next tick.

    :param timing: its ticks from now on.
    :param is_off: whether it is paused or retired.
    """
    following = next_tick(timing, now)
    due_at = None if is_off else following
    return {"next_tick_at": following, "due_at": due_at, "held_at": None}


def is_off(row: Schedule) -> bool:
    """Whether a schedule has no ticks, because it is paused or retired."""
    return row.paused_at is not None or row.retired_at is not None


def _in_words(definition: Definition, row: Schedule | None, now: dt.datetime) -> str:
    recurrence = definition.recurrence if row is None else current_recurrence(row, definition)
    tick = next_tick(recurrence.timing, now)
    if row is not None and (row.next_tick_at <= now or _recurrence(row) == recurrence):
        tick = row.next_tick_at
    when = f"{definition.name}: {recurrence.expression}"
    if row is not None and row.paused_at is not None:
        return f"{when}, paused"
    if tick <= now:
        return f"{when}, overdue since {tick:{_CLOCK}} UTC"
    local = tick.replace(tzinfo=dt.UTC).astimezone(read_zone(recurrence.timezone))
    return f"{when}, next at {local:{_CLOCK}} {local:%Z}"


def _registered(row: Schedule, definition: Definition, now: dt.datetime) -> dict[str, Any]:
    """The values to change in the row of a schedule when a worker with ``definition`` starts."""
    values = {} if row.retired_at is None else _unretired(row)
    text = definition.to_json()
    if row.definition != text:
        values |= {"definition": text, "defined_at": now}
    is_fresh = row.registered_at is None
    recurrence = current_recurrence(row, definition)
    # A missed tick stays due: it is handled when the worker looks for due ticks.
    if is_fresh or (row.next_tick_at > now and _recurrence(row) != recurrence):
        values["registered_at"] = row.registered_at or now
        values |= rescheduled(recurrence.timing, now, is_off=row.paused_at is not None)
    return values


def _recurrence(row: Schedule) -> Recurrence | None:
    """The recurrence in a row; ``None`` if it cannot be read."""
    try:
        return current_recurrence(row, stored_definition(row))
    except Exception:
        return None


def _unretired(row: Schedule) -> dict[str, Any]:
    return {"retired_at": None, "due_at": None if row.paused_at else row.next_tick_at}


def _set_back(rows: Iterable[Schedule], now: dt.datetime) -> list[ScheduleChange]:
    """The changes to schedules whose last tick is in the future, because the clock was set back.

    Those whose ticks follow real time go on at once. The others wait, so that a nightly job does
    not run twice.
    """
    ahead = now + dt.timedelta(seconds=_CLOCK_SECONDS)
    changes = []
    for row in rows:
        if row.last_tick_at is None or row.last_tick_at <= ahead:
            continue
        recurrence = _recurrence(row)
        if recurrence is not None and recurrence.timing.follows_real_time:
            values = rescheduled(recurrence.timing, now, is_off=is_off(row))
            values["last_tick_at"] = None
            changes.append(ScheduleChange(row, values, forget_after=now))
    return changes
