"""The log lines for the stages of jobs, written by receivers of the signals.

Each stage is one line, whatever the parameters contain. Secrets are masked. The record has the same
fields as attributes (``extra``), for structured logs.
"""

from __future__ import annotations

import datetime as dt
import logging
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from blinker import NamedSignal
from flask import Flask

from .. import signals
from ..job import serialize
from ..job.records import JobSpec, Settled
from ..job.statuses import JobStatus, OutcomeKind
from ..job.text import one_line, printable_lines, shown
from ..models import Job
from ..state import AppState, state_of
from ..system.safe_logging import Raised
from ..system.safe_logging import logger as _logger
from .tracebacks import frames_of_job

_MAX_PARAMETERS = 2_000
"""Most characters of parameters in a line. The dashboard shows all of them."""
_MAX_NAME = 255
"""Most characters of a refused name in a line."""


def connect() -> None:
    """Connect the receivers that write log lines. A second call has no effect."""
    for signal, receiver in _RECEIVERS.items():
        signal.connect(receiver)


def _on_refused(app: Flask, target: object, method: object, error: Exception) -> None:
    _write(
        logging.ERROR,
        "Unauthorized or invalid job class/method",
        {"Class": _name(target), "Method": _name(method or "-"), "Error": error},
    )


def _name(name: object) -> str:
    """The text for a refused target or method, which may have any type and length."""
    return name if isinstance(name, str) and len(name) <= _MAX_NAME else shown(name)


def _on_enqueued(app: Flask, job: Job) -> None:
    if _logger.isEnabledFor(logging.INFO):
        fields = {**_job_fields(state_of(app), job), "Queue": job.queue, "Priority": job.priority}
        _write(logging.INFO, "Job enqueued", fields)


def _on_started(app: Flask, job: JobSpec) -> None:
    if _logger.isEnabledFor(logging.INFO):
        _write(logging.INFO, "Job running", _job_fields(state_of(app), job))


def _on_completed(app: Flask, job: JobSpec, settled: Settled) -> None:
    if _logger.isEnabledFor(logging.INFO):
        seconds = f"{settled.outcome.run_seconds:.3f} s"
        fields = {**_job_fields(state_of(app), job, settled), "Duration": seconds}
        _write(logging.INFO, "Job completed successfully", fields)


def log_failure(state: AppState, settled: Settled, error: BaseException | None = None) -> None:
    """Write the line for a failed attempt.

    :param settled: the attempt and the new status of its job; it may not be recorded yet.
    :param error: the exception for ``exc_info`` of the record. Its traceback is masked in the same
        way as in the database.
    """
    job, outcome = settled.spec, settled.outcome
    fields: dict[str, object] = {
        **_job_fields(state, job, settled),
        "Error": _masked_error(state, settled),
        "Retry": f"{settled.retry_count}/{job.retries}",
    }
    level, stage = logging.ERROR, "Job failed"
    if settled.status is JobStatus.RETRYING:
        level, stage = logging.WARNING, "Job failed and will retry"
        next_run = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=settled.delay_seconds or 0)
        fields["Next run"] = _clock_text(next_run)
    elif outcome.kind is OutcomeKind.REFUSED:
        stage = "Unauthorized or invalid job class/method"
    raised = None
    if error is not None:
        # Indented, so that no line of an exception's message looks like a line of the log.
        text = textwrap.indent(printable_lines(outcome.traceback or ""), "  ", lambda _: True)
        raised = Raised(error, frames_of_job(error), text.rstrip())
    _write(level, stage, fields, {"Queue": job.queue}, raised)


def _on_cancelled(app: Flask, job: JobSpec | Job, settled: Settled | None = None) -> None:
    _write(logging.INFO, "Job cancelled", _job_fields(state_of(app), job, settled))


def _on_rescued(app: Flask, job: JobSpec, settled: Settled) -> None:
    fields = {**_job_fields(state_of(app), job), "Error": settled.error, "Status": settled.status}
    _write(logging.WARNING, "Job rescued", fields)


def _on_worker_started(app: Flask, worker: str) -> None:
    _write(logging.INFO, "Worker started", {"Worker": worker})


def _on_worker_stopped(app: Flask, worker: str) -> None:
    _write(logging.INFO, "Worker stopped", {"Worker": worker})


def _on_schedule_fired(app: Flask, schedule: str, tick: dt.datetime, job: Job) -> None:
    fields = {"Schedule": schedule, "Tick": _tick_text(tick), "Job": job.id}
    _write(logging.INFO, "Schedule fired", fields)


def _on_schedule_skipped(app: Flask, schedule: str, tick: dt.datetime, reason: str) -> None:
    fields = {"Schedule": schedule, "Tick": _tick_text(tick), "Reason": reason}
    _write(logging.WARNING, "Schedule skipped", fields)


def _tick_text(tick: dt.datetime) -> str:
    return tick.isoformat(sep=" ", timespec="seconds")


def _job_fields(
    state: AppState, job: Job | JobSpec, settled: Settled | None = None
) -> dict[str, object]:
    return {
        "Class": job.target,
        "Method": job.method or "-",
        "Parameters": _parameters(state, job, _names(settled)),
        "Attempt": job.attempt,
        "Job": job.id,
    }


def _names(settled: Settled | None) -> tuple[str, ...] | None:
    return None if settled is None else settled.outcome.parameter_names


def _parameters(state: AppState, job: Job | JobSpec, names: tuple[str, ...] | None) -> str:
    try:
        masked = state.logged_parameters(job, job.parameters, names)
        text = serialize.dumps_plain(masked)
    except (ValueError, RecursionError):
        return "(not readable)"
    return text if len(text) <= _MAX_PARAMETERS else f"{text[:_MAX_PARAMETERS]}…"


def _masked_error(state: AppState, settled: Settled) -> str:
    job = settled.spec
    try:
        parameters: Any = job.parameters
    except ValueError:
        parameters = []
    return state.logged_text(settled.error or "", job, parameters, _names(settled))


def _write(
    level: int,
    stage: str,
    fields: Mapping[str, object],
    hidden_fields: Mapping[str, object] | None = None,
    raised: Raised | None = None,
) -> None:
    """Write a line.

    :param hidden_fields: fields of the record that the line does not show.
    """
    fields = {**fields, "Timestamp": _clock_text(dt.datetime.now(dt.UTC))}
    # The message is the same for all lines of a stage, so that error trackers can group them.
    message = " | ".join([stage, *(f"{name}: %s" for name in fields)])
    values = [one_line(str(value)) for value in fields.values()]
    attributes = {**fields, **(hidden_fields or {})}
    extra = {f"bgjobs_{name.lower().replace(' ', '_')}": v for name, v in attributes.items()}
    _logger.write(level, message, *values, extra={"bgjobs_stage": stage, **extra}, raised=raised)


def _clock_text(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _on_failure(app: Flask, job: JobSpec, settled: Settled) -> None:
    if not settled.outcome.is_reported:
        log_failure(state_of(app), settled)


_RECEIVERS: dict[NamedSignal, Callable[..., None]] = {
    signals.job_refused: _on_refused,
    signals.job_enqueued: _on_enqueued,
    signals.job_started: _on_started,
    signals.job_completed: _on_completed,
    signals.job_retrying: _on_failure,
    signals.job_failed: _on_failure,
    signals.job_cancelled: _on_cancelled,
    signals.job_rescued: _on_rescued,
    signals.worker_started: _on_worker_started,
    signals.worker_stopped: _on_worker_stopped,
    signals.schedule_fired: _on_schedule_fired,
    signals.schedule_skipped: _on_schedule_skipped,
}
