"""``flask bgjobs worker``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import click

from ..app_state import AppState, current_state
from ..version import __version__
from .group import QueueNames, bgjobs_commands, one_sentence


@bgjobs_commands.command("worker")
@click.option(
    "-q", "--queues", type=QueueNames(), help="Serve only these, in strict order: high,mail."
)
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Jobs at once.")
@click.option("--burst", is_flag=True, help="Stop when nothing is pending or running.")
@click.option("--max-jobs", type=click.IntRange(min=1), help="Stop after so many jobs.")
@click.option("--max-time", type=click.FloatRange(min=0, min_open=True), help="Stop after seconds.")
@click.option("-n", "--name", help="Name shown on the dashboard; default: host and pid.")
@click.option("--shutdown-timeout", type=click.FloatRange(min=0), help="Grace of a stop, seconds.")
@one_sentence
def worker_command(**options: Any) -> None:
    """Run jobs until told to stop (SIGTERM or Ctrl-C; a second one stops at once)."""
    from ..worker import Worker, WorkerOptions

    state = current_state()
    _show_logs()
    worker = Worker(state, WorkerOptions(**options))
    for line in _banner(state, worker):
        click.echo(line)
    with _stopped_by_signals(worker.stop):
        worker.run()
    counts = ", ".join(f"{count} {status.value}" for status, count in worker.counts.items())
    click.echo(f"Worker {worker.name} stopped: {counts or 'it ran no job'}")
    if worker.has_code_running or _other_threads_hold_the_process():
        # Python would wait for them at its end, while their jobs run elsewhere already.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _other_threads_hold_the_process() -> bool:
    main = threading.main_thread()
    return any(t is not main and not t.daemon for t in threading.enumerate())


def _banner(state: AppState, worker: Any) -> list[str]:
    queues = ", ".join(worker.queues) if worker.queues else "all, by priority"
    url = state.store.host_engine.url.render_as_string(hide_password=True)
    return [
        f"flask-bgjobs {__version__} worker {worker.name} for the app {state.app.name}",
        f"  database {url}, queues: {queues}",
        f"  threads: {worker.concurrency}, names on the allow-list: {len(state.registry)}",
    ]


def _show_logs() -> None:
    """Print the stages of jobs, unless the host has set logging up by itself."""
    logger = logging.getLogger("flask_bgjobs")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)


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
