"""The supervisor: starts worker processes, replaces those that end, and stops them together.

It has no database connection and runs no code of the app. Each child is a new process and no fork,
because a process with threads or connections must not be forked.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from ...system.exits import describe_exit
from ...system.safe_logging import logger as _logger
from ...system.signal_handlers import STOP_SIGNALS, handled
from . import sd_notify
from .restarts import Restarts
from .supervised import OPTION, STOP

_MAX_FAILED_STARTS = 3
"""Number of failed starts of each child after which the supervisor gives up, if none was ready."""
END_SECONDS = 13.0
"""Time after the grace period in which a child must end. It is longer than a worker needs."""
_READ_BYTES = 4096
_MAX_SELECT_SECONDS = 86_400.0
"""One wait must stay below 24 days, the limit of epoll."""


class Supervisor:
    """Worker processes that run until the supervisor is asked to stop.

    :param commands: the command of each child; the option ``--supervised`` is added.
    :param burst: whether a child that exits with code 0 is done. By default it is replaced.
    :param grace_seconds: grace period of running jobs after the first signal.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], *, burst: bool, grace_seconds: float
    ) -> None:
        self._slots = [_Slot(number, command) for number, command in enumerate(commands, 1)]
        self._burst = burst
        self._grace_seconds = grace_seconds
        self._selector = selectors.DefaultSelector()
        self._stops = self._stops_forwarded = 0
        self._were_all_ready = False
        self._stopped_cleanly = True
        self._failed_start_code = 1

    def run(self) -> int:
        """Supervise until all children have stopped, are done, or cannot start.

        :returns: the exit code for the calling process: 0 after a clean stop or a burst, 1 if a
            child did not stop cleanly, and the exit code of the children if none could start.
        """
        with self._woken_by_signals():
            while not self._is_over():
                self._start_due()
                self._wait()
                self._reap()
                self._forward_stops()
                self._kill_overdue()
        if self._stops or not self._has_given_up:
            return 0 if self._stopped_cleanly else 1
        _logger.error("No worker process could start in %d tries; giving up", _MAX_FAILED_STARTS)
        return self._failed_start_code

    @property
    def started(self) -> int:
        """Number of processes that were started."""
        return sum(slot.starts for slot in self._slots)

    @property
    def replacements(self) -> int:
        """Number of started processes that replaced an ended one."""
        return sum(max(slot.starts - 1, 0) for slot in self._slots)

    def _is_over(self) -> bool:
        if any(slot.child for slot in self._slots):
            return False
        return bool(self._stops) or self._has_given_up or all(slot.is_done for slot in self._slots)

    @property
    def _has_given_up(self) -> bool:
        """Whether each child has used up its failed starts, and none was ever ready.

        If one was ready before, the app can start, and the present error is temporary. The database
        may be unreachable, for example.
        """
        all_failed = all(slot.failed_starts >= _MAX_FAILED_STARTS for slot in self._slots)
        return all_failed and not self._ever_ready

    @property
    def _ever_ready(self) -> bool:
        return any(slot.was_ready for slot in self._slots)

    # Signals

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[None]:
        self._awake, alarm = socket.socketpair()
        with (
            self._selector,
            self._awake,
            alarm,
            handled(STOP_SIGNALS, self._on_stop_signal),
            handled((signal.SIGCHLD,), lambda *_: None),
        ):
            alarm.setblocking(False)
            self._selector.register(self._awake, selectors.EVENT_READ)
            before = signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)

    def _on_stop_signal(self, *_: object) -> None:
        self._stops += 1

    # Starts

    def _start_due(self) -> None:
        for slot in self._slots:
            if self._is_to_start(slot) and slot.start_at <= time.monotonic():
                self._start(slot)

    def _is_to_start(self, slot: _Slot) -> bool:
        """Whether a child will be started in this slot, now or later."""
        if slot.child or slot.is_done or self._stops:
            return False
        return self._ever_ready or slot.failed_starts < _MAX_FAILED_STARTS

    def _start(self, slot: _Slot) -> None:
        try:
            slot.child = _Child(slot.command)
        except OSError as error:
            # For example too many processes. The running children must not be affected.
            slot.failed_starts += 1
            slot.pause(0.0, failed=True)
            _logger.error(
                "Worker process not started | Process: %d | Error: %s | Next start: %s",
                slot.number,
                error,
                self._next_start(slot),
            )
            return
        slot.starts += 1
        self._selector.register(slot.child.channel, selectors.EVENT_READ, slot)

    # Messages of children, and their ends

    def _wait(self) -> None:
        """Wait for a signal, for a message of a child, or until a start or kill is due."""
        due = [slot.start_at for slot in self._slots if self._is_to_start(slot)]
        due += [slot.child.kill_at for slot in self._slots if slot.child]
        at = min(due, default=math.inf)
        left = max(0.0, at - time.monotonic())
        seconds = None if at == math.inf else min(left, _MAX_SELECT_SECONDS)
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._awake.recv(_READ_BYTES)
            else:
                self._read_message(key.data)

    def _read_message(self, slot: _Slot) -> None:
        """Read the only message of a child: that it takes jobs. End of file means that it ended."""
        assert slot.child is not None
        self._selector.unregister(slot.child.channel)
        if not slot.child.read_message():
            return
        slot.was_ready = True
        if not self._were_all_ready and all(each.was_ready for each in self._slots):
            self._were_all_ready = True
            sd_notify.notify("READY=1", f"STATUS={len(self._slots)} worker processes take jobs")

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.child and (code := slot.child.process.poll()) is not None:
                if slot.child.channel in self._selector.get_map():
                    self._read_message(slot)
                self._on_end(slot, slot.child, code)

    def _on_end(self, slot: _Slot, child: _Child, code: int) -> None:
        child.channel.close()
        slot.child = None
        lived_seconds = time.monotonic() - child.began
        is_clean = child.takes_jobs and code == 0
        if self._stops:
            # A child that took no jobs yet was terminated at once, and its exit code means nothing.
            is_clean = is_clean or not child.takes_jobs
            self._stopped_cleanly &= is_clean
        elif is_clean and self._burst:
            slot.is_done = True
        else:
            slot.pause(lived_seconds, failed=not is_clean)
            if not child.takes_jobs:
                slot.failed_starts += 1
                self._failed_start_code = max(code, 1)
        _logger.log(
            logging.INFO if is_clean else logging.WARNING,
            "Worker process ended | Process: %d | Pid: %d | It %s | After: %.1f s | Next start: %s",
            slot.number,
            child.process.pid,
            describe_exit(code),
            lived_seconds,
            self._next_start(slot),
        )

    def _next_start(self, slot: _Slot) -> str:
        if not self._is_to_start(slot):
            return "none"
        seconds = slot.start_at - time.monotonic()
        return f"in {seconds:.1f} s" if seconds > 0 else "at once"

    # Stops

    def _forward_stops(self) -> None:
        while self._stops_forwarded < self._stops:
            self._stops_forwarded += 1
            is_first = self._stops_forwarded == 1
            if is_first:
                self._announce_stop()
            seconds = END_SECONDS + (self._grace_seconds if is_first else 0.0)
            for slot in self._slots:
                if slot.child:
                    slot.child.stop(time.monotonic() + seconds)

    def _announce_stop(self) -> None:
        sd_notify.notify("STOPPING=1", "STATUS=Waiting for running jobs to finish")
        _logger.info(
            "Supervisor stopping | Processes: %d | Grace: %g s; a second signal ends it",
            sum(slot.child is not None for slot in self._slots),
            self._grace_seconds,
        )

    def _kill_overdue(self) -> None:
        for slot in self._slots:
            if slot.child and slot.child.kill_at <= time.monotonic():
                _logger.error(
                    "Worker process killed | Process: %d | Pid: %d | It did not stop in time",
                    slot.number,
                    slot.child.process.pid,
                )
                slot.child.kill()


