"""``flask bgjobs worker``."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from flask import Flask
from flask.cli import ScriptInfo
from sqlalchemy.exc import DBAPIError

from ..config import POOLS
from ..errors import BgJobsError
from ..execution.leftovers import owning_process
from ..job.statuses import JobStatus
from ..job.text import one_line
from ..signals import worker_started
from ..state import AppState, current_state
from ..store import database_sentence
from ..system.console import show_logs
from ..system.safe_logging import logger as _logger
from ..system.signal_handlers import STOP_SIGNALS, handled
from ..version import __version__
from ..worker.supervisor import sd_notify
from ..worker.supervisor.reload import run_with_reload, watched_folders
from ..worker.supervisor.supervised import OPTION, Supervised
from ..worker.supervisor.supervisor import Supervisor
from .group import NumberRange, QueueNames, bgjobs_commands, one_sentence

if TYPE_CHECKING:
    from ..worker.worker import Worker

_FLASKS_OWN_CHOICE = ("wsgi.py", "app.py")
"""What ``flask`` looks for when nobody names an app."""
_YEARS = 1e9
"""Seconds or MiB: more than anybody means, and not infinite."""
_MOST_PROCESSES = 1_000
_FORCED_END_SECONDS = 11.0
"""Beyond the grace of its jobs, for a worker to end; a supervisor waits for longer. A worker whose
database and child processes all hang would need more."""
_positive = NumberRange(min=0, min_open=True, max=_YEARS)
_DID = {status: status.value for status in JobStatus} | {JobStatus.PENDING: "put back"}


@bgjobs_commands.command("worker")
@click.option(
    "-q", "--queues", type=QueueNames(), help="Serve only these, in strict order: high,mail."
)
@click.option("-P", "--pool", type=click.Choice(POOLS), help="Where jobs run.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Jobs at once.")
@click.option(
    "--processes",
    type=click.IntRange(1, _MOST_PROCESSES),
    help="So many workers, each a process of its own, under one supervisor.",
)
@click.option(OPTION, "supervised", type=int, hidden=True)
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
@click.option(
    "--shutdown-timeout", type=NumberRange(min=0, max=_YEARS), help="Grace of a stop, seconds."
)
@one_sentence
def worker_command(
    reloads: bool, processes: int | None, supervised: int | None, **options: Any
) -> None:
    """Run jobs until told to stop (SIGTERM or Ctrl-C; a second one stops at once)."""
    state = current_state()
    if reloads:
        command = [sys.executable, *without_option(sys.orig_argv[1:], "--reload")]
        sys.exit(run_with_reload(command, watched_folders(state.app.root_path)))
    show_logs()
    # A child is told by its environment as well, where the option stands in it.
    if processes is not None and supervised is None:
        sys.exit(_supervise(state, processes, options))
    _work(state, supervised, **options)


def without_option(words: Sequence[str], option: str, *, has_value: bool = False) -> list[str]:
    """The words of a command line without one option, and without its value if it has one."""
    kept = []
    rest = iter(words)
    for word in rest:
        if word == option and has_value:
            next(rest, None)
        elif word != option and not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def _supervise(state: AppState, processes: int, options: dict[str, Any]) -> int:
    """Run so many workers, each by this command without ``--processes``; the exit code."""
    words = without_option(sys.orig_argv[1:], "--processes", has_value=True)
    name, grace = options["name"], options["shutdown_timeout"]
    supervisor = Supervisor(
        [
            # Of an option that is given twice, the last one counts.
            [sys.executable, *words, *(["--name", f"{name}-{number}"] if name else [])]
            for number in range(1, processes + 1)
        ],
        burst=options["burst"],
        grace_seconds=state.config.shutdown_timeout if grace is None else grace,
    )
    _say(
        f"flask-bgjobs {__version__} supervisor {os.getpid()} for the app {state.app.name}, "
        f"worker processes: {processes}"
    )
    began = time.monotonic()
    code = supervisor.run()
    _say(
        f"Supervisor {os.getpid()} stopped after {time.monotonic() - began:.1f} s: worker "
        f"processes started: {supervisor.started:,}, of these as replacements: "
        f"{supervisor.replacements:,}"
    )
    return code


def _work(state: AppState, supervised: int | None, *, no_scheduler: bool, **options: Any) -> None:
    """Run one worker in this process, until it is told to stop or is done."""
    from ..worker.worker import Worker, WorkerOptions

    worker = Worker(
        state,
        WorkerOptions(scheduler=not no_scheduler, app=_app_path(), show_logs=True, **options),
    )
    for line in _banner(state, worker):
        _say(line)
    began = time.monotonic()
    code = 1
    try:
        with owning_process(), _told_to_stop(worker, supervised):
            worker.run()
        code = 0
    except BgJobsError as error:
        click.echo(f"Error: {one_line(str(error))}", err=True)
    except DBAPIError as error:
        click.echo(f"Error: {database_sentence(error)}", err=True)
    except (Exception, SystemExit):
        # Such as sys.exit() in a listener of the host's: this is not the end that was asked for.
        _logger.exception("Worker failed | Worker: %s", worker.name)
    _say(_summary(worker, time.monotonic() - began))
    _exit(code, at_once=worker.has_code_running or _other_threads_hold_the_process())


def _exit(code: int, *, at_once: bool) -> None:
    """End the process with an exit code.

    :param at_once: without waiting for threads, as Python would; jobs of theirs already run
        elsewhere.
    """
    if at_once:
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        _end_helpers()
        os._exit(code)
    if code:
        sys.exit(code)


def _say(line: str) -> None:
    """Print a line. Where nobody reads stdout any more, print nothing from now on."""
    try:
        click.echo(one_line(line))
    except OSError:
        # Python would try to write the rest when it ends, and exit with code 120.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process's life


def _app_path() -> str | None:
    """From where a child process may import the app, as this command did."""
    info = click.get_current_context().find_object(ScriptInfo)
    if info is None or info.create_app is not None:
        return None
    return info.app_import_path or next(filter(os.path.exists, _FLASKS_OWN_CHOICE), None)


def _end_helpers() -> None:
    """End what jobs have started with ``multiprocessing``; Python does it at an ordinary end."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for each in multiprocessing.active_children():
            each.terminate()


