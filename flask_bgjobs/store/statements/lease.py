"""Workers and their leases: heartbeats, and the rescue of a dead worker's jobs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.records import JobSpec, Settled, lost_outcome
from ...job.row_check import checked
from ...job.statuses import JobStatus, OutcomeKind, lost_kind
from ...models import Worker
from ..database import ATTEMPTS, JOBS, WORKERS
from .audit import Actor, Audits
from .claim import SPEC_COLUMNS
from .settle import Settles

_NO_WORKER = 0
"""An id that is never given to a worker."""


class Leases(Settles, Audits):
    """The statements about workers, and about the jobs that they hold."""

    def register_worker(self, values: Mapping[str, Any]) -> int:
        """Insert the row of a new worker, with status ``alive``.

        :returns: its id.
        """

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
        """Record a worker's heartbeat.

        :returns: ``False`` when the worker has lost its lease and must register under a new id.
        """
        alive = (
            sa.update(Worker)
            .where(Worker.id == worker_id, Worker.status == "alive")
            .values(heartbeat_at=self.now, beats=Worker.beats + 1)
        )
        return bool(self.autocommit(lambda c: c.execute(alive).rowcount))

    def stop_worker(self, worker_id: int) -> None:
        """Record that a worker ended cleanly and holds no jobs.

        A worker that still holds jobs, because their outcomes could not be recorded, keeps the
        status ``alive``. Its heartbeat then stays unchanged, and another worker rescues the jobs.
        """
        holds_jobs = sa.exists().where(
            JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id == worker_id
        )
        self.transaction(
            lambda c: c.execute(
                sa.update(Worker)
                .where(Worker.id == worker_id, Worker.status == "alive", ~holds_jobs)
                .values(status="stopped", stopped_at=self.now)
            )
        )

    def drain_worker(self, worker_id: int, by: Actor | None = None) -> bool:
        """Ask a worker to finish its running jobs and then to end.

        The worker reads the request within its poll interval.

        :returns: ``False`` when the worker has ended, or had been asked before.
        """

        def work(connection: sa.Connection) -> bool:
            asked = connection.execute(
                sa.update(Worker)
                .where(
                    Worker.id == worker_id,
                    Worker.status == "alive",
                    Worker.drain_requested_at.is_(None),
                )
                .values(drain_requested_at=self.now)
            )
            if asked.rowcount:
                name = connection.scalar(sa.select(Worker.name).where(Worker.id == worker_id))
                self.audit(connection, by, "drain", subject=name)
            return bool(asked.rowcount)

        return self.transaction(work)

    def living_workers(self) -> list[sa.Row[Any]]:
        """Id, name, host, process and heartbeat count of the workers that hold a lease."""
        living = (
            sa.select(Worker.id, Worker.name, Worker.host, Worker.process, Worker.beats)
            .where(Worker.status == "alive")
            .order_by(Worker.id)
        )
        return self.autocommit(lambda c: list(c.execute(living)))

    def rescue(self, worker_id: int, beats: int) -> list[Settled] | None:
        """Mark a silent worker dead and take its running jobs, in one transaction.

        Jobs whose rows another transaction has locked are left to :meth:`rescue_orphans`.

        :param beats: the worker's heartbeat count when it was last seen.
        :returns: one entry for each job taken; ``None``, with nothing changed, when there was a
            heartbeat since, or while the worker is claiming jobs: a rescue must include those.
        """
        return self.transaction(lambda c: self._rescue(c, worker_id, beats))

    def _rescue(
        self, connection: sa.Connection, worker_id: int, beats: int
    ) -> list[Settled] | None:
        silent = sa.select(WORKERS.c.id).where(
            WORKERS.c.id == worker_id, WORKERS.c.status == "alive", WORKERS.c.beats == beats
        )
        if connection.scalar(silent.with_for_update(skip_locked=True)) is None:
            return None
        connection.execute(
            sa.update(Worker)
            .where(Worker.id == worker_id)
            .values(status="dead", stopped_at=self.now)
        )
        return self._rescue_jobs(connection, worker_id, is_first=True)

    def rescue_orphans(self) -> list[Settled]:
        """Take running jobs whose worker is not alive.

        Either the worker's row was deleted or edited, or the row of the job was locked when the
        worker's other jobs were rescued.

        :returns: one entry for each job.
        """
        living = sa.select(WORKERS.c.id).where(WORKERS.c.status == "alive")
        orphans = (
            sa.select(JOBS.c.worker_id)
            .where(
                JOBS.c.status == JobStatus.RUNNING.value,
                sa.or_(JOBS.c.worker_id.not_in(living), JOBS.c.worker_id.is_(None)),
            )
            .distinct()
        )
        owners = self.autocommit(lambda c: c.scalars(orphans).all())
        return [
            settled
            for owner in owners
            for settled in self.transaction(functools.partial(self._rescue_jobs, worker_id=owner))
        ]

    def held_by(self, worker_id: int) -> list[JobSpec]:
        """The running jobs of a worker, started or not."""
        return self.autocommit(lambda c: self._held_by(c, worker_id))

    def lost_among_others(self, suspects: Sequence[JobSpec]) -> set[int]:
        """The ids of the suspects whose last worker died while it ran several suspects."""
        # Ordered by attempt, so that the newest row of a job wins. An attempt that was given back
        # has no row.
        attempts = (
            sa.select(ATTEMPTS.c.job_id, ATTEMPTS.c.outcome)
            .where(ATTEMPTS.c.job_id.in_([spec.id for spec in suspects]))
            .order_by(ATTEMPTS.c.job_id, ATTEMPTS.c.attempt)
        )
        last = self.autocommit(lambda c: {row.job_id: row.outcome for row in c.execute(attempts)})
        return {job_id for job_id, kind in last.items() if kind == OutcomeKind.LOST_AMONG.value}

    def _count_started_suspects(self, connection: sa.Connection, worker_id: int) -> int:
        started = sa.select(sa.func.count()).where(
            JOBS.c.status == JobStatus.RUNNING.value,
            JOBS.c.worker_id == worker_id,
            JOBS.c.suspect,
            JOBS.c.started_at.is_not(None),
        )
        return int(connection.scalar(started) or 0)

    def _rescue_jobs(
        self, connection: sa.Connection, worker_id: int | None, *, is_first: bool = False
    ) -> list[Settled]:
        """Settle the running jobs of a worker that is not alive.

        :param is_first: whether this is the rescue of the worker itself, not of remaining jobs.
        """
        if worker_id is None:
            # An edited row has no worker. The fence of the settle needs an id: set an unused one.
            worker_id = _NO_WORKER
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id.is_(None))
                .values(worker_id=worker_id)
            )
        name = connection.scalar(sa.select(Worker.name).where(Worker.id == worker_id))
        specs = self._held_by(connection, worker_id, lock=True)
        started_suspects = self._count_started_suspects(connection, worker_id)
        # Jobs left over from a rescue, because their rows were locked, are not all that the worker
        # ran, so none of them can be proved to have crashed it.
        is_remainder = name is not None and not is_first
        lost = [
            (
                spec,
                lost_outcome(
                    spec,
                    OutcomeKind.LOST
                    if is_remainder
                    else lost_kind(
                        is_started_suspect=_is_started_suspect(spec),
                        started_suspects=started_suspects,
                    ),
                    f"worker {name or worker_id} died",
                ),
            )
            for spec in specs
        ]
        return self.settle_within(connection, worker_id, name or "", lost) if lost else []

    def _held_by(
        self, connection: sa.Connection, worker_id: int, *, lock: bool = False
    ) -> list[JobSpec]:
        held = (
            sa.select(*SPEC_COLUMNS)
            .where(JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id == worker_id)
            .order_by(JOBS.c.id)
        )
        rows = connection.execute(held.with_for_update(skip_locked=True) if lock else held)
        return [checked(JobSpec._make(row))[0] for row in rows]


def _is_started_suspect(spec: JobSpec) -> bool:
    return spec.suspect and spec.started_at is not None
