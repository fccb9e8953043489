"""Query results as plain data for the API and for ``--json`` of the command line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ...job.plain import plain, plain_fields
from .detail import JobDetail
from .rows import JobRow


def job_data(row: JobRow) -> dict[str, Any]:
    """A job of a list, with masked values."""
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del fields["job"]
    return plain_fields(fields) | {"parameters": _decoded(row.parameters)}


def detail_data(detail: JobDetail) -> dict[str, Any]:
    """A job with its attempts and log lines, with masked values."""
    return job_data(detail.row) | {
        "parameters": _decoded(detail.parameters),
        "result": _decoded(detail.result),
        "meta": _decoded(detail.meta),
        "worker": detail.worker_name,
        "why_not_running": detail.reasons,
        "attempts": [plain(attempt) for attempt in detail.attempts],
        "log": [plain(line) for line in detail.lines],
    }


def _decoded(text: str | None) -> Any:
    """The value of a JSON text; the text itself when it is not JSON."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text
