"""Leases: a live worker keeps its lease, a silent one loses it and other workers run its jobs."""

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
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.rescue import Sweeper
from tests.acceptance.helpers import beats, enqueue, lines, stop_between_transactions, workers
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

SHORT_LEASE = {"BGJOBS_LEASE": 1.5, "BGJOBS_HEARTBEAT_INTERVAL": 0.1}
BEATS_OF_TWO_LEASES = 30


def test_stopping_worker_keeps_its_lease(
    app: Flask, state: AppState, start_worker: Start, tmp_path: Path
) -> None:
    """A stopping worker keeps its lease during the grace period, even if that is longer than the
    lease: no other worker rescues its job, and the job completes."""
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
def test_jobs_of_a_killed_worker_run_concurrently_again(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str
) -> None:
    """The next worker runs all jobs of a killed worker at the same time, even if each job runs
    much longer than the pause between two starts."""
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
def test_resumed_worker_stops_jobs_that_it_has_lost(
    app: Flask, state: AppState, start_worker: Start, journal: Path, pool: str
) -> None:
    """A worker that resumes after its lease ended stops the code of the lost job and continues
    under a new id. The outcome of the newer attempt stands."""
    stalled = start_worker("-n", "stalled", "-P", pool, "-c", "1", **SHORT_LEASE)
    job = enqueue("hold_first_attempt", str(journal))
    wait_until(lambda: lines(journal), "the start")
    stop_between_transactions(stalled, state)
    start_worker("-n", "second", "-q", "default", "-c", "1", **SHORT_LEASE)
    assert job.wait(DEADLINE_SECONDS).result == 2
    assert lines(journal) == [f"start {job.id} 1"], (
        "the stalled worker must not have stopped its code yet"
    )
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
def test_late_heartbeat_is_logged(app: Flask, start_worker: Start, journal: Path) -> None:
    """C code that holds the GIL for longer than the heartbeat interval delays the heartbeat, which
    is logged. The worker keeps its lease."""
    worker = start_worker("-c", "1", BGJOBS_LEASE=DEADLINE_SECONDS)
    job = enqueue("hold_gil_first_attempt", str(journal), 1)
    assert job.wait(DEADLINE_SECONDS).result == 1
    wait_until(lambda: "Heartbeat late by" in worker.log.read_text(), "the warning")
    assert "Lease lost" not in worker.log.read_text()


@pytest.mark.on("sqlite")
def test_attempts_overlap_if_the_gil_is_held_past_the_lease(
    app: Flask, start_worker: Start, journal: Path
) -> None:
    """If C code holds the GIL for longer than the lease, another worker runs the job at the same
    time. Only the outcome of the newer attempt counts."""
    # The worker that claims the job stalls; it can be either of them.
    logs = [start_worker("-c", "1", **SHORT_LEASE).log for _ in range(2)]
    job = enqueue("hold_gil_first_attempt", str(journal), 6)
    wait_until(lambda: lines(journal), "the start")
    assert job.wait(DEADLINE_SECONDS).result == 2
    wait_until(lambda: _any_log_has(logs, f"Lease lost | Job: {job.id}"), "the notice")
    assert lines(journal)[:3] == ["start 1", "start 2", "end 2"]
    assert stored(app, job).result == 2
    wait_until(lambda: _any_log_has(logs, "Heartbeat late by"), "the warning")


def _any_log_has(logs: list[Path], words: str) -> bool:
    return any(words in log.read_text() for log in logs)


@pytest.mark.on("sqlite")
def test_jobs_beside_a_poison_job_are_not_blamed(
    app: Flask, state: AppState, start_worker: Start, journal: Path
) -> None:
    """Each time a poison job kills its worker, the worker's other jobs, running or prefetched, run
    again one at a time, and none of them is blamed for a crash."""
    poison = [enqueue("crash_worker", str(journal), priority=n) for n in (5, 1)]
    neighbours = [enqueue("hold", str(journal), 0.05) for _ in range(16)]
    assert start_worker("-c", "6").wait(DEADLINE_SECONDS) == -signal.SIGKILL
    suspects = {str(job.id) for job in neighbours if stored(app, job).status == "running"}
    deaths = [len(lines(journal))]
    while not _all_failed(app, poison):
        worker = start_worker("-c", "6")
        wait_until(lambda w=worker: w.poll() is not None or _all_failed(app, poison), "the end")
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
        assert ("start", "start") not in itertools.pairwise(verbs), (
            "two suspects ran at the same time"
        )


def _all_failed(app: Flask, jobs: list[Job]) -> bool:
    return all(stored(app, job).status == "failed" for job in jobs)


def test_outage_does_not_count_as_silence(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time in which the database did not answer does not count as a worker's silence, not even in
    part. Silence before and after the outage counts."""
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
        outage.setattr(type(state.store), "living_workers", _raise_operational_error)
        for _ in range(10):
            now += 3
            with pytest.raises(OperationalError):
                sweeper.sweep(0)
    for seconds in (1, 4):
        now += seconds
        assert sweeper.sweep(0) == []
    now += 2
    assert [settled.spec.id for settled in sweeper.sweep(0)] == [job.id]


def test_worker_that_cannot_write_rescues_no_jobs(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lock keeps every worker from writing its heartbeat, silence does not count. It counts
    once the sweeping worker can write its own heartbeat and the other one does not."""
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


def _raise_operational_error(_store: object) -> None:
    raise OperationalError("look", {}, Exception("database is gone"))


def test_silence_is_measured_by_a_monotonic_clock(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A jump of the wall clock makes a worker's silence neither longer nor shorter."""
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


def test_silence_while_the_sweeper_was_paused_does_not_count(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a container was paused for longer than a lease, the first worker to resume gives the
    others time for a heartbeat. A worker that stays silent is dead."""
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
