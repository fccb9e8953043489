"""Processes from outside: their CPU, their memory and their end. Linux only, as /proc is."""

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
    """``pid`` and the living processes below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += family(child)
    return found


def cpu_seconds(pid: int) -> float:
    """CPU that ``pid`` and all below it have used so far, in user and in system mode.

    Children that have ended count as soon as their parent has waited for them.
    """
    return sum(_cpu_ticks(member) for member in family(pid)) / _TICKS


def memory_mib(pid: int) -> float:
    """MiB resident of ``pid`` and all below it; pages that a fork shares count in each."""
    return sum(_resident_pages(member) for member in family(pid)) * _PAGE_MIB


def _cpu_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in parentheses may hold blanks; utime, stime, cutime and cstime are 11 fields on.
    return sum(map(int, stat.rpartition(")")[2].split()[11:15]))


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with ``variables``, from which ``benchmarks`` can be imported."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@contextlib.contextmanager
def interrupts_postponed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM come after the block: what it starts is known then, and is ended."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


class Background:
    """A program that runs while the ``with`` block does, and is gone after it.

    :param log: the file to which its output is appended.
    :param folder: where it runs; by default where ``benchmarks`` lies.
    :param user: as whom it runs; by default as whoever runs this.
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
            # Ctrl-C is answered here, and the program is then ended with all below it.
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
        """Of the process that was started."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.poll() is not None

    def end(self) -> None:
        """Ask it to stop, then kill what is left of it."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self._process.terminate()
            self._process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        """The last lines of its output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]


def script(name: str, *words: str) -> list[str]:
    """A command that a package has installed beside this interpreter."""
    return [str(Path(sys.executable).with_name(name)), *words]
