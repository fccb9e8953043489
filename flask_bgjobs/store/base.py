"""Every statement that changes a row, in the order of a job's life.

:class:`Store` is the contract and all that the databases share; a subclass per dialect
supplies the clock, the claim and the tolerant insert. Transactions that it owns are redone
when the database asks for it (deadlock, serialization failure, busy).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime as dt
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import scoped_session

from ..errors import UniqueKeyTaken
from ..models import Attempt, Job, JobLog, Queue, Worker, detached_job
from ..spec import JobSpec, Outcome, Report, Settled
from ..states import FINAL, WAITING, JobStatus, OutcomeKind, Settlement, settlement

T = TypeVar("T")

_REDO_SECONDS = 30.0
"""How long a transaction that the database turned away is tried again."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.005, 0.5
_PROMOTE_AT_ONCE = 1_000
"""Rows per transaction, so that enqueues are not kept waiting behind a long write."""
_UNIQUE_TRIES = 10

_job = cast(sa.Table, Job.__table__)
_worker = cast(sa.Table, Worker.__table__)
_attempt = cast(sa.Table, Attempt.__table__)
SPEC_COLUMNS = [
    (_job.c[Job.__mapper__.attrs[field.name].columns[0].name]).label(field.name)
    for field in dataclasses.fields(JobSpec)
]
_NO_ATTEMPT_ROW = frozenset({OutcomeKind.COMPLETED, OutcomeKind.GIVEN_BACK, OutcomeKind.SNOOZED})


@dataclasses.dataclass(frozen=True, slots=True)
class NewJob:
    """A checked job, ready to be inserted."""

    values: Mapping[str, Any]
    """Column values by attribute name of :class:`~flask_bgjobs.models.Job`."""
    delay_seconds: float | None = None
    """From now by the database's clock, unless ``run_at`` is given."""
    run_at: dt.datetime | None = None
    """UTC, without ``tzinfo``."""


@dataclasses.dataclass(slots=True)
class ActionResult:
    """What an action did to each of the jobs that it was asked to change."""

    done: list[int] = dataclasses.field(default_factory=list)
    requested: list[int] = dataclasses.field(default_factory=list)
    """Running jobs that were asked to stop."""
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    """Why the others were left alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseView:
    """What the database says of the jobs that a worker runs."""

    attempts: Mapping[int, int]
    """Job id to attempt, of every job that is still this worker's."""
    cancelling: frozenset[int]
    """Those of them that were asked to stop."""


