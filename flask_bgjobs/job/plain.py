"""Values as plain data, for the API and for ``--json`` of the command line."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, with times as ISO 8601 text."""
    return plain_fields(dataclasses.asdict(value))


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with times as ISO 8601 text."""
    return {name: time_text(v) if isinstance(v, dt.datetime) else v for name, v in fields.items()}


def time_text(value: dt.datetime) -> str:
    """A UTC time as ISO 8601 text with milliseconds."""
    return f"{value.isoformat(timespec='milliseconds')}Z"
