"""Leases: kept while a worker lives, lost when it is silent, and what becomes of the jobs."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from sqlalchemy.exc import OperationalError

from flask_bgjobs import Job
from flask_bgjobs.state import AppState
from flask_bgjobs.worker import rescue
from flask_bgjobs.worker.rescue import Sweeper
from flask_bgjobs.worker.worker import register
from tests.acceptance.helpers import beats, enqueue, lines, stop_between_transactions, workers
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

SHORT_LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.1}
BEATS_OF_TWO_LEASES = 30


def test_the_grace_of_a_stop_may_outlast_the_lease(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """A worker that was told to stop keeps its lease while its jobs have their grace: nobody
    rescues them, and they complete."""
    gate = tmp_path / "gate"
    stopping = start_worker("-n", "stopping", "-c", "1", **SHORT_LEASE)
    job = enqueue("wait_for_file", str(gate))
    wait_until(lambda: stored(app, job).started_at is not None, "the start")
    start_worker("-n", "other", "-c", "1", **SHORT_LEASE)
    stopping.send_signal(signal.SIGTERM)
    wait_until(lambda: "Worker stopping" in stopping.log.read_text(), "the stop")
    before = beats(state)["other"]
    wait_until(lambda: beats(state)["other"] >= before + BEATS_OF_TWO_LEASES, "two leases")
    gate.touch()
    assert stopping.wait(DEADLINE_SECONDS) == 0
    assert (job.refresh().status, job.attempt) == ("completed", 1)
    assert list(workers(state).values()) == ["stopped", "alive"]


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_jobs_of_a_killed_worker_do_not_wait_for_each_other(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str
) -> None:
    """The jobs of a worker that was killed run beside each other on the next one, also where each
    takes longer than the pause between two starts."""
    options = ("-P", pool, "-c", "4")
    killed = start_worker(*options, BGJOBS_APP="host")
    jobs = [enqueue("hold", str(journal)) for _ in range(4)]
    wait_until(lambda: len(lines(journal)) == 4, "the starts")
    killed.send_signal(signal.SIGKILL)
    killed.wait(DEADLINE_SECONDS)
    start_worker(*options, "--shutdown-timeout", "0", BGJOBS_APP="host")
    wait_until(lambda: len(lines(journal)) == 8, "all of them again")
    assert sorted(lines(journal)[4:]) == sorted(f"start {job.id} 2" for job in jobs)
    for job in jobs:
        assert (job.refresh().status, job.attempt, job.crash_count) == ("running", 2, 0)


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("pool", ["thread", "process"])
def test_a_worker_that_comes_back_stops_what_is_no_longer_its(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str
) -> None:
    """A worker that was stopped past its lease finds it lost, stops the job's code, and works on
    under a new id; the outcome of the newer attempt stands."""
    stalled = start_worker("-n", "stalled", "-P", pool, "-c", "1", **SHORT_LEASE)
    job = enqueue("hold_at_first", str(journal))
    wait_until(lambda: lines(journal), "the start")
    stop_between_transactions(stalled, state)
    start_worker("-n", "second", "-q", "default", "-c", "1", **SHORT_LEASE)
    assert job.wait(DEADLINE_SECONDS).result == 2
    assert lines(journal) == [f"start {job.id} 1"], "its code still stands where it was"
    stalled.send_signal(signal.SIGCONT)
    wait_until(lambda: f"stopped {job.id} JobCancelled" in lines(journal), "the end of the code")
    wait_until(lambda: "Lease lost | Worker: stalled" in stalled.log.read_text(), "the notice")
    again = enqueue("echo", 1, queue="only-stalled").wait(DEADLINE_SECONDS)
    ids = list(workers(state))
    assert (again.result, again.worker_id) == (1, ids[2])
    assert list(workers(state).values()) == ["dead", "alive", "alive"]
    settled = stored(app, job)
    assert (settled.attempt, settled.worker_id, settled.result) == (2, ids[1], 2)
    assert settled.finished_at == job.finished_at


@pytest.mark.on("sqlite")
def test_a_late_heartbeat_is_logged(app: Flask, start_worker: Start, journal: Path) -> None:
    """C code that holds the GIL for longer than the heartbeat's interval makes it late, and the
    log says so; within the lease that is all."""
    worker = start_worker("-c", "1", BGJOBS_LEASE=DEADLINE_SECONDS)
    job = enqueue("hold_gil_at_first", str(journal), 1)
    assert job.wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: "Heartbeat late by" in worker.log.read_text(), "the warning")
    assert "Lease lost" not in worker.log.read_text()


@pytest.mark.on("sqlite")
def test_a_stall_longer_than_the_lease_overlaps(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """C code that holds the GIL for longer than the lease runs on while another worker runs the
    job as well; only the newer outcome counts."""
    # Whichever worker claims the job stalls.
    logs = [start_worker("-c", "1", **SHORT_LEASE).log for _ in range(2)]
    job = enqueue("hold_gil_at_first", str(journal), 6)
    wait_until(lambda: lines(journal), "the start")
    assert job.wait(DEADLINE_SECONDS).result == 2
    wait_until(lambda: _logged(logs, f"Lease lost | Job: {job.id}"), "the notice")
    assert lines(journal)[:3] == ["start 1", "start 2", "end 2"]
    assert stored(app, job).result == 2
    wait_until(lambda: _logged(logs, "Heartbeat late by"), "the warning")


def _logged(logs: list[Path], words: str) -> bool:
    return any(words in log.read_text() for log in logs)


@pytest.mark.on("sqlite")
def test_neighbours_of_poison_are_never_blamed(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """However often poison jobs kill their worker, its other jobs, running and prefetched, are
    run again, one at a time, and none of them is blamed for a crash."""
    poison = [enqueue("crash_worker", str(journal), priority=n) for n in (5, 1)]
    neighbours = [enqueue("hold", str(journal), 0.05) for _ in range(16)]
    assert start_worker("-c", "6").wait(DEADLINE_SECONDS) == -signal.SIGKILL
    suspects = {str(job.id) for job in neighbours if stored(app, job).status == "running"}
    deaths = [len(lines(journal))]
    while not _have_failed(app, poison):
        worker = start_worker("-c", "6")
        wait_until(lambda w=worker: w.poll() is not None or _have_failed(app, poison), "the end")
        deaths.append(len(lines(journal)))
    for job in neighbours:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert (job.crash_count, job.retry_count) == (0, 0)
    for job in poison:
        assert (job.refresh().crash_count, job.error_type) == (3, "Crashed")
        assert 3 <= lines(journal).count(str(job.id)) <= 4
    assert suspects
    for begin, end in itertools.pairwise([*deaths, None]):
        events = [line.split() for line in lines(journal)[begin:end]]
        verbs = [event[0] for event in events if event[1:2] and event[1] in suspects]
        assert ("start", "start") not in itertools.pairwise(verbs), "one began while another ran"


def _have_failed(app: Flask, jobs: list[Job]) -> bool:
    return all(stored(app, job).status == "failed" for job in jobs)


def test_an_outage_is_nobodys_silence(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time in which the database could not be asked is held against nobody, not even in part;
    silence before and after it counts."""
    now = 0.0
    monkeypatch.setattr(rescue, "time", SimpleNamespace(monotonic=lambda: now))
    other = register(state, "other")
    job = enqueue("echo", 1)
    state.store.claim(other, 1)
    sweeper = Sweeper(state.store, lease=10)
    assert sweeper.sweep(0) == []
    now += 4
    assert sweeper.sweep(0) == []
    with monkeypatch.context() as outage:
        outage.setattr(type(state.store), "living_workers", _not_usable)
        for _ in range(10):
            now += 3
            with pytest.raises(OperationalError):
                sweeper.sweep(0)
    for seconds in (1, 4):
        now += seconds
        assert sweeper.sweep(0) == []
    now += 2
    assert [settled.spec.id for settled in sweeper.sweep(0)] == [job.id]


