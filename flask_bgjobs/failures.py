"""Failed attempts, reported in the process where they ran: a log line with the exception, and the
host's functions that :meth:`~flask_bgjobs.BgJobs.on_failure` registered.

An attempt whose process died, or whose row could not be run, is reported by the worker that records
it, without an exception of its own.
"""

from __future__ import annotations

from blinker import NamedSignal
from flask import Flask

from . import logs, signals
from .app_state import AppState, state_of
from .errors import AttemptFailed, JobTimeout
from .safe_logging import logger as _logger
from .spec import JobSpec, Outcome, Settled, settlement_of
from .states import JobStatus, OutcomeKind


def connect() -> None:
    """Report what no other process has reported; calling it again changes nothing."""
    for signal in _SIGNALS:
        signal.connect(_on_recorded)


def report(state: AppState, spec: JobSpec, outcome: Outcome, error: BaseException) -> Outcome:
    """Report an attempt that failed; other outcomes are returned as they are.

    :param error: what its code raised.
    :returns: the outcome to record. Its delay is the one that the log line names.
    """
    decided = settlement_of(spec, outcome, max_crashes=state.config.max_crashes)
    if decided.status not in (JobStatus.FAILED, JobStatus.RETRYING):
        return outcome
    outcome = outcome._replace(delay_seconds=decided.delay_seconds, is_reported=True)
    settled = Settled(spec, outcome, decided.status, decided.retry_count, decided.delay_seconds)
    logs.log_failure(state, settled, error)
    _call_hooks(state, settled, error)
    return outcome


def _on_recorded(app: Flask, job: JobSpec, settled: Settled) -> None:
    if settled.outcome.is_reported:
        return
    state = state_of(app)
    logs.log_failure(state, settled)
    _call_hooks(state, settled, _stand_in(settled))


def _stand_in(settled: Settled) -> BaseException:
    """An exception for an attempt whose own, if there was one, is gone with its process."""
    if settled.outcome.kind is OutcomeKind.TIMEOUT:
        return JobTimeout(settled.error)
    return AttemptFailed(settled.error)


def _call_hooks(state: AppState, settled: Settled, error: BaseException) -> None:
    final = settled.status is JobStatus.FAILED
    for hook in tuple(state.failure_hooks):
        try:
            # Of its own: the job's is over, and its session is closed.
            with state.app.app_context():
                hook(settled.spec, error, final=final)
        except (Exception, SystemExit):
            _logger.exception(
                "%s raised; the job is not affected", getattr(hook, "__qualname__", hook)
            )


_SIGNALS: tuple[NamedSignal, ...] = (signals.job_failed, signals.job_retrying)
