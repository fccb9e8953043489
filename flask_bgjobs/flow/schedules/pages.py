"""Pages of schedules by name, for the dashboard."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt

from ...errors import ConfigError
from ...models import Schedule
from ...state import AppState
from .definition import own_definition, own_names
from .manage import RecurringJob, read_row, unsaved


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulePage:
    """A page of schedules, by name."""

    now: dt.datetime
    """The database's clock, in UTC, without ``tzinfo``."""
    schedules: list[RecurringJob]
    unreadable: list[str]
    """The names of schedules on this page whose rows cannot be read."""
    following: str | None
    """The ``after`` of the next page; ``None`` at the end."""


def schedule_page(
    state: AppState, *, after: str = "", contains: str = "", limit: int
) -> SchedulePage:
    """A page of the schedules in the database, and of those that only the code of this process has.

    :param after: only names after this one.
    :param contains: only names with this text, in any case.
    :param limit: schedules on a page.
    """
    now, rows = state.store.read_schedules(after=after, contains=contains, limit=limit + 1)
    known: dict[str, Schedule | None] = {row.name: row for row in rows}
    # Up to the last name that was read, the database holds no others.
    last = rows[-1].name if len(rows) > limit else None
    for name in own_names(state):
        is_in_range = name > after and (last is None or name <= last)
        if is_in_range and contains.lower() in name.lower():
            known.setdefault(name, None)
    names = sorted(known)
    shown, unreadable = [], []
    for name in names[:limit]:
        row = known[name]
        if row is None:
            # Not valid in this process: a worker may have what it needs.
            with contextlib.suppress(ConfigError):
                row = unsaved(own_definition(state, name), now)
        if row is None:
            continue
        schedule = read_row(state, row, now)
        if schedule is None:
            unreadable.append(name)
        else:
            shown.append(schedule)
    return SchedulePage(now, shown, unreadable, names[limit - 1] if len(names) > limit else None)
