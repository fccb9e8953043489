"""The store's contract: claim, fence, settle, rescue, promote."""

from __future__ import annotations

import collections
import datetime as dt
import re
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue as enqueue_many
from flask_bgjobs.job.records import JobSpec, Outcome, Report, Settled
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import Attempt, JobLog, Queue, Worker
from flask_bgjobs.operations.queries import stats_now
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import QueryTimeout, Selection, Store
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.rescue import Sweeper
from tests.conftest import DEADLINE_SECONDS, EXPORT, stored, wait_until
from tests.databases import END_CONNECTION, number_of, product_of


@pytest.fixture
def worker(state: AppState) -> int:
    return register(state, "one", concurrency=2)


def enqueue(**options: Any) -> int:
    return run_background_job("tests.jobs.echo", **options).id


def make_outcome(spec: JobSpec, kind: OutcomeKind = OutcomeKind.COMPLETED, **more: Any) -> Outcome:
    return Outcome(spec.id, spec.attempt, kind, wait_seconds=0.01, run_seconds=0.02, **more)


def settle(store: Store, worker: int, spec: JobSpec, kind: OutcomeKind, **more: Any) -> Settled:
    (settled,) = store.settle(worker, "one", [(spec, make_outcome(spec, kind, **more))])
    return settled


def rows(store: Store, model: Any) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(sa.select(model.__table__)))


def execute(store: Store, statement: Any) -> None:
    store.transaction(lambda connection: connection.execute(statement))


