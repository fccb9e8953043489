"""RQ on Redis.

By default it starts a process for each job. For jobs of a few milliseconds, its notes on
performance (https://python-rq.org/docs/benchmark/) allow ``SimpleWorker``, which runs jobs in its
own process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ..contender import RedisContender, chunks
from ..processes import script

_AT_ONCE = 1_000
"""Jobs per call of ``enqueue_many``, which is one pipeline."""


class Rq(RedisContender):
    """One worker of the class named by ``worker_class``."""

    needs = ("rq", "redis")
    has_bulk = True
    worker_class: ClassVar[str]

    def enqueue_one_by_one(self, numbers: Iterable[int]) -> None:
        from ..apps.rq import record

        for number in numbers:
            self._queue.enqueue(record, number)

    def enqueue_in_bulk(self, numbers: Sequence[int]) -> None:
        from ..apps.rq import record

        for chunk in chunks(numbers, _AT_ONCE):
            self._queue.enqueue_many(
                [self._queue.prepare_data(record, (number,)) for number in chunk]
            )

    def worker_command(self) -> list[str]:
        options = ("--quiet", "--url", self.url, "--worker-class", self.worker_class)
        return script("rq", "worker", *options)

    def unsettled_in(self, redis: Any) -> int:
        waiting, started = redis.llen("rq:queue:default"), redis.zcard("rq:wip:default")
        return int(waiting + started)

    @functools.cached_property
    def _queue(self) -> Any:
        from redis import Redis
        from rq import Queue

        return Queue(connection=Redis.from_url(self.url))


class RqSimple(Rq):
    name = "rq-simple"
    title = "RQ, SimpleWorker"
    worker_class = "rq.worker.SimpleWorker"
    jobs = 1_000


class RqForking(Rq):
    name = "rq"
    title = "RQ, a process per job"
    worker_class = "rq.worker.Worker"
    jobs = 200


CONTENDERS = (RqSimple, RqForking)
