"""``python -m example_app.demo``: starts the whole shop with one command.

Prepares the database, then runs the web server and a worker as child processes until it is
interrupted. If one of them stops unexpectedly, the other is stopped too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import flask_migrate

from . import create_app, samples
from .cli import admin_password

HOST = "127.0.0.1"
DEFAULT_PORT = 5000
START_SECONDS = 30
WORKER_GRACE_SECONDS = 5
STOP_SECONDS = 15
"""Time that a child process has to stop before it is killed."""
POLL_SECONDS = 0.1


def main() -> int:
    """Run the demo until it is interrupted.

    :returns: the exit code.
    """
    port = _choose_port()
    if port is None:
        return 2
    stop = StopRequest()
    password = _prepare()
    with _children() as children:
        children.append(_web_server(port))
        if not _wait_until_served(port, children, stop):
            return 0 if stop else 1
        # Printed before the worker starts, because its log lines would scroll this out of view.
        _say_welcome(port, password)
        children.append(_worker())
        ended = _first_to_end(children, stop)
        if ended is None:
            print("\nStopping the web server and the worker …", flush=True)
            return _stop(children, stop)
        print(f"The {ended.name} stopped unexpectedly: stopping.", file=sys.stderr, flush=True)
        return 1


class StopRequest:
    """Counts the stop signals that the demo has received; true after the first one. A second Ctrl-C
    stops the child processes immediately."""

    def __init__(self) -> None:
        self.count = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._received)

    def __bool__(self) -> bool:
        return self.count > 0

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Child:
    """A child process of the demo.

    :param stop_signal: the signal that stops it.
    :param environment: environment variables in addition to those of this process.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        stop_signal: signal.Signals,
        **environment: str,
    ) -> None:
        self.name = name
        self._stop_signal = stop_signal
        # In a separate session, so that a Ctrl-C in the terminal reaches only the demo, which then
        # stops its child processes.
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def request_stop(self) -> None:
        if self.exit_code is None:
            self._process.send_signal(self._stop_signal)

    def kill(self) -> None:
        if self.exit_code is None:
            self._process.kill()
        self._process.wait()


def _choose_port() -> int | None:
    wanted = os.environ.get("PORT") or str(DEFAULT_PORT)
    if not (wanted.isascii() and wanted.isdigit() and int(wanted) < 65536):
        print(f"PORT={wanted} is not a port: give a number from 0 to 65535.", file=sys.stderr)
        return None
    free = _bindable(int(wanted))
    if free is None:
        free = _bindable(0)
        print(f"Port {wanted} is taken, so the shop uses {free}.", flush=True)
    return free


def _bindable(port: int) -> int | None:
    with socket.socket() as probe:
        # The web server sets this option too; with it, a port that was just closed counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _prepare() -> str:
    """Prepare the database, with sample products and jobs.

    :returns: the administrator's password.
    """
    print("Preparing the database …", flush=True)
    app = create_app()
    with app.app_context():
        flask_migrate.upgrade()
        password = admin_password()
        samples.seed(password)
        samples.enqueue_sample_jobs()
    return password


@contextlib.contextmanager
def _children() -> Iterator[list[Child]]:
    """A list for child processes. All of them are stopped at the end."""
    children: list[Child] = []
    try:
        yield children
    finally:
        for child in children:
            child.request_stop()
        _wait(lambda: all(child.exit_code is not None for child in children), STOP_SECONDS)
        for child in children:
            child.kill()


def _web_server(port: int) -> Child:
    # Waitress closes its connections on SIGINT, and does not handle SIGTERM.
    serve = ["waitress", f"--listen={HOST}:{port}", "--call", "example_app:create_app"]
    return Child("web server", serve, signal.SIGINT)


def _worker() -> Child:
    grace = ["--shutdown-timeout", str(WORKER_GRACE_SECONDS)]
    work = ["flask", "--app", "example_app", "bgjobs", "worker", *grace]
    # Without tracebacks, because some sample jobs fail on purpose.
    return Child("worker", work, signal.SIGTERM, SHOP_SHORT_LOG="1")


def _wait_until_served(port: int, children: list[Child], stop: StopRequest) -> bool:
    def accepts() -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex((HOST, port)) == 0

    def ended() -> bool:
        return bool(stop) or any(child.exit_code is not None for child in children)

    _wait(lambda: ended() or accepts(), START_SECONDS)
    if ended() or not accepts():
        if not stop:
            print("The demo could not start; see the messages above.", file=sys.stderr)
        return False
    return True


def _say_welcome(port: int, password: str) -> None:
    print(
        f"""
  The shop        http://{HOST}:{port}/
  Its jobs        http://{HOST}:{port}/jobs/
  Sign in as      {samples.ADMIN_EMAIL}
  with password   {password}

  A worker now runs the sample jobs: open /jobs/ to see them run, fail, retry and succeed.
  Its child processes make thumbnails of the product photos. /admin/trouble has jobs that hang
  and crash. /test-background-job enqueues another job.
  Ctrl-C stops both the web server and the worker.
""",
        flush=True,
    )


def _first_to_end(children: list[Child], stop: StopRequest) -> Child | None:
    """The child process that stopped unexpectedly, or ``None`` when the demo is told to stop."""
    while not stop:
        for child in children:
            if child.exit_code is not None:
                return child
        time.sleep(POLL_SECONDS)
    return None


def _stop(children: list[Child], stop: StopRequest) -> int:
    """Stop the child processes: cleanly at first, immediately after another Ctrl-C.

    :returns: the exit code.
    """
    forwarded = 0
    deadline = time.monotonic() + STOP_SECONDS
    while any(child.exit_code is None for child in children) and time.monotonic() < deadline:
        if forwarded < stop.count:
            forwarded = stop.count
            for child in children:
                child.request_stop()
        time.sleep(POLL_SECONDS)
    clean = all(child.exit_code == 0 for child in children)
    print("Both have stopped." if clean else "They did not stop cleanly.", flush=True)
    return 0 if clean else 1


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
