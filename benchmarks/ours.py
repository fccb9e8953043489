"""Measurements of flask-bgjobs alone, run in a separate process.

``python -m benchmarks.ours template KIND`` enqueues the job that is copied to make a backlog;
``… limited NAME NUMBER`` enqueues jobs with a limit; ``… claims`` prints milliseconds per claim,
and ``… pages`` the milliseconds for each page of the dashboard.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from http import HTTPStatus
from typing import Any

from flask_bgjobs import Limit
from flask_bgjobs.state import state_of
from flask_bgjobs.worker.registration import register

from .apps.bgjobs import FULL, FULL_LIMIT, bgjobs, create_app, record

BACKLOGS: dict[str, dict[str, Any]] = {
    "scheduled": {"delay": 30 * 86_400},
    "low": {"priority": -10},
    "completed": {},
    "paused": {"queue": "parked"},
}
"""Options of the jobs in each kind of backlog. Measured jobs have priority 0 and no delay."""
TEMPLATE_NUMBER = -1
LIMITS: dict[str, Limit | None] = {
    "no_limit": None,
    "one_key": Limit("ten", concurrency=10),
    "many_keys": Limit("one", concurrency=1, key=lambda number: str(number % 10_000)),
}
"""The limits of the measured jobs, by name."""
_PER_CALL = 1_000
"""Jobs with limits that are enqueued at once."""
_CLAIMS, _AT_ONCE = 20, 100
PAGES = {
    "overview": "/",
    "jobs": "/list",
    "failed jobs": "/list?status=failed",
    "two statuses": "/list?status=failed&status=retrying",
    "a queue": "/list?queue=mail",
    "words": "/list?q=benchmark",
    "words that nothing has": "/list?q=nothing",
    "finished last": "/list?sort=-finished",
    "of a time": "/list?since=2026-01-01&until=2026-01-02",
    "a deep page": "/list?after=NTAwMDAw",
    "one job": "/job/1000",
    "errors": "/errors?period=7d",
    "queues": "/queues",
    "workers": "/workers?ended=1",
}
"""The measured pages of the dashboard."""
_REQUESTS = 7
CLAIMED_JOBS = _CLAIMS * _AT_ONCE
"""Number of pending jobs that the measurement needs."""


def main() -> None:
    """Perform the act given on the command line."""
    match sys.argv[1:]:
        case ["template", kind]:
            with create_app().app_context():
                record.using(**BACKLOGS[kind]).enqueue(TEMPLATE_NUMBER)
        case ["limited", name, number]:
            _enqueue_limited(name, int(number))
        case ["claims"]:
            print(_claim_ms())
        case ["pages"]:
            print(json.dumps({name: _page_ms(path) for name, path in PAGES.items()}))


def _enqueue_limited(name: str, number: int) -> None:
    with create_app().app_context():
        limit = Limit(FULL, **FULL_LIMIT) if name == FULL else LIMITS[name]
        limited = record if limit is None else record.using(limits=limit)
        if name == FULL:
            bgjobs.limits[FULL].pause()
        for first in range(0, number, _PER_CALL):
            numbers = range(first, min(first + _PER_CALL, number))
            bgjobs.enqueue_many(limited, [(n,) for n in numbers])


def _claim_ms() -> float:
    """Milliseconds to claim a hundred jobs and commit, in a new worker; the median of twenty."""
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


def _page_ms(path: str) -> float:
    """Milliseconds to serve a page; the median of several requests."""
    client = create_app().test_client()
    took = []
    for _ in range(_REQUESTS):
        began = time.perf_counter()
        answer = client.get(f"/jobs{path}")
        took.append(time.perf_counter() - began)
        assert answer.status_code == HTTPStatus.OK, f"{path} was answered with {answer.status}"
    return statistics.median(took) * 1_000


if __name__ == "__main__":
    main()
