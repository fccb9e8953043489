"""RQ on Redis: its jobs are plain functions."""

from __future__ import annotations

from .. import journal


def record(number: int) -> None:
    """The measured job."""
    journal.record(number)
