"""The commands ``flask bgjobs …``: each parses its options, calls one function and prints."""

from . import database, jobs, limits, operate, schedules, weights, worker
from .group import bgjobs_commands

__all__ = [
    "bgjobs_commands",
    "database",
    "jobs",
    "limits",
    "operate",
    "schedules",
    "weights",
    "worker",
]
