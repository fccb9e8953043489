"""Claim: take pending jobs for a worker, in the order of an index."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.records import JobSpec
from ...job.statuses import JobStatus
from ...models import IS_OF_ANY_QUEUE, Job, Queue, by_index, has_status
from .. import transitions
from ..database import JOBS, WORKERS, by_id
from .queue import PAUSED_QUEUES, Queues

SPEC_COLUMNS = [
    (JOBS.c[Job.__mapper__.attrs[name].columns[0].name]).label(name) for name in JobSpec._fields
]

_PENDING = (
    sa.select(JOBS.c.id)
    .where(has_status(JobStatus.PENDING))
    .order_by(JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.id)
)
_PENDING_WITHOUT_SUSPECTS = _PENDING.where(~JOBS.c.suspect)
_OF_ANY_QUEUE = {
    ordered: ordered.where(sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean))
    for ordered in (_PENDING, _PENDING_WITHOUT_SUSPECTS)
}
_CLAIMER = (
    sa.select(WORKERS.c.status, sa.exists().where(Queue.paused_at.is_not(None)).label("any_paused"))
    .where(WORKERS.c.id == sa.bindparam("claimer"))
    # The shared lock makes a rescue of this worker wait: it must include the jobs claimed here.
    .with_for_update(read=True)
)
_PENDING_AT_OFFSET = (
    _OF_ANY_QUEUE[_PENDING].offset(sa.bindparam("behind", type_=sa.Integer)).limit(1)
)
ORDER_COLUMNS = (JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.queue)
# Cast: SQLite may hold a value of any type, which could not be compared with the others.
_RANK = sa.cast(JOBS.c.claim_rank, sa.BigInteger).label("claim_rank")
_REGISTRATION_SECONDS = 86_400.0
"""How long a registration counts. It is renewed long before the queue's row would be pruned."""
_WINDOW_JOBS = 1_000
"""Minimum number of pending jobs that a claim reads to find jobs of open queues."""
_MANY_QUEUES = 200
"""A worker with a longer list of queues first asks which of them have pending jobs, because each
empty queue would cost a statement."""
_QUEUES_PER_STATEMENT, _JOBS_PER_STATEMENT = 100, 10_000
"""How many queues one statement reads from, and how many of their jobs it reads in total."""


