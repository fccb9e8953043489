"""What a pool says of jobs that do not end, and of child processes that do not start."""

from __future__ import annotations

from typing import NamedTuple

from ...job.records import JobSpec
from ..interrupt import Interruption


class Overdue(NamedTuple):
    """A job that holds a thread or a child process for longer than it should."""

    spec: JobSpec
    seconds: float
    """Since it was asked to stop, its process was killed, or its code ended."""
    interruption: Interruption | None
    """What was raised in its code; ``None``: its code has ended, and a teardown has not."""
    position: str
    """What its thread executes, or which process does not end."""


class Failing(NamedTuple):
    """No child process is left, and none could start."""

    seconds: float
    """From the first failed start to the last one."""
    is_hopeless: bool
    """Whether several starts have failed in a row; a single one may have been killed by chance."""
    reason: str
    """Why the last one could not."""
