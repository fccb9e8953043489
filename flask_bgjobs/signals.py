"""Blinker signals, sent with the Flask app as sender.

``job_enqueued`` passes ``job``, a :class:`~flask_bgjobs.Job`. The signals about an attempt pass
``job``, a :class:`~flask_bgjobs.job.records.JobSpec` with the same field names. All of these except
``job_started`` are sent after the outcome is committed, and also pass ``settled``, a
:class:`~flask_bgjobs.job.records.Settled`. ``job_cancelled`` passes only ``job`` if the job had not
started. ``job_refused`` passes ``target``, ``method`` and ``error``. ``worker_started`` and
``worker_stopped`` pass ``worker``, the name of the worker. ``schedule_fired`` and
``schedule_skipped`` pass ``schedule``, the name of the schedule, and ``tick``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from blinker import NamedSignal, Namespace
from flask import Flask

from .job.records import Settled
from .job.statuses import JobStatus, OutcomeKind
from .system.safe_logging import logger as _logger

_namespace = Namespace()

job_enqueued = _namespace.signal("bgjobs-job-enqueued")
"""Sent with ``job`` after the commit of an enqueue, in the process that enqueued."""
job_refused = _namespace.signal("bgjobs-job-refused")
"""Sent with ``target``, ``method`` and ``error`` before an enqueue raises its error."""
job_started = _namespace.signal("bgjobs-job-started")
"""Sent with ``job`` in the job's thread, before its code runs."""
job_completed = _namespace.signal("bgjobs-job-completed")
"""Sent with ``job`` and ``settled`` when a job is completed."""
job_retrying = _namespace.signal("bgjobs-job-retrying")
"""Sent with ``job`` and ``settled`` when an attempt failed and a retry follows."""
job_failed = _namespace.signal("bgjobs-job-failed")
"""Sent with ``job`` and ``settled`` when a job has failed and is not retried."""
job_cancelled = _namespace.signal("bgjobs-job-cancelled")
"""Sent with ``job`` when a job is cancelled, and with ``settled`` if it was running."""
job_rescued = _namespace.signal("bgjobs-job-rescued")
"""Sent with ``job`` and ``settled`` when a job was taken from a dead worker."""
worker_started = _namespace.signal("bgjobs-worker-started")
"""Sent with ``worker``, its name, when a worker starts."""
worker_stopped = _namespace.signal("bgjobs-worker-stopped")
"""Sent with ``worker``, its name, when a worker stops; not when it is killed."""

schedule_fired = _namespace.signal("bgjobs-schedule-fired")
"""Sent with ``schedule``, ``tick`` and ``job`` in a worker that has enqueued the job of a tick."""
schedule_skipped = _namespace.signal("bgjobs-schedule-skipped")
"""Sent with ``schedule``, ``tick`` and ``reason`` in a worker that has skipped a tick."""

_SIGNAL_BY_STATUS = {
    JobStatus.COMPLETED: job_completed,
    JobStatus.RETRYING: job_retrying,
    JobStatus.FAILED: job_failed,
    JobStatus.CANCELLED: job_cancelled,
}

_RESCUE_OUTCOMES = frozenset({OutcomeKind.LOST, OutcomeKind.LOST_AMONG, OutcomeKind.CRASHED})


class Emission(NamedTuple):
    """A signal that is being sent."""

    signal_name: str
    began: float
    """Start of the emission, as ``time.monotonic()``."""


_emissions: dict[int, Emission] = {}
"""The emission in progress in each thread, by thread id."""


def emit(signal: NamedSignal, app: Flask, **values: object) -> None:
    """Send a signal. If a receiver raises an exception, it is logged, and the other receivers are
    still called."""
    emit_each(signal, app, [values])


def emit_in_worker(signal: NamedSignal, app: Flask, **values: object) -> None:
    """Send a signal in a worker, which must not end because a receiver calls ``sys.exit()``.

    :func:`emit` lets ``SystemExit`` pass, because in a web server the server's own signal handler
    may have raised it.
    """
    emit_each(signal, app, [values], caught=(Exception, SystemExit))


def emit_each(
    signal: NamedSignal,
    app: Flask,
    each: Iterable[Mapping[str, object]],
    *,
    caught: tuple[type[BaseException], ...] = (Exception,),
) -> None:
    """Send a signal several times.

    The receivers are looked up only once: for many jobs, the lookup takes longer than the calls.

    :param each: the keyword arguments of each emission.
    :param caught: exceptions of receivers that are logged instead of raised.
    """
    if not signal.receivers:
        return
    receivers = list(signal.receivers_for(app))
    thread_id = threading.get_ident()
    # A receiver may send a signal itself, for example by enqueueing a job.
    outer = _emissions.get(thread_id)
    try:
        for values in each:
            _emissions[thread_id] = Emission(signal.name, time.monotonic())
            for receiver in receivers:
                _call(receiver, signal, app, values, caught)
    finally:
        if outer is None:
            _emissions.pop(thread_id, None)
        else:
            _emissions[thread_id] = outer


def _call(
    receiver: Callable[..., object],
    signal: NamedSignal,
    app: Flask,
    values: Mapping[str, object],
    caught: tuple[type[BaseException], ...],
) -> None:
    try:
        receiver(app, **values)
    except caught:
        _logger.exception("A receiver of %s raised; the job is not affected", signal.name)


def emission_in(thread_id: int) -> Emission | None:
    """The signal that a thread is sending, or ``None``."""
    return _emissions.get(thread_id)


def receiver_in(thread_id: int) -> str:
    """The receiver that a thread is calling, as ``module.function:line``, or ``unknown``."""
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame.f_back is not None:
        if frame.f_back.f_code is _call.__code__:
            module = frame.f_globals.get("__name__")
            return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def emit_settled(app: Flask, settled: Settled) -> None:
    """Send the signals for the recorded outcome of an attempt; there are none for a job that was
    released."""
    if settled.status is not None and settled.outcome.kind in _RESCUE_OUTCOMES:
        emit_in_worker(job_rescued, app, job=settled.spec, settled=settled)
    signal = None if settled.status is None else _SIGNAL_BY_STATUS.get(settled.status)
    if signal is not None:
        emit_in_worker(signal, app, job=settled.spec, settled=settled)