class TestClaim:
    def test_highest_priority_first(self, store: Store, worker: int) -> None:
        """A claim returns jobs by priority, and within one priority by due time."""
        low, first, second, high = (enqueue(priority=p) for p in (-1, 2, 2, "high"))
        assert [spec.id for spec in store.claim(worker, 10)] == [high, first, second, low]

    def test_earliest_due_first_within_a_priority(self, store: Store, worker: int) -> None:
        """A delayed job that was due earlier is claimed before a job that was enqueued earlier."""
        now = dt.datetime.now(dt.UTC)
        later = enqueue()
        earlier = enqueue(run_at=now - dt.timedelta(hours=1))
        assert store.promote() == 1
        assert [spec.id for spec in store.claim(worker, 10)] == [earlier, later]

    def test_earliest_due_first_in_small_claims(self, store: Store, worker: int) -> None:
        """Claims of one job each take the jobs in the order of their due times, not in the order of
        enqueuing."""
        later = enqueue()
        earlier = enqueue(run_at=dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
        store.promote()
        taken = [spec.id for _ in range(2) for spec in store.claim(worker, 1)]
        assert taken == [earlier, later]

    def test_limit_and_no_job_claimed_twice(self, store: Store, worker: int) -> None:
        """A claim takes at most as many jobs as requested, and no job that is already claimed."""
        ids = [enqueue() for _ in range(5)]
        taken = [spec.id for _ in range(4) for spec in store.claim(worker, 2)]
        assert taken == ids

    def test_attempt_counts_claims(self, store: Store, worker: int) -> None:
        """``attempt`` increases by one with each claim."""
        enqueue()
        for attempt in (1, 2, 3):
            (spec,) = store.claim(worker, 1)
            assert spec.attempt == attempt
            settle(store, worker, spec, OutcomeKind.GIVEN_BACK)

    def test_queues_in_strict_order(self, store: Store, worker: int) -> None:
        """A worker with a list of queues claims all jobs of the first before any job of the
        next."""
        mail_low = enqueue(queue="mail", priority=-9)
        other = enqueue(queue="other", priority=9)
        default = enqueue()
        specs = store.claim(worker, 10, ["mail", "default"])
        assert [spec.id for spec in specs] == [mail_low, default]
        assert [spec.id for spec in store.claim(worker, 10)] == [other]

    @pytest.mark.parametrize("queues", [None, ["default"]])
    def test_claim_skips_suspects(
        self, store: Store, worker: int, queues: list[str] | None
    ) -> None:
        """With ``suspects=False``, a claim takes all jobs except suspects."""
        ids = [enqueue() for _ in range(4)]
        execute(store, sa.update(Job).where(Job.id.in_(ids[:2])).values(suspect=True))
        specs = store.claim(worker, 3, queues, suspects=False)
        assert [spec.id for spec in specs] == ids[2:]
        assert [spec.id for spec in store.claim(worker, 3, queues)] == ids[:2]

    def test_claim_skips_paused_queues(self, store: Store, worker: int) -> None:
        """A claim takes no job of a paused queue, and takes the other jobs by priority."""
        enqueue(queue="paused", priority=9)
        low, high = enqueue(queue="a", priority=1), enqueue(queue="b", priority=2)
        middle = enqueue(queue="a", priority=2)
        execute(
            store, sa.insert(Queue).values(name="paused", paused_at=store.now, created_at=store.now)
        )
        assert [spec.id for spec in store.claim(worker, 10)] == [high, middle, low]
        assert store.claim(worker, 10, ["paused"]) == []

    def test_delayed_jobs_are_not_claimed(self, store: Store, worker: int) -> None:
        """A job that is not due yet by the database's clock cannot be claimed."""
        enqueue(delay=60)
        store.promote()
        assert store.claim(worker, 10) == []

    def test_dead_worker_claims_nothing(self, store: Store, worker: int) -> None:
        """A worker whose row is dead or missing cannot claim."""
        enqueue()
        execute(store, sa.update(Worker).values(status="dead"))
        assert store.claim(worker, 10) == []
        assert store.claim(worker + 1, 10) == []

    def test_concurrent_claims_take_each_job_once(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """Eight workers that claim at the same time get each job exactly once."""
        ids = {enqueue() for _ in range(200)}
        taken: list[int] = []

        def claim() -> None:
            worker_id = register(state, "racer", concurrency=1)
            while specs := store.claim(worker_id, 7):
                taken.extend(spec.id for spec in specs)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(ids)

    def test_claim_registers_queue_names(self, store: Store, worker: int) -> None:
        """After a claim, the queue of the job has a row."""
        enqueue(queue="mail")
        store.claim(worker, 10)
        assert [row.name for row in rows(store, Queue)] == ["mail"]


def analyze(store: Store) -> None:
    """Update the statistics that the database plans queries by."""
    execute(store, sa.text("ANALYZE TABLE bgjobs_job" if _is_mysql(store) else "ANALYZE"))


def _is_mysql(store: Store) -> bool:
    return store.engine.name == "mysql"


class TestPlans:
    @pytest.fixture
    def crowded(self, store: Store) -> Store:
        """50,000 rows beside the few that a query needs: waiting, finished and low-priority
        jobs."""
        for status in ("scheduled", "retrying", "completed", "failed", "pending"):
            _copy_job(store, status, 10_000)
        analyze(store)
        return store

    @pytest.mark.parametrize("queues", [None, ["default", "mail"]], ids=["all", "listed"])
    def test_claim_reads_index_in_order(
        self, crowded: Store, queues: list[str] | None, worker: int
    ) -> None:
        """The claim neither sorts nor scans, whatever other rows the table has."""
        plan = plans(crowded, lambda: crowded.claim(worker, 10, queues))
        assert "ix_bgjobs_job_claim" in plan
        assert not scans(plan)
        assert not _sorts(plan)

    def test_claim_beside_paused_queue_reads_index(self, crowded: Store, worker: int) -> None:
        """The claim skips a paused queue without reading its rows."""
        open_job = enqueue(queue="open")
        crowded.pause("default")
        taken: list[JobSpec] = []
        plan = plans(crowded, lambda: taken.extend(crowded.claim(worker, 10)))
        assert [spec.id for spec in taken] == [open_job]
        assert "ix_bgjobs_job_claim_queue" in plan
        assert not scans(plan)

    def test_claim_of_one_queue_reads_no_other(self, store: Store, worker: int) -> None:
        """A claim for one queue does not read a backlog of other queues, even without statistics
        about it."""
        if store.engine.name == "postgresql":
            execute(store, sa.text("ALTER TABLE bgjobs_job SET (autovacuum_enabled = false)"))
        _copy_job(store, "pending", 1_000)
        execute(store, sa.update(Job).values(queue="mail", claim_rank=100_000))
        analyze(store)
        _copy_job(store, "pending", 50_000)
        plan = plans(store, lambda: store.claim(worker, 100, ["mail"]))
        assert "ix_bgjobs_job_claim_queue" in plan
        assert not _sorts(plan)

    @pytest.mark.on("sqlite", "postgresql")
    def test_partial_indexes_hold_few_statuses(self, store: Store) -> None:
        """The indexes for claims hold only unfinished jobs, those of finished jobs, deadlines
        and waiting jobs only these."""
        with store.read() as connection:
            found = sa.inspect(connection).get_indexes("bgjobs_job")
        where = {
            str(index["name"]).removeprefix("ix_bgjobs_job_"): str(condition)
            for index in found
            for option, condition in index.get("dialect_options", {}).items()
            if option.endswith("_where")
        }
        words = re.compile("pending|scheduled|waiting|retrying|NULL|code|queue")
        found_words = {name: set(words.findall(condition)) for name, condition in where.items()}
        assert found_words == {
            "claim": {"pending"},
            "claim_queue": {"pending", "scheduled", "waiting", "retrying"},
            "due": {"scheduled", "retrying"},
            "finished": {"NULL"},
            "deadline": {"NULL"},
            "waits": {"code", "queue"},
        }

    def test_promotion_reads_index(self, crowded: Store) -> None:
        """The query for due jobs reads the index of due times."""
        execute(crowded, sa.text("UPDATE bgjobs_job SET run_at = '2999-01-01 00:00:00.000000'"))
        analyze(crowded)
        plan = plans(crowded, lambda: (crowded.promote(), crowded.upcoming(60, 0.05)))
        assert "ix_bgjobs_job_due" in plan
        assert not scans(plan)

    @pytest.mark.on("mysql")
    def test_promotion_of_many_jobs_does_not_sort(self, crowded: Store) -> None:
        """Even if all jobs are due, the query for the first jobs to promote does not sort."""
        plan = plans(crowded, crowded.promote)
        assert "ix_bgjobs_job_due" in plan
        assert not _sorts(plan)

    @pytest.mark.on("postgresql")
    def test_claim_without_statistics_does_not_sort(self, store: Store, worker: int) -> None:
        """A claim from many rows without statistics reads the index in order and does not sort."""
        execute(store, sa.text("ALTER TABLE bgjobs_job SET (autovacuum_enabled = false)"))
        _copy_job(store, "pending", 50_000)
        plan = plans(store, lambda: store.claim(worker, 1_000))
        assert "ix_bgjobs_job_claim" in plan
        assert not _sorts(plan)

    @pytest.mark.parametrize("counted", [True, False], ids=["analyzed", "uncounted"])
    def test_bulk_completion_finds_jobs_by_id(
        self, crowded: Store, worker: int, counted: bool
    ) -> None:
        """Completing in bulk finds each job by its id, with and without statistics."""
        batch = crowded.claim(worker, 300)
        if not counted and crowded.engine.name == "sqlite":
            execute(crowded, sa.text("DELETE FROM sqlite_stat1"))
            crowded.engine.dispose()
        outcomes = [(spec, make_outcome(spec)) for spec in batch]
        plan = plans(crowded, lambda: crowded.complete(worker, outcomes))
        # The terms of SQLite, PostgreSQL and MySQL.
        keys = ("USING INTEGER PRIMARY KEY", "bgjobs_job_pkey", "bgjobs_job PRIMARY")
        assert any(key in plan for key in keys)
        assert not scans(plan)

    @pytest.mark.on("mysql")
    def test_settle_locks_jobs_by_id(self, crowded: Store, worker: int) -> None:
        """A settle finds the rows to lock by their ids: on MySQL, reading another index would lock
        more rows."""
        keys = [spec.key for spec in crowded.claim(worker, 300)]
        plan = plans(
            crowded, lambda: crowded.transaction(lambda c: crowded.lock_running(c, worker, keys))
        )
        assert "bgjobs_job PRIMARY" in plan
        assert not scans(plan)
        assert not _sorts(plan)

    def test_pruning_reads_index_in_order(self, crowded: Store) -> None:
        """The query for old jobs neither sorts nor scans, in the first batch and after a cursor."""
        execute(crowded, sa.update(Job).values(finished_at=dt.datetime(2000, 1, 1)))
        analyze(crowded)
        retention = {JobStatus.COMPLETED: 60.0, JobStatus.FAILED: 60.0}

        def prune() -> None:
            first = crowded.prune(retention, 10)
            crowded.prune(retention, 10, first.cursor)

        plan = plans(crowded, prune)
        assert "ix_bgjobs_job_finished" in plan
        assert not scans(plan)
        assert not _sorts(plan)

    def test_selection_does_not_scan(self, crowded: Store) -> None:
        """The batches of a selection do not scan the table, with conditions on status, time and
        queue."""
        statuses = (JobStatus.FAILED, JobStatus.PENDING)
        selection = Selection(statuses, until=crowded.clock(), queues=("default",))
        plan = plans(crowded, lambda: next(crowded.selected_ids(selection, 10)))
        assert "bgjobs_job" in plan
        assert not scans(plan)

    # PostgreSQL uses index-only scans only after a vacuum; until then it counts by a table scan.
    @pytest.mark.on("sqlite")
    def test_statistics_read_indexes(self, crowded: Store, state: AppState) -> None:
        """No number of ``flask bgjobs stats`` makes the database read whole rows of all jobs."""
        plan = plans(crowded, lambda: stats_now(state))
        assert not scans(plan)
        assert "ix_bgjobs_job_finished" in plan


def _copy_job(store: Store, status: str, copies: int) -> None:
    """Add low-priority rows with a status."""
    original = run_background_job("tests.jobs.echo")
    columns = [c.name for c in Job.__table__.c if c.name not in ("id", "status", "claim_rank")]
    names = ", ".join(columns)
    # A product of small tables, because MySQL allows a recursion of at most 1,000 steps.
    numbers = (
        "WITH RECURSIVE d(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM d WHERE i < 99), "
        "n(i) AS (SELECT a.i * 500 + b.i * 5 + c.i FROM d AS a, d AS b, d AS c WHERE c.i < 5)"
    )
    execute(
        store,
        sa.text(
            f"INSERT INTO bgjobs_job (status, claim_rank, {names}) {numbers} SELECT '{status}', "
            f"1000 + i, {names} FROM bgjobs_job, n WHERE id = {original.id} AND i < {copies}"
        ),
    )


def plans(store: Store, work: Callable[[], object]) -> str:
    """The query plans of all statements on the job table that ``work`` runs."""
    seen: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if "bgjobs_job" in statement:
            seen.append((statement, parameters))

    sa.event.listen(store.engine, "before_cursor_execute", note)
    work()
    sa.event.remove(store.engine, "before_cursor_execute", note)
    assert seen
    explain = "EXPLAIN QUERY PLAN" if store.engine.name == "sqlite" else "EXPLAIN"
    lines = []
    with store.read() as connection:
        for statement, parameters in seen:
            plan = connection.exec_driver_sql(f"{explain} {statement}", parameters)
            lines += [_plan_step(row) for row in plan]
    return "\n".join(lines)


def _plan_step(row: Any) -> str:
    """One step of a plan as text; MySQL returns it in columns."""
    if hasattr(row, "possible_keys"):
        return f"{row.type} {row.table} {row.key} {row.Extra}"
    return str(row[-1])


def scans(plan: str) -> bool:
    """Whether the plan reads the whole table."""
    scans = ("SCAN bgjobs_job", "Seq Scan on bgjobs_job", "ALL bgjobs_job", "index bgjobs_job")
    return any(scan in plan for scan in scans)


def _sorts(plan: str) -> bool:
    return any(sort in plan for sort in ("TEMP B-TREE", "Sort", "filesort"))


class TestSettle:
    def test_completed(self, app: Flask, store: Store, worker: int) -> None:
        """A completed job has a result and times, no error, and no attempt row."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        report = Report(progress=1.0, meta_json='{"a":1}', lines=("done",))
        settle(store, worker, spec, OutcomeKind.COMPLETED, result_json="[1]", report=report)
        job = stored(app, job_id)
        assert (job.status, job.result, job.meta, job.progress) == ("completed", [1], {"a": 1}, 1.0)
        assert job.finished_at is not None
        assert job.started_at is not None
        assert job.finished_at - job.started_at == dt.timedelta(seconds=0.02)
        assert rows(store, Attempt) == []
        assert [row.message for row in rows(store, JobLog)] == ["done"]

    def test_retry_then_failed(self, app: Flask, store: Store, worker: int) -> None:
        """Retries are counted, each failed attempt has a row, and then the job is failed."""
        job_id = enqueue(retries=1, retry_delay=0)
        dues = []
        for expected in ("retrying", "failed"):
            store.promote()
            (spec,) = store.claim(worker, 1)
            dues.append(spec.run_at)
            settled = settle(
                store,
                worker,
                spec,
                OutcomeKind.FAILED,
                error_type="ValueError",
                error="ValueError: x",
                traceback="…",
            )
            assert settled.status == expected
        job = stored(app, job_id)
        assert (job.retry_count, job.attempt, job.error) == (1, 2, "ValueError: x")
        assert [(row.attempt, row.outcome) for row in rows(store, Attempt)] == [
            (1, "failed"),
            (2, "failed"),
        ]
        assert [row.due_at for row in rows(store, Attempt)] == dues

    def test_retry_delay_uses_database_clock(self, app: Flask, store: Store, worker: int) -> None:
        """A retry is due after its delay, counted from the settle by the database's clock."""
        job_id = enqueue(retry_delay=3_600)
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.FAILED)
        with store.read() as connection:
            now = connection.execute(sa.select(store.now)).scalar_one()
        left = (stored(app, job_id).run_at - now).total_seconds()
        assert 3_600 - DEADLINE_SECONDS < left <= 3_600

    @pytest.mark.parametrize(
        "change",
        [
            {"attempt": 2},
            {"worker_id": 999},
            {"status": "pending"},
        ],
        ids=str,
    )
    def test_fence(self, app: Flask, store: Store, worker: int, change: dict[str, Any]) -> None:
        """A settle of another attempt, worker or status changes nothing and reports a lost
        lease."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        execute(store, sa.update(Job).values(**change))
        before = stored(app, job_id)
        settled = settle(store, worker, spec, OutcomeKind.COMPLETED, result_json="1")
        assert settled.status is None
        after = stored(app, job_id)
        for column in Job.__mapper__.column_attrs:
            assert getattr(after, column.key) == getattr(before, column.key)

    def test_fence_of_start(self, app: Flask, store: Store, worker: int) -> None:
        """Marking an older attempt as started does not mark the newest one."""
        job_id = enqueue()
        (older,) = store.claim(worker, 1)
        settle(store, worker, older, OutcomeKind.GIVEN_BACK)
        (newer,) = store.claim(worker, 1)
        assert store.mark_started(worker, [older]) == (set(), set())
        assert stored(app, job_id).started_at is None
        assert store.mark_started(worker, [newer]) == ({job_id}, set())

    def test_deleted_job_does_not_block_its_batch(
        self, app: Flask, store: Store, worker: int
    ) -> None:
        """If a running job's row was deleted, the other outcomes of the batch are still
        recorded."""
        gone, kept = enqueue(), enqueue()
        specs = store.claim(worker, 2)
        execute(store, sa.delete(Job).where(Job.id == gone))
        batch = [(spec, make_outcome(spec, report=Report(lines=("x",)))) for spec in specs]
        settled = store.settle(worker, "one", batch)
        assert [entry.status for entry in settled] == [None, "completed"]
        assert stored(app, kept).status == "completed"
        assert [row.job_id for row in rows(store, JobLog)] == [kept]

    def test_ids_are_never_reused(self, store: Store) -> None:
        """The next job does not get the id of a deleted job."""
        last = enqueue()
        store.delete([last])
        assert enqueue() > last

    def test_snoozed(self, app: Flask, store: Store, worker: int) -> None:
        """A snoozed job is scheduled again and uses no retry."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.SNOOZED, delay_seconds=60)
        job = stored(app, job_id)
        assert (job.status, job.retry_count) == ("scheduled", 0)

    def test_unique_key_is_held_until_job_ends(self, store: Store, worker: int) -> None:
        """A retrying job holds its unique key; a failed job does not."""
        first = enqueue(unique_key="k", retries=1, retry_delay=0)
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.FAILED)
        assert enqueue(unique_key="k") == first
        store.promote()
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.FAILED)
        assert enqueue(unique_key="k") != first

    @pytest.mark.parametrize("kind", [OutcomeKind.COMPLETED, OutcomeKind.FAILED])
    def test_claims_under_an_earlier_worker_id_are_lost(
        self, state: AppState, store: Store, worker: int, kind: OutcomeKind
    ) -> None:
        """A worker that has started over records no outcome of its earlier claims, even if the same
        attempt number of the same job runs under its new id."""
        enqueue()
        (spec,) = store.claim(worker, 1)
        other = spec._replace(worker_id=worker + 1)
        outcome = make_outcome(other, kind)
        acts = {
            "settle": lambda: store.settle(worker, "one", [(other, outcome)]),
            "complete": lambda: store.complete(worker, [(other, outcome)]),
        }
        for act in acts.values():
            assert [each.status for each in act()] == [None]
        assert [job.status for job in rows(store, Job)] == ["running"]

    def test_complete_records_only_own_jobs(self, store: Store, worker: int) -> None:
        """Of many completed jobs, only those still claimed by the worker are recorded."""
        ids = [enqueue() for _ in range(4)]
        specs = store.claim(worker, 4)
        store.settle(
            worker, "one", [(specs[1], make_outcome(specs[1], OutcomeKind.FAILED_FINALLY))]
        )
        stale = specs[2]._replace(attempt=2)
        batch = [specs[0], specs[1], stale, specs[3]]
        settled = store.complete(
            worker, [(spec, make_outcome(spec, result_json="7")) for spec in batch]
        )
        assert [(each.job_id, each.status) for each in settled] == [
            (ids[0], "completed"),
            (ids[1], None),
            (ids[2], None),
            (ids[3], "completed"),
        ]
        jobs = sorted(rows(store, Job), key=lambda job: job.id)
        assert [job.status for job in jobs] == ["completed", "failed", "running", "completed"]
        assert [job.result for job in jobs] == ["7", None, None, "7"]
        assert jobs[0].started_at - jobs[0].claimed_at == dt.timedelta(seconds=0.01)
        assert jobs[0].finished_at - jobs[0].started_at == dt.timedelta(seconds=0.02)

    def test_finish_times_use_database_clock(
        self, store: Store, worker: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Finish times come from the database's clock even if the code never ran: a worker's clock
        may be wrong."""
        enqueue()
        (spec,) = store.claim(worker, 1)
        monkeypatch.setattr("flask_bgjobs.store.statements.settle.dt", None)
        store.settle(worker, "one", [(spec, Outcome(spec.id, 1, OutcomeKind.REFUSED))])
        (job,), (attempt,) = rows(store, Job), rows(store, Attempt)
        for row in (job, attempt):
            assert dt.timedelta(0) <= row.finished_at - job.created_at < dt.timedelta(minutes=1)


class TestCancel:
    def test_waiting_jobs_are_cancelled_at_once(self, app: Flask, store: Store) -> None:
        """Pending and scheduled jobs are cancelled at once."""
        ids = [enqueue(), enqueue(delay=60)]
        assert store.cancel(ids).done == ids
        assert {stored(app, job_id).status for job_id in ids} == {"cancelled"}

    def test_running_job_gets_a_cancel_request(self, app: Flask, store: Store, worker: int) -> None:
        """A running job gets one cancel request, and stays running until its code has stopped."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        assert store.cancel([job_id]).requested == [job_id]
        asked = stored(app, job_id)
        assert asked.is_cancelling
        store.cancel([job_id])
        assert stored(app, job_id).cancel_requested_at == asked.cancel_requested_at
        assert store.observe(worker, {}).cancelling == {job_id}
        settle(store, worker, spec, OutcomeKind.CANCELLED)
        assert stored(app, job_id).status == "cancelled"

    @pytest.mark.parametrize(
        ("kind", "status"),
        [
            (OutcomeKind.COMPLETED, "completed"),
            (OutcomeKind.FAILED, "cancelled"),
            (OutcomeKind.TIMEOUT, "cancelled"),
            (OutcomeKind.RETRY, "cancelled"),
            (OutcomeKind.SNOOZED, "cancelled"),
            (OutcomeKind.GIVEN_BACK, "cancelled"),
        ],
    )
    def test_outcome_after_cancel_request(
        self, app: Flask, store: Store, worker: int, kind: OutcomeKind, status: str
    ) -> None:
        """A job with a cancel request is completed if it finished, and cancelled otherwise."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        store.cancel([job_id])
        settle(store, worker, spec, kind)
        assert stored(app, job_id).status == status

    def test_finished_and_missing_jobs_are_skipped(self, store: Store, worker: int) -> None:
        """``cancel`` skips finished and missing jobs and returns the reason."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.COMPLETED)
        result = store.cancel([job_id, 999])
        assert result.skipped == {job_id: "it is already completed", 999: "it does not exist"}


class TestManualActions:
    def test_manual_retry_resets_counts(self, app: Flask, store: Store, worker: int) -> None:
        """A manual retry sets the retry and crash counts to 0; ``attempt`` is kept."""
        job_id = enqueue(retries=0)
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.FAILED)
        execute(store, sa.update(Job).values(crash_count=3, retry_count=2))
        assert store.retry([job_id]).done == [job_id]
        job = stored(app, job_id)
        assert (job.status, job.retry_count, job.crash_count, job.attempt) == ("pending", 0, 0, 1)

    def test_completed_job_is_not_retried(self, store: Store, worker: int) -> None:
        """A manual retry skips a completed job."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.COMPLETED)
        assert store.retry([job_id]).skipped == {job_id: "it is completed"}

    def test_delete_skips_running_jobs(self, store: Store, worker: int) -> None:
        """Deleting a job deletes its attempts and log lines; a running job is skipped."""
        failed = enqueue(retries=0)
        (spec,) = store.claim(worker, 1)
        settle(store, worker, spec, OutcomeKind.FAILED, report=Report(lines=("x",)))
        running = enqueue()
        store.claim(worker, 1)
        result = store.delete([failed, running])
        assert result.done == [failed]
        assert result.skipped == {running: "it is running; cancel it first"}
        assert rows(store, Attempt) == rows(store, JobLog) == []

    def test_delete_respects_foreign_keys_of_host(self, store: Store) -> None:
        """A job that another table refers to is skipped, and the other jobs are deleted."""
        execute(store, sa.text(EXPORT))
        held, free = enqueue(), enqueue()
        execute(store, sa.text(f"INSERT INTO export VALUES ({held})"))
        result = store.delete([held, free])
        assert result.done == [free]
        assert result.skipped == {held: "a row of another table refers to it"}


class TestRescue:
    def test_rescued_jobs_are_pending_suspects(self, app: Flask, store: Store, worker: int) -> None:
        """A rescued job is pending and a suspect, and has used no retry."""
        job_id = enqueue()
        store.claim(worker, 1)
        assert [s.status for s in store.rescue(worker, 0)] == ["pending"]
        job = stored(app, job_id)
        assert (job.status, job.suspect, job.retry_count, job.crash_count) == (
            "pending",
            True,
            0,
            0,
        )
        assert [row.status for row in rows(store, Worker)] == ["dead"]

    def test_heartbeat_prevents_rescue(self, store: Store, worker: int) -> None:
        """A worker with a heartbeat since the last look keeps its lease."""
        enqueue()
        store.claim(worker, 1)
        assert store.beat(worker)
        assert store.rescue(worker, 0) is None

    def test_dead_worker_cannot_beat_or_settle(self, app: Flask, store: Store, worker: int) -> None:
        """After a rescue, the old worker can neither renew its lease nor record an outcome."""
        job_id = enqueue()
        (spec,) = store.claim(worker, 1)
        store.rescue(worker, 0)
        assert not store.beat(worker)
        assert settle(store, worker, spec, OutcomeKind.COMPLETED).status is None
        assert stored(app, job_id).status == "pending"

    def test_third_proved_crash_fails_the_job(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """Only crashes after a committed start count, and the third fails the job as crashed."""
        job_id = enqueue()
        for crash in range(4):
            worker_id = register(state, f"w{crash}", concurrency=1)
            (spec,) = store.claim(worker_id, 1)
            assert spec.suspect == (crash > 0)
            store.mark_started(worker_id, [spec])
            store.rescue(worker_id, 0)
            assert stored(app, job_id).crash_count == crash
        job = stored(app, job_id)
        assert (job.status, job.retry_count, job.error_type) == ("failed", 0, "Crashed")

    def test_several_started_suspects_are_not_blamed(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """If several suspects had started, none is blamed. Each then runs without the others, and
        if its worker dies again, that suspect is blamed."""
        ids = [enqueue() for _ in range(3)]
        for number in range(2):
            worker_id = register(state, f"w{number}", concurrency=1)
            specs = store.claim(worker_id, 3)
            store.mark_started(worker_id, specs[:2])
            store.rescue(worker_id, 0)
        assert [stored(app, job_id).crash_count for job_id in ids] == [0, 0, 0]
        worker_id = register(state, "w2", concurrency=1)
        specs = store.claim(worker_id, 3)
        assert store.lost_among_others(specs) == {spec.id for spec in specs[:2]}
        store.mark_started(worker_id, specs[:1])
        store.rescue(worker_id, 0)
        assert [stored(app, spec.id).crash_count for spec in specs] == [1, 0, 0]

    def test_released_suspect_is_still_lost_among_others(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """A suspect that was lost among others still runs without other suspects after a worker
        released it."""
        ids = [enqueue() for _ in range(2)]
        for number in range(2):
            worker_id = register(state, f"w{number}", concurrency=1)
            store.mark_started(worker_id, store.claim(worker_id, 2))
            store.rescue(worker_id, 0)
        worker_id = register(state, "w2", concurrency=1)
        released = OutcomeKind.GIVEN_BACK
        specs = store.claim(worker_id, 2)
        store.settle(worker_id, "w2", [(s, Outcome(s.id, s.attempt, released)) for s in specs])
        assert store.lost_among_others(store.claim(worker_id, 2)) == set(ids)

    def test_unstarted_suspect_is_not_blamed(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """A suspect that had not started when its worker died is not blamed."""
        job_id = enqueue()
        for number in range(5):
            worker_id = register(state, f"w{number}", concurrency=1)
            store.claim(worker_id, 1)
            store.rescue(worker_id, 0)
        assert (stored(app, job_id).status, stored(app, job_id).crash_count) == ("pending", 0)

    def test_start_of_earlier_attempt_proves_no_crash(
        self, app: Flask, store: Store, state: AppState
    ) -> None:
        """A job that started in an earlier attempt, but not in those that died since, is not
        blamed."""
        job_id = enqueue()
        for number in range(5):
            worker_id = register(state, f"w{number}", concurrency=1)
            specs = store.claim(worker_id, 1)
            if number == 0:
                store.mark_started(worker_id, specs)
            store.rescue(worker_id, 0)
        assert (stored(app, job_id).status, stored(app, job_id).crash_count) == ("pending", 0)

    def test_cancel_request_survives_death_of_worker(
        self, app: Flask, store: Store, worker: int
    ) -> None:
        """If its worker dies, a job with a cancel request is cancelled instead of rescued."""
        job_id = enqueue()
        store.claim(worker, 1)
        store.cancel([job_id])
        store.rescue(worker, 0)
        assert stored(app, job_id).status == "cancelled"

    def test_sweeper_waits_for_one_lease(self, app: Flask, state: AppState, worker: int) -> None:
        """A worker whose heartbeat does not change for one lease counts as dead."""
        store = state.store
        enqueue()
        store.claim(worker, 1)
        sweeper = Sweeper(store, lease=0.3)
        assert sweeper.sweep(0) == []
        store.beat(worker)
        assert sweeper.sweep(0) == []
        assert len(wait_until(lambda: sweeper.sweep(0), "the rescue")) == 1

    def test_sweeper_rescues_missing_process_at_once(self, state: AppState, worker: int) -> None:
        """On the same host, the jobs of a process that no longer exists are rescued without waiting
        for the lease."""
        store = state.store
        enqueue()
        store.claim(worker, 1)
        (process,) = (row.process for row in rows(store, Worker))
        gone = process.rsplit("/", 1)[0] + "/1"
        execute(store, sa.update(Worker).values(process=gone))
        assert len(Sweeper(store, lease=3600).sweep(0)) == 1

    def test_released_suspect_stays_a_suspect(
        self, state: AppState, store: Store, worker: int
    ) -> None:
        """A suspect that a stopping worker releases is still a suspect at its next claim."""
        enqueue()
        store.claim(worker, 1)
        store.rescue(worker, 0)
        second = register(state, "two")
        (spec,) = store.claim(second, 1)
        settle(store, second, spec, OutcomeKind.GIVEN_BACK)
        (again,) = store.claim(second, 1)
        assert again.suspect


class TestDue:
    def test_promote_moves_due_jobs(self, app: Flask, store: Store) -> None:
        """``promote`` makes only due jobs pending."""
        due = enqueue(run_at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1))
        later = enqueue(delay=60)
        assert store.promote() == 1
        assert stored(app, due).status == "pending"
        assert stored(app, later).status == "scheduled"

    def test_upcoming_returns_one_time_per_step(self, store: Store) -> None:
        """``upcoming`` returns one due time per step, within the horizon."""
        for delay in (1_000, 1_001, 1_002, 3_000, 9_000):
            enqueue(delay=delay)
        near, far = store.upcoming(6_000, 50)
        assert near == pytest.approx(1_000, abs=100)
        assert far == pytest.approx(3_000, abs=100)


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("waits_ms", [50, 5_000], ids=["redone", "waited for"])
def test_enqueue_waits_for_write_lock_of_host(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, waits_ms: int
) -> None:
    """While the host holds the write lock, transactions of flask-bgjobs wait, and are redone if
    SQLite's own busy timeout ends first."""
    monkeypatch.setattr("flask_bgjobs.store.dialects.sqlite._BUSY_TIMEOUT_MS", waits_ms)
    app = make_app()
    with app.app_context():
        host = state_of(app).db.engine.connect()
        host.exec_driver_sql("BEGIN IMMEDIATE")
        threading.Timer(1.0, host.close).start()
        job = run_background_job("tests.jobs.echo", session=None)
        assert stored(app, job).status == "pending"