def _other_threads_hold_the_process() -> bool:
    main = threading.main_thread()
    return any(t is not main and not t.daemon for t in threading.enumerate())


def _banner(state: AppState, worker: Worker) -> list[str]:
    queues = ", ".join(worker.queues) if worker.queues else "all, by priority"
    url = state.store.host_engine.url.render_as_string(hide_password=True)
    pools = ", ".join(f"{r.size} {r.kind.places}" for r in worker.routes)
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
def _told_to_stop(worker: Worker, supervised: int | None) -> Iterator[None]:
    """Let signals stop the worker, and let its supervisor or systemd know when it takes jobs."""
    forced_end = _ForcedEnd(worker.grace_seconds)
    on_started = _tell_systemd_of_start

    def stop() -> None:
        forced_end.schedule()
        worker.stop()

    on_stop: Callable[[], None] = stop
    if supervised is not None:
        tie = Supervised(supervised, stop)
        on_stop, on_started = tie.stop_once, tie.on_worker_started

    def on_signal(*_: object) -> None:
        on_stop()
        sd_notify.notify("STOPPING=1", "STATUS=Running jobs have their grace")

    in_main_thread = threading.current_thread() is threading.main_thread()
    with (
        worker_started.connected_to(on_started),
        handled(STOP_SIGNALS if in_main_thread else (), on_signal),
    ):
        yield


class _ForcedEnd:
    """Ends the process when its worker was asked to stop and cannot.

    Its loop may stand still, in a signal receiver or a log handler that never returns. Then nothing
    can be given back or logged: other workers take over when the heartbeat has stopped.

    :param grace_seconds: of running jobs, after the first request.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        # A signal handler may put into it at any moment, which it could not do with a lock.
        self._requests: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=self._wait, name="bgjobs-forced-end", daemon=True).start()

    def schedule(self) -> None:
        """End the process after the grace; called again, without the grace."""
        self._requests.put(time.monotonic() + self._grace_seconds + _FORCED_END_SECONDS)
        self._grace_seconds = 0.0

    def _wait(self) -> None:
        end_at = self._requests.get()
        while (left := end_at - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                end_at = min(end_at, self._requests.get(timeout=min(left, threading.TIMEOUT_MAX)))
        os._exit(1)


def _tell_systemd_of_start(_app: Flask, worker: str) -> None:
    sd_notify.notify("READY=1", f"STATUS=The worker {worker} takes jobs")
