"""Dramatiq on Redis with its defaults: a process for each processor, eight threads in each.

Its guide (https://dramatiq.io/guide.html, "Workers") recommends no other settings for small jobs.
Here two processes are used on every machine, as for the other queues. It logs no line per job.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..contender import RedisContender
from ..processes import python


class Dramatiq(RedisContender):
    """Default settings, with two processes."""

    name = "dramatiq"
    title = "Dramatiq, 2 processes of 8 threads"
    needs = ("dramatiq", "redis")

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.dramatiq import record

        for number in numbers:
            record.send(number)

    def worker_command(self) -> list[str]:
        return python("-m", "dramatiq", "benchmarks.apps.dramatiq", "--processes", "2")

    def unsettled_in(self, redis: Any) -> int:
        # Messages stay here until they are acknowledged.
        return int(redis.hlen("dramatiq:default.msgs"))


CONTENDERS = (Dramatiq,)