def test_host_session_reads_jobs(app: Flask) -> None:
    """The host's session can load jobs through the model."""
    job_id = enqueue()
    assert state_of(app).db.session.get(Job, job_id).id == job_id


class TestInDoubt:
    """A commit without a reply may or may not have been done."""

    @pytest.mark.parametrize("was_done", [True, False])
    def test_settle_in_doubt_is_checked_again(
        self, app: Flask, store: Store, worker: int, was_done: bool
    ) -> None:
        """A repeated settle returns the recorded outcome or records it now, and never reports a
        lost lease."""
        job_id = enqueue(retries=2)
        (spec,) = store.claim(worker, 1)
        outcome = [(spec, make_outcome(spec, OutcomeKind.FAILED, error="no"))]
        if was_done:
            store.settle(worker, "one", outcome)
        (settled,) = store.settle(worker, "one", outcome, {spec.key})
        assert (settled.status, settled.retry_count) == ("retrying", 1)
        assert stored(app, job_id).retry_count == 1
        assert len(rows(store, Attempt)) == 1

    def test_rescued_job_in_doubt_is_lost(self, store: Store, worker: int) -> None:
        """After a rescue, an outcome in doubt is not reported as recorded."""
        enqueue()
        (spec,) = store.claim(worker, 1)
        store.rescue(worker, 0)
        (settled,) = store.settle(worker, "one", [(spec, make_outcome(spec))], {spec.key})
        assert settled.status is None

    def test_held_by_finds_claimed_jobs(self, store: Store, worker: int) -> None:
        """The jobs of a claim without a reply can be found by the worker's id."""
        ids = [enqueue(), enqueue()]
        store.claim(worker, 10)
        assert [spec.id for spec in store.held_by(worker)] == ids
        assert store.held_by(worker + 1) == []


