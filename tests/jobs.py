"""Jobs that the tests run, by name in this process and in real workers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import current_app

from flask_bgjobs import Fail, Retry, Snooze, current_job, run_background_job


class SampleJob:
    """The model's job."""

    def execute(self, message: str = "Hello") -> str:
        return f"executed: {message}"

    def boom(self) -> None:
        raise ValueError("boom")

    @staticmethod
    def still(value: int) -> int:
        return value

    def _private(self) -> None:
        raise AssertionError("never called")

    attribute = "no method"


def record(path: str, line: str) -> str:
    """Append a line outside the database, so that every run is seen."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
    return line


def echo(value: Any = None) -> Any:
    return value


def fail(message: str = "no") -> None:
    raise ValueError(message)


def fail_times(times: int, path: str = "") -> int:
    if path:
        record(path, f"{current_job.id} {current_job.attempt}")
    if current_job.attempt <= times:
        raise RuntimeError(f"attempt {current_job.attempt} fails")
    return current_job.attempt


def fail_for_good() -> None:
    raise Fail("it will never work")


def ask_retry(delay: float | None = None) -> None:
    raise Retry("again", delay=delay)


def snooze_once(seconds: float = 0.05) -> str:
    if current_job.attempt == 1:
        raise Snooze(seconds)
    return "rested"


def hold(path: str, seconds: float = 60.0) -> str:
    """Run until stopped; a loop of short steps, so that an interruption arrives soon."""
    record(path, f"start {current_job.id} {current_job.attempt}")
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(0.01)
    except BaseException as error:
        record(path, f"stopped {current_job.id} {type(error).__name__}")
        raise
    record(path, f"end {current_job.id}")
    return "held"


def wait_for_file(path: str) -> bool:
    """Run until a file is there, whatever is asked."""
    while not Path(path).exists():
        time.sleep(0.01)
    return True


def read_pipe(path: str) -> str:
    """Wait in a system call that nothing interrupts, until somebody writes into a named pipe."""
    with open(path) as pipe:
        return pipe.read()


def ask_cancelled(path: str) -> str:
    """Look at the request by itself and finish tidily."""
    record(path, "start")
    while not current_job.cancelled:
        time.sleep(0.01)
    return "tidy"


async def async_hold(path: str) -> None:
    record(path, "start")
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)
        record(path, "cleaned up")


async def in_a_thread(path: str, seconds: float) -> None:
    record(path, "start")
    await asyncio.to_thread(time.sleep, seconds)


async def async_echo(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


def report(steps: int = 3) -> str:
    for step in range(1, steps + 1):
        current_job.progress(step / steps, f"{step} of {steps}")
        current_job.log(f"step {step}")
        current_job.meta["step"] = step
    return "reported"


def system_exit() -> None:
    raise SystemExit(3)


def crash_worker(path: str) -> None:
    record(path, f"{current_job.id}")
    os.kill(os.getpid(), 9)


def record_pid_and_hold_first_attempt(path: str) -> int:
    """Run for ever at the first attempt, and tell where; end at once at a later one."""
    if current_job.attempt == 1:
        record(path, f"{os.getpid()}")
        time.sleep(600)
    return os.getpid()


def crash_once(path: str) -> int:
    """Kill its own process at the first attempt."""
    record(path, f"{current_job.id} {current_job.attempt}")
    if current_job.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return current_job.attempt


def exit_quietly(code: int = 0) -> None:
    """End its process as if all had gone well."""
    os._exit(code)


def ignore_term(path: str) -> None:
    """Run for ever, deaf to SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record(path, f"deaf {current_job.id} {os.getpid()}")
    while True:
        time.sleep(0.05)


def close_descriptors() -> None:
    """Close the child's end of everything, as a careless daemonization does, and go on."""
    os.closerange(3, 256)
    while True:
        time.sleep(0.05)


