"""Counts the statements of a process on SQLite, which has no server that could count them.

The apps call it before anything connects; it does nothing unless the environment asks for it.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

VARIABLE = "BENCHMARK_TRACE"
"""The environment variable that holds the file to which each statement appends one byte."""


def count(path: Path) -> int:
    """How many statements there were so far."""
    return path.stat().st_size if path.exists() else 0


def install() -> None:
    """Count from now on, where the environment names a file."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda _: os.write(descriptor, b"."))
        return connection

    # The module is there twice, and each library has its favourite.
    sqlite3.connect = sqlite3.dbapi2.connect = traced  # type: ignore[assignment]
