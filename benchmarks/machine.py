"""The machine and the package versions of a run."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = (
    "flask-bgjobs",
    "Flask",
    "SQLAlchemy",
    "psycopg",
    "PyMySQL",
    "huey",
    "procrastinate",
    "pgqueuer",
    "rq",
    "dramatiq",
    "celery",
    "redis",
)


def describe() -> dict[str, str]:
    """Date, processors, memory, operating system and Python version."""
    return {
        "date": dt.date.today().isoformat(),
        "processors": f"{os.cpu_count()} x {_processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "load average before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def package_versions() -> dict[str, str]:
    """The versions of the measured packages that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
