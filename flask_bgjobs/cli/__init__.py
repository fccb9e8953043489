"""``flask bgjobs …``: each command parses, calls one function and prints."""

from . import database, jobs, operate, worker
from .group import bgjobs_commands

__all__ = ["bgjobs_commands", "database", "jobs", "operate", "worker"]
