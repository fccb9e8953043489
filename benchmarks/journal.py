"""The journal: a file outside the database to which each job appends its number and the time."""

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
    """Append ``number`` and the monotonic time to the journal of this process's environment.

    It is the whole work of every job that is measured.
    """
    os.write(_descriptor(), _ENTRY.pack(number, time.monotonic_ns()))


@functools.cache
def _descriptor() -> int:
    return os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def count(path: Path) -> int:
    """How many entries there are, without reading them."""
    return path.stat().st_size // _ENTRY.size if path.exists() else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Journal:
    """What jobs have recorded."""

    entries: tuple[tuple[int, int], ...]
    """Number and nanoseconds of the monotonic clock, which all processes share, as written."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The journal in a file, empty where there is none."""
        return cls.parse(path.read_bytes() if path.exists() else b"")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The journal in the content of a file; half an entry at its end is left out."""
        whole = len(data) // _ENTRY.size * _ENTRY.size
        return cls(tuple(_ENTRY.iter_unpack(data[:whole])))

    def without(self, number: int) -> Self:
        """The same without the entries of ``number``."""
        return type(self)(tuple(entry for entry in self.entries if entry[0] != number))

    def times(self) -> dict[int, int]:
        """When each number was recorded, in nanoseconds."""
        return dict(self.entries)

    def per_second(self) -> float:
        """Jobs per second from the first to the last, so that the start of a worker is left out."""
        moments = [nanoseconds for _, nanoseconds in self.entries]
        return (len(moments) - 1) / ((max(moments) - min(moments)) / 1e9)

    def problem(self, numbers: range) -> str | None:
        """Why this is not exactly one run of each of ``numbers``; ``None``: it is."""
        runs = collections.Counter(number for number, _ in self.entries)
        missing = [number for number in numbers if number not in runs]
        if missing:
            return f"{len(missing):,} jobs did not run, the first is {missing[0]}"
        doubled = [number for number in numbers if runs[number] > 1]
        if doubled:
            return f"{len(doubled):,} jobs ran more than once, the first is {doubled[0]}"
        if strangers := runs.keys() - set(numbers):
            return f"{len(strangers):,} jobs ran that nobody enqueued, one is {min(strangers)}"
        return None
