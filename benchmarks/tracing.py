"""Counts the SQL statements of a process on SQLite, which has no server that could count them.

The apps call :func:`install` before the first connection. It has no effect unless the environment
names a file.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

VARIABLE = "BENCHMARK_TRACE"
"""The environment variable that holds the file to which each statement appends one byte."""


def count(path: Path) -> int:
    """The number of statements so far."""
    return path.stat().st_size if path.exists() else 0


def install() -> None:
    """Start to count, if the environment names a file."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda _: os.write(descriptor, b"."))
        return connection

    # Both names are patched, because libraries import `connect` from either module.
    sqlite3.connect = sqlite3.dbapi2.connect = traced  # type: ignore[assignment]
