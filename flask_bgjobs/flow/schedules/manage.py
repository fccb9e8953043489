"""Look at schedules and change them at run time, as ``bgjobs.schedules``, the dashboard and the
command line do."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

from ...enqueue.enqueue import announce
from ...errors import ConfigError, InvalidJob, ScheduleChanged, ScheduleNotFound
from ...job import serialize
from ...models import Job, Schedule
from ...models.job import detached_job
from ...options import RECURRENCE_OPTIONS, RecurrenceValues
from ...state import AppState
from ...store import Actor, ScheduleChange
from .definition import (
    Definition,
    current_recurrence,
    definitions,
    override_of,
    own_definition,
    own_names,
    stored_definition,
)
from .due import next_tick
from .recurrence import Recurrence, checked
from .ticker import is_off, new_row, rescheduled

_TRIES = 10
_NO_ID = 0
"""The id of a row that is not in the database."""
_TOO_MANY_MATCHES = 5


class RecurringJob:
    """A schedule, as it was when it was read."""

    def __init__(self, state: AppState, row: Schedule, now: dt.datetime) -> None:
        self._state = state
        self._row = row
        self._now = now
        self._definition = stored_definition(row)
        self.name: str = row.name
        """The name of the schedule."""
        self.target: str = self._definition.target
        """Dotted name of the class or function."""
        self.method: str | None = self._definition.method
        self.code: Recurrence = self._definition.recurrence
        """How it recurs according to the code of the worker that started last."""
        self.recurrence: Recurrence = current_recurrence(row, self._definition)
        """How it recurs, with the override if there is one."""
        self.overrides: Mapping[str, Any] = override_of(row)
        """The overridden values, by the name of the option; empty if there are none."""

    @property
    def job_name(self) -> str:
        """Target and method as one dotted name."""
        return self._definition.job_name

    @property
    def parameters(self) -> Any:
        """The parameters of each job: a list of positional or a dict of keyword parameters."""
        return serialize.loads(self._definition.parameters)

    @property
    def queue(self) -> str:
        """The queue of each job."""
        return str(self._definition.values["queue"])

    @property
    def id(self) -> int:
        """The number of its row; 0 if only the code has it so far."""
        return self._row.id

    def example_job(self) -> Job:
        """A job as it makes them, which is not in the database."""
        jobs = self._definition.job(self._now)
        values: dict[str, Any] = dict.fromkeys(each.key for each in Job.__mapper__.column_attrs)
        known = {"id": 0, "attempt": 0, "run_at": self._now, "created_at": self._now}
        return detached_job(
            {**values, **jobs.values, **known, "parameters_json": jobs.parameters[0]}
        )

    @property
    def is_registered(self) -> bool:
        """Whether a worker has registered it. Before that, it does not run."""
        return self._row.registered_at is not None

    @property
    def is_retired(self) -> bool:
        """Whether its ticks were stopped, because the code of no live worker had it."""
        return self._row.retired_at is not None

    @property
    def paused_at(self) -> dt.datetime | None:
        """When it was paused, in UTC; ``None`` if it is not paused."""
        return _aware(self._row.paused_at)

    @property
    def paused_by(self) -> str | None:
        """Who paused it; ``None`` for the app's own code."""
        return self._row.paused_by

    @property
    def overridden_at(self) -> dt.datetime | None:
        """When it was last overridden, in UTC."""
        return _aware(self._row.overridden_at)

    @property
    def overridden_by(self) -> str | None:
        """Who overrode it last; ``None`` for the app's own code."""
        return self._row.overridden_by

    @property
    def has_changed_since_override(self) -> bool:
        """Whether the recurrence in the code has changed since it was overridden."""
        return self._row.overridden_code not in (None, _recurrence_json(self.code))

    @property
    def held_at(self) -> dt.datetime | None:
        """Since when its ticks wait for the end of its last job, in UTC; ``None`` if none waits."""
        return _aware(self._row.held_at)

    @property
    def last_tick_at(self) -> dt.datetime | None:
        """The last tick that ran or was skipped, in UTC."""
        return _aware(self._row.last_tick_at)

    @property
    def last_job_id(self) -> int | None:
        """The id of its last job, which may have been deleted."""
        return self._row.last_job_id

    @property
    def next_tick_at(self) -> dt.datetime | None:
        """The next tick, in UTC, in the past if it is overdue; ``None`` while it is paused."""
        return None if self._row.paused_at else _aware(self._row.next_tick_at)

    def next_ticks(self, number: int = 5) -> list[dt.datetime]:
        """The next ticks, in UTC; while it is paused, the ticks that it would have."""
        tick = self._row.next_tick_at
        if self._row.paused_at is not None or tick < self._now:
            tick = next_tick(self.recurrence.timing, self._now)
        ticks = [tick]
        while len(ticks) < number:
            ticks.append(next_tick(self.recurrence.timing, ticks[-1]))
        return [tick.replace(tzinfo=dt.UTC) for tick in ticks]

    def pause(self, by: Actor | None = None) -> RecurringJob:
        """Stop its ticks until :meth:`resume`. Ticks in between are neither run nor made up for.

        :param by: who pauses it, for the audit trail; ``None`` for the app's own code.
        :returns: the schedule as it is now.
        """

        def pause(row: Schedule, now: dt.datetime) -> Mapping[str, Any]:
            if row.paused_at is not None:
                return {}
            who = None if by is None else by.name[:255]
            return {"paused_at": now, "paused_by": who, "due_at": None, "held_at": None}

        return self._change(pause, by, "pause schedule")

    def resume(self, by: Actor | None = None) -> RecurringJob:
        """Continue with the next tick.

        :param by: who resumes it, for the audit trail; ``None`` for the app's own code.
        :returns: the schedule as it is now.
        """

        def resume(row: Schedule, now: dt.datetime) -> Mapping[str, Any]:
            if row.paused_at is None:
                return {}
            timing = current_recurrence(row, stored_definition(row)).timing
            anew = rescheduled(timing, now, is_off=row.retired_at is not None)
            return {"paused_at": None, "paused_by": None, **anew}

        return self._change(resume, by, "resume schedule")

    def override(self, by: Actor | None = None, **values: Unpack[RecurrenceValues]) -> RecurringJob:
        """Replace options of its recurrence, such as ``cron``, until :meth:`reset`.

        All workers use them from their next look at the database. Other options that were
        overridden before keep their values.

        :param by: who overrides it, for the audit trail; ``None`` for the app's own code.
        :param values: fields of :class:`~flask_bgjobs.options.RecurrenceValues`; ``grace=None``
            removes the grace of the code.
        :returns: the schedule as it is now.
        :raises InvalidJob: when a value is not valid.
        :raises TypeError: for an option that does not exist, or without any.
        """
        given = _checked_override(values)

        def override(row: Schedule, now: dt.datetime) -> Mapping[str, Any]:
            before = override_of(row)
            if {"cron", "every"} & set(given):
                before = {k: v for k, v in before.items() if k not in ("cron", "every")}
            definition = stored_definition(row)
            overridden = definition.recurrence.overridden({**before, **given})
            return {
                "override": json.dumps({**before, **given}),
                "overridden_at": now,
                "overridden_by": None if by is None else by.name[:255],
                "overridden_code": _recurrence_json(definition.recurrence),
                **_moved(row, definition, overridden, now),
            }

        return self._change(override, by, "edit schedule")

    def reset(self, by: Actor | None = None) -> RecurringJob:
        """Remove the override, so that it recurs as the code says.

        :param by: who resets it, for the audit trail; ``None`` for the app's own code.
        :returns: the schedule as it is now.
        """

        def reset(row: Schedule, now: dt.datetime) -> Mapping[str, Any]:
            if row.override is None:
                return {}
            definition = stored_definition(row)
            none = dict.fromkeys(("override", "overridden_at", "overridden_by", "overridden_code"))
            return {**none, **_moved(row, definition, definition.recurrence, now)}

        return self._change(reset, by, "reset schedule")

    def run_now(self, by: Actor | None = None) -> Job:
        """Enqueue one of its jobs now, also while it is paused. Its ticks stay as they are.

        :param by: who runs it, for the audit trail; ``None`` for the app's own code.
        :returns: the job, or the existing job with the same ``unique_key``.
        :raises JobNotAllowed: when the allow-list of this process does not hold its job.
        """
        self._state.registry.check(self.target, self.method)
        row, now = _saved(self._state, self._row)
        definition = dataclasses.replace(stored_definition(row), delay_seconds=None)
        job = self._state.store.run_schedule(row, definition.job(now), by)
        if not job.deduplicated:
            announce(self._state, [job])
        return job

    def refresh(self) -> RecurringJob:
        """The schedule as it is now.

        :raises ScheduleNotFound: when it was deleted.
        """
        return find(self._state, self.name)

    def _change(
        self,
        values_of: Callable[[Schedule, dt.datetime], Mapping[str, Any]],
        by: Actor | None,
        action: str,
    ) -> RecurringJob:
        """Change the row, and read it again if it has changed meanwhile.

        :param values_of: returns the values to change in a row at a time; empty: nothing.
        """
        for _ in range(_TRIES):
            row, now = _saved(self._state, self._row)
            values = values_of(row, now)
            if not values:
                break
            change = ScheduleChange(row, values)
            if not self._state.store.change_schedules([change], by, action):
                break
        else:
            raise ScheduleChanged(f"the schedule {self.name!r} changed {_TRIES} times: try again")
        return self.refresh()

    def __repr__(self) -> str:
        return f"<RecurringJob {self.name} {self.recurrence.expression}>"


