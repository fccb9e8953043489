"""Unusual hosts: each function changes the app of a worker that a test starts."""

from __future__ import annotations

import configparser
import logging
import logging.config
import os
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask, g

from flask_bgjobs import job_completed, job_failed, job_started
from flask_bgjobs.execution.pools import is_child
from flask_bgjobs.job.records import JobSpec
from flask_bgjobs.state import state_of


def receiver_hangs(app: Flask) -> None:
    """Connect a receiver that never returns in the first process that calls it."""
    marker = Path(app.config["TEST_MARKER"])

    def hang(_app: Flask, **_values: Any) -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        threading.Event().wait()

    job_completed.connect(hang, app, weak=False)


def handler_hangs(app: Flask) -> None:
    """Add a log handler that blocks at the line of a completed job, as on a full pipe."""
    marker = Path(app.config["TEST_MARKER"])

    class Hang(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Job completed" not in record.getMessage():
                return
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return
            reading, writing = os.pipe()
            os.write(writing, b"x" * 2**16)
            os.write(writing, b"x")
            os.close(reading)

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("flask_bgjobs").addHandler(Hang())


def filter_raises(app: Flask) -> None:
    """Add a log filter that reads ``flask.g``, which raises in most threads of a worker."""

    class User(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.user = g.get("user", "-")
            return True

    logging.basicConfig(level=logging.DEBUG)
    for handler in logging.getLogger().handlers:
        handler.addFilter(User())


def loop_fails(app: Flask) -> None:
    """Raise an exception in the worker's main loop once a job has failed."""
    _break_loop(app, ZeroDivisionError("injected by the test"))


def loop_exits(app: Flask) -> None:
    """Raise ``SystemExit`` in the worker's main loop, as a listener of the host's pool could."""
    _break_loop(app, SystemExit(0))


def _break_loop(app: Flask, error: BaseException) -> None:
    from flask_bgjobs.worker.rescue import Sweeper

    def fail(*_: object) -> None:
        raise error

    def break_loop(_app: Flask, **_values: Any) -> None:
        Sweeper.sweep = fail  # type: ignore[method-assign]

    job_failed.connect(break_loop, app, weak=False)


def pool_fails(app: Flask) -> None:
    """Once a job has failed, raise an exception in the process pool's thread at the next job."""
    from flask_bgjobs.execution.pools.process.tickets import Tickets

    def fail(*_: object) -> None:
        raise ZeroDivisionError("injected by the test")

    def break_pool(_app: Flask, **_values: Any) -> None:
        Tickets.give = fail  # type: ignore[method-assign]

    job_failed.connect(break_pool, app, weak=False)


def pool_fails_during_a_stop(_app: Flask) -> None:
    """Raise an exception in the thread of the process pool when the worker stops."""
    from flask_bgjobs.execution.pools.process.pool import ProcessPool

    take_unstarted = ProcessPool.take_unstarted

    def fail(*_: object) -> None:
        raise ZeroDivisionError("injected by the test")

    def take_and_break(pool: ProcessPool) -> Any:
        taken = take_unstarted(pool)
        ProcessPool._assign_tasks = fail  # type: ignore[method-assign]
        pool._wake_loop()
        return taken

    ProcessPool.take_unstarted = take_and_break  # type: ignore[method-assign]


def dict_config(_app: Flask) -> None:
    """Configure logging as in Flask's documentation, which disables all existing loggers."""
    logging.config.dictConfig(
        {
            "version": 1,
            "formatters": {"default": {"format": "host: %(message)s"}},
            "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "default"}},
            "root": {"level": "INFO", "handlers": ["console"]},
        }
    )


def alembic_config(_app: Flask) -> None:
    """Configure logging as ``flask_migrate.upgrade()`` does."""
    text = """
    [loggers]
    keys = root
    [handlers]
    keys = console
    [formatters]
    keys = generic
    [logger_root]
    level = WARN
    handlers = console
    [handler_console]
    class = StreamHandler
    args = (sys.stderr,)
    level = NOTSET
    formatter = generic
    [formatter_generic]
    format = host: %(message)s
    """
    parser = configparser.RawConfigParser()
    parser.read_string(textwrap.dedent(text))
    logging.config.fileConfig(parser)


def basic_config(_app: Flask) -> None:
    """Log everything from INFO on, as in the documentation."""
    logging.basicConfig(level=logging.INFO, format="host: %(name)s %(message)s")


def sentry(app: Flask) -> None:
    """Set up the Sentry SDK as documented, but write the events to a file."""
    import json

    import sentry_sdk
    from sentry_sdk.transport import Transport

    path = Path(app.config["TEST_MARKER"])

    class Local(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            event = envelope.get_event()
            if event is not None:
                with path.open("a") as file:
                    file.write(json.dumps(event, default=str) + "\n")

    sentry_sdk.init("http://key@127.0.0.1:9/1", transport=Local, traces_sample_rate=0.0)

    def tag(_app: Flask, job: Any) -> None:
        tags = {"job.id": job.id, "job.name": job.target}
        sentry_sdk.set_tags({**tags, "job.queue": job.queue, "job.attempt": job.attempt})

    job_started.connect(tag, app, weak=False)


def failures_are_recorded(app: Flask) -> None:
    """Add a failure hook that records each call and the id of its process."""
    path = Path(app.config["TEST_MARKER"])

    def note(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        with path.open("a") as file:
            file.write(f"{job.id} {job.attempt} {type(exception).__name__} {final} {os.getpid()}\n")

    state_of(app).failure_hooks = [note]


def failure_hook_is_slow(app: Flask) -> None:
    """Add a failure hook that records each call after two and a half seconds."""
    failures_are_recorded(app)
    (note,) = state_of(app).failure_hooks

    def take_time(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        time.sleep(2.5)
        note(job, exception, final=final)

    state_of(app).failure_hooks = [take_time]


def failure_log_is_slow(app: Flask) -> None:
    """Add a log handler that takes a second for each failure."""
    failures_are_recorded(app)
    _call_on_failure_lines(lambda: time.sleep(1))


def failure_log_ends_the_child(app: Flask) -> None:
    """Add a log handler that ends a child process at a failure."""
    failures_are_recorded(app)

    def end() -> None:
        if is_child():
            os._exit(9)

    _call_on_failure_lines(end)


def failure_log_hangs_in_child(app: Flask) -> None:
    """Add a log handler that hangs at a failure in a child process."""
    failures_are_recorded(app)
    _call_on_failure_lines(lambda: threading.Event().wait() if is_child() else None)


def failure_log_hangs_everywhere(app: Flask) -> None:
    """Add a log handler that hangs at a failure in every process."""
    failures_are_recorded(app)
    _call_on_failure_lines(lambda: threading.Event().wait())


def _call_on_failure_lines(call: Callable[[], object]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Job failed"):
                call()

    # First: the worker command adds no handler if there is one.
    logging.basicConfig(level=logging.INFO)
    # A blocked handler holds its lock: without a level, every other line would wait for it.
    logging.getLogger("flask_bgjobs").addHandler(Handler(logging.ERROR))


def failure_hook_hangs(app: Flask) -> None:
    """Add a failure hook that records each call and never returns."""
    failures_are_recorded(app)
    (note,) = state_of(app).failure_hooks

    def hang(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        note(job, exception, final=final)
        threading.Event().wait()

    state_of(app).failure_hooks = [hang]
