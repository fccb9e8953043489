"""Blinker signals, sent with the Flask app as sender.

``job_enqueued`` carries ``job``, a :class:`~flask_bgjobs.Job`. Those of a worker carry
``job``, a :class:`~flask_bgjobs.job.records.JobSpec` with the same field names; all but
``job_started`` also carry ``settled``, a :class:`~flask_bgjobs.job.records.Settled`, and follow
the commit of what they tell. A cancel of a waiting job carries ``job`` alone. ``job_refused``
carries ``target``, ``method`` and ``error``. The signals of
workers carry ``worker``, the worker's name.
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
job_refused = _namespace.signal("bgjobs-job-refused")
job_started = _namespace.signal("bgjobs-job-started")
job_completed = _namespace.signal("bgjobs-job-completed")
job_retrying = _namespace.signal("bgjobs-job-retrying")
job_failed = _namespace.signal("bgjobs-job-failed")
job_cancelled = _namespace.signal("bgjobs-job-cancelled")
job_rescued = _namespace.signal("bgjobs-job-rescued")
worker_started = _namespace.signal("bgjobs-worker-started")
worker_stopped = _namespace.signal("bgjobs-worker-stopped")

_OF_STATUS = {
    JobStatus.COMPLETED: job_completed,
    JobStatus.RETRYING: job_retrying,
    JobStatus.FAILED: job_failed,
    JobStatus.CANCELLED: job_cancelled,
}

_RESCUED = frozenset({OutcomeKind.LOST, OutcomeKind.LOST_AMONG, OutcomeKind.CRASHED})


class Emission(NamedTuple):
    """A signal that is being sent."""

    signal_name: str
    began: float
    """By ``time.monotonic()``."""


_emissions: dict[int, Emission] = {}
"""By the id of the thread that sends."""


def emit(signal: NamedSignal, app: Flask, **values: object) -> None:
    """Send a signal; a receiver that raises is logged and keeps nobody else from hearing."""
    emit_each(signal, app, [values])


def emit_in_worker(signal: NamedSignal, app: Flask, **values: object) -> None:
    """The same in a worker, which must not end because a receiver calls ``sys.exit()``.

    In a web server the exit goes on: the server's own signal handler may have raised it.
    """
    emit_each(signal, app, [values], caught=(Exception, SystemExit))


def emit_each(
    signal: NamedSignal,
    app: Flask,
    each: Iterable[Mapping[str, object]],
    *,
    caught: tuple[type[BaseException], ...] = (Exception,),
) -> None:
    """Send a signal once for each of several ``values``.

    Its receivers are looked up once: for a bulk of jobs that takes longer than to call them.

    :param caught: what a receiver may raise without effect on anything else.
    """
    if not signal.receivers:
        return
    receivers = list(signal.receivers_for(app))
    thread_id = threading.get_ident()
    # A receiver may send a signal itself, as it does with an enqueue.
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
    """The signal that a thread is sending at the moment."""
    return _emissions.get(thread_id)


def receiver_in(thread_id: int) -> str:
    """The receiver that a thread is calling at the moment, as ``module.function:line``."""
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame.f_back is not None:
        if frame.f_back.f_code is _call.__code__:
            module = frame.f_globals.get("__name__")
            return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def emit_settled(app: Flask, settled: Settled) -> None:
    """Send the signals of what was recorded of an attempt; a job given back has none."""
    if settled.status is not None and settled.outcome.kind in _RESCUED:
        emit_in_worker(job_rescued, app, job=settled.spec, settled=settled)
    signal = None if settled.status is None else _OF_STATUS.get(settled.status)
    if signal is not None:
        emit_in_worker(signal, app, job=settled.spec, settled=settled)
