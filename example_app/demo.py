"""``python -m example_app.demo``: the whole shop in one command, for trying it out.

Prepares the database, then runs the web server and a worker as child processes until it is
interrupted. When either of them ends by itself, the other is ended too.
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
END_SECONDS = 15
"""How long a child may take to end before it is killed."""
LOOK_SECONDS = 0.1


def main() -> int:
    """Run the demo until it is interrupted; returns the exit code."""
    port = _choose_port()
    if port is None:
        return 2
    stop = StopRequest()
    password = _prepare()
    with _children() as children:
        children.append(_web_server(port))
        if not _wait_until_served(port, children, stop):
            return 0 if stop else 1
        # Said before the worker starts, whose log lines would push it out of sight.
        _say_welcome(port, password)
        children.append(_worker())
        ended = _first_to_end(children, stop)
        if ended is None:
            print("\nEnding the web server and the worker …", flush=True)
            return _end(children, stop)
        print(f"The {ended.name} ended by itself, so the demo ends.", file=sys.stderr, flush=True)
        return 1


class StopRequest:
    """True once somebody asked the demo to end; counts, as a second Ctrl-C means at once."""

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
    """A process of the demo.

    :param end_signal: what asks it to end.
    :param environment: variables beside those of this process.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        end_signal: signal.Signals,
        **environment: str,
    ) -> None:
        self.name = name
        self._end_signal = end_signal
        # In a session of its own, a Ctrl-C in the terminal reaches the demo alone, which
        # then ends its children in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def ask_to_end(self) -> None:
        if self.exit_code is None:
            self._process.send_signal(self._end_signal)

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
        # As the web server does, so that a port that was just given up counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _prepare() -> str:
    """Bring database, products and jobs into place; returns the administrator's password."""
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
    """A list for children, of which none is left running afterwards, whatever happens."""
    children: list[Child] = []
    try:
        yield children
    finally:
        for child in children:
            child.ask_to_end()
        _wait(lambda: all(child.exit_code is not None for child in children), END_SECONDS)
        for child in children:
            child.kill()


def _web_server(port: int) -> Child:
    # Waitress closes its connections on SIGINT, and knows no SIGTERM.
    serve = ["waitress", f"--listen={HOST}:{port}", "--call", "example_app:create_app"]
    return Child("web server", serve, signal.SIGINT)


def _worker() -> Child:
    grace = ["--shutdown-timeout", str(WORKER_GRACE_SECONDS)]
    work = ["flask", "--app", "example_app", "bgjobs", "worker", *grace]
    # Its sample jobs fail on purpose.
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
            print("The demo could not start; its messages above say why.", file=sys.stderr)
        return False
    return True


def _say_welcome(port: int, password: str) -> None:
    print(
        f"""
  The shop        http://{HOST}:{port}/
  Its jobs        http://{HOST}:{port}/jobs/
  Sign in as      {samples.ADMIN_EMAIL}
  with password   {password}

  A worker runs the sample jobs now: look at /jobs/ to see them run, fail, retry and succeed.
  Its child processes make thumbnails of the products' photos. /admin/trouble has jobs for them
  that hang and crash.
  /test-background-job enqueues one more. Ctrl-C ends both the web server and the worker.
""",
        flush=True,
    )


def _first_to_end(children: list[Child], stop: StopRequest) -> Child | None:
    """The child that ended by itself, or ``None`` when somebody asked the demo to end."""
    while not stop:
        for child in children:
            if child.exit_code is not None:
                return child
        time.sleep(LOOK_SECONDS)
    return None


def _end(children: list[Child], stop: StopRequest) -> int:
    """End the children tidily, at once after another Ctrl-C; returns the exit code."""
    asked = 0
    deadline = time.monotonic() + END_SECONDS
    while any(child.exit_code is None for child in children) and time.monotonic() < deadline:
        if asked < stop.count:
            asked = stop.count
            for child in children:
                child.ask_to_end()
        time.sleep(LOOK_SECONDS)
    clean = all(child.exit_code == 0 for child in children)
    print("Both have ended." if clean else "Not all ended cleanly.", flush=True)
    return 0 if clean else 1


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
