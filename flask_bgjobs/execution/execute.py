"""Execute one attempt, from the job's name to its outcome. No database is used here.

Both pools run :func:`execute`. A failing job is a value, an outcome: no exception of a job may
leave this function.
"""

from __future__ import annotations

import contextvars
import decimal
import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from ..errors import Fail, InvalidJob, JobCancelled, JobNotAllowed, JobTimeout, Retry, Snooze
from ..job import durations, serialize
from ..job.failure_rules import is_final
from ..job.records import JobSpec, Outcome, expired_outcome, waited_seconds
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
    """Run one attempt of a job, and return its outcome.

    If the job forks, the child process ends here as soon as the job's code ends in it.

    :param spec: the claimed job.
    :param job: the object that its code sees as ``current_job``.
    :param scope: the scope through which the code may be interrupted.
    :param claimed: time of the claim, by ``time.monotonic()``.
    :returns: the outcome. The caller hands it over first, then calls
        :meth:`.CurrentJob.report_failure`.
    """
    with forks.CopiesEnd():
        # A copy of the context, so that context variables of the job end with it.
        context_of_job = contextvars.copy_context()
        try:
            outcome = context_of_job.run(_execute, state, spec, job, scope, claimed)
        except BaseException as error:
            # For example a SIGALRM of the job after its code had ended, or a MemoryError.
            outcome = _failure(job, spec, OutcomeKind.FAILED, error)
        raised, job.raised = job.raised, None
        # An exception of a cancelled job is no failure, and a job that is given back runs again.
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
    if (expired := expired_outcome(spec)) is not None:
        return expired
    # Both contexts refer to the same decimal context, so the job gets its own.
    decimal.setcontext(decimal.getcontext().copy())
    job.mask_with(lambda: state.redactor.forms)
    try:
        target = state.registry.resolve(spec.target, spec.method)
        parameters = spec.parameters
        if not isinstance(parameters, list | dict):
            raise ValueError("the parameters in the row are neither a list nor a dict")
        job.mask_with(lambda: state.redactor.masker(parameters, _named_function(target)))
    except (JobNotAllowed, InvalidJob) as error:
        return _without_code(state, spec, job, error)
    except BaseException as error:
        # The import of a module may raise anything, also KeyboardInterrupt.
        return _failure(job, spec, OutcomeKind.FAILED_FINALLY, error)
    started = time.monotonic()
    outcome: dict[str, Any] = {}
    try:
        with state.app.app_context():
            outcome = _attempt(state, spec, job, scope, target, parameters)
    except BaseException as error:
        # A teardown function of the host raised, after the code had ended.
        if not outcome:
            outcome = _outcome_of_exception(spec, job, error)
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


def _without_code(
    state: AppState, spec: JobSpec, job: CurrentJob, error: JobNotAllowed | InvalidJob
) -> Outcome:
    """The outcome of a job whose name is not allowed, or is not defined, in this process."""
    config = state.config
    if config.unknown_jobs == "wait" and state.registry.may_be_elsewhere(
        error, spec.target, spec.method
    ):
        if waited_seconds(spec) < config.unknown_timeout:
            return Outcome(spec.id, spec.attempt, OutcomeKind.UNKNOWN, error=str(error))
        words = durations.in_words(config.unknown_timeout)
        waited = f" No worker had its code within {words} (BGJOBS_UNKNOWN_TIMEOUT)."
        return _failure(job, spec, OutcomeKind.REFUSED, JobNotAllowed(f"{error}{waited}"))
    kind = OutcomeKind.REFUSED if isinstance(error, JobNotAllowed) else OutcomeKind.FAILED_FINALLY
    return _failure(job, spec, kind, error)


def _named_function(target: Target) -> Callable[..., Any] | None:
    try:
        return target.placeholder
    except Exception:
        # The function has no readable signature, so any parameter may be a secret.
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
        return _outcome_of_exception(spec, job, error)
    except BaseException as error:
        state.roll_back_session()
        return _outcome_of_exception(spec, job, error)
    finally:
        context.leave(token)
        state.remove_session()


def _call(scope: InterruptScope, target: Target, parameters: Any) -> Any:
    # A forked child must end before our code runs in it and uses connections of its parent.
    with forks.CopiesEnd():
        if isinstance(parameters, dict):
            result = target.call((), parameters)
        else:
            result = target.call(parameters, {})
    return scope.run_coroutine(result) if inspect.iscoroutine(result) else result


def _outcome_of_exception(spec: JobSpec, job: CurrentJob, error: BaseException) -> dict[str, Any]:
    """Outcome fields for an exception. Only this function maps exceptions to outcomes."""
    match error:
        case Retry():
            kind, delay = OutcomeKind.RETRY, _requested_delay(error.delay)
        case Snooze():
            kind, delay = OutcomeKind.SNOOZED, _requested_delay(error.delay) or 0.0
        case Fail() | serialize.NotSerializable():
            kind, delay = OutcomeKind.FAILED_FINALLY, None
        case JobCancelled():
            kind, delay = OutcomeKind.CANCELLED, None
        case JobTimeout():
            kind, delay = OutcomeKind.TIMEOUT, None
        case _ if is_final(spec.failure_rules, error):
            kind, delay = OutcomeKind.FAILED_FINALLY, None
        case _:
            kind, delay = OutcomeKind.FAILED, None
    return {"kind": kind, "delay_seconds": delay, **_described(job, error)}


def _requested_delay(delay: object) -> float | None:
    """The delay given to ``Retry`` or ``Snooze``; ``None`` if it is missing or no duration."""
    if delay is None:
        return None
    try:
        return durations.seconds(delay, "delay")
    except ValueError:
        return None


def _failure(job: CurrentJob, spec: JobSpec, kind: OutcomeKind, error: BaseException) -> Outcome:
    return Outcome(spec.id, spec.attempt, kind, **_described(job, error))


def _described(job: CurrentJob, error: BaseException) -> dict[str, Any]:
    """Type, message and traceback of any exception, masked and safe to store in any database."""
    kind = storable(type(error).__qualname__)[:255]
    try:
        message = str(error)
    except BaseException as broken:
        message = f"(its message cannot be read: {type(broken).__name__})"
    text = tracebacks.formatted(error)
    masked = job.masked(text)
    job.raised = error, error if masked == text else tracebacks.redacted(error, job.masked(message))
    return {
        "error_type": kind,
        "error": storable(job.masked(f"{kind}: {message}" if message else kind)),
        "traceback": storable(masked, MAX_TRACEBACK_CHARS),
    }
