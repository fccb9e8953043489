"""Celery on Redis.

Its guide to optimizing (https://docs.celeryq.dev/en/stable/userguide/optimizing.html, "Prefetch
Limits") recommends a prefetch multiplier such as 128 for many short tasks, and its tips
(.../userguide/tasks.html, "Ignore results you don't want") to keep no results. Its pool has two
workers: by default it has one for each processor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from ..contender import RedisContender
from ..processes import python

_COMMAND = ("-m", "celery", "-A", "benchmarks.apps.celery", "worker")


class Celery(RedisContender):
    """Two jobs at once, in the pool named by ``pool``."""

    needs = ("celery", "redis")
    jobs = 3_000
    pool: ClassVar[str]

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.celery import record

        for number in numbers:
            record.delay(number)

    def worker_command(self) -> list[str]:
        return python(*_COMMAND, "--loglevel", "WARNING", "--pool", self.pool, "--concurrency", "2")

    def unsettled_in(self, redis: Any) -> int:
        return int(redis.llen("celery") + redis.hlen("unacked"))


class CeleryProcesses(Celery):
    name = "celery"
    title = "Celery, 2 processes"
    pool = "prefork"


class CeleryThreads(Celery):
    name = "celery-threads"
    title = "Celery, 2 threads"
    pool = "threads"


CONTENDERS = (CeleryProcesses, CeleryThreads)
