"""Jobs that fork, or that leave their process changed."""

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
    """Fork; in the copy, end the job's code as ``how`` says. Returns the copy's exit code."""
    pid = os.fork()
    if pid == 0:
        end_copy(how)
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def fork_copy_async(how: str) -> int:
    """Like :func:`fork_copy`, in a coroutine."""
    await asyncio.sleep(0)
    return fork_copy(how)


def fork_copy_in_thread(how: str) -> int:
    """Like :func:`fork_copy`, in a thread that the job starts."""
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
    """Compute something in two ``multiprocessing`` processes."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, range(-count, 0))


def hold_in_processes(path: str) -> None:
    """Run for ten minutes in two other processes."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(record_pid_and_sleep, [(path,), (path,)])


def record_pid_and_sleep(path: str) -> None:
    record(path, f"{os.getpid()}")
    time.sleep(600)


def terminate_copies(count: int) -> list[int]:
    """Send SIGTERM to each new copy at once; returns the exit codes of the copies."""
    codes = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.kill(pid, signal.SIGTERM)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def fork_sleeper() -> int:
    """Fork a copy that sleeps, and leave it running; returns its process id."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    return pid


def fork_sleeper_in_c() -> int:
    """Like :func:`fork_sleeper`, by the C library: Python's fork hooks do not run in the copy."""
    library = ctypes.PyDLL(None)
    pid = int(library.fork())
    if pid == 0:
        library.sleep(600)
        os._exit(0)
    return pid


def run_program(path: str) -> None:
    """Start a program that runs for ten minutes, record its process id, and wait."""
    program = subprocess.Popen(["sleep", "600"])
    record(path, f"{program.pid}")
    program.wait()


def write_to_worker(data: str) -> None:
    """Write raw bytes, given in hexadecimal, to the worker's socket."""
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}").rpartition("/")[2].startswith("socket:"):
            os.write(int(name), bytes.fromhex(data))


tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="no tenant")


def inspect_process() -> dict[str, Any]:
    """Return the state of the process that an earlier job may have changed."""
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


def change_process_and_raise(folder: str) -> int:
    """Change the state that :func:`inspect_process` returns, then raise without a cleanup."""
    change_own_state()
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 600)
    os.chdir(folder)
    os.umask(0o077)
    raise ValueError("failed before the cleanup")


def change_own_state() -> None:
    """Change only the state that a job in a thread can change without affecting other threads."""
    tenant.set("acme")
    decimal.getcontext().prec = 5
    signal.setitimer(signal.ITIMER_REAL, 600)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])


async def change_own_state_async() -> None:
    change_own_state()


def set_alarm_and_return() -> None:
    """Set an alarm whose default action ends the process, and return."""
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
        inspect_process,
        change_process_and_raise,
        change_own_state,
        change_own_state_async,
        set_alarm_and_return,
    )
]
