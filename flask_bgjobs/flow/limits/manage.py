"""Look at limits and change them at run time, as ``bgjobs.limits``, the dashboard and the command
line do."""

from __future__ import annotations

import contextlib
import datetime as dt
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict, Unpack

from ...errors import ConfigError, InvalidJob, LimitNotFound
from ...job import durations
from ...job.limits import MAX_KEY, Rule, checked_per, checked_rule, limit_id
from ...job.rates import with_starts
from ...job.text import shown
from ...models import LimitRow
from ...state import AppState
from ...store import Actor, KeyRow, effective_rule
from .definition import rules

_SHOWN_KEYS = 50
_TOO_MANY_MATCHES = 5
_MICROSECONDS = 1_000_000
_EPOCH = dt.datetime(1970, 1, 1)


class RuleValues(TypedDict, total=False):
    """The values of a limit that can be overridden, as keyword arguments."""

    concurrency: int | None
    """How many jobs may run at once."""
    rate: int | None
    """How many jobs may start in any period of ``per``."""
    per: durations.Duration | None
    burst: int | None
    """How many jobs may start at once after a pause."""


class LimitState:
    """A limit, as it was when it was read."""

    def __init__(self, state: AppState, row: LimitRow, now: dt.datetime) -> None:
        self._state = state
        self._row = row
        self._now = now
        self.id: int = row.id
        """The hash of the name."""
        self.name: str = row.name
        """The name of the limit."""
        self.now = now.replace(tzinfo=dt.UTC)
        """When it was read, by the database's clock."""
        self.code: Rule = effective_rule(row.definition, None)
        """Its numbers according to the code of the worker that started last."""
        self.rule: Rule = effective_rule(row.definition, row.override)
        """Its numbers, with the override if there is one."""
        self.overrides: Mapping[str, Any] = _override_of(row)
        """The overridden numbers, by name, with ``per_seconds`` in place of ``per``; empty if there
        are none."""

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
        """Whether the numbers in the code have changed since it was overridden."""
        return self._row.overridden_code not in (None, self._row.definition)

    @property
    def paused_at(self) -> dt.datetime | None:
        """When it was paused, in UTC; ``None`` if it is not paused."""
        return _aware(self._row.paused_at)

    @property
    def paused_by(self) -> str | None:
        """Who paused it; ``None`` for the app's own code."""
        return self._row.paused_by

    def override(self, by: Actor | None = None, **values: Unpack[RuleValues]) -> LimitState:
        """Replace numbers of the limit until :meth:`reset`, on all workers.

        Other numbers that were overridden before keep their values. Running jobs are not stopped:
        with a lower number, no job starts until enough have ended.

        :param by: who overrides it, for the audit trail; ``None`` for the app's own code.
        :returns: the limit as it is now.
        :raises InvalidJob: when a value is not valid.
        :raises TypeError: for a value that does not exist, or without any.
        """
        given = _checked_override(values)

        def override(row: LimitRow) -> Mapping[str, Any]:
            merged = {**_override_of(row), **given}
            code = effective_rule(row.definition, None)
            try:
                checked_rule(Rule(**{**code._asdict(), **merged}))
            except ValueError as error:
                raise InvalidJob(f"the limit {self.name!r} cannot be overridden: {error}") from None
            return {
                "override": json.dumps(merged),
                "overridden_at": ...,
                "overridden_by": None if by is None else by.name[:255],
                "overridden_code": row.definition,
            }

        return self._change(override, by, "edit limit")

    def reset(self, by: Actor | None = None) -> LimitState:
        """Remove the override, so that the numbers of the code apply.

        :param by: who resets it, for the audit trail; ``None`` for the app's own code.
        :returns: the limit as it is now.
        """
        none = dict.fromkeys(("override", "overridden_at", "overridden_by", "overridden_code"))
        return self._change(lambda row: none if row.override else {}, by, "reset limit")

    def pause(self, key: str | None = None, by: Actor | None = None) -> LimitState:
        """Let no more jobs with this limit start until :meth:`resume`. Running jobs go on.

        :param key: only those with this key.
        :param by: who pauses it, for the audit trail; ``None`` for the app's own code.
        :returns: the limit as it is now.
        """
        if key is not None:
            return self._pause_key(key, by, pause=True)
        values = {"paused_at": ..., "paused_by": None if by is None else by.name[:255]}
        return self._change(lambda row: {} if row.paused_at else values, by, "pause limit")

    def resume(self, key: str | None = None, by: Actor | None = None) -> LimitState:
        """Let jobs with this limit start again.

        :param key: only those with this key, if it was paused.
        :param by: who resumes it, for the audit trail; ``None`` for the app's own code.
        :returns: the limit as it is now.
        """
        if key is not None:
            return self._pause_key(key, by, pause=False)
        none = {"paused_at": None, "paused_by": None}
        return self._change(lambda row: none if row.paused_at else {}, by, "resume limit")

    def busy_keys(self, number: int = _SHOWN_KEYS, *, key: str | None = None) -> list[KeyRow]:
        """Its keys at which jobs wait or that are paused, by name, and then the others that jobs
        use. A limit without keys has one with an empty name.

        :param number: how many at most.
        :param key: only this key.
        """
        return self._state.store.read_keys(number, name=self.name, key=key)

    def rate_left(self, key: KeyRow) -> int | None:
        """How many jobs of a key may start within the current period, if no more start now;
        ``None`` if the limit has no rate."""
        if self.rule.rate is None:
            return None
        now = (self._now - _EPOCH) // dt.timedelta(microseconds=1)
        recorded = with_starts(key.state, (), self.rule, now).starts
        return max(0, self.rule.rate - sum(number for _, number in recorded) - key.held)

    def refresh(self) -> LimitState:
        """The limit as it is now.

        :raises LimitNotFound: when it was deleted.
        """
        return find(self._state, self.name)

    def _pause_key(self, key: str, by: Actor | None, *, pause: bool) -> LimitState:
        if not isinstance(key, str) or len(key) > MAX_KEY:
            raise InvalidJob(f"a key is a str of at most {MAX_KEY} characters, not {shown(key)}")
        self._state.store.pause_key(self.name, self.code, key, by, pause=pause)
        return self.refresh()

    def _change(
        self,
        values_of: Callable[[LimitRow], Mapping[str, Any]],
        by: Actor | None,
        action: str,
    ) -> LimitState:
        self._state.store.change_limit(self.name, self.code, values_of, by, action)
        return self.refresh()

    def __repr__(self) -> str:
        return f"<LimitState {self.name} {self.rule.in_words()}>"


