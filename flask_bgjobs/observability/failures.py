"""Reports of failed attempts, made after their outcomes were handed over.

A report is a log line with the exception, and a call of each ``on_failure`` function
(:meth:`~flask_bgjobs.BgJobs.on_failure`). An attempt is reported in the process where it ran. If
that process died, or if the job's row could not be run, the worker that records the outcome reports
the attempt, with a substitute for the exception.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import queue
import threading
import time
from collections.abc import Callable

from ..errors import AttemptFailed, JobTimeout
from ..job.records import JobSpec, Outcome, Settled, settlement_of
from ..job.statuses import JobStatus, OutcomeKind
from ..state import AppState
from ..system.safe_logging import logger as _logger
from ..system.threads import WorkerThread
from . import logs

_MAX_CALLS = 1_000
"""Most calls in the queue. Each keeps an exception and all objects in its frames alive."""
_FAILED = (JobStatus.FAILED, JobStatus.RETRYING)


def expected(state: AppState, spec: JobSpec, outcome: Outcome) -> Settled | None:
    """The new status and delay of a job after a failed attempt, to be recorded and reported.

    The returned outcome has a fixed retry delay, so that the log line and the database agree.

    :returns: ``None`` if the attempt has not failed.
    """
    decided = settlement_of(spec, outcome, max_crashes=state.config.max_crashes)
    if decided.status not in _FAILED:
        return None
    outcome = outcome._replace(delay_seconds=decided.delay_seconds, is_reported=True)
    return Settled(spec, outcome, decided.status, decided.retry_count, decided.delay_seconds)


def report(
    state: AppState,
    settled: Settled,
    error: BaseException,
    logged: BaseException,
    context: contextvars.Context,
) -> None:
    """Report an attempt that failed in this process.

    :param error: the exception that its code raised, for the ``on_failure`` functions.
    :param logged: the exception for the log: the same, or a substitute without secrets.
    :param context: the job's context.
    """
    # A copy: a context cannot be entered twice, and code that the job started may run in it.
    context = context.copy()
    try:
        context.run(logs.log_failure, state, settled, logged)
        _call_hooks(state, settled, error, context)
    except BaseException:
        # Also gevent.Timeout, which is a BaseException: the thread must run the next job.
        _logger.exception("The failure of job %s could not be reported", settled.job_id)


def report_lost(state: AppState, settled: Settled) -> None:
    """Call the ``on_failure`` functions for a recorded failure that was not reported before.

    Its log line is written by the receiver of ``job_failed`` or ``job_retrying``.
    """
    if settled.status in _FAILED and not settled.outcome.is_reported:
        _call_hooks(state, settled, _substitute(settled), contextvars.copy_context())


def report_late(state: AppState, spec: JobSpec, outcome: Outcome) -> None:
    """Report an attempt whose process ended before it had reported the failure.

    This is done in the thread of ``call_soon``, because a logging handler may have hung in that
    process, and could hang here as well.
    """
    settled = expected(state, spec, outcome)
    if settled is not None:
        state.call_soon(functools.partial(_report_late, state, settled))


def _report_late(state: AppState, settled: Settled) -> None:
    _logger.warning(
        "Failure reported late | Job: %s | Its child process ended before it had logged the "
        "failure; does a logging handler hang?",
        settled.job_id,
    )
    substitute = _substitute(settled)
    report(state, settled, substitute, substitute, contextvars.copy_context())


class CallThread:
    """Calls functions one after the other in a thread, so that no job or worker waits for them."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_CALLS)
        self._thread: threading.Thread | None = None
        self._is_finished = False
        self._lock = threading.Lock()

    def __call__(self, call: Callable[[], None]) -> None:
        """Add a call to the queue. If 1,000 calls wait, it is dropped, and an error is logged."""
        try:
            with self._lock:
                is_finished = self._is_finished
                if not is_finished:
                    self._calls.put_nowait(call)
                    if self._thread is None:
                        self._thread = WorkerThread(self._run, "bgjobs-failures")
                        self._thread.start()
            if is_finished:
                call()
        except queue.Full:
            _logger.error(
                "on_failure call dropped | Queued: %d | The functions are slower than jobs fail",
                _MAX_CALLS,
            )

    def finish(self, seconds: float) -> None:
        """Wait until the queued calls were made, for ``seconds`` at most.

        Later calls are made at once, in the caller's thread.
        """
        ends = time.monotonic() + seconds
        with self._lock:
            self._is_finished = True
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=seconds)
            self._thread.join(max(0.0, ends - time.monotonic()))
        if self._thread.is_alive():
            _logger.warning(
                "on_failure still running at the end | Waited: %g s | Calls not made: %d",
                seconds,
                self._calls.qsize(),
            )

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            # Each call logs its own exceptions. This exception may come from a logging handler.
            with contextlib.suppress(BaseException):
                call()


def _substitute(settled: Settled) -> BaseException:
    """An exception for an attempt whose own exception was lost with its process, or never was."""
    if settled.outcome.kind is OutcomeKind.TIMEOUT:
        return JobTimeout(settled.error)
    return AttemptFailed(settled.error)


def _call_hooks(
    state: AppState, settled: Settled, error: BaseException, context: contextvars.Context
) -> None:
    if not state.failure_hooks:
        return
    call = functools.partial(_call_each_hook, state, settled, error)
    state.call_soon(functools.partial(context.run, call))


def _call_each_hook(state: AppState, settled: Settled, error: BaseException) -> None:
    final = settled.status is JobStatus.FAILED
    for hook in tuple(state.failure_hooks):
        try:
            # A new context, because the job's has ended and its session is closed.
            with state.app.app_context():
                hook(settled.spec, error, final=final)
        except BaseException:
            # Also gevent.Timeout or sys.exit(): only this call may end by it.
            name = getattr(hook, "__qualname__", repr(hook))
            _logger.exception("%s raised; job %s is not affected", name, settled.job_id)
