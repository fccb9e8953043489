"""The journal: a file outside the database, to which each job appends its number and the time."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import struct
import time
from pathlib import Path
from typing import Self

VARIABLE = "BENCHMARK_JOURNAL"
"""The environment variable that holds the journal's path."""
_ENTRY = struct.Struct("=qq")


def record(number: int) -> None:
    """Append ``number`` and the monotonic time to the journal that the environment names.

    A measured job does nothing else.
    """
    os.write(_descriptor(), _ENTRY.pack(number, time.monotonic_ns()))


@functools.cache
def _descriptor() -> int:
    return os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def count(path: Path) -> int:
    """The number of entries, by the size of the file."""
    return path.stat().st_size // _ENTRY.size if path.exists() else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Journal:
    """The entries recorded by jobs."""

    entries: tuple[tuple[int, int], ...]
    """Number of the job and time in nanoseconds, in the order of writing. The time is from the
    monotonic clock, which all processes share."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The journal in a file; empty if the file does not exist."""
        return cls.parse(path.read_bytes() if path.exists() else b"")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The journal in the content of a file. An incomplete entry at the end is ignored."""
        whole = len(data) // _ENTRY.size * _ENTRY.size
        return cls(tuple(_ENTRY.iter_unpack(data[:whole])))

    def without(self, number: int) -> Self:
        """A copy without the entries of ``number``."""
        return type(self)(tuple(entry for entry in self.entries if entry[0] != number))

    def times(self) -> dict[int, int]:
        """The time of each number, in nanoseconds."""
        return dict(self.entries)

    def per_second(self) -> float:
        """Jobs per second from the first to the last entry, without the start of the worker."""
        moments = [nanoseconds for _, nanoseconds in self.entries]
        return (len(moments) - 1) / ((max(moments) - min(moments)) / 1e9)

    def problem(self, numbers: range) -> str | None:
        """A description of missing, repeated or unknown jobs; ``None`` if each of ``numbers`` ran
        exactly once."""
        runs = collections.Counter(number for number, _ in self.entries)
        missing = [number for number in numbers if number not in runs]
        if missing:
            return f"{len(missing):,} jobs did not run, the first is {missing[0]}"
        doubled = [number for number in numbers if runs[number] > 1]
        if doubled:
            return f"{len(doubled):,} jobs ran more than once, the first is {doubled[0]}"
        if unknown := runs.keys() - set(numbers):
            return f"{len(unknown):,} jobs ran that were not enqueued, the first is {min(unknown)}"
        return None
