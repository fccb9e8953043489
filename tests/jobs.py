"""The jobs of the tests; they run in the test process and in real workers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
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

from flask_bgjobs import Fail, Limit, Retry, Snooze, current_job, run_background_job


class SampleJob:
    """A job as a class, with methods of several kinds."""

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
    """Append a line to a file outside the database, so that every run leaves a trace."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
    return line


def limited(path: str, key: str, number: int) -> int:
    """Record the start and the end of this run. Depending on ``number``, the first attempt fails or
    snoozes."""
    job, attempt = current_job.id, current_job.attempt
    record(path, f"start {job} {attempt} {time.time()}")
    try:
        time.sleep(0.002 * (number % 5))
        if attempt == 1 and number % 10 == 0:
            raise RuntimeError("the first attempt fails")
        if attempt == 1 and number % 10 == 1:
            raise Snooze(0.05)
        return number
    finally:
        record(path, f"end {job} {attempt} {time.time()}")


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
    """Run for ``seconds`` in short steps, so that an interruption takes effect soon."""
    try:
        # Within the try: on a slow machine a short timeout may have passed already.
        record(path, f"start {current_job.id} {current_job.attempt}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
    except BaseException as error:
        record(path, f"stopped {current_job.id} {type(error).__name__}")
        raise
    record(path, f"end {current_job.id}")
    return "held"


def wait_for_file(path: str) -> bool:
    """Run until a file exists."""
    while not Path(path).exists():
        time.sleep(0.01)
    return True


def read_pipe(path: str) -> str:
    """Wait in a system call that cannot be interrupted, until data arrives in a named pipe."""
    with open(path) as pipe:
        return pipe.read()


def ask_cancelled(path: str) -> str:
    """Poll ``current_job.cancelled`` and return when it is set."""
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
    """In the first attempt, record the process id and sleep; return at once in a later one."""
    if current_job.attempt == 1:
        record(path, f"{os.getpid()}")
        time.sleep(600)
    return os.getpid()


def crash_once(path: str) -> int:
    """Kill its own process in the first attempt."""
    record(path, f"{current_job.id} {current_job.attempt}")
    if current_job.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return current_job.attempt


def exit_quietly(code: int = 0) -> None:
    """End its process with an exit code and without an exception."""
    os._exit(code)


def ignore_term(path: str) -> None:
    """Run forever and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record(path, f"ignoring {current_job.id} {os.getpid()}")
    while True:
        time.sleep(0.05)


def close_descriptors() -> None:
    """Close all file descriptors of the process, as a careless daemon does, and run forever."""
    os.closerange(3, 256)
    while True:
        time.sleep(0.05)


def stuck_in_c(path: str) -> None:
    """Hold the interpreter in a C call that takes hours and handles no signals.

    Another program writes the record a little later, when the call has begun: before it, Python
    would still handle a signal.
    """
    line = f"stuck {current_job.id} {os.getpid()}"
    subprocess.Popen(["sh", "-c", 'sleep 0.3; echo "$1" >> "$0"', path, line])
    re.match(r"(a+)+$", "a" * 60 + "b")


def with_subprocess(path: str) -> None:
    """Start a program, ignore SIGTERM and run forever."""
    program = subprocess.Popen(["sleep", "600"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record(path, f"{program.pid}")
    while True:
        time.sleep(0.05)


def too_much_memory() -> int:
    """Allocate more memory than the limit of the process allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**30, hard))
    return len(bytearray(2**32))


def grow(mebibytes: int) -> int:
    """Allocate memory and keep it as long as the process lives."""
    _kept.append(b"x" * (mebibytes * 2**20))
    return os.getpid()


_kept: list[bytes] = []


def process_id() -> int:
    return os.getpid()


def note_process(path: str, seconds: float = 0.0) -> None:
    """Record the job's id and the process id after ``seconds``."""
    time.sleep(seconds)
    record(path, f"{current_job.id} {os.getpid()}")


def report_and_hold(path: str) -> None:
    """Report progress, a log line and meta, then run for a minute."""
    current_job.progress(0.5, "half")
    current_job.log("half done")
    current_job.meta["half"] = True
    hold(path)


def swallow(path: str) -> str:
    """Ignore a request to stop, and return a result."""
    record(path, f"start {current_job.id}")
    try:
        while True:
            time.sleep(0.01)
    except BaseException:
        return "finished despite the request"


def enqueue_another(value: int) -> None:
    run_background_job("tests.jobs.echo", parameters=[value])


def enqueue_limited(times: int) -> None:
    """Enqueue a job with the same limit as this one, which does the same with one fewer."""
    if times:
        run_background_job(
            "tests.jobs.enqueue_limited",
            parameters=[times - 1],
            limits=Limit("one", concurrency=1),
        )


