"""Workers and their leases: signs of life, and the rescue of what a dead worker held."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ..models import Worker
from ..spec import JobSpec, Outcome, Settled
from ..states import JobStatus, OutcomeKind
from .audits import Actor, Audits
from .claims import SPEC_COLUMNS
from .database import JOBS, WORKERS
from .settles import Settles


class Leases(Settles, Audits):
    """The statements of a worker's life."""

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
        alive = (
            sa.update(Worker)
            .where(Worker.id == worker_id, Worker.status == "alive")
            .values(heartbeat_at=self.now, beats=Worker.beats + 1)
        )
        return bool(self.alone(lambda c: c.execute(alive).rowcount))

    def stop_worker(self, worker_id: int) -> None:
        """Record that a worker ended cleanly, with nothing left to it.

        One that still holds jobs, because their outcomes could not be recorded, stays alive in
        the table: its silence is noticed, and the jobs are rescued.
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
        """Ask a worker to finish what it runs and to end. ``False``: it has, or was asked before.

        It learns of it with its next look, within the poll interval.
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
        """Id, name, host, process and beats of the workers that hold a lease."""
        living = (
            sa.select(Worker.id, Worker.name, Worker.host, Worker.process, Worker.beats)
            .where(Worker.status == "alive")
            .order_by(Worker.id)
        )
        return self.alone(lambda c: list(c.execute(living)))

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
        return self._free_jobs(connection, worker_id)

    def rescue_orphans(self) -> list[Settled]:
        """Free running jobs that belong to no living worker: its row was deleted or edited.

        :returns: one per job.
        """
        living = sa.select(WORKERS.c.id).where(WORKERS.c.status == "alive")
        orphans = (
            sa.select(JOBS.c.worker_id)
            .where(JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id.not_in(living))
            .distinct()
        )
        owners = self.alone(lambda c: c.scalars(orphans).all())
        return [
            settled
            for owner in owners
            for settled in self.transaction(functools.partial(self._free_jobs, worker_id=owner))
        ]

    def held_by(self, worker_id: int) -> list[JobSpec]:
        """The jobs that are running under a worker, started or not."""
        return self.alone(lambda c: self._held_by(c, worker_id))

    def _free_jobs(self, connection: sa.Connection, worker_id: int) -> list[Settled]:
        name = connection.scalar(sa.select(Worker.name).where(Worker.id == worker_id))
        specs = self._held_by(connection, worker_id, lock=True)
        lost = [(spec, _lost_outcome(spec, name or str(worker_id))) for spec in specs]
        return self.settle_within(connection, worker_id, name or "", lost) if lost else []

    def _held_by(
        self, connection: sa.Connection, worker_id: int, *, lock: bool = False
    ) -> list[JobSpec]:
        held = (
            sa.select(*SPEC_COLUMNS)
            .where(JOBS.c.status == JobStatus.RUNNING.value, JOBS.c.worker_id == worker_id)
            .order_by(JOBS.c.id)
        )
        rows = connection.execute(held.with_for_update() if lock else held)
        return [JobSpec._make(row) for row in rows]


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