class Store(abc.ABC):
    """The statements of one app's tables on one database.

    :param engine: the host's engine for the tables.
    :param session: the host's session, for databases that have only one connection.
    :param schema: the schema of the host's metadata, if it has one.
    :param max_crashes: proved crashes at which a job is failed.
    """

    now: sa.ColumnElement[dt.datetime]
    """The database's clock, read when the statement runs."""
    insert_into: Callable[[sa.Table], sa.Insert]
    """The dialect's own ``insert()``."""

    def __init__(
        self,
        engine: sa.Engine,
        session: scoped_session[Any],
        *,
        schema: str | None,
        max_crashes: int,
    ) -> None:
        self.host_engine = engine
        self.host_session = session
        self.execution_options: dict[str, Any] = (
            {} if schema is None else {"schema_translate_map": {None: schema}}
        )
        self._max_crashes = max_crashes
        self._known_queues: set[str] = set()
        self._own_engine: sa.Engine | None = None
        self._own_engine_pid = 0
        self._own_engine_lock = threading.Lock()
        self._prepare_statements()

    # The database at hand

    @abc.abstractmethod
    def after(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[dt.datetime]:
        """The database's clock plus ``seconds``."""

    @abc.abstractmethod
    def make_engine(self) -> sa.Engine:
        """A small engine of our own on the host's database."""

    @abc.abstractmethod
    def is_redoable(self, error: DBAPIError) -> bool:
        """Whether the same transaction may succeed when it is simply done again."""

    @abc.abstractmethod
    def insert_tolerantly(self, statement: sa.Insert) -> sa.Insert:
        """``statement``, inserting nothing where ``unique_hash`` is taken."""

    @property
    def always_joins(self) -> bool:
        """Whether there is only one connection, so that a commit of ours would be the host's."""
        return False

    def prepare(self, *, wal: bool) -> str | None:
        """Make the database ready for workers; what was changed, for the log.

        :param wal: whether SQLite's write-ahead log may be turned on.
        """
        return None

    @property
    def engine(self) -> sa.Engine:
        """Our own engine, made on first use in each process: a fork must not share connections."""
        with self._own_engine_lock:
            if self._own_engine is None or self._own_engine_pid != os.getpid():
                engine = self.make_engine()
                self._own_engine = engine.execution_options(**self.execution_options)
                self._own_engine_pid = os.getpid()
            return self._own_engine

    def dispose(self) -> None:
        """Close the connections of our own engine; the next use opens new ones."""
        with self._own_engine_lock:
            if self._own_engine is not None:
                self._own_engine.dispose()

    def transaction(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns, done in a transaction of our own.

        ``work`` runs again, from its start, when the database turns the transaction away for
        a passing reason, for up to 30 s.
        """

        def attempt() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        return self.redo(attempt)

    def redo(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; called again while the database is busy, for up to 30 s."""
        deadline = time.monotonic() + _REDO_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except DBAPIError as error:
                if not self.is_redoable(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read with: it takes no write lock and commits nothing."""
        with self.engine.connect() as connection:
            yield connection

    # 1 enqueue

    def insert(self, connection: sa.Connection, jobs: Sequence[NewJob]) -> list[Job]:
        """The inserted jobs, in the order given; with a taken ``unique_key``, its holder.

        :param connection: of our own transaction or of the one that the jobs join.
        """
        if len(jobs) == 1 and jobs[0].values["unique_hash"] is not None:
            return [self._insert_unique(connection, jobs[0])]
        rows = connection.execute(
            self._insert.returning(*self._inserted, sort_by_parameter_order=True),
            [_insert_parameters(job) for job in jobs],
            execution_options=self.execution_options,
        ).all()
        return [_inserted_job(job, row) for job, row in zip(jobs, rows, strict=True)]

    def _insert_unique(self, connection: sa.Connection, job: NewJob) -> Job:
        statement = self.insert_tolerantly(self._insert).returning(*self._inserted)
        for _ in range(_UNIQUE_TRIES):
            row = connection.execute(
                statement, _insert_parameters(job), execution_options=self.execution_options
            ).one_or_none()
            if row is not None:
                return _inserted_job(job, row)
            holder = connection.execute(
                sa.select(_job).where(_job.c.unique_hash == job.values["unique_hash"]),
                execution_options=self.execution_options,
            ).one_or_none()
            if holder is not None:
                found = _loaded_job(holder)
                found.deduplicated = True
                return found
            # The holder finished between the two statements: the key is free again.
        raise UniqueKeyTaken(
            f"the unique_key {job.values['unique_key']!r} changes hands too quickly"
        )

    # 2 claim

    def claim(
        self, worker_id: int, limit: int, queues: Sequence[str] | None = None
    ) -> list[JobSpec]:
        """Up to ``limit`` pending jobs, now running under ``worker_id``, best first.

        :param queues: served in this strict order; ``None`` serves all by priority.
        """
        return self.transaction(lambda c: self._claim(c, worker_id, limit, queues))

    def claim_one(self, worker_id: int, job_id: int) -> list[JobSpec]:
        """The job ``job_id``, now running under ``worker_id``, due or not; empty if it may not."""
        waiting = (JobStatus.PENDING.value, JobStatus.SCHEDULED.value)
        candidates = sa.select(_job.c.id).where(_job.c.id == job_id, _job.c.status.in_(waiting))
        return self.transaction(lambda c: self.claim_from(c, worker_id, candidates, 1))

    def _claim(
        self, connection: sa.Connection, worker_id: int, limit: int, queues: Sequence[str] | None
    ) -> list[JobSpec]:
        if not self._is_alive(connection, worker_id):
            return []
        specs: list[JobSpec] = []
        for candidates in self._candidates(connection, limit, queues):
            specs += self.claim_from(connection, worker_id, candidates, limit - len(specs))
            if len(specs) >= limit:
                break
        self._register_queues(connection, {spec.queue for spec in specs})
        return specs

    @abc.abstractmethod
    def claim_from(
        self, connection: sa.Connection, worker_id: int, candidates: sa.Select[Any], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of the ordered ``candidates``, best first."""

    def _candidates(
        self, connection: sa.Connection, limit: int, queues: Sequence[str] | None
    ) -> Iterator[sa.Select[Any]]:
        paused = set(connection.scalars(self._paused_queues))
        if queues is not None:
            yield from (self._pending_in(name) for name in queues if name not in paused)
        elif paused:
            # Read queue by queue, or the claim would step over every row of the paused ones.
            open_queues = [name for name in self._pending_queues(connection) if name not in paused]
            if open_queues:
                yield self._merged(open_queues, limit)
        else:
            yield self._pending

    def _pending_in(self, queue: str) -> sa.Select[Any]:
        return self._pending.where(_job.c.queue == queue)

    def _merged(self, queues: Sequence[str], limit: int) -> sa.Select[Any]:
        best_of_each = (
            self._pending_in(name)
            .add_columns(_job.c.claim_rank, _job.c.run_at)
            .limit(limit)
            .subquery()
            for name in queues
        )
        best = sa.union_all(*(sa.select(each) for each in best_of_each)).subquery()
        return sa.select(best.c.id).order_by(best.c.claim_rank, best.c.run_at, best.c.id)

    def _pending_queues(self, connection: sa.Connection) -> Iterator[str]:
        """The queues that hold pending jobs, one index seek each."""
        name = connection.scalar(self._next_pending_queue, {"after": ""})
        while name is not None:
            yield name
            name = connection.scalar(self._next_pending_queue, {"after": name})

    def _register_queues(self, connection: sa.Connection, names: set[str]) -> None:
        for name in sorted(names - self._known_queues):
            known = connection.scalar(sa.select(Queue.name).where(Queue.name == name))
            if known is None:
                connection.execute(sa.insert(Queue).values(name=name, created_at=self.now))
            self._known_queues.add(name)

    # 3 start and run

    def mark_started(self, worker_id: int, specs: Iterable[JobSpec]) -> set[int]:
        """Commit the start of jobs before their code runs; the ids that are still ours."""

        def work(connection: sa.Connection) -> set[int]:
            started = set()
            for spec in specs:
                changed = connection.execute(
                    sa.update(Job)
                    .where(*_fence(spec.id, spec.attempt, worker_id))
                    .values(started_at=self.now)
                )
                if changed.rowcount:
                    started.add(spec.id)
            return started

        return self.transaction(work)

    def observe(self, worker_id: int, reports: Mapping[tuple[int, int], Report]) -> LeaseView:
        """Record what running jobs reported, and see which are still ours or cancelled.

        :param reports: by job id and attempt.
        """
        if reports:
            self.transaction(lambda c: self._write_reports(c, worker_id, reports))
        with self.read() as connection:
            rows = connection.execute(self._running_of, {"worker": worker_id}).all()
        return LeaseView(
            attempts={row.id: row.attempt for row in rows},
            cancelling=frozenset(row.id for row in rows if row.cancel_requested_at is not None),
        )

    def _write_reports(
        self,
        connection: sa.Connection,
        worker_id: int,
        reports: Mapping[tuple[int, int], Report],
    ) -> None:
        for (job_id, attempt), report in reports.items():
            values = _report_values(report)
            changed = connection.execute(
                sa.update(Job)
                .where(*_fence(job_id, attempt, worker_id))
                .values(**values or {"attempt": attempt})
            )
            if changed.rowcount:
                self._write_lines(connection, job_id, attempt, report)

    def _write_lines(
        self, connection: sa.Connection, job_id: int, attempt: int, report: Report
    ) -> None:
        if report.lines:
            connection.execute(
                sa.insert(JobLog).values(job_id=job_id, attempt=attempt, created_at=self.now),
                [{"message": line} for line in report.lines],
            )

    # 4 settle

    def settle(
        self, worker_id: int, worker_name: str, finished: Sequence[tuple[JobSpec, Outcome]]
    ) -> list[Settled]:
        """Record how attempts ended, all in one transaction; only those still ours change.

        :returns: one per attempt, in order; ``status`` is ``None`` where the lease was lost.
        """
        return self.transaction(lambda c: self._settle(c, worker_id, worker_name, finished))

    def _settle(
        self,
        connection: sa.Connection,
        worker_id: int,
        worker_name: str,
        finished: Sequence[tuple[JobSpec, Outcome]],
    ) -> list[Settled]:
        ours = self._still_running(connection, worker_id, [spec.id for spec, _ in finished])
        settled: list[Settled] = []
        updates: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = []
        for spec, outcome in finished:
            if ours.get(spec.id, (0, False))[0] != spec.attempt:
                settled.append(Settled(spec, outcome, None))
                continue
            decided = settlement(
                outcome.kind,
                retry_count=spec.retry_count,
                retries=spec.retries,
                crash_count=spec.crash_count,
                max_crashes=self._max_crashes,
                cancel_requested=ours[spec.id][1],
                retry_delay=spec.retry_policy.delay,
                delay_seconds=outcome.delay_seconds,
            )
            updates.append(_settle_parameters(worker_id, spec, outcome, decided))
            if outcome.kind not in _NO_ATTEMPT_ROW:
                attempts.append(_attempt_values(worker_id, worker_name, spec, outcome))
            if outcome.report is not None:
                self._write_lines(connection, spec.id, spec.attempt, outcome.report)
            settled.append(
                Settled(spec, outcome, decided.status, decided.retry_count, decided.delay_seconds)
            )
        if updates:
            connection.execute(self._settle_update, updates)
        if attempts:
            connection.execute(self._insert_attempt, attempts)
        return settled

    def _still_running(
        self, connection: sa.Connection, worker_id: int, ids: Sequence[int]
    ) -> dict[int, tuple[int, bool]]:
        rows = connection.execute(
            self._running_of.where(_job.c.id.in_(ids)).order_by(_job.c.id).with_for_update(),
            {"worker": worker_id},
        )
        return {row.id: (row.attempt, row.cancel_requested_at is not None) for row in rows}

    # Workers and their leases

    def register_worker(self, values: Mapping[str, Any]) -> int:
        """The id of a new, living worker."""

        def work(connection: sa.Connection) -> int:
            result = connection.execute(
                sa.insert(Worker).values(
                    **values, status="alive", started_at=self.now, heartbeat_at=self.now
                )
            )
            (worker_id,) = result.inserted_primary_key or (0,)
            return int(worker_id)

        return self.transaction(work)

    def beat(self, worker_id: int) -> bool:
        """Show that a worker lives. ``False``: its lease was taken away, it must start over."""
        changed = self.transaction(lambda c: c.execute(self._beat, {"worker": worker_id}).rowcount)
        return bool(changed)

    def stop_worker(self, worker_id: int) -> None:
        """Record that a worker ended cleanly, with nothing left to it."""
        self.transaction(
            lambda c: c.execute(
                sa.update(Worker)
                .where(Worker.id == worker_id, Worker.status == "alive")
                .values(status="stopped", stopped_at=self.now)
            )
        )

    def living_workers(self) -> list[sa.Row[Any]]:
        """Id, name, host, process and beats of the workers that hold a lease."""
        with self.read() as connection:
            return list(
                connection.execute(
                    sa.select(Worker.id, Worker.name, Worker.host, Worker.process, Worker.beats)
                    .where(Worker.status == "alive")
                    .order_by(Worker.id)
                )
            )

    def rescue(self, worker_id: int, beats: int) -> list[Settled]:
        """Take the lease of a silent worker, and its running jobs, in one transaction.

        :param beats: the last heartbeat seen; nothing happens when there was one since.
        :returns: one per job taken from it.
        """
        return self.transaction(lambda c: self._rescue(c, worker_id, beats))

    def _rescue(self, connection: sa.Connection, worker_id: int, beats: int) -> list[Settled]:
        taken = connection.execute(
            sa.update(Worker)
            .where(Worker.id == worker_id, Worker.status == "alive", Worker.beats == beats)
            .values(status="dead", stopped_at=self.now)
        )
        if not taken.rowcount:
            return []
        name = connection.scalar(sa.select(Worker.name).where(Worker.id == worker_id)) or ""
        rows = connection.execute(
            sa.select(*SPEC_COLUMNS)
            .where(_job.c.status == JobStatus.RUNNING.value, _job.c.worker_id == worker_id)
            .order_by(_job.c.id)
            .with_for_update()
        )
        specs = [JobSpec(**row._mapping) for row in rows]
        lost = [(spec, _lost_outcome(spec, name)) for spec in specs]
        return self._settle(connection, worker_id, name, lost) if lost else []

    # Due work

    def promote(self) -> int:
        """Move jobs that are due to ``pending``; how many were moved."""
        moved = 0
        while True:
            batch: int = self.transaction(lambda c: c.execute(self._promote).rowcount)
            moved += batch
            if batch < _PROMOTE_AT_ONCE:
                return moved

    def upcoming(self, horizon_seconds: float, step_seconds: float) -> list[float]:
        """Seconds until jobs are due, ascending; none of two within ``step_seconds``.

        :param horizon_seconds: how far to look ahead.
        """
        with self.read() as connection:
            dues = {
                due
                for status in (JobStatus.SCHEDULED.value, JobStatus.RETRYING.value)
                for due in self._upcoming(connection, status, horizon_seconds, step_seconds)
            }
        return sorted(dues)

    def _upcoming(
        self, connection: sa.Connection, status: str, horizon: float, step: float
    ) -> Iterator[float]:
        now: dt.datetime = connection.execute(sa.select(self.now)).scalar_one()
        end = now + dt.timedelta(seconds=horizon)
        last = now - dt.timedelta(days=1)
        while True:
            due = connection.scalar(self._next_due, {"status": status, "after": last, "until": end})
            if due is None:
                return
            yield (due - now).total_seconds()
            last = max(due, now) + dt.timedelta(seconds=step)

    def unfinished(self, queues: Sequence[str] | None) -> bool:
        """Whether any job is pending or running in ``queues``, or in all."""
        statement = sa.select(_job.c.id).where(
            _job.c.status.in_([JobStatus.PENDING.value, JobStatus.RUNNING.value])
        )
        if queues is not None:
            statement = statement.where(_job.c.queue.in_(queues))
        with self.read() as connection:
            return connection.execute(statement.limit(1)).first() is not None

    # By hand

    def get(self, job_id: int) -> Job | None:
        """The job, loaded and detached; ``None`` where there is none."""
        with self.read() as connection:
            row = connection.execute(sa.select(_job).where(_job.c.id == job_id)).one_or_none()
        return None if row is None else _loaded_job(row)

    def cancel(self, ids: Sequence[int]) -> ActionResult:
        """Cancel jobs that wait, and ask running ones to stop."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            for job_id, status in found.items():
                if status in WAITING:
                    result.done.append(job_id)
                elif status == JobStatus.RUNNING:
                    result.requested.append(job_id)
                else:
                    result.skipped[job_id] = f"it is already {status}"
            self._update_each(
                connection,
                result.done,
                status=JobStatus.CANCELLED.value,
                finished_at=self.now,
                unique_hash=None,
            )
            self._update_each(
                connection,
                result.requested,
                cancel_requested_at=sa.func.coalesce(_job.c.cancel_requested_at, self.now),
            )
            return result

        return self._act(ids, work)

    def retry(self, ids: Sequence[int]) -> ActionResult:
        """Make failed, cancelled or retrying jobs pending again, with all their retries."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            for job_id, status in found.items():
                if status not in (
                    JobStatus.FAILED,
                    JobStatus.CANCELLED.value,
                    JobStatus.RETRYING.value,
                ):
                    result.skipped[job_id] = f"it is {status}"
                elif self._retake_key(connection, job_id):
                    result.done.append(job_id)
                else:
                    result.skipped[job_id] = "another job holds its unique_key"
            self._update_each(
                connection,
                result.done,
                status=JobStatus.PENDING.value,
                run_at=self.now,
                retry_count=0,
                crash_count=0,
                suspect=False,
                cancel_requested_at=None,
                started_at=None,
                finished_at=None,
            )
            return result

        return self._act(ids, work)

    def delete(self, ids: Sequence[int]) -> ActionResult:
        """Delete jobs that do not run, with their attempts and log lines."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            for job_id, status in found.items():
                if status == JobStatus.RUNNING:
                    result.skipped[job_id] = "it is running; cancel it first"
                elif self._delete_one(connection, job_id):
                    result.done.append(job_id)
                else:
                    result.skipped[job_id] = "a row of another table refers to it"
            return result

        return self._act(ids, work)

    def _act(
        self,
        ids: Sequence[int],
        work: Callable[[sa.Connection, Mapping[int, str]], ActionResult],
    ) -> ActionResult:
        def locked(connection: sa.Connection) -> ActionResult:
            rows = connection.execute(
                sa.select(_job.c.id, _job.c.status)
                .where(_job.c.id.in_(ids))
                .order_by(_job.c.id)
                .with_for_update()
            )
            found = {row.id: row.status for row in rows}
            result = work(connection, found)
            result.skipped.update({i: "it does not exist" for i in ids if i not in found})
            return result

        return self.transaction(locked)

    def _update_each(self, connection: sa.Connection, ids: Sequence[int], **values: Any) -> None:
        if ids:
            connection.execute(sa.update(_job).where(_job.c.id.in_(ids)).values(**values))

    def _retake_key(self, connection: sa.Connection, job_id: int) -> bool:
        key = connection.scalar(sa.select(_job.c.unique_key).where(_job.c.id == job_id))
        if key is None:
            return True
        try:
            with connection.begin_nested():
                self._update_each(connection, [job_id], unique_hash=unique_hash(key))
        except IntegrityError:
            return False
        return True

    def _delete_one(self, connection: sa.Connection, job_id: int) -> bool:
        try:
            with connection.begin_nested():
                connection.execute(sa.delete(_job).where(_job.c.id == job_id))
                connection.execute(sa.delete(Attempt).where(Attempt.job_id == job_id))
                connection.execute(sa.delete(JobLog).where(JobLog.job_id == job_id))
        except IntegrityError:
            return False
        return True

    # Statements, built once

    def _prepare_statements(self) -> None:
        delay = sa.bindparam("delay_seconds", type_=sa.Double)
        run_at = sa.bindparam("given_run_at", type_=_job.c.run_at.type)
        self._insert = self.insert_into(_job).values(
            created_at=self.now,
            run_at=sa.func.coalesce(
                run_at, sa.case((delay.is_not(None), self.after(delay)), else_=self.now)
            ),
        )
        self._inserted = (_job.c.id, _job.c.created_at, _job.c.run_at)
        self._pending = (
            sa.select(_job.c.id)
            .where(_job.c.status == JobStatus.PENDING.value)
            .order_by(_job.c.claim_rank, _job.c.run_at, _job.c.id)
        )
        self._paused_queues = sa.select(Queue.name).where(Queue.paused_at.is_not(None))
        self._next_pending_queue = (
            sa.select(_job.c.queue)
            .where(_job.c.status == JobStatus.PENDING.value, _job.c.queue > sa.bindparam("after"))
            .order_by(_job.c.queue)
            .limit(1)
        )
        self._running_of = sa.select(_job.c.id, _job.c.attempt, _job.c.cancel_requested_at).where(
            _job.c.status == JobStatus.RUNNING.value, _job.c.worker_id == sa.bindparam("worker")
        )
        self._settle_update = self._make_settle_update(delay)
        self._insert_attempt = sa.insert(_attempt)
        self._beat = (
            sa.update(_worker)
            .where(_worker.c.id == sa.bindparam("worker"), _worker.c.status == "alive")
            .values(heartbeat_at=self.now, beats=_worker.c.beats + 1)
        )
        due = (
            sa.select(_job.c.id)
            .where(
                _job.c.status.in_([JobStatus.SCHEDULED.value, JobStatus.RETRYING.value]),
                _job.c.run_at <= self.now,
            )
            .limit(_PROMOTE_AT_ONCE)
        )
        self._promote = (
            sa.update(_job).where(_job.c.id.in_(due)).values(status=JobStatus.PENDING.value)
        )
        self._next_due = (
            sa.select(_job.c.run_at)
            .where(
                _job.c.status == sa.bindparam("status"),
                _job.c.run_at > sa.bindparam("after", type_=_job.c.run_at.type),
                _job.c.run_at <= sa.bindparam("until", type_=_job.c.run_at.type),
            )
            .order_by(_job.c.run_at)
            .limit(1)
        )

    def _make_settle_update(self, delay: sa.ColumnElement[float]) -> sa.Update:
        keep_meta = sa.bindparam("new_meta", type_=sa.Text)
        columns = {
            name: sa.bindparam(f"new_{name}", type_=_job.c[name].type)
            for name in (
                "status",
                "retry_count",
                "crash_count",
                "suspect",
                "started_at",
                "finished_at",
                "result",
                "error_type",
                "error",
            )
        }
        return (
            sa.update(_job)
            .where(
                _job.c.id == sa.bindparam("job_id"),
                _job.c.status == JobStatus.RUNNING.value,
                _job.c.attempt == sa.bindparam("fence_attempt"),
                _job.c.worker_id == sa.bindparam("fence_worker"),
            )
            .values(
                **columns,
                run_at=sa.case((delay.is_not(None), self.after(delay)), else_=_job.c.run_at),
                meta=sa.func.coalesce(keep_meta, _job.c.meta),
                progress=sa.func.coalesce(
                    sa.bindparam("new_progress", type_=sa.Double), _job.c.progress
                ),
                progress_note=sa.func.coalesce(
                    sa.bindparam("new_note", type_=sa.String), _job.c.progress_note
                ),
                unique_hash=sa.case(
                    (sa.bindparam("is_final", type_=sa.Boolean), None), else_=_job.c.unique_hash
                ),
            )
        )

    def _is_alive(self, connection: sa.Connection, worker_id: int) -> bool:
        status = connection.scalar(sa.select(_worker.c.status).where(_worker.c.id == worker_id))
        return status == "alive"


def unique_hash(unique_key: str) -> str:
    """What a job with this ``unique_key`` holds in a unique column while it is active."""
    return hashlib.sha256(unique_key.encode()).hexdigest()


def _fence(job_id: int, attempt: int, worker_id: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        Job.id == job_id,
        Job.status == JobStatus.RUNNING.value,
        Job.attempt == attempt,
        Job.worker_id == worker_id,
    )


def _insert_parameters(job: NewJob) -> dict[str, Any]:
    values = {_column_name(key): value for key, value in job.values.items()}
    return {**values, "given_run_at": job.run_at, "delay_seconds": job.delay_seconds}


def _column_name(attribute: str) -> str:
    return str(Job.__mapper__.attrs[attribute].columns[0].name)


def _inserted_job(job: NewJob, row: sa.Row[Any]) -> Job:
    nothing_yet = dict.fromkeys(Job.__mapper__.column_attrs.keys())
    return detached_job({**nothing_yet, **job.values, **row._mapping})


def _loaded_job(row: sa.Row[Any]) -> Job:
    columns = Job.__mapper__.column_attrs
    return detached_job({column.key: row._mapping[column.columns[0]] for column in columns})


def _report_values(report: Report) -> dict[str, Any]:
    values = {
        "progress": report.progress,
        "progress_note": report.progress_note,
        "meta_json": report.meta_json,
    }
    return {key: value for key, value in values.items() if value is not None}


def _lost_outcome(spec: JobSpec, worker_name: str) -> Outcome:
    """The outcome of a dead worker's job: only a suspect that had started is to blame."""
    if spec.suspect and spec.started_at is not None:
        return Outcome(
            spec.id,
            spec.attempt,
            OutcomeKind.CRASHED,
            error_type="Crashed",
            error=f"Crashed: worker {worker_name} died while it ran this job alone",
        )
    return Outcome(
        spec.id,
        spec.attempt,
        OutcomeKind.LOST,
        error_type="WorkerLost",
        error=f"WorkerLost: worker {worker_name} died",
    )


def _times(spec: JobSpec, outcome: Outcome) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Start and end of an attempt's code by the database's clock, from local durations."""
    if outcome.wait_seconds is None:
        return spec.started_at, None
    started = spec.claimed_at + dt.timedelta(seconds=outcome.wait_seconds)
    return started, started + dt.timedelta(seconds=outcome.run_seconds)


def _settle_parameters(
    worker_id: int, spec: JobSpec, outcome: Outcome, decided: Settlement
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    is_final = decided.status in FINAL
    report = outcome.report or Report()
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "fence_worker": worker_id,
        "delay_seconds": decided.delay_seconds,
        "is_final": is_final,
        "new_status": decided.status.value,
        "new_retry_count": decided.retry_count,
        "new_crash_count": decided.crash_count,
        "new_suspect": decided.suspect,
        "new_started_at": started_at,
        "new_finished_at": (finished_at or dt.datetime.now(dt.UTC).replace(tzinfo=None))
        if is_final
        else None,
        "new_result": outcome.result_json,
        "new_error_type": outcome.error_type,
        "new_error": outcome.error,
        "new_meta": report.meta_json,
        "new_progress": report.progress,
        "new_note": report.progress_note,
    }


def _attempt_values(
    worker_id: int, worker_name: str, spec: JobSpec, outcome: Outcome
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    return {
        "job_id": spec.id,
        "attempt": spec.attempt,
        "outcome": outcome.kind.value,
        "worker_id": worker_id,
        "worker_name": worker_name,
        "started_at": started_at,
        "finished_at": finished_at or dt.datetime.now(dt.UTC).replace(tzinfo=None),
        "error_type": outcome.error_type,
        "error": outcome.error,
        "traceback": outcome.traceback,
    }
