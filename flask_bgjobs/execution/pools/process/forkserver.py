"""The fork server: a process with one thread, whose forks become the children of a process pool.

A worker has threads and open connections, and must not be forked. A new Python interpreter for
each child would take a second of CPU time. So one small process imports the libraries, but no code
of the host, and forks. A new child then exists within milliseconds, and builds the app by itself.
The fork server is the parent of the children, so only this process can wait for their end. It can
also signal them safely: until it has reaped a child, no other process can get the same pid.

When the worker dies, its connection closes and Linux sends the fork server a signal. The fork
server then kills all children.
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
"""File descriptors sent with each request for a child: channel, tickets and marks."""
_LIBRARIES = (
    "flask_bgjobs.cli",
    "flask_bgjobs.dashboard",
    "flask_bgjobs.execution.pools.process.child",
    "flask_migrate",
    "flask_sqlalchemy",
    "sqlalchemy.dialects.sqlite",
)
"""Modules that are imported before the first fork. None of them starts a thread."""
_CLOSE_SECONDS = 3.0
"""How long to wait for the end of the fork server before it is killed."""
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
    """The system could not fork a child."""

    slot: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class ChildEnded:
    """A child has ended."""

    pid: int
    status: int
    """The wait status that ``os.waitpid`` returns."""


class ForkServer(forks.Forkable):
    """The worker's side: starts the fork server, and sends requests to it.

    :param settings: the ``settings`` of :func:`.child.run`; must be serializable as JSON.
    """

    def __init__(self, settings: dict[str, object]) -> None:
        self._control, server_end = socket.socketpair()
        with server_end:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _START,
                    json.dumps(sys.path),
                    str(server_end.fileno()),
                    json.dumps(settings),
                    str(os.getpid()),
                ],
                pass_fds=[server_end.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal must reach only the worker, which stops its children itself.
                start_new_session=True,
            )
        forks.watch(self)

    def fileno(self) -> int:
        """The file descriptor of the connection, for a selector."""
        return self._control.fileno()

    def fork(self, slot: int, descriptors: list[int]) -> None:
        """Request a child. The reply is a :class:`ChildStarted` or :class:`ChildNotStarted` event.

        :param slot: a number for the child, which the reply repeats.
        :param descriptors: file descriptors of the channel, the tickets and the marks.
        :raises OSError: when the fork server has ended; so do the other requests.
        """
        socket.send_fds(self._control, [_MESSAGE.pack(_FORK, slot, 0)], descriptors)

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a child, unless it has ended."""
        self._control.sendall(_MESSAGE.pack(_SIGNAL, pid, number))

    def signal_group(self, pid: int, number: int) -> None:
        """Send a signal to a child and the processes that it has started."""
        self._control.sendall(_MESSAGE.pack(_SIGNAL_GROUP, pid, number))

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._control.fileno() < 0

    def next_event(self) -> ChildStarted | ChildNotStarted | ChildEnded:
        """Wait for the next event, and return it.

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
        if kind == _ENDED:
            return ChildEnded(first, second)
        return ChildNotStarted(first, os.strerror(second))

    def close(self) -> None:
        """End the fork server and all remaining children."""
        self._control.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            # It is waiting for a killed child that does not end, because it waits in the kernel.
            self._process.kill()
            self._process.wait()

    def after_fork_in_child(self) -> None:
        """Close the copied connection, or the children could outlive the worker."""
        forks.close_in_copy(self._control)


def kill_groups(pids: Iterable[int]) -> None:
    """Kill children, and the processes that they started, after the fork server has ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# In the process of the fork server


def main() -> None:
    """Run the fork server of one worker; in each forked child, run jobs."""
    control = socket.socket(fileno=int(sys.argv[2]))
    settings = json.loads(sys.argv[3])
    # Service managers signal all processes of a service. Only the worker reacts, and decides when
    # its children end.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    for name in _LIBRARIES:
        importlib.import_module(name)
    # Keep the garbage collector from writing to memory pages that parent and children share.
    gc.freeze()
    descriptors = _serve(control, worker=int(sys.argv[4]))
    if descriptors is not None:
        reset_in_copies(former)
        from . import child

        child.run(descriptors, settings)


def _serve(control: socket.socket, worker: int) -> list[int] | None:
    """Execute the worker's requests until the worker has ended.

    :returns: in a forked child, its file descriptors; in the fork server ``None``.
    """
    children: set[int] = set()
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # If a program that the worker started holds the connection open, it does not close when the
    # worker dies.
    _signal_at_end_of_parent(signal.SIGCHLD)
    while os.getppid() == worker:
        readable, _, _ = select.select([control.fileno(), wakeup_read], [], [])
        if wakeup_read in readable:
            os.read(wakeup_read, 4096)
            _reap(children, control)
        if control.fileno() not in readable:
            continue
        try:
            data, descriptors, _, _ = socket.recv_fds(
                control, _MESSAGE.size, _DESCRIPTORS, socket.MSG_WAITALL
            )
        except ConnectionResetError:
            # The worker was killed before it had read all events.
            data = b""
        if len(data) < _MESSAGE.size:
            break
        kind, first, second = _MESSAGE.unpack(data)
        if kind == _FORK:
            try:
                pid = os.fork()
            except OSError as error:
                # No process or memory is available. The living children must not be affected.
                _send_event(control, _NOT_STARTED, first, error.errno or 0)
            else:
                if pid == 0:
                    _detach_from_fork_server(control, wakeup_read, wakeup_write)
                    for descriptor in descriptors:
                        # Programs that jobs start must not inherit them.
                        os.set_inheritable(descriptor, False)
                    return descriptors
                children.add(pid)
                _send_event(control, _STARTED, first, pid)
            for descriptor in descriptors:
                os.close(descriptor)
        elif first in children:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if kind == _SIGNAL_GROUP else os.kill)(first, second)
    _kill_all(children)
    return None


def _detach_from_fork_server(control: socket.socket, wakeup_read: int, wakeup_write: int) -> None:
    """Give the child its own process group and default signal handlers, and close the rest."""
    parent = os.getppid()
    # While C code runs, Python cannot detect that the channel is closed.
    _signal_at_end_of_parent(signal.SIGKILL)
    # Its own process group, so that a kill also ends the processes that its jobs start.
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    control.close()
    os.close(wakeup_read)
    os.close(wakeup_write)
    # The fork server may have ended before the death signal was set.
    if os.getppid() != parent:
        os._exit(1)


def _signal_at_end_of_parent(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends. Only Linux supports this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _reap(children: set[int], control: socket.socket) -> None:
    """Collect the exit status of children that have ended, and report them to the worker."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.remove(pid)
            _kill_group(pid, status)
            _send_event(control, _ENDED, pid, status)


def _kill_group(pid: int, status: int) -> None:
    """Kill the processes that a killed or failed child has started.

    Otherwise parts of a cancelled job could keep running.
    """
    if os.waitstatus_to_exitcode(status) != 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _kill_all(children: set[int]) -> None:
    for pid in children:
        for kill in (os.killpg, os.kill):
            # A child that was just forked has no process group yet.
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


def _send_event(control: socket.socket, kind: bytes, first: int, second: int) -> None:
    # If the worker has ended, the next read detects it.
    with contextlib.suppress(OSError):
        control.sendall(_MESSAGE.pack(kind, first, second))
