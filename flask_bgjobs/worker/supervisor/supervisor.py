"""The supervisor: starts worker processes, watches and replaces them, and stops them together.

It holds no connection to the database and runs nothing of the app's. Each child is a fresh process,
since one that has threads or connections must not be forked.
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

_TRIES = 3
"""Starts of each child, until a service of which none ever took jobs is given up."""
END_SECONDS = 13.0
"""For a child to end, beyond the grace of its jobs: longer than it takes by itself."""
_SOME_BYTES = 4096
_MAX_SELECT_SECONDS = 86_400.0
"""epoll waits for 24 days at most."""


class Supervisor:
    """Some worker processes that run until they are told to stop.

    :param commands: of the children; each gets the option ``--supervised`` besides.
    :param burst: whether a child that ends with code 0 is done, instead of being replaced.
    :param grace_seconds: what the running jobs of a child have after the first signal.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], *, burst: bool, grace_seconds: float
    ) -> None:
        self._slots = [_Slot(number, command) for number, command in enumerate(commands, 1)]
        self._burst = burst
        self._grace_seconds = grace_seconds
        self._selector = selectors.DefaultSelector()
        self._stops = self._stops_passed_on = 0
        self._were_all_up = False
        self._stopped_cleanly = True
        self._failed_start_code = 1

    def run(self) -> int:
        """Supervise until the children have stopped, are done, or turn out unable to start.

        :returns: the exit code for the process that calls this: 0, also after a clean stop; 1 when
            a child did not stop cleanly; that of the children when none could start.
        """
        with self._woken_by_signals():
            while not self._is_over():
                self._start_due()
                self._wait()
                self._reap()
                self._pass_stops_on()
                self._kill_overdue()
        if self._stops or not self._has_given_up:
            return 0 if self._stopped_cleanly else 1
        _logger.error("No worker process could start in %d tries; giving up", _TRIES)
        return self._failed_start_code

    @property
    def started(self) -> int:
        """How many processes it has started."""
        return sum(slot.starts for slot in self._slots)

    @property
    def replacements(self) -> int:
        """How many of these took the place of one that had ended."""
        return sum(max(slot.starts - 1, 0) for slot in self._slots)

    def _is_over(self) -> bool:
        if any(slot.child for slot in self._slots):
            return False
        return bool(self._stops) or self._has_given_up or all(slot.is_done for slot in self._slots)

    @property
    def _has_given_up(self) -> bool:
        """Whether no child was ever up, and each has had its tries.

        Once one was up, the app can start: what keeps it from that now, such as a database that is
        away, will pass.
        """
        return all(slot.failed_starts >= _TRIES for slot in self._slots) and not self._ever_up

    @property
    def _ever_up(self) -> bool:
        return any(slot.was_up for slot in self._slots)

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
        """Whether a child is to start there, now or later."""
        if slot.child or slot.is_done or self._stops:
            return False
        return self._ever_up or slot.failed_starts < _TRIES

    def _start(self, slot: _Slot) -> None:
        try:
            slot.child = _Child(slot.command)
        except OSError as error:
            # Such as too many processes: the children that run must not suffer for it.
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

    # What children tell, and how they end

    def _wait(self) -> None:
        """Wait until there is a signal, a child tells something, or something is due."""
        due = [slot.start_at for slot in self._slots if self._is_to_start(slot)]
        due += [slot.child.kill_at for slot in self._slots if slot.child]
        at = min(due, default=math.inf)
        left = max(0.0, at - time.monotonic())
        seconds = None if at == math.inf else min(left, _MAX_SELECT_SECONDS)
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._awake.recv(_SOME_BYTES)
            else:
                self._hear(key.data)

    def _hear(self, slot: _Slot) -> None:
        """Take note of all that a child ever tells: that it takes jobs, or that it is no more."""
        assert slot.child is not None
        self._selector.unregister(slot.child.channel)
        if not slot.child.is_ready():
            return
        slot.was_up = True
        if not self._were_all_up and all(each.was_up for each in self._slots):
            self._were_all_up = True
            sd_notify.notify("READY=1", f"STATUS={len(self._slots)} worker processes take jobs")

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.child and (code := slot.child.process.poll()) is not None:
                if slot.child.channel in self._selector.get_map():
                    self._hear(slot)
                self._on_end(slot, slot.child, code)

    def _on_end(self, slot: _Slot, child: _Child, code: int) -> None:
        child.channel.close()
        slot.child = None
        lived_seconds = time.monotonic() - child.began
        is_well = child.takes_jobs and code == 0
        if self._stops:
            # One that did not take jobs yet was ended at once, and had nothing to lose.
            is_well = is_well or not child.takes_jobs
            self._stopped_cleanly &= is_well
        elif is_well and self._burst:
            slot.is_done = True
        else:
            slot.pause(lived_seconds, failed=not is_well)
            if not child.takes_jobs:
                slot.failed_starts += 1
                self._failed_start_code = max(code, 1)
        _logger.log(
            logging.INFO if is_well else logging.WARNING,
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

    def _pass_stops_on(self) -> None:
        while self._stops_passed_on < self._stops:
            self._stops_passed_on += 1
            is_first = self._stops_passed_on == 1
            if is_first:
                self._tell_of_stop()
            seconds = END_SECONDS + (self._grace_seconds if is_first else 0.0)
            for slot in self._slots:
                if slot.child:
                    slot.child.stop(time.monotonic() + seconds)

    def _tell_of_stop(self) -> None:
        sd_notify.notify("STOPPING=1", "STATUS=Running jobs have their grace")
        _logger.info(
            "Supervisor stopping | Processes: %d | Grace: %g s; a second signal ends it",
            sum(slot.child is not None for slot in self._slots),
            self._grace_seconds,
        )

    def _kill_overdue(self) -> None:
        for slot in self._slots:
            if slot.child and slot.child.kill_at <= time.monotonic():
                _logger.error(
                    "Worker process killed | Process: %d | Pid: %d | It did not end in its time",
                    slot.number,
                    slot.child.process.pid,
                )
                slot.child.kill()


class _Slot:
    """The place of one child after the other."""

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number = number
        self.command = command
        self.child: _Child | None = None
        self.start_at = -math.inf
        self.starts = 0
        self.failed_starts = 0
        """How many children ended before they took jobs."""
        self.was_up = False
        """Whether one ever took jobs."""
        self.is_done = False
        self._restarts = Restarts()

    def pause(self, lived_seconds: float, *, failed: bool) -> None:
        """Set when the next child is to start, after the end of one."""
        pause = self._restarts.pause(lived_seconds, failed=failed)
        self.start_at = time.monotonic() + pause


class _Child:
    """One worker process.

    :raises OSError: when it cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            try:
                self.process = subprocess.Popen(
                    [*command, OPTION, str(descriptor)],
                    pass_fds=[descriptor],
                    # What systemd is told is the supervisor's word.
                    env={k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"},
                )
            except OSError:
                self.channel.close()
                raise
        self.began = time.monotonic()
        self.takes_jobs = False
        self.kill_at = math.inf

    def is_ready(self) -> bool:
        """Whether that is what it has to say; it says nothing when it has ended."""
        with contextlib.suppress(OSError):
            self.takes_jobs = bool(self.channel.recv(1, socket.MSG_DONTWAIT))
        return self.takes_jobs

    def stop(self, kill_at: float) -> None:
        """Ask it to stop; asked again, it ends the grace of its jobs.

        :param kill_at: the monotonic time at which its own time is over.
        """
        self.kill_at = kill_at
        with contextlib.suppress(OSError):
            self.channel.send(STOP)
        if not self.takes_jobs:
            # It may not listen yet, while it imports the app.
            self.process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self.kill_at = math.inf
        self.process.kill()
