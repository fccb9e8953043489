"""CPU and memory use of other processes, and background processes. Requires Linux and /proc."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGESIZE") / 2**20
_STOP_SECONDS = 15.0


def family(pid: int) -> list[int]:
    """A process and its living descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += family(child)
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its descendants have used, in user and in system mode.

    A child process that has ended is included once its parent has waited for it.
    """
    return sum(_cpu_ticks(member) for member in family(pid)) / _TICKS


def memory_mib(pid: int) -> float:
    """Resident memory of a process and its descendants. Shared pages count in each process."""
    return sum(_resident_pages(member) for member in family(pid)) * _PAGE_MIB


def _cpu_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in parentheses may contain spaces. The fields utime, stime, cutime and cstime follow.
    return sum(map(int, stat.rpartition(")")[2].split()[11:15]))


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process, plus ``variables`` and a path to import ``benchmarks``."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@contextlib.contextmanager
def interrupts_postponed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block, so that a process started in the block
    is registered and can be stopped."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)


class Background:
    """A program that runs during a ``with`` block.

    :param log: the file to which its output is appended.
    :param folder: its working directory; default: the root of the repository.
    :param user: the user that runs it; default: the current user.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        *,
        folder: Path = ROOT,
        user: str | None = None,
    ) -> None:
        self._log = log
        self._start = functools.partial(
            subprocess.Popen,
            command,
            cwd=folder,
            env=environment_with(variables),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            # So that Ctrl-C reaches only this process, which then stops the program.
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        self._process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        try:
            with self._log.open("a") as output, interrupts_postponed():
                self._process = self._start(stdout=output)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        """Terminate the process, then kill its process group."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self._process.terminate()
            self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_output(self) -> str:
        """The last lines of its output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


def python(*words: str) -> list[str]:
    """A command line for this Python interpreter."""
    return [sys.executable, *words]


def script(name: str, *words: str) -> list[str]:
    """A command line for a script that is installed beside this interpreter."""
    return [str(Path(sys.executable).with_name(name)), *words]
