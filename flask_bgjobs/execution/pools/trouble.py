"""Reports of a pool about jobs that do not end, and child processes that do not start."""

from __future__ import annotations

from typing import NamedTuple

from ...job.records import JobSpec
from ..interrupt import Interruption


class Overdue(NamedTuple):
    """A job that still holds a thread or child process although it should have ended."""

    spec: JobSpec
    seconds: float
    """Seconds since it was asked to stop, its process was killed, or its code ended."""
    interruption: Interruption | None
    """The exception raised in its code; ``None``: its code has ended, but a teardown runs."""
    position: str
    """The code that its thread executes, or the process that does not end."""


class Failing(NamedTuple):
    """The state of a process pool that has no child process, because none could start."""

    seconds: float
    """Seconds from the first failed start to the last one."""
    is_hopeless: bool
    """Whether several starts in a row have failed; one child may have been killed by chance."""
    reason: str
    """Why the last start failed."""