def record_tick(path: str) -> None:
    """Append the schedule, the tick and the id of this job to a file outside the database."""
    meta = current_job.meta
    record(path, f"{meta['schedule']} {meta['tick']:%Y-%m-%dT%H:%M:%S} {current_job.id}")


def tick() -> str:
    """The tick of the schedule for which this job runs."""
    return str(current_job.meta["tick"])


def wall_clock() -> float:
    return time.time()


def enqueue_later(value: int, delay: float) -> int:
    """Enqueue a delayed job from the worker's process; returns its id."""
    return run_background_job("tests.jobs.echo", parameters=[value], delay=delay).id


def hang_scheduler(part: str) -> None:
    """Block a thread of the worker's scheduler: one of its executor, or its main thread."""
    # Imported here, because some processes import this module but must not import the scheduler.
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
    """Log numbered lines, with a pause after each line."""
    for number in range(lines):
        current_job.log(f"line {number}")
        time.sleep(seconds)


def tell_until(end: str) -> int:
    """Log numbered lines until the file ``end`` exists, and return their number."""
    for number in itertools.count():
        current_job.log(f"line {number}")
        time.sleep(0.02)
        if Path(end).exists():
            break
    return number + 1


def keep_own_row(journal: str, end: str, how: str) -> None:
    """Keep the row of this job locked until the file ``end`` exists."""
    lock = "SELECT id FROM bgjobs_job WHERE id = {} FOR UPDATE"
    statement = lock if how == "locks" else "INSERT INTO export VALUES ({})"
    with current_app.extensions["sqlalchemy"].engine.begin() as connection:
        connection.execute(sa.text(statement.format(current_job.id)))
        current_job.log("locked")
        record(journal, "locked")
        while not Path(end).exists():
            time.sleep(0.01)


def brief(path: str, name: str) -> None:
    """Record ``name`` and run for two milliseconds."""
    record(path, name)
    time.sleep(0.002)


def hold_first_attempt(path: str) -> int:
    """Run for ten minutes in the first attempt, and return at once in a later one."""
    if current_job.attempt == 1:
        hold(path, 600)
    return current_job.attempt


def hold_gil_first_attempt(path: str, seconds: int) -> int:
    """In the first attempt, hold the GIL for ``seconds``."""
    attempt = current_job.attempt
    record(path, f"start {attempt}")
    while attempt == 1:
        # No other thread may run now: it could begin a transaction that then stays open.
        sys.setswitchinterval(60)
        if _no_thread_writes():
            ctypes.PyDLL(None).sleep(seconds)
            attempt = 0
        sys.setswitchinterval(0.005)
        time.sleep(0.001)
    record(path, f"end {current_job.attempt}")
    return current_job.attempt


def _no_thread_writes() -> bool:
    """Whether no thread of this process is in a transaction, whose locks would block others."""
    stacks = (traceback.walk_stack(frame) for frame in sys._current_frames().values())
    frames = (frame for stack in stacks for frame, _ in stack)
    # The heartbeat does not measure how long its own write takes, so it must not be in `_beat`.
    return not any(frame.f_code.co_name in ("transaction", "_beat") for frame in frames)


def return_unstorable(what: str) -> Any:
    """Return a result that cannot be stored."""
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
    """Raise an exception that is hard to report."""
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
    """Leave an open or failed transaction in the host's session."""
    session = current_app.extensions["sqlalchemy"].session
    row = "INSERT INTO bgjobs_queue (name, created_at) VALUES ('left', CURRENT_TIMESTAMP)"
    session.execute(sa.text(row))
    if how == "broken":
        session.execute(sa.text("SELECT * FROM no_such_table"))
    if how == "swallowed":
        with contextlib.suppress(sa.exc.DBAPIError):
            session.execute(sa.text("SELECT * FROM no_such_table"))


def inspect_session() -> list[Any]:
    """Return process, thread, whether a transaction is open, and the rows that a job left."""
    session = current_app.extensions["sqlalchemy"].session
    is_open = session().in_transaction()
    names = session.execute(sa.text("SELECT name FROM bgjobs_queue WHERE name = 'left'"))
    return [os.getpid(), threading.get_ident(), is_open, list(names.scalars())]


def count_by_session() -> int:
    """The number of jobs that the host's session finds."""
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
            enqueue_limited,
            limited,
            record_tick,
            tick,
            wall_clock,
            enqueue_later,
            hang_scheduler,
            tell_slowly,
            tell_until,
            brief,
            keep_own_row,
            hold_first_attempt,
            hold_gil_first_attempt,
            return_unstorable,
            throw,
            spoil_session,
            inspect_session,
            count_by_session,
            login,
        )
    ),
]
