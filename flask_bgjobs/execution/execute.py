"""Execute: one attempt, from the name to the outcome. No database here.

Both pools run this same function. A failing job is a value, an outcome; nothing that a job
does may raise out of here.
"""

from __future__ import annotations

import contextvars
import decimal
import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from ..errors import Fail, JobCancelled, JobNotAllowed, JobTimeout, Retry, Snooze
from ..job import durations, serialize
from ..job.records import JobSpec, Outcome
from ..job.statuses import OutcomeKind
from ..job.text import MAX_TRACEBACK_CHARS, storable
from ..observability import failures, tracebacks
from ..registry import Target
from ..signals import job_started
from ..state import AppState
from ..system import forks
from ..system.safe_logging import SafeLogger
from . import current as context
from .current import CurrentJob
from .interrupt import InterruptScope
from .leftovers import ThreadState


def execute(
    state: AppState, spec: JobSpec, job: CurrentJob, scope: InterruptScope, claimed: float
) -> Outcome:
    """How the attempt ended.

    A copy of the process that a job forks ends here, as soon as the job's code ends in it.

    :param spec: the claimed job.
    :param job: what its code sees as ``current_job``.
    :param scope: through which it may be stopped.
    :param claimed: when it was claimed, by ``time.monotonic()``.
    :returns: to be handed over first; then :meth:`.CurrentJob.report_failure` is to be called.
    """
    with forks.CopiesEnd():
        # A copy of the context: what the job sets in it is gone when it ends.
        context_of_job = contextvars.copy_context()
        try:
            outcome = context_of_job.run(_execute, state, spec, job, scope, claimed)
        except BaseException as error:
            # Such as an alarm of the job's after its code had ended, or no memory.
            outcome = _failure(job, spec, OutcomeKind.FAILED, error)
        raised, job.raised = job.raised, None
        # What a cancelled job raised is no failure, and one that is given back runs again.
        if raised is None or job.cancelled or scope.interruption is JobCancelled:
            return outcome
        settled = failures.expected(state, spec, outcome)
        if settled is None:
            return outcome
        job.report_with(functools.partial(failures.report, state, settled, *raised, context_of_job))
        return settled.outcome


def _execute(
    state: AppState, spec: JobSpec, job: CurrentJob, scope: InterruptScope, claimed: float
) -> Outcome:
    # The one of the caller is an object that both contexts hold.
    decimal.setcontext(decimal.getcontext().copy())
    job.mask_with(lambda: state.redactor.forms)
    try:
        target = state.registry.resolve(spec.target, spec.method)
        parameters = spec.parameters
        if not isinstance(parameters, list | dict):
            raise ValueError("the parameters in the row are neither a list nor a dict")
        job.mask_with(lambda: state.redactor.masker(parameters, _named(target)))
    except JobNotAllowed as error:
        return _failure(job, spec, OutcomeKind.REFUSED, error)
    except BaseException as error:
        # A module may raise anything when it is imported, KeyboardInterrupt as well.
        return _failure(job, spec, OutcomeKind.FAILED_FINALLY, error)
    started = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        with state.app.app_context():
            outcome = _attempt(state, spec, job, scope, target, parameters)
    except BaseException as error:
        # A teardown of the host's raised, after the code had ended.
        if not outcome:
            outcome = _of_exception(job, error)
        else:
            SafeLogger(state.app.logger).exception("Teardown after job %s raised", spec.id)
    return Outcome(
        spec.id,
        spec.attempt,
        wait_seconds=started - claimed,
        run_seconds=time.monotonic() - started,
        report=job.take_report(),
        parameter_names=target.positional_names if isinstance(parameters, list) else None,
        **outcome,
    )


def _named(target: Target) -> Callable[..., Any] | None:
    try:
        return target.named
    except Exception:
        # A function that tells nothing of its parameters: any of them may be the secret.
        return None


def _attempt(
    state: AppState,
    spec: JobSpec,
    job: CurrentJob,
    scope: InterruptScope,
    target: Target,
    parameters: Any,
) -> dict[str, Any]:
    token = context.enter(job)
    try:
        state.emit_in_worker(job_started, job=spec)
        with ThreadState():
            result = scope.run(lambda: _call(scope, target, parameters))
        job.check_meta()
        text = serialize.dumps(result, name="result", max_bytes=state.config.max_payload)
        return {"kind": OutcomeKind.COMPLETED, "result_json": text}
    except JobTimeout as error:
        error.args = (f"it ran longer than {spec.timeout} s",)
        state.roll_back_session()
        return _of_exception(job, error)
    except BaseException as error:
        state.roll_back_session()
        return _of_exception(job, error)
    finally:
        context.leave(token)
        state.remove_session()


def _call(scope: InterruptScope, target: Target, parameters: Any) -> Any:
    # Before anything of ours runs in a copy, as that would use what it shares with its parent.
    with forks.CopiesEnd():
        if isinstance(parameters, dict):
            result = target.call((), parameters)
        else:
            result = target.call(parameters, {})
    return scope.run_coroutine(result) if inspect.iscoroutine(result) else result


def _of_exception(job: CurrentJob, error: BaseException) -> dict[str, Any]:
    """What an exception says about the attempt: the one place where that is decided."""
    match error:
        case Retry():
            kind, delay = OutcomeKind.RETRY, _asked_delay(error.delay)
        case Snooze():
            kind, delay = OutcomeKind.SNOOZED, _asked_delay(error.delay) or 0.0
        case Fail() | serialize.NotSerializable():
            kind, delay = OutcomeKind.FAILED_FINALLY, None
        case JobCancelled():
            kind, delay = OutcomeKind.CANCELLED, None
        case JobTimeout():
            kind, delay = OutcomeKind.TIMEOUT, None
        case _:
            kind, delay = OutcomeKind.FAILED, None
    return {"kind": kind, "delay_seconds": delay, **_described(job, error)}


def _asked_delay(delay: object) -> float | None:
    """The delay that the code asked for; one that is no duration counts as not given."""
    if delay is None:
        return None
    try:
        return durations.seconds(delay, "delay")
    except ValueError:
        return None


def _failure(job: CurrentJob, spec: JobSpec, kind: OutcomeKind, error: BaseException) -> Outcome:
    return Outcome(spec.id, spec.attempt, kind, **_described(job, error))


def _described(job: CurrentJob, error: BaseException) -> dict[str, Any]:
    """Type, message and traceback of an exception, fit for any database, whatever it is."""
    kind = storable(type(error).__qualname__)[:255]
    try:
        message = str(error)
    except BaseException as broken:
        message = f"(its message cannot be read: {type(broken).__name__})"
    text = tracebacks.formatted(error)
    masked = job.masked(text)
    job.raised = error, error if masked == text else tracebacks.stand_in(error, job.masked(message))
    return {
        "error_type": kind,
        "error": storable(job.masked(f"{kind}: {message}" if message else kind)),
        "traceback": storable(masked, MAX_TRACEBACK_CHARS),
    }
