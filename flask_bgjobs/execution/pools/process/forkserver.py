"""The fork server: a process with one thread, whose forks become the children of a process pool.

A worker has threads and open connections, and must not be forked. Starting Python anew for
each child would take a second of processor time. So one small process imports the libraries,
no code of the host's, and forks: a new child is there in milliseconds, and builds the app by
itself. It is the children's parent, so only it can tell when one has ended, and can signal one
without the risk of meeting another process that got its number since.

When the worker dies, the connection closes and Linux sends a signal; then it kills all
children.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable

from ....system import forks
from ....system.signal_handlers import reset_in_copies

_MESSAGE = struct.Struct("=cqq")
_FORK, _SIGNAL, _SIGNAL_GROUP = b"f", b"s", b"g"
_STARTED, _NOT_STARTED, _ENDED = b"b", b"n", b"e"
_DESCRIPTORS = 3
_LIBRARIES = (
    "flask_bgjobs.cli",
    "flask_bgjobs.dashboard",
    "flask_bgjobs.execution.pools.process.child",
    "flask_migrate",
    "flask_sqlalchemy",
    "sqlalchemy.dialects.sqlite",
)
"""Imported before the first fork. None of them starts a thread."""
_CLOSE_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_START += f"from {__name__} import main; main()"


@dataclasses.dataclass(frozen=True, slots=True)
class ChildStarted:
    """A child has started."""

    slot: int
    pid: int


@dataclasses.dataclass(frozen=True, slots=True)
class ChildNotStarted:
    """The system refused to fork."""

    slot: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """A child has ended."""

    pid: int
    status: int
    """As ``os.waitpid`` gives it."""


class ForkServer(forks.Forkable):
    """The worker's side: starts the process, and tells it what to do.

    :param settings: what :func:`.child.run` needs, as JSON can hold it.
    """

    def __init__(self, settings: dict[str, object]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _START,
                    json.dumps(sys.path),
                    str(theirs.fileno()),
                    json.dumps(settings),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal is meant for the worker, which decides what it means here.
                start_new_session=True,
            )
        forks.watch(self)

    def fileno(self) -> int:
        """For a selector."""
        return self._control.fileno()

    def fork(self, slot: int, descriptors: list[int]) -> None:
        """Ask for a child; :class:`ChildStarted` or :class:`ChildNotStarted` will answer.

        :raises OSError: when the fork server has ended, as the others do.
        """
        socket.send_fds(self._control, [_MESSAGE.pack(_FORK, slot, 0)], descriptors)

    def signal(self, pid: int, number: int) -> None:
        """Signal a child, unless it has ended."""
        self._control.sendall(_MESSAGE.pack(_SIGNAL, pid, number))

    def signal_group(self, pid: int, number: int) -> None:
        """Signal a child and all processes that it has started."""
        self._control.sendall(_MESSAGE.pack(_SIGNAL_GROUP, pid, number))

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._control.fileno() < 0

    def next_event(self) -> ChildStarted | ChildNotStarted | Ended:
        """What has happened; waits for it.

        :raises EOFError: when the fork server has ended.
        """
        try:
            data = self._control.recv(_MESSAGE.size, socket.MSG_WAITALL)
        except OSError:
            data = b""
        if len(data) < _MESSAGE.size:
            raise EOFError
        kind, first, second = _MESSAGE.unpack(data)
        if kind == _STARTED:
            return ChildStarted(first, second)
        return (
            Ended(first, second) if kind == _ENDED else ChildNotStarted(first, os.strerror(second))
        )

    def close(self) -> None:
        """End the fork server and every child that is left."""
        self._control.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            # It waits for a child that waits within the kernel.
            self._process.kill()
            self._process.wait()

    def after_fork_in_child(self) -> None:
        """Close a copy's connection, which would else keep children after the worker's death."""
        forks.close_in_copy(self._control)


def kill_groups(pids: Iterable[int]) -> None:
    """End children, and the processes that they started, after the fork server was killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# In the process of the fork server


def main() -> None:
    """Serve one worker; in the children, run jobs."""
    control = socket.socket(fileno=int(sys.argv[2]))
    settings = json.loads(sys.argv[3])
    # Service managers signal the whole group: what that means is the worker's decision.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    for name in _LIBRARIES:
        importlib.import_module(name)
    # Keeps the garbage collector from writing to pages that parent and children share.
    gc.freeze()
    descriptors = _serve(control, worker=int(sys.argv[4]))
    if descriptors is not None:
        reset_in_copies(former)
        from . import child

        child.run(descriptors, settings)


def _serve(control: socket.socket, worker: int) -> list[int] | None:
    """Do what the worker asks until it is gone; in a child, the descriptors that it was given."""
    children: set[int] = set()
    awake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The connection does not close while a program that the worker started holds it open.
    _signal_at_end_of_parent(signal.SIGCHLD)
    while os.getppid() == worker:
        readable, _, _ = select.select([control.fileno(), awake], [], [])
        if awake in readable:
            os.read(awake, 4096)
            _reap(children, control)
        if control.fileno() not in readable:
            continue
        try:
            data, descriptors, _, _ = socket.recv_fds(
                control, _MESSAGE.size, _DESCRIPTORS, socket.MSG_WAITALL
            )
        except ConnectionResetError:
            # Killed before it had read what we told it.
            data = b""
        if len(data) < _MESSAGE.size:
            break
        kind, first, second = _MESSAGE.unpack(data)
        if kind == _FORK:
            try:
                pid = os.fork()
            except OSError as error:
                # No process or no memory is left: the children that live must not suffer for it.
                _tell(control, _NOT_STARTED, first, error.errno or 0)
            else:
                if pid == 0:
                    _leave_nursery(control, awake, alarm)
                    for descriptor in descriptors:
                        # Programs that jobs start shall not have them.
                        os.set_inheritable(descriptor, False)
                    return descriptors
                children.add(pid)
                _tell(control, _STARTED, first, pid)
            for descriptor in descriptors:
                os.close(descriptor)
        elif first in children:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if kind == _SIGNAL_GROUP else os.kill)(first, second)
    _kill_all(children)
    return None


def _leave_nursery(control: socket.socket, awake: int, alarm: int) -> None:
    parent = os.getppid()
    # Also while C code keeps Python from noticing that the channel is closed.
    _signal_at_end_of_parent(signal.SIGKILL)
    # A group of its own, so that a kill reaches the processes that its jobs start.
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    control.close()
    os.close(awake)
    os.close(alarm)
    if os.getppid() != parent:
        os._exit(1)


def _signal_at_end_of_parent(number: signal.Signals) -> None:
    """Have this process sent a signal when its parent ends; only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _reap(children: set[int], control: socket.socket) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.remove(pid)
            _kill_group(pid, status)
            _tell(control, _ENDED, pid, status)


def _kill_group(pid: int, status: int) -> None:
    """End what a dead child's job has started: a cancelled job must not go on in parts."""
    if os.waitstatus_to_exitcode(status) != 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _kill_all(children: set[int]) -> None:
    for pid in children:
        for kill in (os.killpg, os.kill):
            # One that was forked a moment ago has no group yet.
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


def _tell(control: socket.socket, kind: bytes, first: int, second: int) -> None:
    # A worker that is gone is noticed by the next read.
    with contextlib.suppress(OSError):
        control.sendall(_MESSAGE.pack(kind, first, second))
