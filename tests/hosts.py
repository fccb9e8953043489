"""Hosts unlike the usual one: each function changes the app of a worker that a test starts."""

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
    """A receiver that never returns, in the first process that calls it."""
    marker = Path(app.config["TEST_MARKER"])

    def hang(_app: Flask, **_values: Any) -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        threading.Event().wait()

    job_completed.connect(hang, app, weak=False)


def handler_hangs(app: Flask) -> None:
    """A log handler that never returns from the line of a completed job, as a full pipe."""
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
    """A filter that reads ``flask.g``, which most threads of a worker do not have."""

    class User(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.user = g.get("user", "-")
            return True

    logging.basicConfig(level=logging.DEBUG)
    for handler in logging.getLogger().handlers:
        handler.addFilter(User())


def loop_fails(app: Flask) -> None:
    """A fault in the worker's own loop, once a job has failed."""
    _break_loop(app, ZeroDivisionError("a fault of ours"))


def loop_exits(app: Flask) -> None:
    """A ``sys.exit()`` in the worker's own loop, as in a listener of the host's pool."""
    _break_loop(app, SystemExit(0))


def _break_loop(app: Flask, error: BaseException) -> None:
    from flask_bgjobs.worker import worker

    def fail(*_: object) -> None:
        raise error

    def break_loop(_app: Flask, **_values: Any) -> None:
        worker.Worker._sweep = fail  # type: ignore[method-assign]

    job_failed.connect(break_loop, app, weak=False)


def pool_fails(app: Flask) -> None:
    """A fault in the thread that serves the child processes, once a job has failed."""
    from flask_bgjobs.execution.pools.process.pool import ProcessPool

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    def break_pool(_app: Flask, **_values: Any) -> None:
        ProcessPool._assign_tasks = fail  # type: ignore[method-assign]

    job_failed.connect(break_pool, app, weak=False)


def pool_fails_in_a_stop(_app: Flask) -> None:
    """A fault in the thread that serves the child processes, once the worker stops."""
    from flask_bgjobs.execution.pools.process.pool import ProcessPool

    take_unstarted = ProcessPool.take_unstarted

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    def take_and_break(pool: ProcessPool) -> Any:
        taken = take_unstarted(pool)
        ProcessPool._assign_tasks = fail  # type: ignore[method-assign]
        pool._wake_loop()
        return taken

    ProcessPool.take_unstarted = take_and_break  # type: ignore[method-assign]


def dict_config(_app: Flask) -> None:
    """Logging as Flask's documentation sets it up, which disables all loggers that exist."""
    logging.config.dictConfig(
        {
            "version": 1,
            "formatters": {"default": {"format": "host: %(message)s"}},
            "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "default"}},
            "root": {"level": "INFO", "handlers": ["console"]},
        }
    )


def alembic_config(_app: Flask) -> None:
    """Logging as ``flask_migrate.upgrade()`` leaves it behind."""
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
    """Logging of everything from INFO on, as the documentation shows it."""
    logging.basicConfig(level=logging.INFO, format="host: %(name)s %(message)s")


def sentry(app: Flask) -> None:
    """The Sentry SDK with the recipe of the documentation; events go into a file."""
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
    """A function for failed attempts that writes them down, with the process that calls it."""
    path = Path(app.config["TEST_MARKER"])

    def note(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        with path.open("a") as file:
            file.write(f"{job.id} {job.attempt} {type(exception).__name__} {final} {os.getpid()}\n")

    state_of(app).failure_hooks = [note]


def failure_hook_is_slow(app: Flask) -> None:
    """A function for failed attempts that notes each call after two and a half seconds."""
    failures_are_recorded(app)
    (note,) = state_of(app).failure_hooks

    def take_time(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        time.sleep(2.5)
        note(job, exception, final=final)

    state_of(app).failure_hooks = [take_time]


def failure_log_is_slow(app: Flask) -> None:
    """A handler of the log that takes a second for each failure."""
    failures_are_recorded(app)
    _on_failure_lines(lambda: time.sleep(1))


def failure_log_ends_the_child(app: Flask) -> None:
    """A handler of the log that ends a child process at a failure."""
    failures_are_recorded(app)

    def end() -> None:
        if is_child():
            os._exit(9)

    _on_failure_lines(end)


def failure_log_hangs_in_child(app: Flask) -> None:
    """A handler of the log that hangs at the first failure in a child process."""
    failures_are_recorded(app)
    _on_failure_lines(lambda: threading.Event().wait() if is_child() else None)


def failure_log_hangs_everywhere(app: Flask) -> None:
    """A handler for errors that hangs at a failure in every process."""
    failures_are_recorded(app)
    _on_failure_lines(lambda: threading.Event().wait())


def _on_failure_lines(call: Callable[[], object]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Job failed"):
                call()

    # Before it: where there is a handler, the command adds none.
    logging.basicConfig(level=logging.INFO)
    # A handler that hangs holds its lock: without a level, every other line would wait for it.
    logging.getLogger("flask_bgjobs").addHandler(Handler(logging.ERROR))


def failure_hook_hangs(app: Flask) -> None:
    """A function for failed attempts that notes each call and never returns."""
    failures_are_recorded(app)
    (note,) = state_of(app).failure_hooks

    def hang(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        note(job, exception, final=final)
        threading.Event().wait()

    state_of(app).failure_hooks = [hang]