class Limits:
    """The limits of an app: those in the database, and those in the code of this process.

    A name may be shortened to its last part where that is unambiguous, such as ``sync`` for
    ``shop.jobs.sync``.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> LimitState:
        """The limit with this name.

        :raises LimitNotFound: when there is none, or several match a shortened name.
        """
        return find(self._state, name)

    def all(self) -> list[LimitState]:
        """All limits, by name."""
        return list_limits(self._state)

    def __contains__(self, name: str) -> bool:
        """Whether there is one limit with this name."""
        with contextlib.suppress(LimitNotFound):
            return bool(find(self._state, name))
        return False

    def __iter__(self) -> Iterator[str]:
        """The names of all limits, in order."""
        return iter([each.name for each in list_limits(self._state)])

    def __len__(self) -> int:
        """The number of limits."""
        return len(list_limits(self._state))


def list_limits(state: AppState) -> list[LimitState]:
    """All limits, by name: those in the database, and those that only this process's code has."""
    now, rows = state.store.read_limits()
    known = {row.name for row in rows}
    own = [_unsaved(name, rule, now) for name, rule in _own(state).items() if name not in known]
    return [LimitState(state, row, now) for row in sorted([*rows, *own], key=lambda r: r.name)]


def busy_keys(state: AppState, number: int, limit: LimitState | None = None) -> list[KeyRow]:
    """The keys of all limits, or of one, as :meth:`LimitState.busy_keys`."""
    return state.store.read_keys(number, name=None if limit is None else limit.name)


def find(state: AppState, name: str) -> LimitState:
    """The limit with this name, or with this last part of its name.

    :raises LimitNotFound: when there is none, or several match.
    """
    found = {each.name: each for each in list_limits(state)}
    matches = [name] if name in found else [n for n in found if n.endswith(f".{name}")]
    if len(matches) == 1:
        return found[matches[0]]
    if matches:
        choices = ", ".join(matches[:_TOO_MANY_MATCHES])
        raise LimitNotFound(f"several limits are named {name!r}: give one of {choices}")
    last_parts = (each.rpartition(".")[2] for each in found)
    close = difflib.get_close_matches(str(name), [*found, *last_parts], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise LimitNotFound(f"there is no limit {name!r}{hint}")


def _own(state: AppState) -> Mapping[str, Rule]:
    """The limits in the code of this process; none if they contradict each other."""
    with contextlib.suppress(ConfigError):
        return rules(state)
    return {}


def _unsaved(name: str, rule: Rule, now: dt.datetime) -> LimitRow:
    """The row of a limit that is not in the database."""
    text = json.dumps(rule.to_json())
    return LimitRow(id=limit_id(name), name=name, definition=text, defined_at=now)


def _override_of(row: LimitRow) -> dict[str, Any]:
    """The overridden values of a limit; none if the row does not hold valid ones."""
    try:
        found = json.loads(row.override or "{}")
        Rule(**found)
    except (ValueError, TypeError, RecursionError):
        return {}
    return dict(found)


def _checked_override(values: Mapping[str, Any]) -> dict[str, Any]:
    for name in values:
        if name not in RuleValues.__annotations__:
            known = ", ".join(RuleValues.__annotations__)
            raise TypeError(f"a limit has no {name}=; it has {known}")
    if not values:
        raise TypeError("override() needs a value, such as concurrency=2 or rate=50")
    given = {name: value for name, value in values.items() if name != "per"}
    if "burst" in given and given["burst"] is None:
        given["burst"] = 1
    try:
        if "per" in values:
            given["per_seconds"] = checked_per(values["per"])
    except ValueError as error:
        raise InvalidJob(str(error)) from None
    return given


def _aware(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.replace(tzinfo=dt.UTC)