def stuck_in_c(path: str) -> None:
    """Hold the interpreter in a call that takes hours and never looks up.

    Another program makes the record, when the call has surely begun: before it, Python would
    still answer a signal.
    """
    line = f"stuck {current_job.id} {os.getpid()}"
    subprocess.Popen(["sh", "-c", 'sleep 0.3; echo "$1" >> "$0"', path, line])
    re.match(r"(a+)+$", "a" * 60 + "b")


def with_subprocess(path: str) -> None:
    """Start a program that goes on by itself, and wait for ever."""
    program = subprocess.Popen(["sleep", "600"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record(path, f"{program.pid}")
    while True:
        time.sleep(0.05)


def too_much_memory() -> int:
    """Ask for more than its limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, hard))
    return len(bytearray(2**32))


def grow(mebibytes: int) -> int:
    """Keep memory for as long as the process lives."""
    _kept.append(b"x" * (mebibytes * 2**20))
    return os.getpid()


_kept: list[bytes] = []


def process_id() -> int:
    return os.getpid()


def note_process(path: str, seconds: float = 0.0) -> None:
    """Note which process runs which job."""
    time.sleep(seconds)
    record(path, f"{current_job.id} {os.getpid()}")


def report_and_hold(path: str) -> None:
    """Tell how far it is, then run for ever."""
    current_job.progress(0.5, "half")
    current_job.log("half done")
    current_job.meta["half"] = True
    hold(path)


def swallow(path: str) -> str:
    """Finish in spite of every request to stop."""
    record(path, f"start {current_job.id}")
    try:
        while True:
            time.sleep(0.01)
    except BaseException:
        return "finished in spite of it"


def enqueue_another(value: int) -> None:
    run_background_job("tests.jobs.echo", parameters=[value])


def wall_clock() -> float:
    return time.time()


def enqueue_later(value: int, delay: float) -> int:
    """By the clock of the process that runs this; the id of the new job."""
    return run_background_job("tests.jobs.echo", parameters=[value], delay=delay).id


def hang_scheduler(part: str) -> None:
    """Let a thread of the worker's scheduler wait for ever: the one that calls, or its main one."""
    # Here, as the names of these jobs are imported by processes that must do without it.
    from apscheduler.events import EVENT_JOB_SUBMITTED
    from apscheduler.schedulers.background import BackgroundScheduler

    (scheduler,) = (o for o in gc.get_objects() if type(o) is BackgroundScheduler)
    hangs, never = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        never.wait()

    if part == "executor":
        scheduler.add_job(hang)
    else:
        scheduler.add_listener(hang, EVENT_JOB_SUBMITTED)
    assert hangs.wait(30)


def tell_slowly(lines: int, seconds: float) -> None:
    """Log numbered lines, with a pause after each."""
    for number in range(lines):
        current_job.log(f"line {number}")
        time.sleep(seconds)


def keep_own_row(journal: str, end: str, how: str) -> None:
    """Keep the row of this job locked until there is a file ``end``."""
    lock = "SELECT id FROM bgjobs_job WHERE id = {} FOR UPDATE"
    statement = lock if how == "locks" else "INSERT INTO export VALUES ({})"
    with current_app.extensions["sqlalchemy"].engine.begin() as connection:
        connection.execute(sa.text(statement.format(current_job.id)))
        current_job.log("locked")
        record(journal, "locked")
        while not Path(end).exists():
            time.sleep(0.01)


def brief(path: str, name: str) -> None:
    """Note that it runs, and take two milliseconds for it."""
    record(path, name)
    time.sleep(0.002)


def hold_first_attempt(path: str) -> int:
    """Run for ever at the first attempt, and end at once at a later one."""
    if current_job.attempt == 1:
        hold(path, 600)
    return current_job.attempt


def hold_gil_first_attempt(path: str, seconds: int) -> int:
    """At the first attempt let no other thread of the process run for some seconds."""
    attempt = current_job.attempt
    record(path, f"start {attempt}")
    while attempt == 1:
        # Nobody may come in between, and so begin a transaction that then lasts as long.
        sys.setswitchinterval(60)
        if _no_thread_writes():
            ctypes.PyDLL(None).sleep(seconds)
            attempt = 0
        sys.setswitchinterval(0.005)
        time.sleep(0.001)
    record(path, f"end {current_job.attempt}")
    return current_job.attempt


def _no_thread_writes() -> bool:
    """Whether no thread of this process is in a transaction: others would wait for its locks."""
    stacks = (traceback.walk_stack(frame) for frame in sys._current_frames().values())
    frames = (frame for stack in stacks for frame, _ in stack)
    return not any(frame.f_code.co_name == "transaction" for frame in frames)


def give(what: str) -> Any:
    """A result that cannot be stored."""
    results: dict[str, Any] = {
        "an object": {"rows": [1, object()]},
        "NaN": {"rows": [1.0, float("nan")]},
        "infinity": {"rows": [1, float("-inf")]},
        "a surrogate": {"rows": [0, "\ud800"]},
        "too large": "x" * 2**21,
    }
    return results[what]


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it has no text")


class TwoArguments(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)


def throw(what: str) -> None:
    """Raise what is hard to tell."""
    errors: dict[str, BaseException] = {
        "no text": Unreadable(),
        "NUL and surrogates": ValueError("a\0b\ud800c"),
        "two arguments": TwoArguments(5, "no"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "generator": GeneratorExit(),
        "cancelled": asyncio.CancelledError(),
        "bare": BaseException("bare"),
    }
    if what == "50 MB":
        raise ValueError("begin" + "x" * 50_000_000 + "end")
    if what == "chain":
        error: Exception = ValueError("first")
        for number in range(500):
            link = RuntimeError(f"link {number}")
            link.__cause__ = error
            error = link
        raise error
    raise errors[what]


def spoil_session(how: str) -> None:
    """Leave the host's session as no job should."""
    session = current_app.extensions["sqlalchemy"].session
    row = "INSERT INTO bgjobs_queue (name, created_at) VALUES ('left', CURRENT_TIMESTAMP)"
    session.execute(sa.text(row))
    if how == "broken":
        session.execute(sa.text("SELECT * FROM no_such_table"))
    if how == "swallowed":
        with contextlib.suppress(sa.exc.DBAPIError):
            session.execute(sa.text("SELECT * FROM no_such_table"))


def inspect_session() -> list[Any]:
    """Where it runs, whether a transaction is open, and what is there by the session."""
    session = current_app.extensions["sqlalchemy"].session
    is_open = session().in_transaction()
    names = session.execute(sa.text("SELECT name FROM bgjobs_queue WHERE name = 'left'"))
    return [os.getpid(), threading.get_ident(), is_open, list(names.scalars())]


def count_by_session() -> int:
    """How many jobs the host's session finds."""
    session = current_app.extensions["sqlalchemy"].session
    return int(session.execute(sa.text("SELECT count(*) FROM bgjobs_job")).scalar_one())


def login(user: str, password: str) -> None:
    raise ValueError(f"{user} could not log in with {password}")


NAMES = [
    "tests.jobs.SampleJob",
    *(
        f"tests.jobs.{function.__name__}"
        for function in (
            record,
            echo,
            fail,
            fail_times,
            fail_for_good,
            ask_retry,
            snooze_once,
            hold,
            wait_for_file,
            read_pipe,
            ask_cancelled,
            async_hold,
            in_a_thread,
            async_echo,
            report,
            system_exit,
            crash_worker,
            crash_once,
            record_pid_and_hold_first_attempt,
            exit_quietly,
            ignore_term,
            close_descriptors,
            stuck_in_c,
            with_subprocess,
            too_much_memory,
            grow,
            process_id,
            note_process,
            report_and_hold,
            swallow,
            enqueue_another,
            wall_clock,
            enqueue_later,
            hang_scheduler,
            tell_slowly,
            brief,
            keep_own_row,
            hold_first_attempt,
            hold_gil_first_attempt,
            give,
            throw,
            spoil_session,
            inspect_session,
            count_by_session,
            login,
        )
    ),
]