class Schedules:
    """The schedules of an app: those in the database, and those in the code of this process.

    A name may be shortened to its last part where that is unambiguous, such as ``nightly_report``
    for ``shop.jobs.nightly_report``.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> RecurringJob:
        """The schedule with this name.

        :raises ScheduleNotFound: when there is none, or several match a shortened name.
        """
        return find(self._state, name)

    def all(self) -> list[RecurringJob]:
        """All schedules, by name."""
        return list_schedules(self._state)

    def __contains__(self, name: str) -> bool:
        """Whether there is one schedule with this name."""
        with contextlib.suppress(ScheduleNotFound):
            return bool(find(self._state, name))
        return False

    def __iter__(self) -> Iterator[str]:
        """The names of all schedules, in order."""
        return iter([each.name for each in list_schedules(self._state)])

    def __len__(self) -> int:
        """The number of schedules."""
        return len(list_schedules(self._state))


def list_schedules(state: AppState) -> list[RecurringJob]:
    """All schedules, by name. Those whose rows cannot be read are left out."""
    return readable_schedules(state)[0]


def readable_schedules(state: AppState) -> tuple[list[RecurringJob], list[str]]:
    """All schedules, and the names of those whose rows cannot be read, both by name."""
    now, rows = state.store.read_schedules()
    known = {row.name for row in rows}
    own = (unsaved(each, now) for name, each in _own(state).items() if name not in known)
    in_order = sorted([*rows, *own], key=lambda row: row.name)
    found = {row.name: read_row(state, row, now) for row in in_order}
    unreadable = [name for name, each in found.items() if each is None]
    return [each for each in found.values() if each is not None], unreadable


def find(state: AppState, name: str) -> RecurringJob:
    """The schedule with this name, or with this last part of its name.

    :raises ScheduleNotFound: when there is none, several match, or its row cannot be read.
    """
    now, rows = state.store.read_schedules(name)
    row = next(iter(rows), None)
    if row is None:
        row = _matching(state, name)
    found = read_row(state, row, now)
    if found is None:
        raise ScheduleNotFound(
            f"the row of the schedule {name!r} cannot be read; a worker whose code has it writes "
            "it anew when it starts"
        )
    return found


def _matching(state: AppState, name: str) -> Schedule:
    now, rows = state.store.read_schedules()
    saved = {row.name: row for row in rows}
    known = {*saved, *own_names(state)}
    matches = [name] if name in known else sorted(n for n in known if n.endswith(f".{name}"))
    if len(matches) > 1:
        choices = ", ".join(matches[:_TOO_MANY_MATCHES])
        raise ScheduleNotFound(f"several schedules are named {name!r}: give one of {choices}")
    for match in matches:
        if match in saved:
            return saved[match]
        # Not valid in this process: as if its code did not have it.
        with contextlib.suppress(ConfigError):
            # Only this one: building the definitions of ten thousand takes seconds.
            return unsaved(own_definition(state, match), now)
    others = known - set(matches)
    last_parts = (each.rpartition(".")[2] for each in others)
    close = difflib.get_close_matches(name, [*others, *last_parts], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ScheduleNotFound(f"there is no schedule {name!r}{hint}")


def _own(state: AppState) -> Mapping[str, Definition]:
    """The definitions in the code of this process; those that are not valid here are left out."""
    try:
        return definitions(state)
    except ConfigError:
        return {}


def unsaved(definition: Definition, now: dt.datetime) -> Schedule:
    """The row of a schedule that is not in the database."""
    return Schedule(id=_NO_ID, **new_row(definition, now))


def read_row(state: AppState, row: Schedule, now: dt.datetime) -> RecurringJob | None:
    """The schedule of a row; ``None`` if the row cannot be read."""
    try:
        return RecurringJob(state, row, now)
    except Exception:
        return None


def _saved(state: AppState, row: Schedule) -> tuple[Schedule, dt.datetime]:
    """The row as it is in the database now. It is inserted if only the code has it so far."""
    now, rows = state.store.schedules(row.name)
    if not rows and row.id == _NO_ID:
        values = {"name": row.name, "definition": row.definition, "defined_at": now}
        times = rescheduled(stored_definition(row).recurrence.timing, now, is_off=False)
        state.store.add_schedules([{**values, **times}])
        now, rows = state.store.schedules(row.name)
    if not rows:
        raise ScheduleNotFound(f"there is no schedule {row.name!r} (any more)")
    return rows[0], now


def _checked_override(values: RecurrenceValues) -> dict[str, Any]:
    names = ", ".join(RECURRENCE_OPTIONS)
    for name in values:
        if name not in RECURRENCE_OPTIONS:
            raise TypeError(f"a schedule has no option {name}= to override; they are {names}")
    try:
        given = checked(values)
    except ValueError as error:
        raise InvalidJob(str(error)) from None
    if values.get("grace", 0) is None:
        # The only option that can be without a value.
        given["grace"] = None
    if not given:
        raise TypeError(f"give at least one option to override: {names}")
    return given


def _moved(
    row: Schedule, definition: Definition, after: Recurrence, now: dt.datetime
) -> Mapping[str, Any]:
    """The values that move the next tick if the timing changes. A tick that is due stays so."""
    if row.next_tick_at <= now or current_recurrence(row, definition).timing == after.timing:
        return {}
    return rescheduled(after.timing, now, is_off=is_off(row))


def _recurrence_json(recurrence: Recurrence) -> str:
    return json.dumps(recurrence.values(), sort_keys=True)


def _aware(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.replace(tzinfo=dt.UTC)