class _Slot:
    """One of the worker processes; an ended child is replaced in the same slot."""

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number = number
        self.command = command
        self.child: _Child | None = None
        self.start_at = -math.inf
        self.starts = 0
        self.failed_starts = 0
        """Number of children that could not be started, or ended before they took jobs."""
        self.was_ready = False
        """Whether a child of this slot has ever taken jobs."""
        self.is_done = False
        self._restarts = Restarts()

    def pause(self, lived_seconds: float, *, failed: bool) -> None:
        """Set the time of the next start, after a child has ended.

        :param lived_seconds: from the child's start to its end.
        :param failed: whether it failed.
        """
        pause = self._restarts.pause(lived_seconds, failed=failed)
        self.start_at = time.monotonic() + pause


class _Child:
    """One worker process.

    :raises OSError: when the process cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            try:
                self.process = subprocess.Popen(
                    [*command, OPTION, str(descriptor)],
                    pass_fds=[descriptor],
                    # Only the supervisor may notify systemd.
                    env={k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"},
                )
            except OSError:
                self.channel.close()
                raise
        self.began = time.monotonic()
        self.takes_jobs = False
        self.kill_at = math.inf

    def read_message(self) -> bool:
        """Read the child's message.

        :returns: whether the child takes jobs; ``False``: it has ended without a message.
        """
        with contextlib.suppress(OSError):
            self.takes_jobs = bool(self.channel.recv(1, socket.MSG_DONTWAIT))
        return self.takes_jobs

    def stop(self, kill_at: float) -> None:
        """Ask the child to stop; a second call ends the grace period of its jobs.

        :param kill_at: time by ``time.monotonic()`` at which the child is to be killed.
        """
        self.kill_at = kill_at
        with contextlib.suppress(OSError):
            self.channel.send(STOP)
        if not self.takes_jobs:
            # While it imports the app, it does not read the socket yet.
            self.process.terminate()

    def kill(self) -> None:
        """Kill the process."""
        self.kill_at = math.inf
        self.process.kill()