class TestOrphans:
    def test_jobs_of_deleted_worker_are_rescued(
        self, app: Flask, state: AppState, worker: int
    ) -> None:
        """If a worker's row was deleted, the next sweep rescues its running jobs."""
        store = state.store
        job_id = enqueue()
        store.claim(worker, 1)
        execute(store, sa.delete(Worker))
        assert [settled.status for settled in Sweeper(store, lease=3600).sweep(0)] == ["pending"]
        job = stored(app, job_id)
        assert (job.status, job.suspect, job.retry_count) == ("pending", True, 0)

    def test_job_of_live_worker_is_no_orphan(self, store: Store, worker: int) -> None:
        """A job whose worker is alive is not rescued as an orphan."""
        enqueue()
        store.claim(worker, 1)
        assert store.rescue_orphans() == []


@pytest.mark.on("postgresql", "mysql")
class TestConcurrency:
    """Cases that need a database with several concurrent writers."""

    def test_claiming_worker_is_not_rescued(self, app: Flask, store: Store, worker: int) -> None:
        """A worker is not rescued during its claim, because the rescue would miss the claimed
        jobs."""
        job_id = enqueue()
        with store.engine.connect() as connection, connection.begin():
            store._claim(connection, worker, 1, None, (), True)
            assert store.rescue(worker, 0) is None
        assert [settled.job_id for settled in store.rescue(worker, 0) or ()] == [job_id]
        assert stored(app, job_id).status == "pending"

    def test_rescue_does_not_wait_for_other_workers(
        self, store: Store, state: AppState, worker: int
    ) -> None:
        """While another worker's job is locked, the jobs of a dead worker are rescued."""
        others = enqueue()
        store.claim(register(state, "two"), 1)
        job_id = enqueue()
        store.claim(worker, 1)
        with store.engine.connect() as connection, connection.begin():
            connection.execute(sa.update(Job).where(Job.id == others).values(progress=0.5))
            assert [settled.job_id for settled in store.rescue(worker, 0)] == [job_id]

    def test_promotion_skips_changing_jobs(self, app: Flask, store: Store) -> None:
        """A due job whose cancellation is not yet committed is not promoted."""
        job_id = enqueue(run_at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1))
        with store.engine.connect() as connection, connection.begin():
            connection.execute(sa.update(Job).values(status="cancelled"))
            assert store.promote() == 0
        assert store.promote() == 0
        assert stored(app, job_id).status == "cancelled"

    def test_connection_closed_by_server_is_replaced(self, app: Flask, store: Store) -> None:
        """The first statement after the server closed the connection succeeds, also if it is a
        read."""
        with store.engine.connect() as connection:
            number = number_of(connection)
            idle: Any = connection.connection.driver_connection
        with app.extensions["sqlalchemy"].engine.connect() as other:
            other.exec_driver_sql(END_CONNECTION[store.engine.name].format(number))
        descriptor = idle._sock.fileno() if _is_mysql(store) else idle.fileno()
        wait_until(lambda: select.select([descriptor], [], [], 0)[0], "the end of the connection")
        assert store.clock() is not None

    def test_deadline_ends_a_wait_for_a_lock(self, store: Store, worker: int) -> None:
        """A store with a deadline raises when a statement takes longer, and continues on a new
        connection."""
        prompt = store.with_deadline(0.5)
        with store.engine.connect() as connection, connection.begin():
            connection.execute(sa.update(Worker).values(name="locked"))
            with pytest.raises(sa.exc.OperationalError):
                prompt.beat(worker)
        assert prompt.beat(worker)
        prompt.dispose()

    def test_server_ends_idle_transaction(self, store: Store, worker: int) -> None:
        """If a worker stalls within a transaction, the server releases its locks after the
        deadline."""
        stalled = store.with_deadline(1.0)
        connection = stalled.engine.connect()
        connection.execute(sa.update(Worker).values(name="locked"))
        begun = dt.datetime.now()
        assert store.beat(worker)
        assert dt.datetime.now() - begun > dt.timedelta(seconds=0.5)
        connection.invalidate()
        connection.close()
        stalled.dispose()

    @pytest.mark.on("postgresql")
    def test_planner_settings_affect_only_worker_transactions(
        self, app: Flask, store: Store
    ) -> None:
        """A worker's transactions never scan the table; the planner settings of other connections
        do not change."""
        shows = "SELECT current_setting('enable_seqscan'), current_setting('jit')"

        def settings(connection: sa.Connection) -> tuple[str, ...]:
            return tuple(connection.exec_driver_sql(shows).one())

        with app.extensions["sqlalchemy"].engine.connect() as connection:
            usual = settings(connection)
        worker_store = store.with_deadline(5.0)
        assert worker_store.transaction(settings) == ("off", "off")
        # The settings end with the transaction, also on the same connection.
        assert worker_store.autocommit(settings) == usual
        assert store.transaction(settings) == usual
        worker_store.dispose()


