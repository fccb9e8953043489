"""``flask bgjobs worker``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from flask.cli import ScriptInfo

from ..app_state import AppState, current_state
from ..console import show_logs
from ..states import JobStatus
from ..version import __version__
from .group import QueueNames, bgjobs_commands, one_sentence

if TYPE_CHECKING:
    from ..worker import Worker

_FLASKS_OWN_CHOICE = ("wsgi.py", "app.py")
"""What ``flask`` looks for when nobody names an app."""
_YEARS = 1e9
"""Seconds or MiB: more than anybody means, and not infinite."""
_positive = click.FloatRange(min=0, min_open=True, max=_YEARS)
_DID = {status: status.value for status in JobStatus} | {JobStatus.PENDING: "put back"}
_POOL_UNITS = {"thread": "threads", "process": "child processes"}


@bgjobs_commands.command("worker")
@click.option(
    "-q", "--queues", type=QueueNames(), help="Serve only these, in strict order: high,mail."
)
@click.option("-P", "--pool", type=click.Choice(["thread", "process"]), help="Where jobs run.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Jobs at once.")
@click.option("--burst", is_flag=True, help="Stop when nothing is pending or running.")
@click.option(
    "--max-jobs",
    type=click.IntRange(min=1),
    help="After so many jobs, replace a child process; with threads, stop.",
)
@click.option(
    "--max-time",
    type=_positive,
    help="The same after so many seconds.",
)
@click.option(
    "--max-memory",
    type=_positive,
    help="The same at so many MiB of memory.",
)
@click.option("-n", "--name", help="Name shown on the dashboard; default: host and pid.")
@click.option("--shutdown-timeout", type=click.FloatRange(min=0), help="Grace of a stop, seconds.")
@one_sentence
def worker_command(**options: Any) -> None:
    """Run jobs until told to stop (SIGTERM or Ctrl-C; a second one stops at once)."""
    from ..worker import Worker, WorkerOptions

    state = current_state()
    show_logs()
    worker = Worker(state, WorkerOptions(app=_app_path(), show_logs=True, **options))
    for line in _banner(state, worker):
        click.echo(line)
    began = time.monotonic()
    with _stopped_by_signals(worker.stop):
        worker.run()
    click.echo(_summary(worker, time.monotonic() - began))
    if worker.has_code_running or _other_threads_hold_the_process():
        # Python would wait for them at its end, while their jobs run elsewhere already.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _app_path() -> str | None:
    """From where a child process may import the app, as this command did."""
    info = click.get_current_context().find_object(ScriptInfo)
    if info is None or info.create_app is not None:
        return None
    return info.app_import_path or next(filter(os.path.exists, _FLASKS_OWN_CHOICE), None)


def _other_threads_hold_the_process() -> bool:
    main = threading.main_thread()
    return any(t is not main and not t.daemon for t in threading.enumerate())


def _banner(state: AppState, worker: Worker) -> list[str]:
    queues = ", ".join(worker.queues) if worker.queues else "all, by priority"
    url = state.store.host_engine.url.render_as_string(hide_password=True)
    pools = ", ".join(f"{r.size} {_POOL_UNITS[r.pool]}" for r in worker.routes)
    if len(worker.routes) > 1:
        pools += f" for {', '.join(worker.routes[1].queues or ())}"
    dashboard = state.config.dashboard_url_prefix if state.config.dashboard else "off"
    return [
        f"flask-bgjobs {__version__} worker {worker.name} for the app {state.app.name}",
        f"  database   {url}",
        f"  queues     {queues}",
        f"  pool       {pools}",
        f"  allowed    {len(state.registry)} names",
        f"  dashboard  {dashboard}",
    ]


def _summary(worker: Worker, seconds: float) -> str:
    counts = ", ".join(f"{count:,} {_DID[status]}" for status, count in worker.counts.items())
    return f"Worker {worker.name} stopped after {seconds:.1f} s: {counts or 'it ran no job'}"


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Any:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
