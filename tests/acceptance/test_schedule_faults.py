"""Recurring jobs while workers are killed, databases restart and clocks jump."""

from __future__ import annotations

import collections
import datetime as dt
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_bgjobs.flow.schedules.manage import find
from flask_bgjobs.flow.schedules.timing import read_every
from flask_bgjobs.models import ScheduleTick
from flask_bgjobs.state import AppState
from tests.acceptance.conftest import WallClock
from tests.acceptance.helpers import lines
from tests.acceptance.test_outages import SERVERS
from tests.conftest import DEADLINE_SECONDS, wait_until
from tests.servers import Server

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

SECONDS = float(os.environ.get("BGJOBS_TEST_SCHEDULE_SECONDS", "12"))
"""How long workers are killed; longer for a thorough run by hand."""
KILL_EVERY_SECONDS = 1.5
WORKERS = 4
HOUR = 3_600
SECOND = dt.timedelta(seconds=1)
LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.2, "BGJOBS_MAX_CRASHES": 1_000}


@pytest.fixture(params=["sqlite", *SERVERS])
def server(request: pytest.FixtureRequest) -> Iterator[Server | None]:
    """A server that the test may restart; ``None`` for SQLite."""
    if request.param == "sqlite":
        yield None
        return
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def database_url(server: Server | None, tmp_path: Path) -> str:
    """The URL of a new database."""
    if server is None:
        return f"sqlite:///{tmp_path / 'test.db'}"
    return str(server.url(server.create_database()))


def schedule(journal: Path, **options: Any) -> dict[str, Any]:
    """A recurring job that records its tick in ``journal``."""
    return {"job": "tests.jobs.record_tick", "parameters": [str(journal)], **options}


def ticks_of(state: AppState, name: str) -> list[ScheduleTick]:
    """All ticks of a schedule, oldest first."""
    _, (row,) = state.store.schedules(name)
    return state.store.last_ticks([row.id], 100_000)[row.id][::-1]


def recorded(journal: Path) -> dict[str, dict[dt.datetime, set[str]]]:
    """The ids of the jobs that ran, by schedule and tick."""
    found: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(set))
    for line in lines(journal):
        name, tick, job_id = line.split()
        found[name][dt.datetime.fromisoformat(tick)].add(job_id)
    return found


