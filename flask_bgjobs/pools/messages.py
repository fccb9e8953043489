"""Jobs, outcomes and reports as JSON: nothing else crosses the pipe between worker and child."""

from __future__ import annotations

import dataclasses
import datetime as dt
import operator
from collections.abc import Sequence
from typing import Any

from ..spec import JobSpec, Outcome, Report
from ..states import OutcomeKind

_SPEC_FIELDS = [field.name for field in dataclasses.fields(JobSpec)]
_OUTCOME_FIELDS = [field.name for field in dataclasses.fields(Outcome)]
_spec_values = operator.attrgetter(*_SPEC_FIELDS)
_outcome_values = operator.attrgetter(*_OUTCOME_FIELDS)
_CLAIMED_AT, _STARTED_AT = _SPEC_FIELDS.index("claimed_at"), _SPEC_FIELDS.index("started_at")
_KIND, _REPORT = _OUTCOME_FIELDS.index("kind"), _OUTCOME_FIELDS.index("report")


def pack_spec(spec: JobSpec) -> list[Any]:
    """The values of ``spec`` as JSON can hold them."""
    values = list(_spec_values(spec))
    values[_CLAIMED_AT] = spec.claimed_at.isoformat()
    values[_STARTED_AT] = spec.started_at and spec.started_at.isoformat()
    return values


def unpack_spec(values: Sequence[Any]) -> JobSpec:
    """What :func:`pack_spec` was given."""
    values = list(values)
    values[_CLAIMED_AT] = dt.datetime.fromisoformat(values[_CLAIMED_AT])
    if values[_STARTED_AT] is not None:
        values[_STARTED_AT] = dt.datetime.fromisoformat(values[_STARTED_AT])
    return JobSpec(*values)


def pack_outcome(outcome: Outcome) -> list[Any]:
    """The values of ``outcome`` as JSON can hold them."""
    values = list(_outcome_values(outcome))
    values[_REPORT] = None if outcome.report is None else pack_report(outcome.report)
    return values


def unpack_outcome(values: Sequence[Any]) -> Outcome:
    """What :func:`pack_outcome` was given."""
    values = list(values)
    values[_KIND] = OutcomeKind(values[_KIND])
    values[_REPORT] = None if values[_REPORT] is None else unpack_report(values[_REPORT])
    return Outcome(*values)


def pack_report(report: Report) -> list[Any]:
    """The values of ``report`` as JSON can hold them."""
    return list(dataclasses.astuple(report))


def unpack_report(values: Sequence[Any]) -> Report:
    """What :func:`pack_report` was given."""
    progress, note, meta_json, lines = values
    return Report(progress, note, meta_json, tuple(lines))