def _is_open(queue: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """The condition that a queue is neither paused nor excluded by the caller."""
    is_paused = sa.exists().where(Queue.name == queue, Queue.paused_at.is_not(None))
    excluded = sa.bindparam("left_out", expanding=True, type_=sa.String)
    return sa.and_(queue.not_in(excluded), ~is_paused)


def pending_in(queue: str | sa.ColumnElement[str], ordered: sa.Select[Any]) -> sa.Select[Any]:
    """Restrict the query ``ordered`` to one queue, and to the index for single queues."""
    return by_index(ordered.where(JOBS.c.queue == queue), "ix_bgjobs_job_claim_queue")


class Claims(Queues):
    """The statements that claim jobs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_queues: dict[str, float] = {}
        """When this process last registered each queue, by ``time.monotonic()``."""
        self._statements: dict[tuple[Any, ...], Any] = {}
        """Built statements, by the function that builds them and its arguments."""

    def claim(
        self,
        worker_id: int,
        limit: int,
        queues: Sequence[str] | None = None,
        *,
        without: Collection[str] = (),
        suspects: bool = True,
    ) -> list[JobSpec]:
        """Claim up to ``limit`` pending jobs for a worker.

        Within a queue, or across all queues when ``queues`` is ``None``, jobs are claimed by
        priority, then by due time, then by id.

        :param queues: queues to claim from, in strict order; ``None``: all queues, by priority.
        :param without: queues to exclude.
        :param suspects: whether to claim suspects as well.
        :returns: the claimed jobs in claim order; also empty when the worker has lost its lease.
        """
        specs = self.transaction(
            lambda c: self._claim(c, worker_id, limit, queues, without, suspects)
        )
        self.note_queues(specs)
        return specs

    def note_queues(self, specs: Iterable[JobSpec]) -> None:
        """Note that the queues of jobs were registered by a claim that is committed now."""
        now = time.monotonic()
        for name in self._queues_to_register(specs):
            self._known_queues[name] = now

    def claim_one(self, worker_id: int, job_id: int) -> list[JobSpec]:
        """Claim one pending or scheduled job, even if it is not due yet. A scheduled job with
        limits cannot be claimed: see :meth:`.promote.Due.promote_one`.

        :returns: a list with the job; empty when it cannot be claimed.
        """
        waiting = (JobStatus.PENDING.value, JobStatus.SCHEDULED.value)
        candidates = sa.select(JOBS.c.id).where(JOBS.c.id == job_id, JOBS.c.status.in_(waiting))
        without_limits = sa.or_(JOBS.c.status == JobStatus.PENDING.value, ~transitions.HAS_LIMITS)
        allowed = candidates.where(without_limits)
        return self.transaction(lambda c: self._claim_from(c, worker_id, allowed, 1))

    def _claim(self, connection: sa.Connection, worker_id: int, *wishes: Any) -> list[JobSpec]:
        claimer = self.lock_claimer(connection, worker_id)
        return self.claim_for(claimer, connection, worker_id, *wishes)

    def lock_claimer(self, connection: sa.Connection, worker_id: int) -> Any:
        """Lock the row of a worker, so that nobody rescues it meanwhile, and read what
        :meth:`claim_for` needs."""
        return connection.execute(_CLAIMER, {"claimer": worker_id}).first()

    def claim_for(
        self,
        claimer: Any,
        connection: sa.Connection,
        worker_id: int,
        limit: int,
        queues: Sequence[str] | None,
        without: Collection[str],
        suspects: bool,
    ) -> list[JobSpec]:
        """Do the work of :meth:`claim` within a larger transaction of ours.

        :param claimer: the result of :meth:`lock_claimer`.
        """
        if claimer is None or claimer.status != "alive":
            return []
        ordered = _PENDING if suspects else _PENDING_WITHOUT_SUSPECTS
        if queues is not None:
            specs = self._claim_by_queue(connection, ordered, worker_id, limit, queues, without)
        elif without or claimer.any_paused:
            specs = self._claim_from_open_queues(connection, ordered, worker_id, limit, without)
        else:
            specs = self._claim_from(connection, worker_id, _OF_ANY_QUEUE[ordered], limit)
        if names := self._queues_to_register(specs):
            self.register_queues(connection, names)
        return specs

    def _claim_by_queue(
        self,
        connection: sa.Connection,
        ordered: sa.Select[Any],
        worker_id: int,
        limit: int,
        queues: Sequence[str],
        without: Collection[str],
    ) -> list[JobSpec]:
        """Claim from ``queues`` in their order."""
        closed = {*connection.scalars(PAUSED_QUEUES), *without}
        served = [name for name in queues if name not in closed]
        if len(served) > _MANY_QUEUES:
            names = sa.select(self.queues_holding(JobStatus.PENDING).c.name)
            holding = set(connection.scalars(names))
            served = [name for name in served if name in holding]
        specs: list[JobSpec] = []
        for name in served:
            if len(specs) == limit:
                break
            wanted = limit - len(specs)
            pending = pending_in(name, ordered)
            specs += self._claim_from(connection, worker_id, pending, wanted)
        return specs

    def _claim_from_open_queues(
        self,
        connection: sa.Connection,
        ordered: sa.Select[Any],
        worker_id: int,
        limit: int,
        without: Collection[str],
    ) -> list[JobSpec]:
        """Claim from all open queues: those that are neither paused nor in ``without``.

        First read a window of the best pending jobs of all queues, and drop those whose queue is
        not open. If too few are left and more jobs are pending, read the open queues one by one.
        """
        excluded = sorted(without)
        window = max(_WINDOW_JOBS, 4 * limit)
        statement = self._cached_statement(self._open_window_query, ordered)
        found = connection.scalars(statement, {"window": window, "left_out": excluded})
        specs = self._claim_ids(connection, worker_id, found.all(), limit)
        if len(specs) == limit or not self._has_more_pending_than(connection, window - len(specs)):
            return specs
        while len(specs) < limit:
            wanted = limit - len(specs)
            ids = self._best_jobs_of_open_queues(connection, ordered, wanted, excluded)
            more = self._claim_ids(connection, worker_id, ids, wanted)
            if not more:
                break
            specs += more
        return specs

    def _claim_ids(
        self, connection: sa.Connection, worker_id: int, ids: Sequence[int], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of these jobs whose rows no other transaction has locked."""
        specs: list[JobSpec] = []
        position = 0
        while position < len(ids) and len(specs) < limit:
            # Take no more ids than are wanted: each of their rows is locked.
            chosen = ids[position : position + limit - len(specs)]
            position += len(chosen)
            candidates = by_id(_PENDING.where(JOBS.c.id.in_(chosen)))
            specs += self._claim_from(connection, worker_id, candidates, len(chosen))
        return specs

    def _has_more_pending_than(self, connection: sa.Connection, number: int) -> bool:
        """Whether more than ``number`` jobs are pending."""
        return connection.scalar(_PENDING_AT_OFFSET, {"behind": number}) is not None

    def _best_jobs_of_open_queues(
        self,
        connection: sa.Connection,
        ordered: sa.Select[Any],
        wanted: int,
        excluded: Sequence[str],
    ) -> list[int]:
        """The ids of the best jobs of open queues, in claim order.

        The best jobs are in the queues with the best first jobs, so only those queues are read. The
        list ends where a queue that was not read, or not read far enough, could have a better job.
        It has at least ``wanted`` ids, or a hundred if fewer, where there are as many jobs.
        """
        max_queues = min(wanted, _QUEUES_PER_STATEMENT)
        parameters = {"left_out": excluded, "heads": max_queues + 1}
        heads = connection.execute(
            self._cached_statement(self._queue_heads_query, ordered), parameters
        ).all()
        names = [head.queue for head in heads[:max_queues]]
        if not names:
            return []
        depth = min(2 * wanted, _JOBS_PER_STATEMENT // len(names))
        rows = [
            (row.claim_rank, row.run_at, row.id, row.queue)
            for row in self._first_jobs_of_each(connection, ordered, names, depth)
        ]
        rows.sort()
        rows_read = collections.Counter(queue for *_, queue in rows)
        last_row = {queue: (rank, due, job_id) for rank, due, job_id, queue in rows}
        bounds = [last_row[queue] for queue, number in rows_read.items() if number == depth]
        bounds += [(head.claim_rank, head.run_at, head.id) for head in heads[max_queues:]]
        bound = min(bounds, default=None)
        return [row[2] for row in rows if bound is None or row[:3] <= bound]

    def _first_jobs_of_each(
        self,
        connection: sa.Connection,
        ordered: sa.Select[Any],
        names: Sequence[str],
        depth: int,
    ) -> Sequence[sa.Row[Any]]:
        """The first ``depth`` pending jobs of each queue."""
        statement = self._cached_statement(self._first_jobs_query, ordered, len(names))
        given = {f"queue_{n}": name for n, name in enumerate(names)}
        return connection.execute(statement, {**given, "depth": depth}).all()

    def _first_jobs_query(self, ordered: sa.Select[Any], number: int) -> sa.CompoundSelect[Any]:
        """The query for the first jobs of ``number`` queues."""
        depth = sa.bindparam("depth", type_=sa.Integer)
        firsts = (
            self.limit_ordered(
                pending_in(sa.bindparam(f"queue_{n}"), ordered).add_columns(*ORDER_COLUMNS), depth
            ).subquery()
            for n in range(number)
        )
        return sa.union_all(*(sa.select(each) for each in firsts))

    def _cached_statement(self, build: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``build(*arguments)``, cached: building a statement takes longer than
        running it."""
        key = build, *arguments
        if key not in self._statements:
            self._statements[key] = build(*arguments)
        return self._statements[key]

    def _open_window_query(self, ordered: sa.Select[Any]) -> sa.Select[Any]:
        """The query for the jobs of open queues among the first ``window`` pending jobs."""
        limit = sa.bindparam("window", type_=sa.Integer)
        pending = _OF_ANY_QUEUE[ordered].add_columns(*ORDER_COLUMNS)
        best = self.limit_ordered(pending, limit).subquery("best")
        return (
            sa.select(best.c.id)
            .where(_is_open(best.c.queue))
            .order_by(best.c.claim_rank, best.c.run_at, best.c.id)
        )

    def _queue_heads_query(self, ordered: sa.Select[Any]) -> sa.Select[Any]:
        """The query for the first job of each open queue, best queues first.

        It takes one index seek per queue.
        """
        names = self.queues_holding(JobStatus.PENDING)
        first = JOBS.alias("first")
        first_job = (
            sa.select(first.c.id)
            .where(first.c.status == sa.literal_column("'pending'", sa.String))
            .where(first.c.queue == names.c.name)
            .order_by(first.c.claim_rank, first.c.run_at, first.c.id)
            .limit(1)
        )
        if ordered is _PENDING_WITHOUT_SUSPECTS:
            first_job = first_job.where(~first.c.suspect)
        for dialect in ("mysql", "mariadb"):
            first_job = first_job.with_hint(
                first, "FORCE INDEX (ix_bgjobs_job_claim_queue)", dialect
            )
        heads = (
            sa.select(names.c.name, first_job.scalar_subquery().label("job_id"))
            .where(names.c.name.is_not(None), _is_open(names.c.name))
            .cte("heads")
        )
        return (
            sa.select(JOBS.c.id, *ORDER_COLUMNS)
            .join_from(heads, JOBS, JOBS.c.id == heads.c.job_id)
            .order_by(JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.id)
            .limit(sa.bindparam("heads", type_=sa.Integer))
        )

    def _claim_from(
        self, connection: sa.Connection, worker_id: int, candidates: sa.Select[Any], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of the ordered ``candidates``; return them in claim order."""
        is_usual = candidates is _OF_ANY_QUEUE[_PENDING]
        build = self._claim_statement
        update = self._cached_statement(build, candidates) if is_usual else build(candidates)
        rows = list(connection.execute(update, {"claimer": worker_id, "at_most": limit}))
        # RETURNING gives rows in no particular order.
        rows.sort(key=lambda row: (row.claim_rank, row.run_at, row.id))
        return [JobSpec._make(row[:-1]) for row in rows]

    def _claim_statement(self, candidates: sa.Select[Any]) -> sa.Update:
        first = self.limit_ordered(candidates, sa.bindparam("at_most", type_=sa.Integer))
        return (
            sa.update(JOBS)
            .where(JOBS.c.id.in_(self.locked(first)))
            .values(transitions.claimed(sa.bindparam("claimer"), self.now))
            .returning(*SPEC_COLUMNS, _RANK)
        )

    def _queues_to_register(self, specs: Iterable[JobSpec]) -> set[str]:
        """The queues of the jobs that this process has not registered within the last day."""
        oldest = time.monotonic() - _REGISTRATION_SECONDS
        names = {spec.queue for spec in specs}
        return {name for name in names if self._known_queues.get(name, -math.inf) < oldest}
