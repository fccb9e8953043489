"""The process pool: runs jobs in child processes.

A job that crashes, hangs or uses much CPU time does not affect other jobs, and its process can be
killed. Each child has its own channel, tickets and marks (see :mod:`.tickets`), so that a faulty
child cannot disturb another one. One thread of the worker, the pool's loop, serves all children.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ....errors import BgJobsError, JobCancelled, JobTimeout
from ....job.records import JobSpec, Outcome, Report, lost_outcome
from ....job.statuses import OutcomeKind, lost_kind
from ....job.text import one_line
from ....system.exits import describe_exit
from ....system.safe_logging import logger as _logger
from ....system.threads import WorkerThread
from ..pace import Pace
from ..trouble import Failing, Overdue
from . import child as child_module
from .channel import ParentEnd
from .child import Limits
from .forkserver import ChildEnded, ChildNotStarted, ChildStarted, ForkServer, kill_groups
from .handle import PREFETCH_SECONDS, REPORT_SECONDS, ChildHandle, Task, UnreportedFailure
from .messages import pack_spec, unpack_outcome, unpack_report
from .tickets import Marks, Tickets

STOP_SECONDS = 2.0
"""Time between SIGTERM, after which code can clean up, and SIGKILL."""
_MAX_PREFETCH = 32
"""Largest number of jobs that a child gets in advance."""
_MAX_SELECT_SECONDS = 86_400.0
"""Longest wait of the loop. epoll accepts at most 24 days."""
_START_SECONDS = 60.0
"""How long a child may take to build the app."""
_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.1, 30.0
_HOPELESS_FAILURES = 3
"""After this many failed starts in a row, the cause is not one child that was killed by chance."""


def _ignore(_spec: JobSpec, _outcome: Outcome) -> None:
    """Default for ``on_unreported_failure``: do nothing."""


class ProcessPool:
    """A fixed number of child processes.

    :param app: import path from which children build the app, as for ``flask --app``.
    :param size: the number of children.
    :param on_finished: called, in the pool's own thread, with each job and its outcome.
    :param on_unreported_failure: called in the same thread with each failed job whose process ended
        before it had reported the failure. It must not log in this thread, because a logging
        handler may hang.
    :param limits: limits at which a child is replaced; default: none.
    :param show_logs: whether children print their log lines.
    :raises BgJobsError: when no child can build the app; the message has the reason.
    """

    stop_seconds = STOP_SECONDS + 1.0
    """Time within which cancelled code has stopped, in seconds."""

    def __init__(
        self,
        app: str,
        size: int,
        on_finished: Callable[[JobSpec, Outcome], None],
        *,
        on_unreported_failure: Callable[[JobSpec, Outcome], None] = _ignore,
        limits: Limits | None = None,
        show_logs: bool = False,
    ) -> None:
        self.size = size
        self._on_finished = on_finished
        self._on_unreported_failure = on_unreported_failure
        self._unreported_failures: collections.deque[UnreportedFailure] = collections.deque()
        self._settings: dict[str, object] = {
            "app": app,
            "limits": dataclasses.asdict(limits or Limits()),
            "show_logs": show_logs,
        }
        self._changed = threading.Condition()
        self._waiting: collections.deque[Task] = collections.deque()
        self._children: dict[int, ChildHandle] = {}
        self._numbers = itertools.count(1)
        self._slots = itertools.count(1)
        self._finished: collections.deque[tuple[JobSpec, Outcome]] = collections.deque()
        """Finished jobs whose outcomes have not been passed to ``on_finished`` yet."""
        self._pace = Pace()
        self._is_closed = False
        self._close_deadline = math.inf
        """When a closed pool stops waiting for its children."""
        self._failures = 0
        """Number of failed starts since a child last became ready."""
        self._failure = ""
        """Why the last child could not start."""
        self._is_hopeless = False
        """Whether to stop waiting for the first child."""
        self._failing_since = self._failed_at = math.inf
        """Times of the first and the last failed start while no child was ready."""
        self._next_start_at = 0.0
        """When the next child may be started, because of the backoff."""
        self._selector = selectors.DefaultSelector()
        self._wakeup_read, self._wakeup_write = socket.socketpair()
        self._wakeup_write.setblocking(False)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ, self._drain_wakeups)
        self._start_fork_server()
        self._thread = WorkerThread(self._run, "bgjobs-children")
        self._thread.start()
        self._wait_for_first_child()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until the pool is closed."""
        return [self._thread]

    # The same methods as those of the thread pool

    def submit(self, specs: Iterable[JobSpec], claimed: float) -> None:
        """Run jobs in this order, each as soon as a child is idle.

        :param claimed: time of their claim, by ``time.monotonic()``.
        """
        with self._changed:
            self._waiting.extend(Task(spec, claimed) for spec in specs)
        self._wake_loop()

    def unstarted(self) -> int:
        """Number of submitted jobs that wait for a child."""
        with self._changed:
            return len(self._waiting) + sum(
                max(0, len(child.assigned) - 1) for child in self._children.values()
            )

    def running(self) -> int:
        """Number of jobs that hold a child: they run, or their failure is being reported."""
        with self._changed:
            return sum(child.is_busy for child in self._children.values()) + len(self._finished)

    def idle(self) -> int:
        """Number of jobs that would start at once if they were submitted now."""
        with self._changed:
            idle = (
                c.is_ready and not c.stopping and not c.is_busy for c in self._active_children()
            )
            return sum(idle) - len(self._waiting)

    def capacity(self) -> int:
        """Number of jobs that can run at the same time.

        :returns: the size of the pool; while children fail to start, the number of ready children.
        """
        with self._changed:
            return sum(c.is_ready for c in self._active_children()) if self._failures else self.size

    def failing(self) -> Failing | None:
        """Why no child can start; ``None`` while a child is ready, or before the first failure."""
        with self._changed:
            if self._failing_since == math.inf:
                return None
            # Only up to the last failure, because the child that is starting may succeed.
            seconds = self._failed_at - self._failing_since
            return Failing(seconds, self._failures >= _HOPELESS_FAILURES, self._failure)

    def take_unstarted(self) -> list[JobSpec]:
        """Remove the jobs that no child has started from the pool, and return them."""
        with self._changed:
            for child in self._children.values():
                self._take_back(child)
            taken = [task.spec for task in self._waiting]
            self._waiting.clear()
            return taken

    def running_specs(self) -> list[JobSpec]:
        """The running jobs, and finished jobs whose outcomes were not handed over yet."""
        with self._changed:
            finished = [spec for spec, _ in self._finished]
            return [*finished, *(task.spec for task in self._current_tasks())]

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a child."""
        with self._changed:
            assigned = [
                task.spec
                for child in self._children.values()
                for task in itertools.islice(child.assigned.values(), 1, None)
            ]
            return assigned + [task.spec for task in self._waiting]

    def reports(self) -> dict[tuple[int, int], Report]:
        """Progress and log lines of running jobs since the last call, by job id and attempt."""
        with self._changed:
            tasks = [(task.spec, task.take_report()) for task in self._current_tasks()]
        return {(spec.id, spec.attempt): report for spec, report in tasks if report is not None}

    def cancel(self, spec: JobSpec) -> None:
        """Stop a job's code, with SIGTERM at once and SIGKILL two seconds later.

        A job that no child has started ends as cancelled without having run.
        """
        with self._changed:
            holder = next((c for c in self._children.values() if c.number_of(spec)), None)
            if holder is not None:
                self._take_back(holder)
                number = holder.number_of(spec)
                if number:
                    self._stop(holder, number, for_timeout=False)
                    return
            waiting = next((task for task in self._waiting if task.spec is spec), None)
            if waiting is None:
                return
            self._waiting.remove(waiting)
        self._on_finished(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))

    def overdue(self) -> list[Overdue]:
        """Stopped jobs whose children still live after SIGKILL.

        A process that waits in the kernel, for a disk or a network file system, does not end.
        """
        now = time.monotonic()
        with self._changed:
            return [
                Overdue(
                    child.assigned[child.stopping].spec,
                    now - child.killed_at,
                    JobTimeout if child.marks.stop_for_timeout else JobCancelled,
                    f"process {child.pid}",
                )
                for child in self._children.values()
                if child.stopping in child.assigned and child.killed_at <= now
            ]

    def close(self) -> None:
        """End all children. No job can be submitted afterwards.

        Children that run a job are killed at once. The others have two seconds to end.
        """
        with self._changed:
            self._is_closed = True
            self._close_deadline = min(self._close_deadline, time.monotonic() + 2 * STOP_SECONDS)
        self._wake_loop()
        self._thread.join()

    # The loop, in its own thread

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException:
            self._on_loop_failure()
            raise
        finally:
            self._fork_server.close()
            self._selector.close()
            self._wakeup_read.close()
            self._wakeup_write.close()

    def _on_loop_failure(self) -> None:
        """End all children after an error in the loop.

        :meth:`take_unstarted` then returns their jobs, and the worker can give them back.
        """
        self._fork_server.close()
        with self._changed:
            self._is_closed = True
            self._failure = "the thread that manages the child processes has failed; see the log"
            self._is_hopeless = True
            assigned = [
                task for child in self._children.values() for task in child.assigned.values()
            ]
            self._waiting.extendleft(reversed(assigned))
            self._collect_unreported()
            self._children.clear()
            self._changed.notify_all()
        self._deliver_outcomes()

    def _loop(self) -> None:
        while not self._has_ended():
            for key, _ in self._selector.select(self._seconds_to_next_check()):
                with self._changed:
                    key.data()
            with self._changed:
                now = time.monotonic()
                self._check_children(now)
                self._assign_tasks(now)
            self._deliver_outcomes()
        with self._changed:
            self._collect_unreported()
        self._deliver_outcomes()

    def _deliver_outcomes(self) -> None:
        """Pass finished jobs and unreported failures to the callbacks.

        A finished job counts as running until its callback has returned, so that it is always
        listed either here or in the worker's outbox.
        """
        while self._finished:
            self._on_finished(*self._finished[0])
            with self._changed:
                self._finished.popleft()
        while self._unreported_failures:
            spec, outcome, _ = self._unreported_failures.popleft()
            self._on_unreported_failure(spec, outcome)

    def _collect_unreported(self) -> None:
        """Take the unreported failures of children that have not ended."""
        for child in self._children.values():
            self._unreported_failures += child.unreported.values()

    def _has_ended(self) -> bool:
        return self._is_closed and (not self._children or time.monotonic() >= self._close_deadline)

    def _wake_loop(self) -> None:
        # The buffer is full, so the loop is woken anyway; or the pool is closed.
        with contextlib.suppress(OSError):
            self._wakeup_write.send(b"!")

    def _drain_wakeups(self) -> None:
        self._wakeup_read.recv(4096)

    def _seconds_to_next_check(self) -> float | None:
        """Seconds that the loop can wait for events; ``None``: no limit."""
        with self._changed:
            now = time.monotonic()
            at = min(
                (child.next_check_at(now) for child in self._children.values()),
                default=math.inf,
            )
            if len(self._active_children()) < self.size and not self._is_closed:
                at = min(at, self._next_start_at)
            at = min(at, self._close_deadline)
            return None if at == math.inf else min(max(0.0, at - now), _MAX_SELECT_SECONDS)

    def _check_children(self, now: float) -> None:
        for child in list(self._children.values()):
            running = child.running()
            if running is not None and not child.stopping:
                self._check_job(child, *running, now)
            if now - child.reporting_since > PREFETCH_SECONDS:
                self._check_failure_report(child, now)
            if now >= child.kill_at:
                self._kill(child, now)
        if self._is_closed:
            for child in self._active_children():
                self._end_child(child, now)
            return
        while len(self._active_children()) < self.size and now >= self._next_start_at:
            self._start_child()

    def _kill(self, child: ChildHandle, now: float) -> None:
        child.kill_at, child.killed_at = math.inf, now
        if child.pid is not None:
            # Otherwise it is killed as soon as its pid is known.
            self._command(self._fork_server.signal_group, child.pid, signal.SIGKILL)
        if not (child.is_ready or child.is_ending):
            # Replace it, even if its process does not end.
            child.is_ending = child.failed_start_recorded = True
            reason = f"it took longer than {_START_SECONDS:g} s to build the app"
            if not self._is_registered(child):
                reason = "it closed its connection but did not exit"
            self._record_failed_start(child.failure or reason)

    def _check_job(self, child: ChildHandle, number: int, task: Task, now: float) -> None:
        seconds = now - child.marks.started_at
        if task.spec.timeout is not None and seconds >= task.spec.timeout:
            self._stop(child, number, for_timeout=True)
        elif len(child.assigned) > 1 and seconds > PREFETCH_SECONDS:
            self._take_back(child)

    def _check_failure_report(self, child: ChildHandle, now: float) -> None:
        self._take_back(child)
        if now - child.reporting_since >= REPORT_SECONDS:
            # Not logged here, because the logging handler may hang in this process as well.
            self._kill(child, now)

    def _assign_tasks(self, now: float) -> None:
        """Give each idle child a job, and children with short jobs some more in advance."""
        available = [
            c for c in self._active_children() if c.is_ready and not c.stopping and not c.unreported
        ]
        quick = [c for c in available if c.run_seconds_at(now) <= PREFETCH_SECONDS]
        for children, room in ((available, 1), (quick, 1 + self._prefetch())):
            for child in children:
                while self._waiting and len(child.assigned) < room:
                    self._assign(child, self._waiting.popleft())
        for child in available:
            self._flush(child)

    def _prefetch(self) -> int:
        """How many jobs a child gets in advance."""
        if self._pace.seconds is None:
            return 0
        seconds = max(self._pace.seconds, PREFETCH_SECONDS / _MAX_PREFETCH)
        return int(PREFETCH_SECONDS / seconds)

    def _assign(self, child: ChildHandle, task: Task) -> None:
        number = next(self._numbers)
        child.assigned[number] = task
        child.channel.send([number, task.claimed, pack_spec(task.spec)])
        child.tickets.give(number)

    def _flush(self, child: ChildHandle) -> None:
        if not self._is_registered(child):
            return
        child.channel.flush()
        events = selectors.EVENT_READ
        if child.channel.has_outgoing:
            events |= selectors.EVENT_WRITE
        key = self._selector.get_key(child.channel)
        if key.events != events:
            self._selector.modify(child.channel, events, key.data)

    def _is_registered(self, child: ChildHandle) -> bool:
        """Whether the loop still reads the child's channel."""
        return child.channel in self._selector.get_map()

    def _take_back(self, child: ChildHandle) -> None:
        """Put the tasks that the child has not started back at the front of the queue, in order."""
        numbers = child.tickets.take_back()
        self._waiting.extendleft(child.assigned.pop(number) for number in reversed(numbers))

    def _stop(self, child: ChildHandle, number: int, *, for_timeout: bool) -> None:
        if child.stopping or child.pid is None:
            return
        child.stopping = number
        child.kill_at = time.monotonic() + STOP_SECONDS
        child.marks.ask_stop(number, for_timeout=for_timeout)
        self._command(self._fork_server.signal, child.pid, signal.SIGTERM)
        self._take_back(child)
        self._wake_loop()

    # Starting and reaping children

    def _active_children(self) -> list[ChildHandle]:
        return [child for child in self._children.values() if not child.is_ending]

    def _current_tasks(self) -> list[Task]:
        """The first task of each child: it is running, or starts next."""
        return [next(iter(c.assigned.values())) for c in self._children.values() if c.assigned]

    def _start_fork_server(self) -> None:
        self._fork_server = ForkServer(self._settings)
        self._selector.register(self._fork_server, selectors.EVENT_READ, self._on_fork_server_event)

    def _start_child(self) -> None:
        """Start a child. On an error, the loop tries again after a pause (backoff).

        The system may have run out of file descriptors or processes.
        """
        try:
            if self._fork_server.is_closed:
                self._start_fork_server()
            self._request_child()
        except OSError as error:
            self._record_failed_start(f"{type(error).__name__}: {error}")

    def _request_child(self) -> None:
        with contextlib.ExitStack() as undo:
            parent_end, child_end = socket.socketpair()
            undo.callback(parent_end.close)
            with child_end:
                tickets = Tickets.create()
                undo.callback(tickets.close)
                marks = Marks.create()
                undo.callback(marks.close)
                slot = next(self._slots)
                self._fork_server.fork(
                    slot, [child_end.fileno(), tickets.read_end, marks.descriptor]
                )
            undo.pop_all()
        child = ChildHandle(slot, ParentEnd(parent_end), tickets, marks)
        child.kill_at = time.monotonic() + _START_SECONDS
        self._children[slot] = child
        self._selector.register(
            child.channel, selectors.EVENT_READ, lambda: self._on_readable(child)
        )

    def _command(self, command: Callable[..., None], *arguments: Any) -> None:
        try:
            command(*arguments)
        except OSError:
            # The fork server has ended. The loop detects this and starts another one.
            self._wake_loop()

    def _on_fork_server_event(self) -> None:
        try:
            event = self._fork_server.next_event()
        except EOFError:
            self._on_fork_server_lost()
            return
        match event:
            case ChildStarted():
                child = self._children[event.slot]
                child.pid = event.pid
                if child.killed_at < math.inf:
                    self._command(self._fork_server.signal_group, child.pid, signal.SIGKILL)
            case ChildNotStarted():
                self._remove_child(self._children[event.slot])
                self._record_failed_start(event.reason)
            case ChildEnded():
                self._on_child_ended(event)

    def _on_child_ended(self, event: ChildEnded) -> None:
        child = next(c for c in self._children.values() if c.pid == event.pid)
        exit_text = describe_exit(os.waitstatus_to_exitcode(event.status))
        self._reap_child(child, lambda task: child.crash_outcome(task, exit_text))
        if not (child.is_ready or child.failed_start_recorded or self._is_closed):
            self._record_failed_start(
                child.failure or f"its process {exit_text} while building the app"
            )

    def _record_failed_start(self, failure: str) -> None:
        """Log a failed start, and set the backoff: the next child would probably fail as well."""
        self._failures += 1
        self._failure = failure
        self._is_hopeless |= self._failures >= _HOPELESS_FAILURES
        if not any(child.is_ready for child in self._active_children()):
            self._failed_at = time.monotonic()
            self._failing_since = min(self._failing_since, self._failed_at)
        backoff = _FIRST_BACKOFF_SECONDS * 2 ** min(self._failures, 20)
        self._next_start_at = time.monotonic() + min(backoff, _LAST_BACKOFF_SECONDS)
        _logger.error("A child of the process pool could not start: %s", one_line(failure))
        self._changed.notify_all()

    def _on_fork_server_lost(self) -> None:
        """Reap all children after the fork server has ended, and record the outcomes of their jobs.

        The pool cannot know whether one of the running jobs was the cause.
        """
        _logger.error("The fork server of the process pool has ended; starting another one")
        kill_groups(child.pid for child in self._children.values() if child.pid is not None)
        is_start = any(not (child.is_ready or child.is_ending) for child in self._children.values())
        running = [found[1] for child in self._children.values() if (found := child.running())]
        suspects = sum(task.spec.suspect for task in running)
        for child in list(self._children.values()):
            self._reap_child(child, functools.partial(_lost_outcome, suspects))
        self._selector.unregister(self._fork_server)
        self._fork_server.close()
        if is_start and not self._is_closed:
            # Each start of a child may end the fork server, so the backoff is needed.
            self._record_failed_start("the fork server has ended")

    def _reap_child(self, child: ChildHandle, outcome_of: Callable[[Task], Outcome]) -> None:
        """Read the last messages of a dead child, and finish the job that it was running.

        :param outcome_of: returns the outcome of that job.
        """
        self._on_readable(child)
        self._take_back(child)
        self._unreported_failures += child.unreported.values()
        for number, task in reversed(child.assigned.items()):
            if number > child.marks.started:
                # It took the ticket, but had not started the job.
                self._waiting.appendleft(task)
            else:
                self._finish(task, outcome_of(task))
        self._remove_child(child)

    def _remove_child(self, child: ChildHandle) -> None:
        del self._children[child.slot]
        if self._is_registered(child):
            self._selector.unregister(child.channel)
        child.channel.close()
        child.tickets.close()
        child.marks.close()

    def _end_child(self, child: ChildHandle, now: float) -> None:
        """End a child: at once if it has a job, otherwise within two seconds."""
        child.is_ending = True
        self._take_back(child)
        child.kill_at = now if child.assigned else now + STOP_SECONDS
        child.tickets.end()

    # Messages of children

    def _on_readable(self, child: ChildHandle) -> None:
        if child.slot not in self._children or not self._is_registered(child):
            # The child was removed after the selector had returned this event.
            return
        for message in child.channel.receive():
            try:
                self._handle_message(child, message)
            except (TypeError, ValueError, IndexError) as error:
                _logger.warning("Cannot read a message from a child process: %s", error)
        if not child.channel.is_closed:
            self._flush(child)
            return
        # A closed channel counts as readable, so the loop would spin until the child has ended.
        self._selector.unregister(child.channel)
        if not child.is_ending:
            # A child that failed to start keeps its place, so that the next start is delayed.
            child.is_ending = child.is_ready
            self._take_back(child)
            # A child that ends by itself may still be calling the host's ``on_failure`` functions.
            ends_by_itself = child.is_ready and not child.is_busy
            seconds = STOP_SECONDS + (child_module.LAST_CALLS_SECONDS if ends_by_itself else 0.0)
            child.kill_at = min(child.kill_at, time.monotonic() + seconds)

    def _handle_message(self, child: ChildHandle, message: Any) -> None:
        match message:
            case [child_module.OUTCOME, number, values] if number in child.assigned:
                self._on_outcome(child, number, unpack_outcome(values))
            case [child_module.REPORTED, number] if number in child.unreported:
                del child.unreported[number]
            case [child_module.REPORT, number, values] if number in child.assigned:
                child.assigned[number].add_report(unpack_report(values))
            case [child_module.READY] if child.killed_at == math.inf:
                child.is_ready = True
                child.kill_at = math.inf
                self._failures, self._is_hopeless, self._failing_since = 0, False, math.inf
                self._changed.notify_all()
            case [child_module.BROKEN, error]:
                child.failure = self._failure = error
                self._is_hopeless = True
                # A thread of the app may keep the process alive.
                child.kill_at = min(child.kill_at, time.monotonic() + STOP_SECONDS)
                self._changed.notify_all()
            case (
                [child_module.OUTCOME | child_module.REPORT, _, _]
                | [child_module.READY]
                | [child_module.REPORTED, _]
            ):
                # The job has ended in the meantime, or the child is about to end.
                pass
            case _:
                _logger.warning("Ignoring an unknown message from a child process")

    def _on_outcome(self, child: ChildHandle, number: int, outcome: Outcome) -> None:
        if (outcome.job_id, outcome.attempt) != child.assigned[number].spec.key:
            raise ValueError("the outcome belongs to another job")
        task = child.assigned.pop(number)
        if child.stopping == number:
            child.stopping, child.kill_at = 0, math.inf
        self._pace.note(outcome.run_seconds)
        if outcome.is_reported:
            child.unreported[number] = UnreportedFailure(task.spec, outcome, time.monotonic())
        self._finish(task, outcome)

    def _finish(self, task: Task, outcome: Outcome) -> None:
        earlier = task.take_report()
        if earlier is not None:
            outcome = outcome._replace(report=earlier.followed_by(outcome.report))
        self._finished.append((task.spec, outcome))

    def _wait_for_first_child(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with self._changed:
            while not any(child.is_ready for child in self._children.values()):
                left = deadline - time.monotonic()
                if self._is_hopeless or left <= 0:
                    reason = self._failure or f"it took longer than {_START_SECONDS:g} s"
                    break
                self._changed.wait(left)
            else:
                return
        self.close()
        raise BgJobsError(
            f"a child process could not build the app from {self._settings['app']!r} "
            f"(BGJOBS_APP, or --app): {reason}"
        )


def _lost_outcome(suspects: int, task: Task) -> Outcome:
    """The outcome of a job that was running when the fork server and all children ended.

    :param suspects: number of suspects that were running.
    """
    kind = lost_kind(is_started_suspect=task.spec.suspect, started_suspects=suspects)
    return lost_outcome(task.spec, kind, "all child processes of its worker ended")
