"""Jobs that the tests run, by name in this process and in real workers."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

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


def stuck_in_c(path: str) -> None:
    """Hold the interpreter in a call that takes hours and never looks up."""
    record(path, f"stuck {current_job.id} {os.getpid()}")
    re.match(r"(a+)+$", "a" * 60 + "b")


def with_subprocess(path: str) -> None:
    """Start a program that goes on by itself, and wait for ever."""
    program = subprocess.Popen(["sleep", "600"])
    record(path, f"{program.pid}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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


def tell_and_hold(path: str) -> None:
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
            ask_cancelled,
            async_hold,
            in_a_thread,
            async_echo,
            report,
            system_exit,
            crash_worker,
            crash_once,
            exit_quietly,
            ignore_term,
            stuck_in_c,
            with_subprocess,
            too_much_memory,
            grow,
            process_id,
            tell_and_hold,
            swallow,
            enqueue_another,
            login,
        )
    ),
]
