"""Claims from many queues, some of them paused: order, and number of statements."""

from __future__ import annotations

import datetime as dt
import random
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.job.turns import claim_rank
from flask_bgjobs.models import Queue
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Store
from flask_bgjobs.worker.prune import Pruner
from flask_bgjobs.worker.registration import register


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one")


def add_jobs(store: Store, places: list[tuple[str, int]]) -> None:
    """Add one pending job for each queue and priority, in the order of their due times."""
    template = run_background_job("tests.jobs.echo")
    columns = [c for c in Job.__table__.c if c.name != "id"]
    with store.read() as connection:
        row = connection.execute(sa.select(*columns).where(Job.id == template.id)).one()
    store.delete([template.id])
    begin = row.run_at - dt.timedelta(hours=1)
    rows = [
        {
            **row._mapping,
            "queue": queue,
            "priority": priority,
            "claim_rank": claim_rank(priority),
            "run_at": begin + dt.timedelta(milliseconds=number),
        }
        for number, (queue, priority) in enumerate(places)
    ]
    store.transaction(lambda connection: connection.execute(sa.insert(Job.__table__), rows))


def claim_order(store: Store, closed: set[str]) -> list[int]:
    """The ids of the pending jobs of open queues in the order of claims, sorted in Python."""
    with store.read() as connection:
        rows = connection.execute(sa.select(Job.__table__)).all()
    waiting = [row for row in rows if row.status == "pending" and row.queue not in closed]
    return [row.id for row in sorted(waiting, key=lambda r: (r.claim_rank, r.run_at, r.id))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("closed_share", [0.1, 0.8])
def test_claims_follow_the_order_across_open_queues(
    app: Flask,
    store: Store,
    worker: int,
    monkeypatch: pytest.MonkeyPatch,
    closed_share: float,
    seed: int,
) -> None:
    """Each claim takes the first jobs of all open queues, however many jobs of closed queues or
    suspects come before them, and however many queues there are."""
    sizes = {"_WINDOW_JOBS": 12, "_QUEUES_PER_STATEMENT": 5, "_JOBS_PER_STATEMENT": 20}
    for name, value in sizes.items():
        monkeypatch.setattr(f"flask_bgjobs.store.statements.claim.{name}", value)
    chance = random.Random(seed)
    queues = [f"q{number:02}" for number in range(30)]
    some = chance.choices(queues, k=4)
    places = [
        (chance.choice(queues if chance.random() < 0.6 else some), chance.choice([0, 0, 0, 1, 5]))
        for _ in range(250)
    ]
    add_jobs(store, places)
    closed = {name for name in queues if chance.random() < closed_share}
    left_out = {name for name in closed if chance.random() < 0.5}
    for name in closed - left_out:
        store.pause(name)
    pending = claim_order(store, closed)
    suspects = set(chance.sample(pending, len(pending) // 3))
    mark = sa.update(Job).where(Job.id.in_(suspects)).values(suspect=True)
    store.transaction(lambda connection: connection.execute(mark))
    for with_suspects in (False, True):
        expected = [job_id for job_id in pending if (job_id in suspects) == with_suspects]
        taken: list[int] = []
        while specs := store.claim(
            worker,
            chance.choice([1, 3, 8, 40]),
            without=left_out,
            suspects=with_suspects,
        ):
            taken += [spec.id for spec in specs]
            assert taken == expected[: len(taken)]
        assert taken == expected


def test_concurrent_claims_beside_a_paused_queue(app: Flask, store: Store, state: AppState) -> None:
    """Workers that claim at the same time beside a paused queue get each job once and leave
    none."""
    add_jobs(store, [("closed", 9)] * 1_100 + [(f"q{number % 40}", 0) for number in range(400)])
    store.pause("closed")
    expected = claim_order(store, {"closed"})
    taken: list[int] = []

    def claim() -> None:
        worker_id = register(state, "racer", concurrency=1)
        while specs := store.claim(worker_id, 7):
            taken.extend(spec.id for spec in specs)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(expected)


def test_number_of_statements_does_not_grow_with_queues(
    app: Flask, store: Store, worker: int
) -> None:
    """A claim from 1,500 queues takes few statements, even beside a paused queue whose jobs come
    first."""
    add_jobs(store, [("closed", 9)] * 1_100 + [(f"q{number:04}", 0) for number in range(1_500)])
    store.pause("closed")
    statements = []

    def note(_c: Any, _k: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(store.engine, "before_cursor_execute", note)
    assert len(store.claim(worker, 50)) == 50
    assert len(store.queue_names()) == 1_501
    assert len(statements) < 20


def test_long_list_of_queues_is_claimed_in_order(app: Flask, store: Store, worker: int) -> None:
    """A worker with a list of 1,000 queues, most of them empty, claims in their order with few
    statements."""
    add_jobs(store, [("q0900", 0), ("q0100", 0), ("q0500", 9), ("other", 9)])
    store.pause("q0500")
    statements = []

    def note(_c: Any, _k: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(store.engine, "before_cursor_execute", note)
    specs = store.claim(worker, 10, [f"q{number:04}" for number in range(1_000)])
    assert [spec.queue for spec in specs] == ["q0100", "q0900"]
    assert len(statements) < 20


class TestPruning:
    """Pruning the rows of queues."""

    def queue_names(self, store: Store) -> list[str]:
        with store.read() as connection:
            return sorted(connection.scalars(sa.select(Queue.name)))

    def test_unused_queue_is_pruned(self, app: Flask, store: Store, worker: int) -> None:
        """An old queue is deleted unless it is paused or has waiting jobs; a young queue is
        kept."""
        for name in ("idle", "paused", "waiting", "young"):
            run_background_job("tests.jobs.echo", queue=name)
        store.claim(worker, 10)
        store.pause("paused")
        run_background_job("tests.jobs.echo", queue="waiting", delay=3600)
        old = dt.datetime(2020, 1, 1)
        change = sa.update(Queue).where(Queue.name != "young").values(created_at=old)
        store.transaction(lambda connection: connection.execute(change))
        Pruner(store, {}).step()
        assert self.queue_names(store) == ["paused", "waiting", "young"]

    def test_queue_in_use_is_registered_again(
        self, app: Flask, store: Store, worker: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A claim renews the registration of its queue once a day, so that a queue in use is never
        pruned, and registers a pruned queue again."""
        run_background_job("tests.jobs.echo", queue="mail")
        store.claim(worker, 1)
        old = sa.update(Queue).values(created_at=dt.datetime(2020, 1, 1))
        store.transaction(lambda connection: connection.execute(old))
        monkeypatch.setattr("flask_bgjobs.store.statements.claim._REGISTRATION_SECONDS", 0.0)
        run_background_job("tests.jobs.echo", queue="mail")
        store.claim(worker, 1)
        assert store.prune_queues(10) == 0
        store.transaction(lambda connection: connection.execute(old))
        assert store.prune_queues(10) == 1
        run_background_job("tests.jobs.echo", queue="mail")
        store.claim(worker, 1)
        assert self.queue_names(store) == ["mail"]
