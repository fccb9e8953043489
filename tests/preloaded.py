"""An interpreter that has already imported everything, and forks the commands that tests start.

Importing Flask, SQLAlchemy and the drivers takes longer than most tests. A forked command is an
ordinary process: it has its own directory, environment, arguments, standard streams and exit code.

Some commands start other interpreters: a worker with a process pool starts its fork server, and a
supervisor its workers. Such a command gets spare processes, which are forks in the same state. Each
becomes one of these interpreters.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import functools
import importlib
import json
import math
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

_ROOT = Path(__file__).parents[1]
_MESSAGE_BYTES = 1024 * 1024
_PAUSE_SECONDS = 0.01
_STARTING_OTHERS = (
    "flask_bgjobs.execution.pools.process.forkserver",
    "flask_bgjobs.worker.supervisor.supervisor",
)
"""The modules that start interpreters with ``subprocess.Popen``."""
_MODULES = (
    "flask.cli",
    "psycopg",
    "pymysql",
    "sqlalchemy.dialects.mysql.pymysql",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "tests.apps",
    "flask_bgjobs.worker.worker",
    "flask_bgjobs.cli.worker",
    *_STARTING_OTHERS,
)
"""Imported before the first fork; none of these modules starts a thread or opens a file."""


class _ForkedProcess(abc.ABC):
    """A process with methods of ``subprocess.Popen``."""

    pid: int

    @abc.abstractmethod
    def poll(self) -> int | None:
        """The exit code, or ``None`` while the process runs."""

    def wait(self, timeout: float = math.inf) -> int:
        """Wait for the end of the process and return the exit code.

        :raises subprocess.TimeoutExpired: if the process runs longer than ``timeout``.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_PAUSE_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Process(_ForkedProcess):
    """A forked command."""

    def __init__(self, interpreter: PreloadedInterpreter, pid: int) -> None:
        self._interpreter = interpreter
        self.pid = pid

    def poll(self) -> int | None:
        return self._interpreter.exit_code(self.pid)


class PreloadedInterpreter:
    """The client side: starts the interpreter and requests processes from it."""

    def __init__(self) -> None:
        self._socket, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(remote.fileno())],
                cwd=_ROOT,
                pass_fds=[remote.fileno()],
            )
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def start_module(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        output: IO[Any],
        spares: int = 0,
    ) -> Process:
        """Start ``python -m module`` with arguments, in a session of its own.

        :param folder: its working directory.
        :param output: its standard output and standard error.
        :param spares: number of its spare processes. It must start as many interpreters.
        """
        request = {
            "module": module,
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment),
            "spares": spares,
        }
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [output.fileno()])
            while (pid := self._receive(0).get("started")) is None:
                pass
        return Process(self, pid)

    def exit_code(self, pid: int) -> int | None:
        """The exit code of a process, or ``None`` while it runs."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while True:
                self._receive(socket.MSG_DONTWAIT)
        return self._codes.get(pid)

    def _receive(self, flags: int) -> dict[str, int]:
        data = self._socket.recv(_MESSAGE_BYTES, flags)
        if not data:
            raise ChildProcessError("the interpreter that forks the tests' processes has ended")
        message: dict[str, int] = json.loads(data)
        if "ended" in message:
            self._codes[message["ended"]] = message["code"]
        return message

    def close(self) -> None:
        """End the interpreter by closing its socket."""
        self._socket.close()
        self._process.wait()


@functools.cache
def preloaded_interpreter() -> PreloadedInterpreter:
    """The interpreter of this test process; it ends with the test process."""
    interpreter = PreloadedInterpreter()
    atexit.register(interpreter.close)
    return interpreter


def _serve(connection: socket.socket) -> None:
    """Fork a process for each request, and report each exit code, until the socket is closed."""
    living: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is connection:
                    request, descriptors, *_ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
                    if not request:
                        return
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        connection.close()
                        for pidfd in living:
                            os.close(pidfd)
                        _run_module(json.loads(request), *descriptors)
                        return
                    os.close(*descriptors)
                    pidfd = os.pidfd_open(pid)
                    living[pidfd] = pid
                    selector.register(pidfd, selectors.EVENT_READ)
                    connection.send(json.dumps({"started": pid}).encode())
                else:
                    pidfd = key.fd
                    selector.unregister(pidfd)
                    os.close(pidfd)
                    _, status = os.waitpid(pid := living.pop(pidfd), 0)
                    code = os.waitstatus_to_exitcode(status)
                    connection.send(json.dumps({"ended": pid, "code": code}).encode())


def _run_module(request: dict[str, Any], output: int) -> None:
    """Run a module in this process, as ``python -m`` does."""
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [request["folder"], *paths, *(p for p in sys.path if p not in paths)]
    spares: list[_SpareProcess] = []
    for _ in range(request["spares"]):
        spares.append(spare := _SpareProcess())
        if spare.pid == 0:
            for other in spares[:-1]:
                other.release()
            spare.become_interpreter()
            return
    if spares:
        _use_for_interpreters(spares)
    sys.argv = ["", *request["arguments"]]
    sys.orig_argv = [sys.executable, "-m", request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _use_for_interpreters(spares: list[_SpareProcess]) -> None:
    """Use the spare processes for the first interpreters that this process starts."""

    def popen(
        command: Sequence[str], pass_fds: Sequence[int], **options: Any
    ) -> _SpareProcess | subprocess.Popen[bytes]:
        if not spares:
            return subprocess.Popen(command, pass_fds=pass_fds, **options)
        spare = spares.pop(0)
        environment = options.get("env", os.environ)
        spare.start(command, *pass_fds, environment, options.get("start_new_session", False))
        return spare

    names = {**vars(subprocess), "Popen": popen}
    for module in _STARTING_OTHERS:
        sys.modules[module].subprocess = SimpleNamespace(**names)  # type: ignore[attr-defined]


class _SpareProcess(_ForkedProcess):
    """A child process that waits until it becomes another interpreter. If this process ends before
    that, it ends as well."""

    def __init__(self) -> None:
        self._code: int | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        self._socket = ours if self.pid else theirs
        (theirs if self.pid else ours).close()

    def start(
        self,
        command: Sequence[str],
        descriptor: int,
        environment: Mapping[str, str],
        has_own_session: bool,
    ) -> None:
        """Let the process become ``python -c …`` or ``python -m …`` with a file descriptor."""
        request = {
            "command": command[1:],
            "descriptor": descriptor,
            "environment": dict(environment),
            "has_own_session": has_own_session,
        }
        socket.send_fds(self._socket, [json.dumps(request).encode()], [descriptor])
        self.release()

    def release(self) -> None:
        """Close the connection; a process without a command then ends."""
        self._socket.close()

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def become_interpreter(self) -> None:
        """In the child: wait for the command, and run it."""
        message, received, *_ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        self.release()
        if not message:
            return
        request = json.loads(message)
        if received != [request["descriptor"]]:
            os.dup2(*received, request["descriptor"])
            os.close(*received)
        if request["has_own_session"]:
            os.setsid()
        os.environ.clear()
        os.environ.update(request["environment"])
        option, program, *sys.argv[1:] = request["command"]
        sys.orig_argv = [sys.executable, *request["command"]]
        if option == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in _MODULES:
        importlib.import_module(name)
    _serve(socket.socket(fileno=int(sys.argv[1])))
