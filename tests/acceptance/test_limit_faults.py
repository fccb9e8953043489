"""Limits while workers and children are killed, and people change what they can."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flask_bgjobs import Job, Limit
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_all
from flask_bgjobs.flow.limits.keeper import admit_all
from flask_bgjobs.flow.limits.manage import Limits
from flask_bgjobs.job.limits import LimitUse, uses_from_json
from flask_bgjobs.job.statuses import FINAL
from flask_bgjobs.models import Notice, Seat
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState
from tests.acceptance.helpers import descendants, lines
from tests.conftest import wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

JOBS = int(os.environ.get("BGJOBS_TEST_LIMIT_JOBS", "500"))
"""Number of jobs; more for a thorough run by hand."""
WORKERS = 3
KILL_EVERY_SECONDS = 1.5
LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.2, "BGJOBS_MAX_CRASHES": 1_000}
MOST_SECONDS = 120 + JOBS / 20
QUEUES = ("a", "b")
LIMITS = [
    Limit("one", concurrency=1, key="{key}"),
    Limit("three", concurrency=3, key="{key}"),
    Limit("fifty", concurrency=50, key="{key}"),
]
RATES = [
    Limit("even", rate=20, per=1),
    Limit("slow", rate=8, per=2),
    Limit("burst", rate=30, per=1, burst=30),
    Limit("some", rate=20, per=2, burst=5),
    Limit("each", rate=6, per=1, burst=3, key="{key}"),
]
LATE_NOTE_SECONDS = 0.05
"""How much later than its start a job on a busy machine may write the time into the journal."""
ALL = Limit("all", concurrency=8)
SHARE_WITH_RATE, SHARE_WITH_ALL = 4, 2
"""One of so many groups of jobs has a rate as well, or a limit that they share."""


def enqueue_jobs(state: AppState, journal: Path, chance: random.Random) -> list[int]:
    """Enqueue the jobs in groups with different limits.

    :returns: their ids.
    """
    ids: list[int] = []
    size = max(1, JOBS // 30)
    while len(ids) < JOBS:
        limits = [chance.choice(LIMITS)]
        if chance.randrange(SHARE_WITH_RATE) == 0:
            limits.append(chance.choice(RATES))
        if chance.randrange(SHARE_WITH_ALL) == 0:
            limits.append(ALL)
        options = JobOptions(
            limits=limits,
            queue=chance.choice(QUEUES),
            priority=chance.choice([0, 0, 5]),
            retries=2,
            retry_delay=0.05,
        )
        sets = [
            {"path": str(journal), "key": f"k{chance.randrange(4)}", "number": n}
            for n in range(size)
        ]
        ids += [job.id for job in enqueue_all(state, "tests.jobs.limited", None, sets, options)]
    return ids


class People:
    """People who cancel jobs, pause queues, limits and keys, and override limits."""

    def __init__(self, state: AppState, ids: Sequence[int], chance: random.Random) -> None:
        self._state = state
        self._ids = ids
        self._chance = chance
        self._ends = threading.Event()
        self.acts: collections.Counter[str] = collections.Counter()
        self.errors: list[BaseException] = []

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Act in a thread during this block, and undo what would hold jobs back at its end."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()
        self._undo()
        assert self.errors == []

    @property
    def have_more_to_do(self) -> bool:
        """Whether some of the acts have not been done yet."""
        return not self.errors and len(self.acts) < len(self._possible)

    @property
    def _possible(self) -> list[Callable[[], None]]:
        return [self._cancel, self._queue, self._limit, self._key]

    def _run(self) -> None:
        try:
            with self._state.app.app_context():
                while not self._ends.wait(0.1):
                    act = self._chance.choice(self._possible)
                    act()
                    self.acts[act.__name__] += 1
        except BaseException as error:
            self.errors.append(error)

    def _cancel(self) -> None:
        self._state.store.cancel([self._chance.choice(self._ids)])

    def _queue(self) -> None:
        act = self._chance.choice([self._state.store.pause, self._state.store.resume])
        act(self._chance.choice(QUEUES))

    def _limit(self) -> None:
        limit = Limits(self._state)["three"]
        self._chance.choice([lambda: limit.override(concurrency=1), limit.reset])()

    def _key(self) -> None:
        limit = Limits(self._state)[self._chance.choice(["one", "fifty"])]
        self._chance.choice([limit.pause, limit.resume])(f"k{self._chance.randrange(4)}")

    def _undo(self) -> None:
        for queue in QUEUES:
            self._state.store.resume(queue)
        for name in ("one", "fifty"):
            for key in range(4):
                Limits(self._state)[name].resume(f"k{key}")
        Limits(self._state)["three"].reset()


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_limits_hold(state: AppState, start_worker: Start, journal: Path, pool: str) -> None:
    """While workers and children are killed, jobs retry, snooze and are cancelled, and limits are
    paused and overridden, no limit is exceeded at any moment; all jobs end, and no seat is left."""
    chance = random.Random(11)
    state.store.define_limits({str(limit.name): limit.rule for limit in [*LIMITS, *RATES, ALL]})
    ids = enqueue_jobs(state, journal, chance)
    options = ("--pool", pool, "-c", "4")
    people = People(state, ids, random.Random(12))
    ends = time.monotonic() + MOST_SECONDS
    half = JOBS // 2
    with people.acting():
        # Started one after another: on a fast machine, the first ends half of the jobs meanwhile.
        workers = [start_worker(*options, **LEASE) for _ in range(WORKERS)]
        killed_at = time.monotonic()
        while people.have_more_to_do or (unfinished(state) > half and time.monotonic() < ends):
            time.sleep(0.2)
            if time.monotonic() - killed_at > KILL_EVERY_SECONDS:
                killed_at = time.monotonic()
                kill_one(workers, chance, pool)
                workers.append(start_worker(*options, **LEASE))
    wait_until(lambda: not unfinished(state), "the end of all jobs", MOST_SECONDS)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    for worker in workers:
        worker.wait(timeout=60)
    admit_all(state.store)
    assert left(state, Seat) == left(state, Notice) == 0
    check_journal(state, journal)


def kill_one(workers: list[Any], chance: random.Random, pool: str) -> None:
    """Kill a worker, or one of its children."""
    victim = workers.pop(chance.randrange(len(workers)))
    children = descendants(victim.pid) if pool == "process" else []
    if children and chance.random() < 0.5:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(children), signal.SIGKILL)
        victim.send_signal(signal.SIGTERM)
    else:
        victim.send_signal(signal.SIGKILL)


def unfinished(state: AppState) -> int:
    final = [status.value for status in FINAL]
    with state.store.read() as connection:
        count = sa.select(sa.func.count()).select_from(Job).where(Job.status.not_in(final))
        return connection.scalar(count) or 0


def left(state: AppState, model: Any) -> int:
    with state.store.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(model)) or 0


def check_journal(state: AppState, journal: Path) -> None:
    """Check each limit against the starts and ends that the jobs have recorded."""
    with state.store.read() as connection:
        rows = connection.execute(sa.select(Job.id, Job.__table__.c.limits))
        limits = {row.id: uses_from_json(row.limits) for row in rows}
    starts: dict[tuple[int, int], float] = {}
    ends: dict[tuple[int, int], float] = {}
    for line in lines(journal):
        event, job_id, attempt, at = line.split()
        (starts if event == "start" else ends)[int(job_id), int(attempt)] = float(at)
    assert len(starts) > JOBS / 3
    runs: Mapping[LimitUse, list[tuple[float, float]]] = collections.defaultdict(list)
    for run, start in starts.items():
        for use in limits[run[0]]:
            # Of a run that was killed, the end is not known.
            runs[use].append((start, ends.get(run, start)))
    for use, intervals in runs.items():
        intervals.sort()
        if use.rule.concurrency is not None:
            assert most_at_once(intervals) <= use.rule.concurrency, use
        if use.rule.rate is not None and use.rule.per_seconds is not None:
            times = [start for start, _ in intervals]
            pairs = zip(times, times[use.rule.rate :], strict=False)
            shortest = min((later - first for first, later in pairs), default=float("inf"))
            assert shortest >= use.rule.per_seconds - LATE_NOTE_SECONDS, (use, shortest)


def most_at_once(intervals: Sequence[tuple[float, float]]) -> int:
    """The largest number of intervals that overlap."""
    # Of an end and a start at the same time, the end comes first.
    events = sorted([(end, -1) for _, end in intervals] + [(start, 1) for start, _ in intervals])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most
