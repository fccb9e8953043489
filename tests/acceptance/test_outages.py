"""Lost connections, stopped servers and silent network links, with real workers."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from flask import Flask
from sqlalchemy.exc import SQLAlchemyError

from flask_bgjobs import BgJobsError, Job, Limit
from flask_bgjobs.state import state_of
from flask_bgjobs.store import Store
from tests.acceptance.helpers import beats, enqueue, lines, starts
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, stored, wait_until
from tests.preloaded import preloaded_interpreter
from tests.servers import MariaServer, PostgresServer, Proxy, Server, When, commits

pytestmark = pytest.mark.acceptance
Start = Callable[..., Any]

LONG_LEASE: dict[str, Any] = {"BGJOBS_LEASE": 120, "BGJOBS_HEARTBEAT_INTERVAL": 0.2}
"""Longer than any wait in a test: no job is rescued because a lease ended."""
CLAIMED = commits("SKIP LOCKED", "< UPDATE [1-9]")
"""Matches the commit of a claim that claimed a job."""
SETTLED = commits("UPDATE bgjobs_job.* SET .*error_type", "< UPDATE [1-9]")
HANDED_OVER = commits("FROM bgjobs_worker", "DELETE .*bgjobs_seat", "< UPDATE [1-9]")
"""Matches the commit of a handover."""
SERVERS = {"postgresql": PostgresServer, "mariadb": MariaServer}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Combine servers and pools; on MariaDB one pool is enough, as both use it in the same way."""
    if "pool" in metafunc.fixturenames:
        pairs = [("postgresql", "thread"), ("postgresql", "process"), ("mariadb", "thread")]
        metafunc.parametrize(("server", "pool"), pairs, indirect=["server"], scope="module")
    elif "server" in metafunc.fixturenames:
        metafunc.parametrize("server", SERVERS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server. A test that stops it must start it again."""
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def database(server: Server) -> str:
    """The name of a new database on that server."""
    return server.create_database()


@pytest.fixture
def database_url(server: Server, database: str) -> str:
    """The test's own URL of the database, which bypasses the link that the test breaks."""
    return server.url(database)


@pytest.fixture
def link(server: Server) -> Iterator[Proxy]:
    """A proxy between the workers and the server, which the test can break."""
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def linked_url(server: Server, database: str, link: Proxy) -> str:
    """The URL of the database over that link."""
    return server.url(database, port=link.port)


@pytest.fixture
def make_app() -> Iterator[Callable[..., Flask]]:
    """Creates additional apps, and closes their connections after the test."""
    apps: list[Flask] = []

    def make(url: str, **config: Any) -> Flask:
        apps.append(build_app(url, **config))
        return apps[-1]

    yield make
    for app in apps:
        with app.app_context():
            app.extensions["sqlalchemy"].engine.dispose()
        state_of(app).store.dispose()


def finish(app: Flask, jobs: list[Job], seconds: float = 2 * DEADLINE_SECONDS) -> list[Job]:
    """Wait until all jobs have ended; returns them as stored in the database."""

    def ended() -> bool:
        return all(stored(app, job).status in ("completed", "failed", "cancelled") for job in jobs)

    wait_until(ended, "the end of all jobs", seconds)
    return [stored(app, job) for job in jobs]


def log_of(worker: Any) -> str:
    """The text of a worker's log."""
    return str(worker.log.read_text())


def completions(jobs: list[Job], *workers: Any) -> dict[int, int]:
    """How often the logs say that each job completed, by job id."""
    found = re.findall(
        r"^.*Job completed successfully .*\| Job: (\d+)", "\n".join(map(log_of, workers)), re.M
    )
    times = collections.Counter(map(int, found))
    return {job.id: times[job.id] for job in jobs}


def assert_ran_once(journal: Path, jobs: list[Job], *workers: Any) -> None:
    """Assert that every job completed, its code ran once, and its completion was logged once."""
    assert {job.status for job in jobs} == {"completed"}
    assert {(job.retry_count, job.crash_count) for job in jobs} == {(0, 0)}
    starts = collections.Counter(line for line in lines(journal) if line.startswith("start"))
    assert len(starts) == len(jobs)
    assert set(starts.values()) == {1}, starts.most_common(3)
    wait_until(lambda: all(completions(jobs, *workers).values()), "the last line in the log")
    assert set(completions(jobs, *workers).values()) == {1}
    assert "ease lost" not in "".join(map(log_of, workers))


def stop(worker: Any) -> None:
    """Stop a worker with SIGTERM; it must exit with code 0."""
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0


# Lost connections


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_in_a_claim_loses_no_job(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, when: When
) -> None:
    """If a connection ends before or after the commit of a claim, every job still runs once."""
    cut = link.cut_when(CLAIMED, when, times=3)
    jobs = [enqueue("hold", str(journal), 0.02) for _ in range(30)]
    worker = start_worker("-c", "4", SQLALCHEMY_DATABASE_URI=linked_url, **LONG_LEASE)
    assert cut.wait(DEADLINE_SECONDS)
    finished = finish(app, jobs)
    assert_ran_once(journal, finished, worker)
    claimed_unseen = [job for job in finished if job.attempt > 1]
    assert bool(claimed_unseen) == (when == "after")
    stop(worker)


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_in_a_handover_loses_no_job(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, when: When
) -> None:
    """If a connection ends before or after the commit of a handover, every job still runs once, and
    never more jobs at once than its limit allows."""
    cut = link.cut_when(HANDED_OVER, when)
    limit = Limit("two", concurrency=2)
    jobs = [enqueue("hold", str(journal), 0.02, limits=limit) for _ in range(30)]
    worker = start_worker("-c", "4", SQLALCHEMY_DATABASE_URI=linked_url, **LONG_LEASE)
    assert cut.wait(DEADLINE_SECONDS)
    finished = finish(app, jobs)
    assert_ran_once(journal, finished, worker)
    claimed_unseen = [job for job in finished if job.attempt > 1]
    assert bool(claimed_unseen) == (when == "after")
    running = [1 if line.startswith("start") else -1 for line in lines(journal)]
    assert max(itertools.accumulate(running)) <= 2
    stop(worker)


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_in_a_settle_leaves_one_outcome(
    app: Flask,
    start_worker: Start,
    link: Proxy,
    linked_url: str,
    journal: Path,
    pool: str,
    when: When,
) -> None:
    """If a connection ends at the commit of a settle, the outcome is recorded and logged once."""
    config = {"SQLALCHEMY_DATABASE_URI": linked_url, "BGJOBS_APP": "host", **LONG_LEASE}
    worker = start_worker("-P", pool, "-c", "2", **config)
    cut = link.cut_when(SETTLED, when, times=3)
    jobs = [enqueue("hold", str(journal), 0.1) for _ in range(12)]
    assert cut.wait(DEADLINE_SECONDS)
    finished = finish(app, jobs)
    assert_ran_once(journal, finished, worker)
    assert {job.attempt for job in finished} == {1}
    stop(worker)


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_in_a_failed_settle_uses_one_retry(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, when: When
) -> None:
    """If a connection ends in the settle of a failed attempt, one retry is used and logged."""
    worker = start_worker(SQLALCHEMY_DATABASE_URI=linked_url, **LONG_LEASE)
    cut = link.cut_when(SETTLED, when)
    job = enqueue("fail_times", 1, str(journal), retry_delay=0)
    assert cut.wait(DEADLINE_SECONDS)
    (finished,) = finish(app, [job])
    assert (finished.status, finished.attempt, finished.retry_count) == ("completed", 2, 1)
    assert lines(journal) == [f"{job.id} 1", f"{job.id} 2"]
    assert log_of(worker).count("Job failed and will retry") == 1
    assert "ease lost" not in log_of(worker)
    stop(worker)


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_lost_in_an_enqueue_saves_one_job_at_most(
    app: Flask, make_app: Any, link: Proxy, linked_url: str, database: str, when: When
) -> None:
    """If a connection ends in the insert of an enqueue, there is one job or none, never two."""
    with make_app(linked_url).app_context():
        enqueue("echo", 0)
        cut = link.cut_when(lambda transcript: "INSERT INTO bgjobs_job" in transcript[-1], when)
        with contextlib.suppress(SQLAlchemyError, BgJobsError):
            enqueue("echo", 1)
        assert cut.is_set()
        enqueue("echo", 2)
    parameters = [job.parameters for job in (stored(app, n) for n in _ids(app))]
    assert parameters.count([1]) == (when == "after")
    assert parameters.count([2]) == 1


def _ids(app: Flask) -> list[int]:
    with state_of(app).store.read() as connection:
        return list(connection.exec_driver_sql("SELECT id FROM bgjobs_job ORDER BY id").scalars())


def test_connections_that_end_continually_lose_no_job(
    app: Flask, start_worker: Start, server: Server, database: str, journal: Path, pool: str
) -> None:
    """All connections of a worker end every 100 ms, and each job still runs exactly once."""
    worker = start_worker("-P", pool, "-c", "4", BGJOBS_APP="host", **LONG_LEASE)
    jobs = [enqueue("hold", str(journal), 0.05) for _ in range(150)]
    end = time.monotonic() + 4
    ended = 0
    while time.monotonic() < end:
        ended += server.end_connections(database)
        time.sleep(0.1)
    assert ended > 20
    assert_ran_once(journal, finish(app, jobs), worker)
    stop(worker)


# Stopped servers


def test_outcomes_are_recorded_after_an_outage(
    app: Flask, start_worker: Start, server: Server, journal: Path, tmp_path: Path
) -> None:
    """Jobs that end while the server is down are recorded as first attempts when it is back.

    The outage is longer than the lease, but no worker loses its lease.
    """
    gate = tmp_path / "gate"
    config = {"BGJOBS_LEASE": 5, "BGJOBS_HEARTBEAT_INTERVAL": 0.2, "BGJOBS_APP": "host"}
    workers = [start_worker("-P", pool, "-c", "3", **config) for pool in ("thread", "process")]
    jobs = [enqueue("hold", str(journal), seconds) for seconds in (2, 3, 4, 12, 12, 12)]
    gated = enqueue("wait_for_file", str(gate))
    wait_until(lambda: starts(journal) == len(jobs), "the starts")
    memory = [_memory(worker.pid) for worker in workers]
    server.stop("fast")
    stopped_at = time.monotonic()
    for worker in workers:
        wait_until(lambda w=worker: "Database not usable" in log_of(w), "the notice")
    gate.touch()
    wait_until(lambda: time.monotonic() - stopped_at > 8, "the end of the outage")
    server.start()
    finished = finish(app, jobs)
    assert_ran_once(journal, finished, *workers)
    assert {job.attempt for job in finished} == {1}
    assert finish(app, [gated])[0].attempt <= 2
    for worker, before in zip(workers, memory, strict=True):
        assert "Worker dead" not in log_of(worker)
        assert _memory(worker.pid) - before < 50
        stop(worker)


def test_worker_with_a_raising_log_filter_survives_an_outage(
    app: Flask, start_worker: Start, server: Server
) -> None:
    """A worker whose log filter raises in its threads runs jobs and sends heartbeats afterwards."""
    worker = start_worker("-n", "logged", TEST_SET_UP="filter_raises", **LONG_LEASE)
    state = state_of(app)
    wait_until(lambda: beats(state).get("logged"), "a heartbeat")
    server.stop("fast")
    wait_until(
        lambda: "--- Logging error" in log_of(worker), "a line of a thread without a context"
    )
    server.start()
    assert finish(app, [enqueue("echo", 1)])[0].result == 1
    before = beats(state)["logged"]
    wait_until(lambda: beats(state)["logged"] > before, "a heartbeat after the outage")
    stop(worker)


def _memory(pid: int) -> int:
    """The resident memory of a process, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) // 1024


def test_worker_stops_while_the_server_is_down(
    app: Flask, start_worker: Start, server: Server, journal: Path, pool: str
) -> None:
    """SIGTERM ends a worker even during an outage; another worker runs its job again afterwards."""
    worker = start_worker("-P", pool, "--shutdown-timeout", "1", BGJOBS_APP="host", **LONG_LEASE)
    job = enqueue("hold", str(journal), 3)
    wait_until(lambda: lines(journal), "the start")
    server.stop("immediate")
    try:
        wait_until(lambda: "Database not usable" in log_of(worker), "the notice")
        stop(worker)
    finally:
        server.start()
    start_worker(**LONG_LEASE)
    (finished,) = finish(app, [job])
    assert (finished.status, finished.attempt) == ("completed", 2)


def test_enqueue_raises_during_an_outage_and_works_afterwards(
    app: Flask, start_worker: Start, server: Server
) -> None:
    """An enqueue raises while the server is down, and works as soon as the server is back."""
    assert enqueue("echo", 1).id
    server.stop("fast")
    try:
        began = time.monotonic()
        with pytest.raises((SQLAlchemyError, BgJobsError)):
            enqueue("echo", 2)
        assert time.monotonic() - began < DEADLINE_SECONDS
    finally:
        server.start()
    job = enqueue("echo", 3)
    server.restart("fast")
    # The pooled connection of the last enqueue is dead now.
    again = enqueue("echo", 4)
    start_worker()
    assert [job.result for job in finish(app, [job, again])] == [3, 4]


def test_repeated_restarts_lose_no_job(
    app: Flask, start_worker: Start, server: Server, journal: Path
) -> None:
    """The server restarts five times under load, cleanly or after a crash; each job runs once."""
    workers = [
        start_worker("-P", pool, "-c", "3", BGJOBS_APP="host", **LONG_LEASE)
        for pool in ("thread", "process")
    ]
    jobs: list[Job] = []
    modes: list[Literal["fast", "immediate"]] = ["fast", "immediate"] * 2 + ["immediate"]
    for mode in modes:
        jobs += [enqueue("hold", str(journal), 0.2) for _ in range(25)]
        started = len(jobs) - 20
        wait_until(lambda n=started: len(lines(journal)) >= n, "some of the load")
        server.restart(mode)
    assert_ran_once(journal, finish(app, jobs), *workers)
    for worker in workers:
        stop(worker)


def test_worker_without_a_server_exits_with_one_sentence(
    app: Flask, server: Server, start_worker: Start, tmp_path: Path
) -> None:
    """A worker that starts while the server is down reports it in one sentence; exit code 1."""
    server.stop("fast")
    try:
        worker = start_worker()
        assert worker.wait(DEADLINE_SECONDS) == 1
    finally:
        server.start()
    assert log_of(worker).startswith("Error: ")
    assert "Traceback" not in log_of(worker)


# Silent links


def test_link_silent_for_longer_than_the_lease(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, pool: str
) -> None:
    """A worker without a reply from the database claims no jobs. Another worker runs its job; the
    first worker stops the code of that job, and runs jobs again when the link works.

    Only its own deadline tells the worker that the connection is dead.
    """
    config = {"BGJOBS_LEASE": 4, "BGJOBS_HEARTBEAT_INTERVAL": 0.2, "BGJOBS_APP": "host"}
    cut_off = start_worker(
        *("-P", pool, "-n", "cut-off", "-c", "2"), SQLALCHEMY_DATABASE_URI=linked_url, **config
    )
    job = enqueue("hold", str(journal), 600)
    wait_until(lambda: stored(app, job).started_at is not None, "the start")
    other = start_worker("-n", "other", "-c", "2", **config)
    link.go_silent()
    wait_until(lambda: "Database not usable" in log_of(cut_off), "the deadline")
    quick = [enqueue("echo", n) for n in range(5)]
    wait_until(lambda: f"start {job.id} 2" in lines(journal), "the rescue")
    assert "Worker: cut-off | Reason: its lease ran out" in log_of(other)
    assert {job.attempt for job in finish(app, quick)} == {1}
    link.let_pass()
    wait_until(lambda: "ease lost" in log_of(cut_off), "the notice")
    wait_until(lambda: f"stopped {job.id} JobCancelled" in lines(journal), "the end of its code")
    current = stored(app, job)
    assert (current.status, current.attempt, current.crash_count) == ("running", 2, 0)
    other.send_signal(signal.SIGTERM)
    other.send_signal(signal.SIGTERM)
    wait_until(lambda: f"start {job.id} 3" in lines(journal), "the claim by the first worker")
    cut_off.send_signal(signal.SIGTERM)
    wait_until(lambda: "Worker stopping" in log_of(cut_off), "the stop")
    stop(cut_off)


def test_worker_recovers_if_the_link_fails_while_it_registers_again(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str
) -> None:
    """A worker whose link goes silent while it registers again recovers without help."""
    config = {"BGJOBS_LEASE": 8, "BGJOBS_HEARTBEAT_INTERVAL": 0.2}
    worker = start_worker("-c", "2", SQLALCHEMY_DATABASE_URI=linked_url, **config)
    enqueue("echo", 1).wait(DEADLINE_SECONDS)
    silent = link.go_silent_when(lambda transcript: "INSERT INTO bgjobs_worker" in transcript[-1])
    wait_until(lambda: _rescue_all(app), "the rescue")
    assert silent.wait(DEADLINE_SECONDS)
    assert enqueue("echo", 2).wait(2 * DEADLINE_SECONDS).result == 2
    stop(worker)


def _rescue_all(app: Flask) -> bool:
    """Rescue the jobs of the only worker; returns ``False`` if it sent a heartbeat meanwhile."""
    store = state_of(app).store
    for row in store.living_workers():
        store.rescue(row.id, row.beats)
    return not store.living_workers()


@pytest.mark.parametrize(("grace", "signals"), [(1, 1), (600, 2)])
def test_worker_stops_while_the_link_is_silent(
    app: Flask,
    start_worker: Start,
    link: Proxy,
    linked_url: str,
    journal: Path,
    grace: int,
    signals: int,
) -> None:
    """A worker that stops while its link is silent ends after its grace period, or at a second
    signal. It does not wait for a transaction, which could take a minute with such a lease."""
    worker = start_worker(
        *("-c", "2", "--shutdown-timeout", str(grace)),
        SQLALCHEMY_DATABASE_URI=linked_url,
        **LONG_LEASE,
    )
    enqueue("hold", str(journal), 600)
    wait_until(journal.exists, "the start")
    link.go_silent()
    for _ in range(signals):
        # The kernel merges two signals that arrive at the same time.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(1)
        worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize("position", [0, -2, -1])
def test_each_round_trip_of_a_worker_has_a_deadline(
    app: Flask, make_app: Any, link: Proxy, linked_url: str, position: int
) -> None:
    """A link that goes silent at any statement does not block a worker: neither while a connection
    is set up, nor at a query, nor at the rollback with which a connection returns to its pool."""
    linked = make_app(linked_url)

    def read(store: Store) -> str:
        try:
            with linked.app_context(), store.read() as connection:
                return str(connection.exec_driver_sql("SELECT 'read'").scalar())
        except SQLAlchemyError:
            return "failed"

    recording, store = (state_of(linked).store.with_deadline(1) for _ in range(2))
    statements: list[str] = []
    link.go_silent_when(lambda transcript: bool(statements.append(transcript[-1])))
    assert read(recording) == "read"
    recording.dispose()
    numbers = itertools.count()
    silent = link.go_silent_when(lambda _: next(numbers) == position % len(statements))
    assert _call_with_deadline(lambda: read(store)) in ("read", "failed")
    assert silent.is_set(), statements
    link.let_pass()
    assert _call_with_deadline(lambda: read(store)) == "read"
    store.dispose()


def test_opening_the_listening_connection_has_a_deadline(
    app: Flask, make_app: Any, link: Proxy, linked_url: str
) -> None:
    """A link that goes silent while a worker opens the connection on which it listens does not
    block the thread that listens."""
    linked = make_app(linked_url)
    store = state_of(linked).store.with_deadline(1)

    def listen() -> str:
        with linked.app_context(), contextlib.suppress(SQLAlchemyError, NotImplementedError):
            store.listen(threading.Event(), list, lambda: False)
        return "ended"

    link.go_silent_when(lambda _: True)
    assert _call_with_deadline(listen) == "ended"
    link.let_pass()
    store.dispose()


def test_link_silent_for_less_than_the_lease(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, pool: str
) -> None:
    """After a short silence, no lease, outcome or attempt is lost."""
    # The worker gives up a quarter of the lease and ten seconds of connecting after the last reply.
    config = {"BGJOBS_LEASE": 30, "BGJOBS_HEARTBEAT_INTERVAL": 0.2, "BGJOBS_APP": "host"}
    worker = start_worker("-P", pool, "-c", "4", SQLALCHEMY_DATABASE_URI=linked_url, **config)
    watcher = start_worker("-q", "elsewhere", **config)
    jobs = [enqueue("hold", str(journal), seconds) for seconds in (0.5, 1, 2, 6)]
    wait_until(lambda: starts(journal) == 4, "the starts")
    link.go_silent()
    wait_until(lambda: "Database not usable" in log_of(worker), "the deadline")
    link.let_pass()
    finished = finish(app, jobs)
    assert_ran_once(journal, finished, worker)
    assert {job.attempt for job in finished} == {1}
    assert "Worker dead" not in log_of(watcher)
    stop(worker)


@pytest.mark.parametrize("statement", ["claim", "settle"])
def test_late_commit_changes_nothing(
    app: Flask, start_worker: Start, link: Proxy, linked_url: str, journal: Path, statement: str
) -> None:
    """A commit that arrives late on an abandoned connection changes nothing.

    The locks of that connection do not block the worker either, which uses a new connection.
    """
    rule = {"claim": CLAIMED, "settle": SETTLED}[statement]
    silent = link.go_silent_when(rule)
    config = {"BGJOBS_LEASE": 20, "BGJOBS_HEARTBEAT_INTERVAL": 0.2}
    worker = start_worker("-c", "2", SQLALCHEMY_DATABASE_URI=linked_url, **config)
    first = enqueue("hold", str(journal), 0.1)
    assert silent.wait(DEADLINE_SECONDS)
    finish(app, [first])
    link.let_pass()
    more = [enqueue("hold", str(journal), 0.1) for _ in range(5)]
    assert_ran_once(journal, finish(app, [first, *more]), worker)
    stop(worker)


# Health checks


@pytest.mark.parametrize("fault", ["stopped", "silent"])
def test_health_page_answers_during_an_outage(
    app: Flask,
    make_app: Any,
    start_worker: Start,
    server: Server,
    link: Proxy,
    linked_url: str,
    fault: str,
) -> None:
    """``/jobs/healthz`` answers 503 while the database does not answer, and 200 afterwards."""
    start_worker(**LONG_LEASE)
    client = make_app(linked_url, BGJOBS_DASHBOARD=True).test_client()
    assert client.get("/jobs/healthz").status_code == 200
    with _broken(fault, server, link):
        answer = _call_with_deadline(lambda: client.get("/jobs/healthz"))
        assert (answer.status_code, answer.text) == (503, "the database does not answer")
    wait_until(lambda: client.get("/jobs/healthz").status_code == 200, "the recovery")


@pytest.mark.parametrize("fault", ["stopped", "silent"])
def test_health_command_ends_during_an_outage(
    app: Flask,
    start_worker: Start,
    server: Server,
    link: Proxy,
    linked_url: str,
    tmp_path: Path,
    fault: str,
) -> None:
    """``flask bgjobs health`` exits with 1 while the database does not answer, then with 0."""
    start_worker(**LONG_LEASE)
    (tmp_path / "linked.py").write_text(
        f"from tests.apps import build_app\ndef create_app(): return build_app({linked_url!r})\n"
    )
    assert _health(tmp_path)[0] == 0
    with _broken(fault, server, link):
        code, output = _health(tmp_path)
        assert code == 1
        assert re.search(r"^Not healthy: ", output, re.MULTILINE)
        assert "Traceback" not in output
    wait_until(lambda: _health(tmp_path)[0] == 0, "the recovery")


@contextlib.contextmanager
def _broken(fault: str, server: Server, link: Proxy) -> Iterator[None]:
    if fault == "silent":
        link.go_silent()
    else:
        server.stop("fast")
    try:
        yield
    finally:
        if fault == "silent":
            link.let_pass()
        else:
            server.start()


def _call_with_deadline(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or fail if it does not return in time."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert answers, f"no answer in {DEADLINE_SECONDS:g} s"
    return answers[0]


def _health(folder: Path) -> tuple[int, str]:
    """Run ``flask bgjobs health``; returns its exit code and its output."""
    with (folder / "health.log").open("w+") as output:
        process = preloaded_interpreter().start_module(
            "flask",
            ["--app", "linked", "bgjobs", "health"],
            folder=folder,
            environment={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"},
            output=output,
        )
        code = process.wait(DEADLINE_SECONDS)
        output.seek(0)
        return code, output.read()
