"""Conversion of jobs, outcomes and reports for the JSON messages between worker and child."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from typing import Any

from ....job.records import JobSpec, Outcome, Report
from ....job.statuses import OutcomeKind

_TIMES = [
    JobSpec._fields.index(name)
    for name in ("run_at", "claimed_at", "started_at", "deadline_at", "waiting_since")
]
_KIND, _REPORT, _NAMES = map(Outcome._fields.index, ("kind", "report", "parameter_names"))


def pack_spec(spec: JobSpec) -> list[Any]:
    """The fields of a job as values for JSON."""
    values: list[Any] = list(spec)
    for index in _TIMES:
        values[index] = values[index] and values[index].isoformat()
    return values


def unpack_spec(values: Sequence[Any]) -> JobSpec:
    """The job from the values of :func:`pack_spec`."""
    values = list(values)
    for index in _TIMES:
        values[index] = values[index] and dt.datetime.fromisoformat(values[index])
    return JobSpec(*values)


def pack_outcome(outcome: Outcome) -> list[Any]:
    """The fields of an outcome as values for JSON."""
    values: list[Any] = list(outcome)
    values[_REPORT] = None if outcome.report is None else pack_report(outcome.report)
    return values


def unpack_outcome(values: Sequence[Any]) -> Outcome:
    """The outcome from the values of :func:`pack_outcome`."""
    values = list(values)
    values[_KIND] = OutcomeKind(values[_KIND])
    values[_REPORT] = None if values[_REPORT] is None else unpack_report(values[_REPORT])
    values[_NAMES] = None if values[_NAMES] is None else tuple(values[_NAMES])
    return Outcome(*values)


def pack_report(report: Report) -> list[Any]:
    """The fields of a report as values for JSON."""
    return list(dataclasses.astuple(report))


def unpack_report(values: Sequence[Any]) -> Report:
    """The report from the values of :func:`pack_report`."""
    progress, note, meta_json, lines = values
    return Report(progress, note, meta_json, tuple(lines))
