"""Child processes: a job that crashes, hangs or burns CPU hurts no other, and can be killed.

Each child has its own channel, tickets and marks (see :mod:`.tickets`), so nothing that one of
them does reaches another. One thread of the worker's, the pool's loop, talks to all of them.
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
from typing import Any, NamedTuple

from ....errors import BgJobsError, JobCancelled, JobTimeout
from ....job.records import JobSpec, Outcome, Report, lost_outcome
from ....job.statuses import OutcomeKind, lost_kind
from ....job.text import one_line
from ....system.exits import describe_exit
from ....system.safe_logging import logger as _logger
from ....system.threads import WorkerThread
from ..pace import Pace
from ..trouble import Failing, Overdue
from . import child
from .channel import ParentEnd
from .child import Limits
from .forkserver import ChildNotStarted, ChildStarted, Ended, ForkServer, kill_groups
from .messages import pack_spec, unpack_outcome, unpack_report
from .tickets import Marks, Tickets

STOP_SECONDS = 2.0
"""Between SIGTERM, which lets code clean up, and SIGKILL."""
_AHEAD_SECONDS = 0.01
"""Work handed to a child ahead; behind a job that runs longer, it is taken back."""
_MAX_AHEAD = 32
_REPORT_SECONDS = 10.0
"""For a child to write the log line of a failure."""
_MAX_SELECT_SECONDS = 86_400.0
"""epoll waits for 24 days at most."""
_START_SECONDS = 60.0
"""For a child to build the app."""
_FIRST_BACKOFF_SECONDS, _LAST_BACKOFF_SECONDS = 0.1, 30.0
_HOPELESS_FAILURES = 3
"""Children that died in a row while they built the app, for reasons they could not tell."""


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    spec: JobSpec
    claimed: float
    report: Report | None = None
    """What its code told, and nobody has asked for yet."""

    def tell(self, report: Report) -> None:
        """Keep what its code told."""
        self.report = report if self.report is None else self.report.followed_by(report)

    def take_report(self) -> Report | None:
        """What its code told since the last call."""
        report, self.report = self.report, None
        return report


class _Reporting(NamedTuple):
    spec: JobSpec
    outcome: Outcome
    since: float
    """By ``time.monotonic()``."""


@dataclasses.dataclass(slots=True, eq=False)
class _Child:
    slot: int
    channel: ParentEnd
    tickets: Tickets
    marks: Marks
    pid: int | None = None
    is_ready: bool = False
    is_leaving: bool = False
    handed: dict[int, _Task] = dataclasses.field(default_factory=dict)
    """What it was given and has not finished, by number, in order."""
    stopping: int = 0
    """The number of the job that it was told to stop; 0: none."""
    reporting: dict[int, _Reporting] = dataclasses.field(default_factory=dict)
    """The failures that it has yet to report, by number."""
    killed_at: float = math.inf
    kill_at: float = math.inf
    failure: str = ""
    """Why it could not build the app."""
    is_noted: bool = False
    """Whether its failed start was counted before it ended."""

    def running(self) -> tuple[int, _Task] | None:
        """The job whose code runs, as far as the marks tell."""
        number = self.marks.started
        task = self.handed.get(number)
        return None if task is None or self.marks.finished == number else (number, task)

    @property
    def reports_since(self) -> float:
        """Since when it reports a failure, unless it was killed meanwhile; else infinity."""
        since = (reporting.since for reporting in self.reporting.values())
        return min(since, default=math.inf) if self.killed_at == math.inf else math.inf

    @property
    def is_busy(self) -> bool:
        """Whether it has a job, or reports the failure of one."""
        return bool(self.handed or self.reporting)

    def runs_for(self, now: float) -> float:
        """Seconds since the code that runs began; 0 when none does."""
        return 0.0 if self.running() is None else now - self.marks.started_at


def _nothing(_spec: JobSpec, _outcome: Outcome) -> None:
    """Report nothing."""


class ProcessPool:
    """A fixed number of child processes.

    :param app: import path from which children build the app, as ``flask --app`` takes it.
    :param size: how many children.
    :param on_finished: called, in the pool's own thread, with each job and its outcome.
    :param on_cut_off: called in the same way with a failed job whose process ended before it had
        reported the failure. It must not log in this thread: a logging handler may hang.
    :param limits: when a child is replaced by a fresh one.
    :param show_logs: whether children print their log lines.
    :raises BgJobsError: when no child can build the app; says why.
    """

    stop_seconds = STOP_SECONDS + 1.0
    """Within which code that was cancelled has stopped."""

    def __init__(
        self,
        app: str,
        size: int,
        on_finished: Callable[[JobSpec, Outcome], None],
        *,
        on_cut_off: Callable[[JobSpec, Outcome], None] = _nothing,
        limits: Limits | None = None,
        show_logs: bool = False,
    ) -> None:
        self.size = size
        self._on_finished = on_finished
        self._on_cut_off = on_cut_off
        self._cut_off: collections.deque[_Reporting] = collections.deque()
        self._settings: dict[str, object] = {
            "app": app,
            "limits": dataclasses.asdict(limits or Limits()),
            "show_logs": show_logs,
        }
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._children: dict[int, _Child] = {}
        self._numbers = itertools.count(1)
        self._slots = itertools.count(1)
        self._done: collections.deque[tuple[JobSpec, Outcome]] = collections.deque()
        """What has ended and was not handed over yet."""
        self._pace = Pace()
        self._is_closed = False
        self._leave_at = math.inf
        """When a closed pool stops waiting for its children."""
        self._failures = 0
        self._failure = ""
        """Why the last child could not start."""
        self._is_hopeless = False
        """Whether another try would change nothing."""
        self._failing_since = self._failed_at = math.inf
        """When the first child could not start while none was left, and the last one."""
        self._start_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._awake, self._alarm = socket.socketpair()
        self._alarm.setblocking(False)
        self._selector.register(self._awake, selectors.EVENT_READ, self._on_alarm)
        self._open_fork_server()
        self._thread = WorkerThread(self._run, "bgjobs-children")
        self._thread.start()
        self._wait_for_first_child()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live until it is closed."""
        return [self._thread]

    # The same methods as of the thread pool

    def submit(self, specs: Iterable[JobSpec], claimed: float) -> None:
        """Run jobs, in this order, as children become free.

        :param claimed: when they were claimed, by ``time.monotonic()``.
        """
        with self._changed:
            self._waiting.extend(_Task(spec, claimed) for spec in specs)
        self._ring()

    def unstarted(self) -> int:
        """How many submitted jobs wait for a child."""
        with self._changed:
            return len(self._waiting) + sum(
                max(0, len(each.handed) - 1) for each in self._children.values()
            )

    def running(self) -> int:
        """How many jobs hold a child: those that run, and those whose failure is reported."""
        with self._changed:
            return sum(each.is_busy for each in self._children.values()) + len(self._done)

    def idle(self) -> int:
        """How many jobs would begin at once, were they submitted now."""
        with self._changed:
            idle = (c.is_ready and not c.stopping and not c.is_busy for c in self._living())
            return sum(idle) - len(self._waiting)

    def capacity(self) -> int:
        """How many jobs could run at once: all children, or those that are left while new ones
        cannot start."""
        with self._changed:
            return sum(c.is_ready for c in self._living()) if self._failures else self.size

    def failing(self) -> Failing | None:
        """How children fail to start while none is left; ``None`` while one is there."""
        with self._changed:
            if self._failing_since == math.inf:
                return None
            # Up to the last failure: the child that is starting now may be a good one.
            seconds = self._failed_at - self._failing_since
            return Failing(seconds, self._failures >= _HOPELESS_FAILURES, self._failure)

    def take_unstarted(self) -> list[JobSpec]:
        """The jobs that no child has begun; they will not be run here."""
        with self._changed:
            for each in self._children.values():
                self._take_back(each)
            taken = [task.spec for task in self._waiting]
            self._waiting.clear()
            return taken

    def running_specs(self) -> list[JobSpec]:
        """The jobs that run."""
        with self._changed:
            ended = [spec for spec, _ in self._done]
            return [*ended, *(task.spec for task in self._first_tasks())]

    def unstarted_specs(self) -> list[JobSpec]:
        """The jobs that wait for a child."""
        with self._changed:
            behind = [
                task.spec
                for each in self._children.values()
                for task in itertools.islice(each.handed.values(), 1, None)
            ]
            return behind + [task.spec for task in self._waiting]

    def reports(self) -> dict[tuple[int, int], Report]:
        """What running jobs told since the last call, by job id and attempt."""
        with self._changed:
            tasks = [(task.spec, task.take_report()) for task in self._first_tasks()]
        return {(spec.id, spec.attempt): report for spec, report in tasks if report is not None}

    def cancel(self, spec: JobSpec) -> None:
        """Stop a job's code: SIGTERM now, SIGKILL two seconds later.

        One that no child has begun ends as cancelled without having run.
        """
        with self._changed:
            holder = next((c for c in self._children.values() if _number_of(c, spec)), None)
            if holder is not None:
                self._take_back(holder)
                number = _number_of(holder, spec)
                if number:
                    self._stop(holder, number, for_timeout=False)
                    return
            waiting = next((task for task in self._waiting if task.spec is spec), None)
            if waiting is None:
                return
            self._waiting.remove(waiting)
        self._on_finished(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))

    def overdue(self) -> list[Overdue]:
        """The jobs whose children were killed and have not ended: one that waits for a disk or a
        network file system within the kernel may not."""
        now = time.monotonic()
        with self._changed:
            return [
                Overdue(
                    each.handed[each.stopping].spec,
                    now - each.killed_at,
                    JobTimeout if each.marks.stop_for_timeout else JobCancelled,
                    f"process {each.pid}",
                )
                for each in self._children.values()
                if each.stopping in each.handed and each.killed_at <= now
            ]

    def close(self) -> None:
        """End all children, at once where code still runs; nothing more can be submitted."""
        with self._changed:
            self._is_closed = True
            self._leave_at = min(self._leave_at, time.monotonic() + 2 * STOP_SECONDS)
        self._ring()
        self._thread.join()

    # The loop, in a thread of its own

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException:
            self._give_up()
            raise
        finally:
            self._fork_server.close()
            self._selector.close()
            self._awake.close()
            self._alarm.close()

    def _give_up(self) -> None:
        """End all children; :meth:`take_unstarted` returns what they had, to be given back."""
        self._fork_server.close()
        with self._changed:
            self._is_closed = True
            self._failure = "the thread that starts them has failed; the log says why"
            self._is_hopeless = True
            handed = [task for each in self._children.values() for task in each.handed.values()]
            self._waiting.extendleft(reversed(handed))
            self._changed.notify_all()
        self._report_cut_off()
        with self._changed:
            self._children.clear()

    def _loop(self) -> None:
        while not self._is_over():
            for key, _ in self._selector.select(self._pause()):
                with self._changed:
                    key.data()
            with self._changed:
                now = time.monotonic()
                self._look_after_children(now)
                self._hand_out(now)
            self._hand_over()
        self._report_cut_off()

    def _hand_over(self) -> None:
        """Hand over the jobs that have ended. They count as running until then, so that each job is
        always in at least one place."""
        while self._done:
            self._on_finished(*self._done[0])
            with self._changed:
                self._done.popleft()
        while self._cut_off:
            spec, outcome, _ = self._cut_off.popleft()
            self._on_cut_off(spec, outcome)

    def _report_cut_off(self) -> None:
        """Report the failures that the children that are left have not reported."""
        for each in self._children.values():
            self._cut_off += each.reporting.values()
        self._hand_over()

    def _is_over(self) -> bool:
        return self._is_closed and (not self._children or time.monotonic() >= self._leave_at)

    def _ring(self) -> None:
        # Full, so it rings already; or the pool has ended.
        with contextlib.suppress(OSError):
            self._alarm.send(b"!")

    def _on_alarm(self) -> None:
        self._awake.recv(4096)

    def _pause(self) -> float | None:
        """Seconds until something must be looked at, if nothing is heard before."""
        with self._changed:
            now = time.monotonic()
            at = min(
                (self._look_at(each, now) for each in self._children.values()), default=math.inf
            )
            if len(self._living()) < self.size and not self._is_closed:
                at = min(at, self._start_at)
            at = min(at, self._leave_at)
            return None if at == math.inf else min(max(0.0, at - now), _MAX_SELECT_SECONDS)

    def _look_at(self, each: _Child, now: float) -> float:
        at = min(each.kill_at, each.reports_since + _REPORT_SECONDS)
        if len(each.handed) > 1 or (each.handed and each.reporting):
            at = min(at, now + _AHEAD_SECONDS)
        if each.stopping:
            return at
        running = each.running()
        for number, task in each.handed.items():
            if task.spec.timeout is not None:
                # One that has not begun cannot be overdue before its whole time has gone by.
                is_running = running is not None and running[0] == number
                begun = each.marks.started_at if is_running else now
                at = min(at, begun + task.spec.timeout)
        return at

    def _look_after_children(self, now: float) -> None:
        for each in list(self._children.values()):
            running = each.running()
            if running is not None and not each.stopping:
                self._look_after_job(each, *running, now)
            if now - each.reports_since > _AHEAD_SECONDS:
                self._look_after_report(each, now)
            if now >= each.kill_at:
                self._kill(each, now)
        if self._is_closed:
            for each in self._living():
                self._dismiss(each, now)
            return
        while len(self._living()) < self.size and now >= self._start_at:
            self._start_child()

    def _kill(self, each: _Child, now: float) -> None:
        each.kill_at, each.killed_at = math.inf, now
        if each.pid is not None:
            # Otherwise it is killed as soon as its number is known.
            self._command(self._fork_server.signal_group, each.pid, signal.SIGKILL)
        if not (each.is_ready or each.is_leaving):
            # Another one takes its place, also where this one cannot end.
            each.is_leaving = each.is_noted = True
            reason = f"it took longer than {_START_SECONDS:g} s to build the app"
            if not self._is_watched(each):
                reason = "it closed its connection and did not end"
            self._note_failed_start(each.failure or reason)

    def _look_after_job(self, each: _Child, number: int, task: _Task, now: float) -> None:
        seconds = now - each.marks.started_at
        if task.spec.timeout is not None and seconds >= task.spec.timeout:
            self._stop(each, number, for_timeout=True)
        elif len(each.handed) > 1 and seconds > _AHEAD_SECONDS:
            self._take_back(each)

    def _look_after_report(self, each: _Child, now: float) -> None:
        self._take_back(each)
        if now - each.reports_since >= _REPORT_SECONDS:
            # Without a line in the log, whose handler may hang here as well.
            self._kill(each, now)

    def _hand_out(self, now: float) -> None:
        """Give every idle child a job, then each a little more than it can do at once."""
        free = [c for c in self._living() if c.is_ready and not c.stopping and not c.reporting]
        quick = [c for c in free if c.runs_for(now) <= _AHEAD_SECONDS]
        for children, room in ((free, 1), (quick, 1 + self._ahead())):
            for each in children:
                while self._waiting and len(each.handed) < room:
                    self._hand(each, self._waiting.popleft())
        for each in free:
            self._flush(each)

    def _ahead(self) -> int:
        if self._pace.seconds is None:
            return 0
        seconds = max(self._pace.seconds, _AHEAD_SECONDS / _MAX_AHEAD)
        return int(_AHEAD_SECONDS / seconds)

    def _hand(self, each: _Child, task: _Task) -> None:
        number = next(self._numbers)
        each.handed[number] = task
        each.channel.send([number, task.claimed, pack_spec(task.spec)])
        each.tickets.give(number)

    def _flush(self, each: _Child) -> None:
        if not self._is_watched(each):
            return
        each.channel.flush()
        events = selectors.EVENT_READ
        if each.channel.has_outgoing:
            events |= selectors.EVENT_WRITE
        key = self._selector.get_key(each.channel)
        if key.events != events:
            self._selector.modify(each.channel, events, key.data)

    def _is_watched(self, each: _Child) -> bool:
        """Whether its channel is still read."""
        return each.channel in self._selector.get_map()

    def _take_back(self, each: _Child) -> None:
        """Put what the child has not begun before all that waits, in its old order."""
        numbers = each.tickets.take_back()
        self._waiting.extendleft(each.handed.pop(number) for number in reversed(numbers))

    def _stop(self, each: _Child, number: int, *, for_timeout: bool) -> None:
        if each.stopping or each.pid is None:
            return
        each.stopping = number
        each.kill_at = time.monotonic() + STOP_SECONDS
        each.marks.ask_stop(number, for_timeout=for_timeout)
        self._command(self._fork_server.signal, each.pid, signal.SIGTERM)
        self._take_back(each)
        self._ring()

    # Starting and reaping children

    def _living(self) -> list[_Child]:
        return [each for each in self._children.values() if not each.is_leaving]

    def _first_tasks(self) -> list[_Task]:
        return [next(iter(c.handed.values())) for c in self._children.values() if c.handed]

    def _open_fork_server(self) -> None:
        self._fork_server = ForkServer(self._settings)
        self._selector.register(self._fork_server, selectors.EVENT_READ, self._on_fork_server)

    def _start_child(self) -> None:
        """Start a child, or try again after a pause: descriptors or processes may have run out."""
        try:
            if self._fork_server.is_closed:
                self._open_fork_server()
            self._request_child()
        except OSError as error:
            self._note_failed_start(f"{type(error).__name__}: {error}")

    def _request_child(self) -> None:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                tickets = Tickets.create()
                undo.callback(tickets.close)
                marks = Marks.create()
                undo.callback(marks.close)
                slot = next(self._slots)
                self._fork_server.fork(slot, [theirs.fileno(), tickets.read_end, marks.descriptor])
            undo.pop_all()
        each = _Child(slot, ParentEnd(ours), tickets, marks)
        each.kill_at = time.monotonic() + _START_SECONDS
        self._children[slot] = each
        self._selector.register(each.channel, selectors.EVENT_READ, lambda: self._on_message(each))

    def _command(self, command: Callable[..., None], *arguments: Any) -> None:
        try:
            command(*arguments)
        except OSError:
            # The fork server has ended: the loop notices, and opens another.
            self._ring()

    def _on_fork_server(self) -> None:
        try:
            event = self._fork_server.next_event()
        except EOFError:
            self._on_fork_server_lost()
            return
        match event:
            case ChildStarted():
                each = self._children[event.slot]
                each.pid = event.pid
                if each.killed_at < math.inf:
                    self._command(self._fork_server.signal_group, each.pid, signal.SIGKILL)
            case ChildNotStarted():
                self._forget(self._children[event.slot])
                self._note_failed_start(event.reason)
            case Ended():
                self._on_ended(event)

    def _on_ended(self, event: Ended) -> None:
        each = next(c for c in self._children.values() if c.pid == event.pid)
        how = describe_exit(os.waitstatus_to_exitcode(event.status))
        self._reap_child(each, lambda task: self._crash_outcome(each, task, how))
        if not (each.is_ready or each.is_noted or self._is_closed):
            self._note_failed_start(each.failure or f"its process {how} while it built the app")

    def _note_failed_start(self, failure: str) -> None:
        """Wait before the next one: what keeps one child from starting keeps all."""
        self._failures += 1
        self._failure = failure
        self._is_hopeless |= self._failures >= _HOPELESS_FAILURES
        if not any(each.is_ready for each in self._living()):
            self._failed_at = time.monotonic()
            self._failing_since = min(self._failing_since, self._failed_at)
        backoff = _FIRST_BACKOFF_SECONDS * 2 ** min(self._failures, 20)
        self._start_at = time.monotonic() + min(backoff, _LAST_BACKOFF_SECONDS)
        _logger.error("A child of the process pool could not start: %s", one_line(failure))
        self._changed.notify_all()

    def _on_fork_server_lost(self) -> None:
        """All children went with it, and nobody can tell which of them was to blame, if any."""
        _logger.error("The process that starts the children has ended; another one is started")
        kill_groups(each.pid for each in self._children.values() if each.pid is not None)
        is_start = any(not (each.is_ready or each.is_leaving) for each in self._children.values())
        running = [found[1] for each in self._children.values() if (found := each.running())]
        suspects = sum(task.spec.suspect for task in running)
        for each in list(self._children.values()):
            self._reap_child(each, functools.partial(_outcome_of_lost, suspects))
        self._selector.unregister(self._fork_server)
        self._fork_server.close()
        if is_start and not self._is_closed:
            # It may be the start of a child that ends it, each time.
            self._note_failed_start("the process that starts the children has ended")

    def _reap_child(self, each: _Child, outcome_of: Callable[[_Task], Outcome]) -> None:
        """Hear what a dead child said last, and settle the job that died with it."""
        self._on_message(each)
        self._take_back(each)
        self._cut_off += each.reporting.values()
        for number, task in reversed(each.handed.items()):
            if number > each.marks.started:
                # It took the ticket, but had not begun.
                self._waiting.appendleft(task)
            else:
                self._finish(task, outcome_of(task))
        self._forget(each)

    def _forget(self, each: _Child) -> None:
        del self._children[each.slot]
        if self._is_watched(each):
            self._selector.unregister(each.channel)
        each.channel.close()
        each.tickets.close()
        each.marks.close()

    def _crash_outcome(self, each: _Child, task: _Task, how: str) -> Outcome:
        spec, started_at = task.spec, each.marks.started_at
        kind, error_type = OutcomeKind.CRASHED, "Crashed"
        error = f"Crashed: the process that ran it {how}"
        if each.stopping:
            if each.marks.stop_for_timeout:
                kind, error_type = OutcomeKind.TIMEOUT, "JobTimeout"
                error = f"JobTimeout: it ran longer than {spec.timeout} s and its process {how}"
            else:
                kind, error_type = OutcomeKind.CANCELLED, "JobCancelled"
                error = f"JobCancelled: its process {how}"
        return Outcome(
            spec.id,
            spec.attempt,
            kind,
            error_type=error_type,
            error=error,
            wait_seconds=started_at - task.claimed,
            run_seconds=time.monotonic() - started_at,
        )

    def _dismiss(self, each: _Child, now: float) -> None:
        """Let a child go: at once when its code must not go on, else when it is idle."""
        each.is_leaving = True
        self._take_back(each)
        each.kill_at = now if each.handed else now + STOP_SECONDS
        each.tickets.end()

    # Messages of children

    def _on_message(self, each: _Child) -> None:
        if each.slot not in self._children or not self._is_watched(each):
            # That happened while this event waited for its turn.
            return
        for message in each.channel.receive():
            try:
                self._on_one_message(each, message)
            except (TypeError, ValueError, IndexError) as error:
                _logger.warning("A message of a child process cannot be read: %s", error)
        if not each.channel.is_closed:
            self._flush(each)
            return
        # It would be readable for as long as the child takes to end.
        self._selector.unregister(each.channel)
        if not each.is_leaving:
            # One that has failed to start keeps its place: the next one waits for a while.
            each.is_leaving = each.is_ready
            self._take_back(each)
            # One with nothing left to run may have functions of the host's to call.
            is_orderly = each.is_ready and not each.is_busy
            seconds = STOP_SECONDS + (child.LAST_CALLS_SECONDS if is_orderly else 0.0)
            each.kill_at = min(each.kill_at, time.monotonic() + seconds)

    def _on_one_message(self, each: _Child, message: Any) -> None:
        match message:
            case [child.OUTCOME, number, values] if number in each.handed:
                self._on_outcome(each, number, unpack_outcome(values))
            case [child.REPORTED, number] if number in each.reporting:
                del each.reporting[number]
            case [child.REPORT, number, values] if number in each.handed:
                each.handed[number].tell(unpack_report(values))
            case [child.READY] if each.killed_at == math.inf:
                each.is_ready = True
                each.kill_at = math.inf
                self._failures, self._is_hopeless, self._failing_since = 0, False, math.inf
                self._changed.notify_all()
            case [child.BROKEN, sentence]:
                each.failure = self._failure = sentence
                self._is_hopeless = True
                # A thread of the app's may keep it alive.
                each.kill_at = min(each.kill_at, time.monotonic() + STOP_SECONDS)
                self._changed.notify_all()
            case [child.OUTCOME | child.REPORT, _, _] | [child.READY] | [child.REPORTED, _]:
                # Of a job that has ended meanwhile, or of a child that is about to end.
                pass
            case _:
                _logger.warning("A child process sent an unknown message, which is ignored")

    def _on_outcome(self, each: _Child, number: int, outcome: Outcome) -> None:
        if (outcome.job_id, outcome.attempt) != each.handed[number].spec.key:
            raise ValueError("it is the outcome of another job")
        task = each.handed.pop(number)
        if each.stopping == number:
            each.stopping, each.kill_at = 0, math.inf
        self._pace.note(outcome.run_seconds)
        if outcome.is_reported:
            each.reporting[number] = _Reporting(task.spec, outcome, time.monotonic())
        self._finish(task, outcome)

    def _finish(self, task: _Task, outcome: Outcome) -> None:
        earlier = task.take_report()
        if earlier is not None:
            outcome = outcome._replace(report=earlier.followed_by(outcome.report))
        self._done.append((task.spec, outcome))

    def _wait_for_first_child(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with self._changed:
            while not any(each.is_ready for each in self._children.values()):
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


def _number_of(each: _Child, spec: JobSpec) -> int:
    """The number under which a child has a job; 0 when it has not."""
    return next((number for number, task in each.handed.items() if task.spec is spec), 0)


def _outcome_of_lost(suspects: int, task: _Task) -> Outcome:
    """The outcome of a job that ran when all children ended.

    :param suspects: how many suspects ran then.
    """
    kind = lost_kind(is_started_suspect=task.spec.suspect, started_suspects=suspects)
    return lost_outcome(task.spec, kind, "all child processes of its worker ended")
