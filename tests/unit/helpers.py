"""Helper functions for the unit tests."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from typing import Any

from flask_bgjobs.job import serialize
from flask_bgjobs.job.records import JobSpec


def make_spec(**changes: Any) -> JobSpec:
    """A claimed job with default values; ``parameters`` is serialized as in the database."""
    if "parameters" in changes:
        changes["parameters_json"] = serialize.dumps(changes.pop("parameters"))
    values: dict[str, Any] = {
        "id": 42,
        "target": "shop.jobs.SampleJob",
        "method": None,
        "parameters_json": "[]",
        "queue": "default",
        "priority": 0,
        "attempt": 1,
        "worker_id": 7,
        "retry_count": 0,
        "retries": 3,
        "retry_delay": "[5.0]",
        "backoff": "fixed",
        "max_retry_delay": None,
        "jitter": 0.0,
        "timeout": None,
        "failure_rules": None,
        "suspect": False,
        "crash_count": 0,
        "meta_json": None,
        "run_at": dt.datetime(2026, 1, 1),
        "claimed_at": dt.datetime(2026, 1, 1),
        "started_at": None,
        "deadline_at": None,
        "waiting_since": None,
        "limits_json": None,
    }
    return JobSpec(**{**values, **changes})


def wait_until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    """Return as soon as ``condition`` is true; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition was still false at the deadline"
        time.sleep(0.002)
