"""What is read, as plain data: the API and the command line's ``--json`` say the same."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

from .detail import JobDetail
from .rows import JobRow


def plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, with times as JSON can hold them."""
    return _plain_fields(dataclasses.asdict(value))


def job_data(row: JobRow) -> dict[str, Any]:
    """A job of a list; its secrets are masked already."""
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del fields["job"]
    return _plain_fields(fields) | {"parameters": _read(row.parameters)}


def detail_data(detail: JobDetail) -> dict[str, Any]:
    """All that is known of a job; its secrets are masked already."""
    return job_data(detail.row) | {
        "parameters": _read(detail.parameters),
        "result": _read(detail.result),
        "meta": _read(detail.meta),
        "worker": detail.worker_name,
        "why_not_running": detail.reasons,
        "attempts": [plain(attempt) for attempt in detail.attempts],
        "log": [plain(line) for line in detail.lines],
    }


def time_text(value: dt.datetime) -> str:
    """A UTC time in ISO 8601, to the millisecond."""
    return f"{value.isoformat(timespec='milliseconds')}Z"


def _plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: time_text(v) if isinstance(v, dt.datetime) else v for name, v in fields.items()}


def _read(text: str | None) -> Any:
    """What a JSON text says; the text itself when it is none."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
