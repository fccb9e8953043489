"""What only flask-bgjobs is measured by, in a process of its own.

``python -m benchmarks.ours template KIND`` enqueues the job that a backlog is copied from;
``python -m benchmarks.ours claims`` prints milliseconds per claim.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from flask_bgjobs.app_state import state_of
from flask_bgjobs.worker import register

from .apps.bgjobs import create_app, record

BACKLOGS: dict[str, dict[str, Any]] = {
    "scheduled": {"delay": 30 * 86_400},
    "low": {"priority": -10},
    "completed": {},
    "paused": {"queue": "parked"},
}
"""The options of a job in each kind of backlog; all others are of priority 0 and due at once."""
TEMPLATE_NUMBER = -1
_CLAIMS, _AT_ONCE = 20, 100
CLAIMED_JOBS = _CLAIMS * _AT_ONCE
"""How many must be there to be claimed."""


def main() -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["template", kind]:
            with create_app().app_context():
                record.using(**BACKLOGS[kind]).enqueue(TEMPLATE_NUMBER)
        case ["claims"]:
            print(_claim_ms())


def _claim_ms() -> float:
    """Milliseconds to claim a hundred jobs and commit, the median of twenty, by a new worker."""
    app = create_app()
    state = state_of(app)
    worker_id = register(state, "benchmark")
    took = []
    for _ in range(_CLAIMS):
        began = time.perf_counter()
        claimed = state.store.claim(worker_id, _AT_ONCE)
        took.append(time.perf_counter() - began)
        assert len(claimed) == _AT_ONCE, f"only {len(claimed)} jobs were there to claim"
    return statistics.median(took) * 1_000


if __name__ == "__main__":
    main()
