"""Weights as plain data, for the command line and the API."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...job.plain import time_text
from ...store import KeyTurns
from .manage import WeightState


def weight_data(weight: WeightState, *, names_people: bool = True) -> dict[str, Any]:
    """A weight as plain data.

    :param names_people: whether to say who has changed it.
    """
    at = weight.overridden_at
    return {
        "key": weight.key,
        "weight": weight.weight,
        "code": weight.code,
        "is_overridden": weight.is_overridden,
        "overridden_at": None if at is None else time_text(at.replace(tzinfo=None)),
        "overridden_by": weight.overridden_by if names_people else None,
        "code_has_changed_since": weight.has_changed_since_override,
    }


def turns_data(key: KeyTurns) -> dict[str, Any]:
    """A key with jobs whose turn is still to come, as plain data."""
    return dataclasses.asdict(key)


def drift(weight: WeightState) -> str:
    """How a weight differs from the configuration, in words; empty if it is not overridden."""
    at = weight.overridden_at
    if at is None:
        return ""
    by = f" by {weight.overridden_by}" if weight.overridden_by else ""
    later = "; the configuration has changed since" if weight.has_changed_since_override else ""
    return (
        f"{weight.weight:g}, in the configuration {weight.code:g} "
        f"(overridden{by} at {at:%Y-%m-%d %H:%M:%S} UTC{later})"
    )
