"""Jobs that do something to their process: they fork, or leave it changed."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import decimal
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tests.jobs import record


def fork_copy(how: str) -> int:
    """The exit code of a copy of this process in which the job's code ends, one way or another."""
    pid = os.fork()
    if pid == 0:
        end_copy(how)
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def fork_copy_async(how: str) -> int:
    """The same, from a coroutine."""
    await asyncio.sleep(0)
    return fork_copy(how)


def fork_copy_in_thread(how: str) -> int:
    """The same, from a thread that the job starts."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(fork_copy(how)))
    thread.start()
    thread.join()
    return codes[0]


def end_copy(how: str) -> None:
    if how == "exit":
        sys.exit(7)
    if how == "message":
        sys.exit("the copy gives up")
    if how == "raise":
        raise ValueError("raised in the copy")


def map_in_processes(count: int) -> list[int]:
    """What ``multiprocessing`` is for."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, range(-count, 0))


def hold_in_processes(path: str) -> None:
    """Run for ever in two other processes."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(tell_pid_and_sleep, [(path,), (path,)])


def tell_pid_and_sleep(path: str) -> None:
    record(path, f"{os.getpid()}")
    time.sleep(600)


def terminate_copies(count: int) -> list[int]:
    """How copies end that are sent a SIGTERM as soon as they are there."""
    codes = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.kill(pid, signal.SIGTERM)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def fork_sleeper() -> int:
    """The process id of a copy that sleeps, and is left alone."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    return pid


def fork_sleeper_in_c() -> int:
    """The same by the C library, so that Python has closed nothing in the copy."""
    library = ctypes.PyDLL(None)
    pid = int(library.fork())
    if pid == 0:
        library.sleep(600)
        os._exit(0)
    return pid


def run_program(path: str) -> None:
    """Start a program, and wait for its end."""
    program = subprocess.Popen(["sleep", "600"])
    record(path, f"{program.pid}")
    program.wait()


def write_to_worker(data: str) -> None:
    """Send something to the worker that is no message."""
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}").rpartition("/")[2].startswith("socket:"):
            os.write(int(name), bytes.fromhex(data))


tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def look_at_process() -> dict[str, Any]:
    """What another job may have left changed."""
    umask = os.umask(0)
    os.umask(umask)
    handlers = {
        n.name: signal.getsignal(n) for n in (signal.SIGALRM, signal.SIGINT, signal.SIGUSR1)
    }
    return {
        "pid": os.getpid(),
        "thread": threading.get_ident(),
        "tenant": tenant.get(),
        "precision": decimal.getcontext().prec,
        "handlers": {name: str(handler) for name, handler in handlers.items()},
        "timers": [signal.getitimer(t)[0] > 0 for t in (signal.ITIMER_REAL, signal.ITIMER_PROF)],
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "folder": os.getcwd(),
        "umask": umask,
    }


def leave_changes(folder: str) -> int:
    """Change all that, and stop in the middle."""
    change_own_state()
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 600)
    os.chdir(folder)
    os.umask(0o077)
    raise ValueError("before it tidied up")


def change_own_state() -> None:
    """Change what a job in a thread can change without harm to other threads."""
    tenant.set("somebody")
    decimal.getcontext().prec = 5
    signal.setitimer(signal.ITIMER_REAL, 600)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])


async def change_own_state_async() -> None:
    change_own_state()


def set_alarm_and_return() -> None:
    """Leave an alarm that ends the process."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)


NAMES = [
    f"tests.process_jobs.{function.__name__}"
    for function in (
        fork_copy,
        fork_copy_async,
        fork_copy_in_thread,
        map_in_processes,
        hold_in_processes,
        terminate_copies,
        fork_sleeper,
        fork_sleeper_in_c,
        run_program,
        write_to_worker,
        look_at_process,
        leave_changes,
        change_own_state,
        change_own_state_async,
        set_alarm_and_return,
    )
]
