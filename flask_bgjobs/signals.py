"""Blinker signals, sent with the Flask app as sender.

``job_enqueued`` carries ``job``, a :class:`~flask_bgjobs.Job`. Those of a worker carry
``job``, a :class:`~flask_bgjobs.spec.JobSpec` with the same field names; all but
``job_started`` also carry ``settled``, a :class:`~flask_bgjobs.spec.Settled`, and follow
the commit of what they tell. A cancel of a waiting job carries ``job`` alone. ``job_refused``
carries ``target``, ``method`` and ``error``. The signals of
workers carry ``worker``, the worker's name.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping

from blinker import NamedSignal, Namespace
from flask import Flask

from .spec import Settled
from .states import JobStatus, OutcomeKind

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

_RESCUED = frozenset({OutcomeKind.LOST, OutcomeKind.CRASHED})

_logger = logging.getLogger("flask_bgjobs")


def emit(signal: NamedSignal, app: Flask, **values: object) -> None:
    """Send a signal; a receiver that raises is logged and keeps nobody else from hearing."""
    emit_each(signal, app, [values])


def emit_each(signal: NamedSignal, app: Flask, each: Iterable[Mapping[str, object]]) -> None:
    """Send a signal once for each of several ``values``.

    Its receivers are looked up once: for a bulk of jobs that takes longer than to call them.
    """
    if not signal.receivers:
        return
    receivers = list(signal.receivers_for(app))
    for values in each:
        for receiver in receivers:
            try:
                receiver(app, **values)
            except Exception:
                # Also when the broken receiver is the log itself.
                with contextlib.suppress(Exception):
                    _logger.exception(
                        "A receiver of %s raised; the job is not affected", signal.name
                    )


def emit_settled(app: Flask, settled: Settled) -> None:
    """Send the signals of what was recorded of an attempt; a job given back has none."""
    if settled.status is not None and settled.outcome.kind in _RESCUED:
        emit(job_rescued, app, job=settled.spec, settled=settled)
    signal = None if settled.status is None else _OF_STATUS.get(settled.status)
    if signal is not None:
        emit(signal, app, job=settled.spec, settled=settled)
