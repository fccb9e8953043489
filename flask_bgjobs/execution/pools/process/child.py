"""A child of the process pool: builds the app, then runs jobs one after the other."""

from __future__ import annotations

import dataclasses
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from flask.cli import ScriptInfo

from ....errors import JobCancelled, JobTimeout
from ....job.records import JobSpec
from ....job.text import storable
from ....observability.failures import CallThread
from ....state import AppState, import_jobs, state_of
from ....system import forks
from ....system.console import show_logs
from ....system.memory import memory_in_use
from ....system.signal_handlers import reset_in_copies
from ...current import CurrentJob
from ...execute import execute
from ...interrupt import InterruptScope
from ...leftovers import ProcessState
from .. import become_child
from .channel import ChildEnd
from .messages import pack_outcome, pack_report, unpack_spec
from .tickets import Marks, Tickets

_REPORT_SECONDS = 0.25
"""Interval for sending progress and log lines to the worker."""
LAST_CALLS_SECONDS = 10.0
"""How long a child that ends by itself waits for the host's ``on_failure`` functions. A new child
runs jobs in the meantime."""
_ENDED_CALLS_SECONDS = 1.5
"""The same time when the worker ends the child, which is killed after two seconds."""
READY, BROKEN, OUTCOME, REPORT, REPORTED = "ready", "broken", "outcome", "report", "reported"
"""Messages to the worker: the app is built; the app cannot be built; the outcome of a job; progress
and log lines of a job; the failure of a job was reported."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits at which a child ends by itself, between two jobs, and is replaced by a new one."""

    max_jobs: int | None = None
    """Number of jobs."""
    max_time: float | None = None
    """Time since the app was built, in seconds."""
    max_memory: float | None = None
    """Memory in use by the child, in MiB."""


def run(descriptors: list[int], settings: dict[str, Any]) -> None:
    """Run jobs until the worker ends, a limit is reached, or a job was stopped.

    :param descriptors: file descriptors of the channel, the tickets and the marks.
    :param settings: ``app``, ``limits`` and ``show_logs``, as for :class:`.pool.ProcessPool`.
    """
    become_child()
    channel_end, tickets_end, marks_end = descriptors
    channel = ChildEnd(socket.socket(fileno=channel_end))
    try:
        with forks.CopiesEnd():
            state = _build_app(settings)
    except BaseException as error:
        with channel.lock:
            channel.send([BROKEN, storable(f"{type(error).__name__}: {error}")])
        sys.exit(1)
    child = _Child(state, channel, Tickets(tickets_end), Marks(marks_end))
    child.run(Limits(**settings["limits"]))


def _build_app(settings: dict[str, Any]) -> AppState:
    app = ScriptInfo(app_import_path=settings["app"]).load_app()
    if settings["show_logs"]:
        show_logs()
    state = state_of(app)
    import_jobs(state)
    return state


class _Child:
    def __init__(self, state: AppState, channel: ChildEnd, tickets: Tickets, marks: Marks) -> None:
        self._state = state
        self._channel = channel
        self._tickets = tickets
        self._marks = marks
        self._number = 0
        self._job: CurrentJob | None = None
        self._scope: InterruptScope | None = None

    def run(self, limits: Limits) -> None:
        reset_in_copies({signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_term)})
        self._process = ProcessState()
        calls = self._state.call_soon = CallThread()
        threading.Thread(target=self._send_reports, name="bgjobs-reports", daemon=True).start()
        with self._channel.lock:
            self._channel.send([READY])
        started, jobs = time.monotonic(), 0
        while (number := self._tickets.take()) is not None:
            jobs += 1
            if self._run_one(number) or _reached_limit(limits, jobs, time.monotonic() - started):
                break
        self._channel.close()
        calls.finish(_ENDED_CALLS_SECONDS if number is None else LAST_CALLS_SECONDS)

    def _run_one(self, number: int) -> bool:
        """Run the job of a ticket.

        :returns: whether its code was interrupted. Interrupted code may leave locks, threads and
            inconsistent state behind, so this process must not run another job.
        """
        claimed, spec = self._receive_job(number)
        self._state.store.reconnect_if_replaced()
        job = CurrentJob(spec, max_payload=self._state.config.max_payload)
        scope = InterruptScope()
        self._marks.start(number, time.monotonic())
        # The number is set last: the signal handler uses job and scope once it is set.
        self._job, self._scope, self._number = job, scope, number
        if self._marks.stop == number:
            self._interrupt()
        outcome = execute(self._state, spec, job, scope, claimed)
        self._number, self._job, self._scope = 0, None, None
        self._process.restore()
        with self._channel.lock:
            self._channel.send([OUTCOME, number, pack_outcome(outcome)])
        self._marks.finish(number)
        if outcome.is_reported:
            job.report_failure()
            with self._channel.lock:
                self._channel.send([REPORTED, number])
        return scope.interruption is not None

    def _receive_job(self, number: int) -> tuple[float, JobSpec]:
        """Return the claim time and the job of a ticket.

        The data of jobs whose tickets were taken back is skipped.
        """
        while True:
            sent, claimed, values = self._channel.receive()
            if sent == number:
                return claimed, unpack_spec(values)

    def _on_term(self, _number: int, _frame: FrameType | None) -> None:
        # Other SIGTERMs are ignored. A service manager may signal all processes of the service, but
        # the worker decides when its children end.
        if self._number and self._marks.stop == self._number:
            self._interrupt()

    def _interrupt(self) -> None:
        assert self._job is not None
        assert self._scope is not None
        if self._marks.stop_for_timeout:
            self._scope.interrupt(JobTimeout)
        else:
            self._job.request_cancel()
            self._scope.interrupt(JobCancelled)

    def _send_reports(self) -> None:
        while True:
            time.sleep(_REPORT_SECONDS)
            number, job = self._number, self._job
            if job is None:
                continue
            try:
                with self._channel.lock:
                    report = job.take_report()
                    if report is not None:
                        self._channel.send([REPORT, number, pack_report(report)])
            except OSError:
                return


def _reached_limit(limits: Limits, jobs: int, seconds: float) -> bool:
    if limits.max_jobs is not None and jobs >= limits.max_jobs:
        return True
    if limits.max_time is not None and seconds >= limits.max_time:
        return True
    return limits.max_memory is not None and memory_in_use() >= limits.max_memory