@pytest.mark.slow
def test_jitter_spreads_simultaneous_retries(store: Store, state: AppState, worker: int) -> None:
    """The retries of 2,000 jobs that fail together are spread over the range of the jitter, and
    waking up for them takes at most one trigger per step."""
    options = JobOptions(retries=1, retry_delay=30, jitter=0.5)
    enqueue_many(state, "tests.jobs.fail", None, [["no"]] * 2_000, options)
    specs = store.claim(worker, 2_000)
    settled = store.settle(worker, "one", [(s, make_outcome(s, OutcomeKind.FAILED)) for s in specs])
    assert collections.Counter(entry.status for entry in settled) == {"retrying": 2_000}
    with store.read() as connection:
        dues = connection.scalars(sa.select(Job.run_at)).all()
    per_second = collections.Counter(due.replace(microsecond=0) for due in dues)
    assert len(per_second) >= 30
    assert max(per_second.values()) < 200
    assert len(store.upcoming(60, 0.05)) <= 60 / 0.05


class TestReading:
    def test_database_ends_long_query(self, store: Store) -> None:
        """The database ends a query that exceeds the limit, and the connection can run the next
        query."""
        began = time.monotonic()
        with pytest.raises(QueryTimeout), store.reading(0.3), store.read() as connection:
            connection.exec_driver_sql(product_of(900, 900))
        assert 0.3 <= time.monotonic() - began < DEADLINE_SECONDS
        assert rows(store, Job) == []

    def test_each_query_has_its_own_limit(self, store: Store) -> None:
        """The time between two queries does not count, and after the block no limit remains."""
        with store.reading(0.5), store.read() as connection:
            connection.exec_driver_sql("SELECT 1")
            time.sleep(0.6)
            assert connection.exec_driver_sql(product_of(20)).scalar() == 20 * 900
        with store.reading(0.02), store.read():
            pass
        with store.read() as connection:
            assert connection.exec_driver_sql(product_of(900)).scalar() == 900 * 900

    def test_block_reads_from_one_connection(self, store: Store) -> None:
        """All reads of a block share one connection, which returns to the pool at its end."""
        with store.reading(1.0):
            with store.read() as first, store.read() as second:
                assert first is second
            with store.read() as third:
                assert third is first
            assert store.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
        assert store.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with store.read() as one, store.read() as another:
            assert one is not another

    @pytest.mark.on("mysql")
    def test_dead_connection_is_not_reused(self, store: Store) -> None:
        """If the connection dies after a read, the block ends without an error, and the connection
        is not reused."""
        with store.reading(5.0), store.read() as connection:
            number = number_of(connection)
            with store.host_engine.connect() as other:
                other.exec_driver_sql(END_CONNECTION["mysql"].format(number))
        assert rows(store, Job) == []

    def test_block_continues_after_an_error(self, store: Store) -> None:
        """After a query that failed, the next query of the block succeeds."""
        with store.reading(1.0):
            with pytest.raises(sa.exc.DBAPIError), store.read() as connection:
                connection.exec_driver_sql("SELECT nothing FROM nowhere")
            assert rows(store, Job) == []

    def test_other_errors_are_not_timeouts(self, store: Store) -> None:
        """A query that fails for another reason does not raise ``QueryTimeout``."""
        with (
            pytest.raises(sa.exc.DBAPIError) as raised,
            store.reading(1.0),
            store.read() as connection,
        ):
            connection.exec_driver_sql("SELECT nothing FROM nowhere")
        assert not isinstance(raised.value, QueryTimeout)


def test_database_errors_hide_parameters(app: Flask, store: Store, worker: int) -> None:
    """The message of a database error does not contain parameters or results of jobs."""
    with pytest.raises(sa.exc.DBAPIError) as failure, store.engine.connect() as connection:
        connection.execute(sa.text("SELECT no_such_column, :secret"), {"secret": "hunter2"})
    # The driver's own message comes before this mark, and psycopg2 quotes the statement in it.
    assert "hunter2" not in str(failure.value).partition("[SQL:")[2]
    assert "hide_parameters" in str(failure.value)
