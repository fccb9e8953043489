"""Claim: taking pending jobs in the order of an index, best first."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Collection, Sequence
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

_IN_ORDER = (
    sa.select(JOBS.c.id)
    .where(has_status(JobStatus.PENDING))
    .order_by(JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.id)
)
_WITHOUT_SUSPECTS = _IN_ORDER.where(~JOBS.c.suspect)
_OF_ANY_QUEUE = {
    in_order: in_order.where(sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean))
    for in_order in (_IN_ORDER, _WITHOUT_SUSPECTS)
}
_STATUS_OF_CLAIMER = (
    sa.select(WORKERS.c.status)
    .where(WORKERS.c.id == sa.bindparam("claimer"))
    # Shared, so that a rescue waits: what is claimed now must not be missing in it.
    .with_for_update(read=True)
)
_ANY_PAUSED = sa.select(sa.literal(1)).where(Queue.paused_at.is_not(None)).limit(1)
_BEHIND = _OF_ANY_QUEUE[_IN_ORDER].offset(sa.bindparam("behind", type_=sa.Integer)).limit(1)
ORDER_COLUMNS = (JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.queue)
_REGISTERED_SECONDS = 86_400.0
"""Then a queue is registered again, long before its row would be pruned."""
_WINDOW = 1_000
"""Pending jobs that a claim reads at least to find those of open queues."""
_MANY_QUEUES = 200
"""Of a worker's list: it is first seen which of more than these hold jobs, or each empty one would
cost a statement."""
_QUEUES_AT_ONCE, _ROWS_AT_ONCE = 100, 10_000
"""How many queues one statement merges, and how many of their jobs it reads."""


def _is_open(queue: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    is_paused = sa.exists().where(Queue.name == queue, Queue.paused_at.is_not(None))
    left_out = sa.bindparam("left_out", expanding=True, type_=sa.String)
    return sa.and_(queue.not_in(left_out), ~is_paused)


def _best_first(spec: JobSpec) -> tuple[Any, ...]:
    return -spec.priority, spec.run_at, spec.id


def pending_in(queue: str | sa.ColumnElement[str], in_order: sa.Select[Any]) -> sa.Select[Any]:
    """Those of the jobs ``in_order`` that are in ``queue``."""
    return by_index(in_order.where(JOBS.c.queue == queue), "ix_bgjobs_job_claim_queue")


class Claims(Queues):
    """The statements of a claim."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_queues: dict[str, float] = {}
        """When each queue was registered, by ``time.monotonic()``."""
        self._statements: dict[tuple[Any, ...], Any] = {}
        """By what builds them, and its arguments."""

    def claim(
        self,
        worker_id: int,
        limit: int,
        queues: Sequence[str] | None = None,
        *,
        without: Collection[str] = (),
        suspects: bool = True,
    ) -> list[JobSpec]:
        """Up to ``limit`` pending jobs, now running under ``worker_id``, best first.

        :param queues: served in this strict order; ``None`` serves all by priority.
        :param without: queues that are left out.
        :param suspects: whether suspects are claimed as well.
        """
        specs = self.transaction(
            lambda c: self._claim(c, worker_id, limit, queues, without, suspects)
        )
        now = time.monotonic()
        for name in self._unregistered(specs):
            self._known_queues[name] = now
        return specs

    def claim_one(self, worker_id: int, job_id: int) -> list[JobSpec]:
        """The job ``job_id``, now running under ``worker_id``, due or not; empty if it may not."""
        waiting = (JobStatus.PENDING.value, JobStatus.SCHEDULED.value)
        candidates = sa.select(JOBS.c.id).where(JOBS.c.id == job_id, JOBS.c.status.in_(waiting))
        return self.transaction(lambda c: self._claim_from(c, worker_id, candidates, 1))

    def _claim(
        self,
        connection: sa.Connection,
        worker_id: int,
        limit: int,
        queues: Sequence[str] | None,
        without: Collection[str],
        suspects: bool,
    ) -> list[JobSpec]:
        if not self._is_alive(connection, worker_id):
            return []
        in_order = _IN_ORDER if suspects else _WITHOUT_SUSPECTS
        if queues is not None:
            specs = self._claim_by_queue(connection, in_order, worker_id, limit, queues, without)
        elif without or connection.scalar(_ANY_PAUSED):
            specs = self._claim_from_open(connection, in_order, worker_id, limit, without)
        else:
            specs = self._claim_from(connection, worker_id, _OF_ANY_QUEUE[in_order], limit)
        if names := self._unregistered(specs):
            self.register_queues(connection, names)
        return specs

    def _claim_by_queue(
        self,
        connection: sa.Connection,
        in_order: sa.Select[Any],
        worker_id: int,
        limit: int,
        queues: Sequence[str],
        without: Collection[str],
    ) -> list[JobSpec]:
        """Claim from these queues, the first of them first."""
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
            pending = pending_in(name, in_order)
            specs += self._claim_from(connection, worker_id, pending, wanted)
        return specs

    def _claim_from_open(
        self,
        connection: sa.Connection,
        in_order: sa.Select[Any],
        worker_id: int,
        limit: int,
        without: Collection[str],
    ) -> list[JobSpec]:
        """Claim the best jobs of all queues that are neither paused nor left out.

        The best jobs of all queues are read first, and those of closed queues dropped. Only where
        closed queues fill that window, the open queues are looked for one after the other.
        """
        left_out = sorted(without)
        window = max(_WINDOW, 4 * limit)
        statement = self._built_once(self._open_in_window, in_order)
        found = connection.scalars(statement, {"window": window, "left_out": left_out})
        specs = self._claim_ids(connection, worker_id, found.all(), limit)
        if len(specs) == limit or not self._has_more_than(connection, window - len(specs)):
            return specs
        while len(specs) < limit:
            wanted = limit - len(specs)
            ids = self._best_of_open_queues(connection, in_order, wanted, left_out)
            more = self._claim_ids(connection, worker_id, ids, wanted)
            if not more:
                break
            specs += more
        return specs

    def _claim_ids(
        self, connection: sa.Connection, worker_id: int, ids: Sequence[int], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of these jobs that no other transaction keeps locked."""
        specs: list[JobSpec] = []
        begin = 0
        while begin < len(ids) and len(specs) < limit:
            # No more than are wanted, or they would be locked for nothing.
            chosen = ids[begin : begin + limit - len(specs)]
            begin += len(chosen)
            candidates = by_id(_IN_ORDER.where(JOBS.c.id.in_(chosen)))
            specs += self._claim_from(connection, worker_id, candidates, len(chosen))
        return specs

    def _has_more_than(self, connection: sa.Connection, number: int) -> bool:
        """Whether more than so many jobs are pending."""
        return connection.scalar(_BEHIND, {"behind": number}) is not None

    def _best_of_open_queues(
        self,
        connection: sa.Connection,
        in_order: sa.Select[Any],
        wanted: int,
        left_out: Sequence[str],
    ) -> list[int]:
        """The ids of the best jobs of open queues, best first; at least a hundred or ``wanted``.

        The best jobs of all are in the queues whose first jobs are the best. The list ends where a
        queue that was not read, or was not read far enough, could have a better job.
        """
        most = min(wanted, _QUEUES_AT_ONCE)
        parameters = {"left_out": left_out, "heads": most + 1}
        heads = connection.execute(self._built_once(self._heads, in_order), parameters).all()
        names = [head.queue for head in heads[:most]]
        if not names:
            return []
        depth = min(2 * wanted, _ROWS_AT_ONCE // len(names))
        rows = [
            (row.claim_rank, row.run_at, row.id, row.queue)
            for row in self._first_of_each(connection, in_order, names, depth)
        ]
        rows.sort()
        read = collections.Counter(queue for *_, queue in rows)
        last = {queue: (rank, due, job_id) for rank, due, job_id, queue in rows}
        ends = [last[queue] for queue, number in read.items() if number == depth]
        ends += [(head.claim_rank, head.run_at, head.id) for head in heads[most:]]
        end = min(ends, default=None)
        return [row[2] for row in rows if end is None or row[:3] <= end]

    def _first_of_each(
        self,
        connection: sa.Connection,
        in_order: sa.Select[Any],
        names: Sequence[str],
        depth: int,
    ) -> Sequence[sa.Row[Any]]:
        """The first ``depth`` pending jobs of each queue."""
        statement = self._built_once(self._union_of_first, in_order, len(names))
        given = {f"queue_{n}": name for n, name in enumerate(names)}
        return connection.execute(statement, {**given, "depth": depth}).all()

    def _union_of_first(self, in_order: sa.Select[Any], number: int) -> sa.CompoundSelect[Any]:
        """The first jobs of so many queues."""
        depth = sa.bindparam("depth", type_=sa.Integer)
        firsts = (
            self.limit_ordered(
                pending_in(sa.bindparam(f"queue_{n}"), in_order).add_columns(*ORDER_COLUMNS), depth
            ).subquery()
            for n in range(number)
        )
        return sa.union_all(*(sa.select(each) for each in firsts))

    def _built_once(self, build: Callable[..., Any], *arguments: Any) -> Any:
        """What ``build`` makes of these, kept: to build a statement takes longer than to run it."""
        key = build, *arguments
        if key not in self._statements:
            self._statements[key] = build(*arguments)
        return self._statements[key]

    def _open_in_window(self, in_order: sa.Select[Any]) -> sa.Select[Any]:
        limit = sa.bindparam("window", type_=sa.Integer)
        pending = _OF_ANY_QUEUE[in_order].add_columns(*ORDER_COLUMNS)
        best = self.limit_ordered(pending, limit).subquery("best")
        return (
            sa.select(best.c.id)
            .where(_is_open(best.c.queue))
            .order_by(best.c.claim_rank, best.c.run_at, best.c.id)
        )

    def _heads(self, in_order: sa.Select[Any]) -> sa.Select[Any]:
        """The best jobs among the first of each open queue, by one index seek per queue."""
        names = self.queues_holding(JobStatus.PENDING)
        first = JOBS.alias("first")
        its_first = (
            sa.select(first.c.id)
            .where(first.c.status == sa.literal_column("'pending'", sa.String))
            .where(first.c.queue == names.c.name)
            .order_by(first.c.claim_rank, first.c.run_at, first.c.id)
            .limit(1)
        )
        if in_order is _WITHOUT_SUSPECTS:
            its_first = its_first.where(~first.c.suspect)
        for dialect in ("mysql", "mariadb"):
            its_first = its_first.with_hint(
                first, "FORCE INDEX (ix_bgjobs_job_claim_queue)", dialect
            )
        heads = (
            sa.select(names.c.name, its_first.scalar_subquery().label("job_id"))
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
        """Claim the first ``limit`` of the ordered ``candidates``, best first."""
        is_usual = candidates is _OF_ANY_QUEUE[_IN_ORDER]
        build = self._claim_of
        update = self._built_once(build, candidates) if is_usual else build(candidates)
        rows = connection.execute(update, {"claimer": worker_id, "at_most": limit}).all()
        # RETURNING promises no order.
        return sorted(map(JobSpec._make, rows), key=_best_first)

    def _claim_of(self, candidates: sa.Select[Any]) -> sa.Update:
        first = self.limit_ordered(candidates, sa.bindparam("at_most", type_=sa.Integer))
        return (
            sa.update(JOBS)
            .where(JOBS.c.id.in_(self.locked(first)))
            .values(transitions.claimed(sa.bindparam("claimer"), self.now))
            .returning(*SPEC_COLUMNS)
        )

    def _is_alive(self, connection: sa.Connection, worker_id: int) -> bool:
        return connection.scalar(_STATUS_OF_CLAIMER, {"claimer": worker_id}) == "alive"

    def _unregistered(self, specs: Sequence[JobSpec]) -> set[str]:
        """The queues that were not registered within the last day."""
        begin = time.monotonic() - _REGISTERED_SECONDS
        names = {spec.queue for spec in specs}
        return {name for name in names if self._known_queues.get(name, -math.inf) < begin}
