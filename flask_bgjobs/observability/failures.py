"""Failed attempts, reported after their outcomes were handed over.

A report is a log line with the exception, and a call of each function that
:meth:`~flask_bgjobs.BgJobs.on_failure` registered. An attempt is reported in the process where it
ran. One whose process died, or whose row could not be run, is reported by the worker that records
it, without an exception of its own.
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
"""Calls that wait; each keeps an exception, and what its frames refer to."""
_FAILED = (JobStatus.FAILED, JobStatus.RETRYING)


def expected(state: AppState, spec: JobSpec, outcome: Outcome) -> Settled | None:
    """What becomes of the job of an attempt that failed, to be recorded and reported like that.

    Its outcome has the delay that the log line will name. ``None``: it has not failed.
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

    :param error: what its code raised, for the host's functions.
    :param logged: the same for the log, or a stand-in for it without secrets.
    :param context: of the job.
    """
    # A copy, as something that the job has started may run in its own.
    context = context.copy()
    try:
        context.run(logs.log_failure, state, settled, logged)
        _call_hooks(state, settled, error, context)
    except BaseException:
        # Also a timeout of gevent's: the thread goes on with the next job.
        _logger.exception("The failure of job %s could not be reported", settled.job_id)


def report_lost(state: AppState, settled: Settled) -> None:
    """Call the host's functions for what was recorded of an attempt that nobody has reported.

    The log line follows the signals of the record.
    """
    if settled.status in _FAILED and not settled.outcome.is_reported:
        _call_hooks(state, settled, _stand_in(settled), contextvars.copy_context())


def report_cut_off(state: AppState, spec: JobSpec, outcome: Outcome) -> None:
    """Report, in the thread of ``call_soon``, an attempt whose process ended before it had done so.

    A logging handler may have hung in that process, and would hang here as well.
    """
    settled = expected(state, spec, outcome)
    if settled is not None:
        state.call_soon(functools.partial(_report_cut_off, state, settled))


def _report_cut_off(state: AppState, settled: Settled) -> None:
    _logger.warning(
        "Failure reported late | Job: %s | Its child process ended before it had logged the "
        "failure; does a logging handler hang?",
        settled.job_id,
    )
    stand_in = _stand_in(settled)
    report(state, settled, stand_in, stand_in, contextvars.copy_context())


class CallThread:
    """Calls the host's functions, one after the other, so that no job or worker waits for them."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_CALLS)
        self._thread: threading.Thread | None = None
        self._is_finished = False
        self._lock = threading.Lock()

    def __call__(self, call: Callable[[], None]) -> None:
        """Make a call soon. Calls that come when too many wait are dropped, and logged."""
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
        """Wait for the calls that are due, for so many seconds at most.

        A call that comes later is made at once, in the caller's thread.
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
            # What a call raises it logs by itself; this may be a logging handler that raises.
            with contextlib.suppress(BaseException):
                call()


def _stand_in(settled: Settled) -> BaseException:
    """An exception for an attempt whose own, if there was one, is gone with its process."""
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
            # Of its own: the job's is over, and its session is closed.
            with state.app.app_context():
                hook(settled.spec, error, final=final)
        except BaseException:
            # Also a timeout of gevent's, or sys.exit(): nothing but this call may end by it.
            name = getattr(hook, "__qualname__", repr(hook))
            _logger.exception("%s raised; job %s is not affected", name, settled.job_id)
