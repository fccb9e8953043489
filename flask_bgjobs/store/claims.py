"""Claim: taking pending jobs in the order of an index, best first."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ..models import IS_OF_ANY_QUEUE, Job, Queue, by_index, has_status
from ..spec import JobSpec
from ..states import JobStatus
from .database import JOBS, WORKERS
from .queues import Queues

SPEC_COLUMNS = [
    (JOBS.c[Job.__mapper__.attrs[name].columns[0].name]).label(name) for name in JobSpec._fields
]

_IN_ORDER = (
    sa.select(JOBS.c.id)
    .where(has_status(JobStatus.PENDING))
    .order_by(JOBS.c.claim_rank, JOBS.c.run_at, JOBS.c.id)
)
_PENDING = _IN_ORDER.where(sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean))
_STATUS_OF_CLAIMER = (
    sa.select(WORKERS.c.status)
    .where(WORKERS.c.id == sa.bindparam("claimer"))
    # Shared, so that a rescue waits: what is claimed now must not be missing in it.
    .with_for_update(read=True)
)
_PAUSED_QUEUES = sa.select(Queue.name).where(Queue.paused_at.is_not(None))
_NEXT_PENDING_QUEUE = (
    sa.select(JOBS.c.queue)
    .where(has_status(JobStatus.PENDING), JOBS.c.queue > sa.bindparam("after"))
    .order_by(JOBS.c.queue)
    .limit(1)
)


def _best_first(spec: JobSpec) -> tuple[Any, ...]:
    return -spec.priority, spec.run_at, spec.id


class Claims(Queues):
    """The statements of a claim."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_queues: set[str] = set()

    def claim(
        self,
        worker_id: int,
        limit: int,
        queues: Sequence[str] | None = None,
        *,
        without: Collection[str] = (),
    ) -> list[JobSpec]:
        """Up to ``limit`` pending jobs, now running under ``worker_id``, best first.

        :param queues: served in this strict order; ``None`` serves all by priority.
        :param without: queues that are left out.
        """
        specs = self.transaction(lambda c: self._claim(c, worker_id, limit, queues, without))
        self._known_queues |= {spec.queue for spec in specs}
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
    ) -> list[JobSpec]:
        if not self._is_alive(connection, worker_id):
            return []
        specs: list[JobSpec] = []
        for candidates in self._candidates(connection, limit, queues, without):
            specs += self._claim_from(connection, worker_id, candidates, limit - len(specs))
            if len(specs) >= limit:
                break
        self._register_queues(connection, {spec.queue for spec in specs})
        return specs

    def _claim_from(
        self, connection: sa.Connection, worker_id: int, candidates: sa.Select[Any], limit: int
    ) -> list[JobSpec]:
        """Claim the first ``limit`` of the ordered ``candidates``, best first."""
        update = self._claim_of_pending if candidates is _PENDING else self._claim_of(candidates)
        rows = connection.execute(update, {"claimer": worker_id, "at_most": limit}).all()
        # RETURNING promises no order.
        return sorted(map(JobSpec._make, rows), key=_best_first)

    @functools.cached_property
    def _claim_of_pending(self) -> sa.Update:
        # To build it takes longer than to run it.
        return self._claim_of(_PENDING)

    def _claim_of(self, candidates: sa.Select[Any]) -> sa.Update:
        first = self.first(candidates, sa.bindparam("at_most", type_=sa.Integer))
        return (
            sa.update(JOBS)
            .where(JOBS.c.id.in_(self.locked(first)))
            .values(claimed_values(sa.bindparam("claimer"), self.now))
            .returning(*SPEC_COLUMNS)
        )

    def _is_alive(self, connection: sa.Connection, worker_id: int) -> bool:
        return connection.scalar(_STATUS_OF_CLAIMER, {"claimer": worker_id}) == "alive"

    def _candidates(
        self,
        connection: sa.Connection,
        limit: int,
        queues: Sequence[str] | None,
        without: Collection[str],
    ) -> Iterator[sa.Select[Any]]:
        closed = {*connection.scalars(_PAUSED_QUEUES), *without}
        if queues is not None:
            yield from (self._pending_in(name) for name in queues if name not in closed)
        elif closed:
            # Read queue by queue, or the claim would step over every row of the closed ones.
            open_queues = [name for name in self._pending_queues(connection) if name not in closed]
            if open_queues:
                yield self._merged(open_queues, limit)
        else:
            yield _PENDING

    def _pending_in(self, queue: str) -> sa.Select[Any]:
        return by_index(_IN_ORDER.where(JOBS.c.queue == queue), "ix_bgjobs_job_claim_queue")

    def _merged(self, queues: Sequence[str], limit: int) -> sa.Select[Any]:
        pending = (
            self._pending_in(name).add_columns(JOBS.c.claim_rank, JOBS.c.run_at) for name in queues
        )
        best_of_each = (self.first(each, limit).subquery() for each in pending)
        best = sa.union_all(*(sa.select(each) for each in best_of_each)).subquery()
        # Joined again with the table, whose rows can be locked.
        return (
            sa.select(JOBS.c.id)
            .join_from(best, JOBS, JOBS.c.id == best.c.id)
            .where(has_status(JobStatus.PENDING))
            .order_by(best.c.claim_rank, best.c.run_at, best.c.id)
        )

    def _pending_queues(self, connection: sa.Connection) -> Iterator[str]:
        """The queues that hold pending jobs, one index seek each."""
        name = connection.scalar(_NEXT_PENDING_QUEUE, {"after": ""})
        while name is not None:
            yield name
            name = connection.scalar(_NEXT_PENDING_QUEUE, {"after": name})

    def _register_queues(self, connection: sa.Connection, names: set[str]) -> None:
        for name in sorted(names - self._known_queues):
            self.register_queue(connection, name)


def claimed_values(worker_id: Any, claimed_at: Any) -> dict[str, Any]:
    """What a claim writes into a job."""
    return {
        "status": JobStatus.RUNNING.value,
        "attempt": JOBS.c.attempt + 1,
        "worker_id": worker_id,
        "claimed_at": claimed_at,
        "started_at": None,
        "finished_at": None,
        "progress": None,
        "progress_note": None,
    }