def test_who_cannot_beat_judges_nobody(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lock keeps all from writing, and so from showing that they live, nobody's silence
    counts; what counts is the silence of one among others that beat."""
    now = 0.0
    monkeypatch.setattr(rescue, "time", SimpleNamespace(monotonic=lambda: now))
    own, other = (register(state, name) for name in ("own", "other"))
    job = enqueue("echo", 1)
    state.store.claim(other, 1)
    sweeper = Sweeper(state.store, lease=10)
    assert sweeper.sweep(own) == []
    for _ in range(10):
        now += 3
        assert sweeper.sweep(own) == []
    for _ in range(2):
        state.store.beat(own)
        now += 2
        assert sweeper.sweep(own) == []
    state.store.beat(own)
    now += 4
    assert [settled.spec.id for settled in sweeper.sweep(own)] == [job.id]


def _not_usable(_store: object) -> None:
    raise OperationalError("look", {}, Exception("database is gone"))


def test_silence_is_measured_by_a_monotonic_clock(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wall clock that jumps makes no worker's silence longer, and none shorter."""
    clocks = SimpleNamespace(now=0.0, wall=1e9)
    times = SimpleNamespace(monotonic=lambda: clocks.now, time=lambda: clocks.wall)
    monkeypatch.setattr(rescue, "time", times)
    other = register(state, "other")
    job = enqueue("echo", 1)
    state.store.claim(other, 1)
    sweeper = Sweeper(state.store, lease=10)
    sweeper.sweep(0)
    for jump in (0, 3_600, -7_200):
        clocks.now += 3
        clocks.wall += 3 + jump
        assert sweeper.sweep(0) == []
    clocks.now += 3
    assert [settled.spec.id for settled in sweeper.sweep(0)] == [job.id]


def test_silence_that_the_sweeper_slept_through(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a whole container was paused for longer than a lease, the first worker to wake up
    gives the others time to show that they live; those that stay silent are dead."""
    now = 0.0
    monkeypatch.setattr(rescue, "time", SimpleNamespace(monotonic=lambda: now))
    other = register(state, "other")
    job = enqueue("echo", 1)
    state.store.claim(other, 1)
    sweeper = Sweeper(state.store, lease=10)
    assert sweeper.sweep(0) == []
    now += 1_000
    assert sweeper.sweep(0) == []
    now += 4
    assert sweeper.sweep(0) == []
    now += 4
    assert [settled.spec.id for settled in sweeper.sweep(0)] == [job.id]
    assert workers(state) == {other: "dead"}