def test_each_tick_has_one_job(
    state: AppState, start_worker: Start, server: Server | None, journal: Path
) -> None:
    """While workers are killed and the server restarts, each tick has exactly one job, which runs,
    and no tick is left out."""
    every = {"missed": "all", "overlap": "allow"}
    config = {
        **LEASE,
        "BGJOBS_SCHEDULE": {
            "second": schedule(journal, every=1, **every),
            "two": schedule(journal, every=2, **every),
            "cron": schedule(journal, cron="*/3 * * * * *", **every),
            "minute": schedule(journal, cron="* * * * *", **every),
        },
    }
    rng = random.Random(7)
    workers = [start_worker("-c", "2", **config) for _ in range(WORKERS)]
    restarts = [SECONDS / 3, SECONDS * 2 / 3] if server is not None else []
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < SECONDS:
        time.sleep(KILL_EVERY_SECONDS * rng.random() * 2)
        victim = workers.pop(rng.randrange(WORKERS))
        victim.send_signal(signal.SIGKILL)
        workers.append(start_worker("-c", "2", **config))
        if restarts and passed > restarts[0]:
            assert server is not None
            server.restart("immediate" if len(restarts) == 1 else "fast")
            del restarts[0]
    names = list(config["BGJOBS_SCHEDULE"])
    for name in names:
        # So that all jobs can finish.
        find(state, name).pause()
    due = {name: ticks_of(state, name) for name in names}
    jobs = {tick.job_id for ticks in due.values() for tick in ticks}
    wait_until(
        lambda: (
            {int(j) for ids in recorded(journal).values() for e in ids.values() for j in e} == jobs
        ),
        "the runs of all jobs",
        2 * DEADLINE_SECONDS,
    )
    runs = recorded(journal)
    for name, seconds in (("second", 1), ("two", 2), ("cron", 3), ("minute", 60)):
        times = [tick.tick_at for tick in due[name]]
        assert {tick.outcome for tick in due[name]} <= {"fired"}
        assert all(len(ids) == 1 for ids in runs[name].values()), runs[name]
        assert sorted(runs[name]) == times
        gaps = {after - before for before, after in itertools.pairwise(times)}
        assert gaps <= {dt.timedelta(seconds=seconds)}, gaps
    assert len(due["second"]) >= SECONDS - 2


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
class TestClocks:
    """On SQLite the clock of the machine decides, so that a test can change it."""

    def test_jump_ahead(
        self, state: AppState, clock: WallClock, start_with: Start, journal: Path
    ) -> None:
        """After a jump ahead by an hour, missed ticks have one job, and the next ticks follow."""
        start_with(clock, BGJOBS_SCHEDULE={"s": schedule(journal, every=1)})
        wait_until(lambda: len(lines(journal)) >= 2, "two ticks")
        clock.jump_to(HOUR)
        wait_until(lambda: any(tick.missed >= 99 for tick in ticks_of(state, "s")), "the jump")
        before = len(lines(journal))
        wait_until(lambda: len(lines(journal)) >= before + 2, "two more ticks")
        assert len(lines(journal)) < 60
        assert all(len(ids) == 1 for ids in recorded(journal)["s"].values())

    def test_jump_back(
        self, state: AppState, clock: WallClock, start_with: Start, journal: Path
    ) -> None:
        """After a jump back by an hour, intervals go on at once, and a daily job does not come
        again."""
        ahead = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=30)
        daily = f"{ahead.second} {ahead.minute} {ahead.hour} * * *"
        config = {
            "s": schedule(journal, every=1),
            "cron": schedule(journal, cron="* * * * * *"),
            "daily": schedule(journal, cron=daily),
        }
        start_with(clock, BGJOBS_SCHEDULE=config)
        clock.jump_to(HOUR)
        wait_until(lambda: len(recorded(journal)["daily"]) == 1, "the daily job")
        clock.jump_to(0)
        now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
        for name in ("s", "cron"):
            wait_until(
                lambda n=name: sum(t < now + 60 * SECOND for t in recorded(journal)[n]) >= 2,
                f"two ticks of {name}",
            )
        assert len(recorded(journal)["daily"]) == 1
        _, (row,) = state.store.schedules("daily")
        assert row.next_tick_at > now + dt.timedelta(hours=24)

    def test_stopped_for_two_hours(
        self, state: AppState, clock: WallClock, start_with: Start, journal: Path
    ) -> None:
        """After a worker was stopped for two hours, each policy does what it says."""
        policies = {
            "once": {},
            "skip": {"missed": "skip"},
            "all": {"missed": "all"},
            "grace": {"missed": "all", "grace": 30 * 60},
        }
        ten_minutes = 600
        # Half an interval away from a tick, so that exactly twelve ticks pass in two hours.
        timing = read_every(ten_minutes)
        moment = dt.datetime.now(dt.UTC)
        offset = (timing.next_after(moment) - moment).total_seconds() - ten_minutes / 2
        clock.jump_to(offset)
        config = {
            name: schedule(journal, every=ten_minutes, overlap="allow", **options)
            for name, options in policies.items()
        }
        worker = start_with(clock, BGJOBS_SCHEDULE=config)
        worker.send_signal(signal.SIGSTOP)
        clock.jump_to(offset + 2 * HOUR)
        worker.send_signal(signal.SIGCONT)
        expected = {"once": 1, "skip": 0, "all": 12, "grace": 3}
        wait_until(
            lambda: all(ticks_of(state, name) for name in policies), "the ticks of all schedules"
        )
        wait_until(lambda: len(lines(journal)) == sum(expected.values()), "the runs")
        assert {name: len(recorded(journal)[name]) for name in policies} == expected
        (once,), (skipped,) = ticks_of(state, "once"), ticks_of(state, "skip")
        assert (once.outcome, once.missed) == ("fired", 11)
        assert (skipped.outcome, skipped.missed) == ("skipped", 11)
        late, *_ = ticks_of(state, "grace")
        assert (late.outcome, late.missed, late.reason) == (
            "skipped",
            8,
            "more than 1800 s late",
        )
