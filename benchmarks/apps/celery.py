"""Celery on Redis."""

from __future__ import annotations

import os

from celery import Celery

from .. import journal
from ..contender import URL_VARIABLE

app = Celery("benchmarks.apps.celery", broker=os.environ[URL_VARIABLE])
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=128)


@app.task
def record(number: int) -> None:
    """The measured job."""
    journal.record(number)
