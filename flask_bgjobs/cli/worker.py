"""``flask bgjobs worker``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from flask import Flask
from flask.cli import ScriptInfo

from .. import sd_notify
from ..app_state import AppState, current_state
from ..console import show_logs
from ..reload import run_with_reload, watched_folders
from ..signals import worker_started
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
@click.option("--no-scheduler", is_flag=True, help="No pruning; the rest goes on as without it.")
@click.option("--reload", "reloads", is_flag=True, help="Start anew when code changes.")
@click.option("-n", "--name", help="Name shown on the dashboard; default: host and pid.")
@click.option("--shutdown-timeout", type=click.FloatRange(min=0), help="Grace of a stop, seconds.")
@one_sentence
def worker_command(no_scheduler: bool, reloads: bool, **options: Any) -> None:
    """Run jobs until told to stop (SIGTERM or Ctrl-C; a second one stops at once)."""
    from ..worker import Worker, WorkerOptions

    state = current_state()
    if reloads:
        command = [sys.executable, *(word for word in sys.orig_argv[1:] if word != "--reload")]
        sys.exit(run_with_reload(command, watched_folders(state.app.root_path)))
    show_logs()
    worker = Worker(
        state,
        WorkerOptions(scheduler=not no_scheduler, app=_app_path(), show_logs=True, **options),
    )
    for line in _banner(state, worker):
        click.echo(line)
    began = time.monotonic()
    with _stopped_by_signals(worker), worker_started.connected_to(_tell_systemd_of_start):
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


def _tell_systemd_of_start(_app: Flask, worker: str) -> None:
    sd_notify.notify("READY=1", f"STATUS=The worker {worker} takes jobs")


@contextlib.contextmanager
def _stopped_by_signals(worker: Worker) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        worker.stop()
        sd_notify.notify("STOPPING=1", "STATUS=Running jobs have their grace")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
