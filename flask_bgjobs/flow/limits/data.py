"""Limits as plain data, for the command line and the API."""

from __future__ import annotations

import datetime as dt
from typing import Any

from ...job.limits import Rule
from ...job.plain import time_text
from ...store import KeyRow
from .manage import LimitState


def limit_data(limit: LimitState, *, names_people: bool = True) -> dict[str, Any]:
    """A limit as plain data.

    :param names_people: whether to say who has changed it.
    """
    return {
        "name": limit.name,
        "state": state_of_limit(limit),
        "rule": rule_data(limit.rule),
        "code": rule_data(limit.code),
        "is_overridden": bool(limit.overrides),
        "overridden_at": _text(limit.overridden_at),
        "overridden_by": limit.overridden_by if names_people else None,
        "code_has_changed_since": limit.has_changed_since_override,
        "paused_at": _text(limit.paused_at),
        "paused_by": limit.paused_by if names_people else None,
    }


def key_data(limit: LimitState, key: KeyRow, *, names_people: bool = True) -> dict[str, Any]:
    """A key of a limit as plain data.

    :param names_people: whether to say who has paused it.
    """
    return {
        "key": key.name,
        "held": key.held,
        "waiting": key.waiting,
        "waiting_for_queue": key.parked,
        "rate_left": limit.rate_left(key),
        "next_start_in": key.next_in,
        "paused_at": _text(key.paused_at),
        "paused_by": key.paused_by if names_people else None,
    }


def rule_data(rule: Rule) -> dict[str, Any]:
    """The numbers of a limit as plain data."""
    values = rule._asdict()
    values["per"] = values.pop("per_seconds")
    return values


def state_of_limit(limit: LimitState) -> str:
    """``paused``, ``overridden`` or ``active``."""
    if limit.paused_at is not None:
        return "paused"
    return "overridden" if limit.overrides else "active"


def drift(limit: LimitState) -> str:
    """How a limit differs from the code, in words; empty if it is not overridden."""
    if not limit.overrides:
        return ""
    by = f" by {limit.overridden_by}" if limit.overridden_by else ""
    at = limit.overridden_at
    when = "" if at is None else f" at {at:%Y-%m-%d %H:%M:%S} UTC"
    later = "; the code has changed since" if limit.has_changed_since_override else ""
    numbers = f"{limit.rule.in_words()}, in the code {limit.code.in_words()}"
    return f"{numbers} (overridden{by}{when}{later})"


def _text(time: dt.datetime | None) -> str | None:
    return None if time is None else time_text(time.replace(tzinfo=None))
