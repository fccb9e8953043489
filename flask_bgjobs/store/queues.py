"""Queues: which there are, and holding back those that are paused."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from ..models import Queue, has_status
from ..states import WAITING, JobStatus
from .audits import Actor, Audits
from .database import JOBS, QUEUES

_NEXT_QUEUE = (
    sa.select(JOBS.c.queue)
    .where(JOBS.c.queue > sa.bindparam("after"))
    .order_by(JOBS.c.queue)
    .limit(1)
)


class Queues(Audits):
    """The statements about queues."""

    def pause(self, name: str, by: Actor | None = None) -> bool:
        """Let no worker claim jobs of the queue. ``False``: it was paused already."""
        return self.transaction(lambda c: self._pause(c, name, by))

    def resume(self, name: str, by: Actor | None = None) -> bool:
        """Let workers claim jobs of the queue again. ``False``: it was not paused."""
        paused = sa.update(Queue).where(Queue.name == name, Queue.paused_at.is_not(None))

        def work(connection: sa.Connection) -> bool:
            self.notify(connection)
            is_done = bool(connection.execute(paused.values(paused_at=None)).rowcount)
            if is_done:
                self.audit(connection, by, "resume", subject=name)
            return is_done

        return self.transaction(work)

    def queue_names(self) -> set[str]:
        """Every queue that a worker has claimed from, that is paused, or that has waiting jobs."""
        with self.read() as connection:
            claimed = connection.scalars(sa.select(Queue.name)).all()
            holding = (name for s in WAITING for name in self._queues_holding(connection, s))
            return {*claimed, *holding}

    def register_queue(self, connection: sa.Connection, name: str) -> None:
        """Make sure that the queue has a row; others may do so at the same moment."""
        row = self.insert_into(QUEUES).values(name=name, created_at=self.now)
        connection.execute(row.on_conflict_do_nothing())

    def _pause(self, connection: sa.Connection, name: str, by: Actor | None) -> bool:
        self.register_queue(connection, name)
        running = sa.update(Queue).where(Queue.name == name, Queue.paused_at.is_(None))
        is_done = bool(connection.execute(running.values(paused_at=self.now)).rowcount)
        if is_done:
            self.audit(connection, by, "pause", subject=name)
        return is_done

    def _queues_holding(self, connection: sa.Connection, status: JobStatus) -> Iterator[str]:
        """The queues that hold jobs with this status, one index seek each."""
        next_queue = _NEXT_QUEUE.where(has_status(status))
        name: str | None = ""
        while (name := connection.scalar(next_queue, {"after": name})) is not None:
            yield name
