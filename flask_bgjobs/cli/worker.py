"""The command ``flask bgjobs worker``."""

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
    from ..flow.schedules.ticker import Ticker
    from ..worker.worker import Worker

_DEFAULT_APP_FILES = ("wsgi.py", "app.py")
"""Files that ``flask`` looks for when no app is given."""
_MAX_NUMBER = 1e9
"""Upper limit of options in seconds or MiB: more than any sensible value, but not infinite."""
_MAX_PROCESSES = 1_000
_MAX_SCHEDULES = 20
"""How many schedules the banner of a worker lists."""
_FORCED_EXIT_SECONDS = 11.0
"""Time that a worker has to end after the grace period of its jobs; a supervisor waits longer.
If the database and the child processes all hang, this time is not enough, and the process is ended
by force."""
_positive = NumberRange(min=0, min_open=True, max=_MAX_NUMBER)
_SUMMARY_WORDS = {status: status.value for status in JobStatus} | {JobStatus.PENDING: "released"}


@bgjobs_commands.command("worker")
@click.option(
    "-q", "--queues", type=QueueNames(), help="Serve only these queues, in strict order: high,mail."
)
@click.option("-P", "--pool", type=click.Choice(POOLS), help="Where jobs run.")
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), help="Number of jobs to run at once."
)
@click.option(
    "--processes",
    type=click.IntRange(1, _MAX_PROCESSES),
    help="Run this number of workers, each in its own process, under one supervisor.",
)
@click.option(OPTION, "supervised", type=int, hidden=True)
@click.option("--burst", is_flag=True, help="Stop when no job is pending or running.")
@click.option(
    "--max-jobs",
    type=click.IntRange(min=1),
    help="Replace a child process after this number of jobs; with threads, stop the worker.",
)
@click.option(
    "--max-time",
    type=_positive,
    help="The same after this number of seconds.",
)
@click.option(
    "--max-memory",
    type=_positive,
    help="The same at this memory use in MiB.",
)
@click.option("--no-scheduler", is_flag=True, help="Do not fire schedules or prune.")
@click.option("--reload", "reloads", is_flag=True, help="Restart when code changes.")
@click.option("-n", "--name", help="Name shown on the dashboard; default: host and pid.")
@click.option(
    "--shutdown-timeout",
    type=NumberRange(min=0, max=_MAX_NUMBER),
    help="Seconds that running jobs have to finish after a stop signal.",
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
    # `supervised` is checked too: if FLASK_BGJOBS_WORKER_PROCESSES is set, the workers that the
    # supervisor starts read it as well.
    if processes is not None and supervised is None:
        sys.exit(_supervise(state, processes, options))
    _work(state, supervised, **options)


def without_option(words: Sequence[str], option: str, *, has_value: bool = False) -> list[str]:
    """The words of a command line without an option, and without its value if it has one."""
    kept = []
    rest = iter(words)
    for word in rest:
        if word == option and has_value:
            next(rest, None)
        elif word != option and not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def _supervise(state: AppState, processes: int, options: dict[str, Any]) -> int:
    """Run several workers, each with this command line without ``--processes``.

    :returns: the exit code.
    """
    words = without_option(sys.orig_argv[1:], "--processes", has_value=True)
    name, grace = options["name"], options["shutdown_timeout"]
    supervisor = Supervisor(
        [
            # Appended, because the last value counts if an option is given twice.
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
    """Run one worker in this process until it stops, then exit."""
    from ..worker.options import WorkerOptions
    from ..worker.worker import Worker

    worker = Worker(
        state,
        WorkerOptions(scheduler=not no_scheduler, app=_app_path(), show_logs=True, **options),
    )
    for line in _banner(state, worker):
        _say(line)
    began = time.monotonic()
    code = 1
    try:
        with owning_process(), _stopping_on_signals(worker, supervised):
            worker.run()
        code = 0
    except BgJobsError as error:
        click.echo(f"Error: {one_line(str(error))}", err=True)
    except DBAPIError as error:
        click.echo(f"Error: {database_sentence(error)}", err=True)
    except (Exception, SystemExit):
        # For example sys.exit() in a listener of the app, which must not look like a clean stop.
        _logger.exception("Worker failed | Worker: %s", worker.name)
    _say(_summary(worker, time.monotonic() - began))
    _exit(code, at_once=worker.has_code_running or _other_threads_hold_the_process())


def _exit(code: int, *, at_once: bool) -> None:
    """End the process with an exit code.

    :param at_once: do not wait for other threads, as Python would. Their jobs have been released,
        and may already run in another worker.
    """
    if at_once:
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        _terminate_helpers()
        os._exit(code)
    if code:
        sys.exit(code)


def _say(line: str) -> None:
    """Print a line. If standard output is a closed pipe, discard this line and all later ones."""
    try:
        click.echo(one_line(line))
    except OSError:
        # Otherwise Python would try to flush stdout at exit, and exit with code 120.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process's life


def _app_path() -> str | None:
    """The import name by which a child process can import the app, as this command did; ``None`` if
    the app was given as an object."""
    info = click.get_current_context().find_object(ScriptInfo)
    if info is None or info.create_app is not None:
        return None
    return info.app_import_path or next(filter(os.path.exists, _DEFAULT_APP_FILES), None)


def _terminate_helpers() -> None:
    """Terminate the processes that jobs have started with ``multiprocessing``, as Python does at a
    normal exit."""
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
        *_schedules(worker.ticker),
    ]


def _schedules(ticker: Ticker | None) -> list[str]:
    """The lines of the banner about recurring jobs; none if the app has none."""
    if not ticker:
        return []
    number = len(ticker.names)
    lines = [f"  schedules  {number:,}"]
    lines += [f"    {text}" for text in ticker.upcoming(_MAX_SCHEDULES)]
    if number > _MAX_SCHEDULES:
        lines.append(f"    and {number - _MAX_SCHEDULES:,} more: flask bgjobs schedules")
    return lines


def _summary(worker: Worker, seconds: float) -> str:
    counts = ", ".join(
        f"{count:,} {_SUMMARY_WORDS[status]}" for status, count in worker.counts.items()
    )
    return f"Worker {worker.name} stopped after {seconds:.1f} s: {counts or 'no jobs'}"


@contextlib.contextmanager
def _stopping_on_signals(worker: Worker, supervised: int | None) -> Iterator[None]:
    """Stop the worker on signals, and tell its supervisor or systemd when it is ready."""
    forced_exit = _ForcedExit(worker.grace_seconds)
    on_started = _tell_systemd_of_start

    def stop() -> None:
        forced_exit.schedule()
        worker.stop()

    on_stop: Callable[[], None] = stop
    if supervised is not None:
        link = Supervised(supervised, stop)
        on_stop, on_started = link.stop_once, link.on_worker_started

    def on_signal(*_: object) -> None:
        on_stop()
        sd_notify.notify("STOPPING=1", "STATUS=Waiting for running jobs to finish")

    in_main_thread = threading.current_thread() is threading.main_thread()
    with (
        worker_started.connected_to(on_started),
        handled(STOP_SIGNALS if in_main_thread else (), on_signal),
    ):
        yield


class _ForcedExit:
    """Ends the process if its worker cannot stop.

    The worker's loop may be blocked in a signal receiver or a log handler that never returns. Then
    jobs cannot be released, and the end is not logged. Other workers take over when the heartbeat
    has stopped.

    :param grace_seconds: grace period of running jobs after the first stop signal.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        # `SimpleQueue.put` is reentrant: a signal handler may call it at any moment. With a lock,
        # it could deadlock.
        self._requests: queue.SimpleQueue[float] = queue.SimpleQueue()
        threading.Thread(target=self._wait, name="bgjobs-forced-end", daemon=True).start()

    def schedule(self) -> None:
        """End the process after the grace period; a second call drops the grace period."""
        self._requests.put(time.monotonic() + self._grace_seconds + _FORCED_EXIT_SECONDS)
        self._grace_seconds = 0.0

    def _wait(self) -> None:
        end_at = self._requests.get()
        while (left := end_at - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                end_at = min(end_at, self._requests.get(timeout=min(left, threading.TIMEOUT_MAX)))
        os._exit(1)


def _tell_systemd_of_start(_app: Flask, worker: str) -> None:
    sd_notify.notify("READY=1", f"STATUS=Worker {worker} is ready for jobs")
