"""Queues: list, register, pause, resume and prune them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import UNCLAIMED, JobStatus
from ...models import IS_OF_ANY_QUEUE, Queue, has_status
from ..database import JOBS, QUEUES
from .audit import Actor, Audits
from .seats import Seats

_KEPT_SECONDS = 7 * 86_400.0
"""How long the row of an unused queue is kept."""

PAUSED_QUEUES = sa.select(Queue.name).where(Queue.paused_at.is_not(None))


class Queues(Seats, Audits):
    """The statements about queues."""

    def pause(self, name: str, by: Actor | None = None) -> bool:
        """Stop workers from claiming jobs of the queue; ``False`` if it was already paused."""
        return self.transaction(lambda c: self._pause(c, name, by))

    def resume(self, name: str, by: Actor | None = None) -> bool:
        """Let workers claim jobs of the queue again; ``False`` if it was not paused."""
        paused = sa.update(Queue).where(Queue.name == name, Queue.paused_at.is_not(None))

        def work(connection: sa.Connection) -> bool:
            self.notify(connection)
            is_done = bool(connection.execute(paused.values(paused_at=None)).rowcount)
            if is_done:
                self.notice_queues(connection)
                self.audit(connection, by, "resume", subject=name)
            return is_done

        return self.transaction(work)

    def queue_names(self) -> set[str]:
        """The names of all queues that have a row or hold waiting jobs.

        A queue has a row while it is paused, and for at least a week after a worker claimed from
        it.
        """
        holding = (sa.select(self.queues_holding(status).c.name) for status in sorted(UNCLAIMED))
        names = sa.union_all(sa.select(Queue.name), *holding)
        with self.read() as connection:
            return {name for name in connection.scalars(names) if name is not None}

    def unfinished(self, queues: Sequence[str] | None) -> bool:
        """Whether any job is running in ``queues``, or pending in a queue that is not paused.

        :param queues: ``None``: all queues.
        """
        with self.read() as connection:
            if connection.scalar(sa.select(any_job(JobStatus.RUNNING, queues))):
                return True
            paused = set(connection.scalars(PAUSED_QUEUES))
            if not paused:
                return bool(connection.scalar(sa.select(any_job(JobStatus.PENDING, queues))))
            if queues is None:
                holding = connection.scalars(sa.select(self.queues_holding(JobStatus.PENDING)))
                return any(name not in paused for name in holding if name is not None)
            open_queues = [name for name in queues if name not in paused]
            return bool(connection.scalar(sa.select(any_job(JobStatus.PENDING, open_queues))))

    def queues_holding(self, status: JobStatus) -> sa.FromClause:
        """The subquery for the names of the queues that hold jobs with this status, and a ``NULL``.

        It takes one index seek per queue; ``DISTINCT`` would read all their jobs.
        """
        has_it = has_status(status)
        walk = (
            sa.select(sa.func.min(JOBS.c.queue).label("name"))
            .where(has_it)
            .cte(f"{status.value}_queue", recursive=True)
        )
        following = (
            sa.select(sa.func.min(JOBS.c.queue))
            .where(has_it, JOBS.c.queue > walk.c.name)
            .correlate(walk)
            .scalar_subquery()
        )
        return walk.union_all(sa.select(following).where(walk.c.name.is_not(None)))

    def register_queues(self, connection: sa.Connection, names: Iterable[str]) -> None:
        """Insert the rows of queues, or renew their time. Workers may do so at the same moment."""
        # Sorted, so that all workers lock the rows in the same order and cannot deadlock.
        connection.execute(self._registration, [{"name": name} for name in sorted(names)])

    @functools.cached_property
    def _registration(self) -> Any:
        row = self.insert_into(QUEUES).values(created_at=self.now)
        return row.on_conflict_do_update(
            index_elements=[QUEUES.c.name], set_={"created_at": row.excluded.created_at}
        )

    def prune_queues(self, limit: int) -> int:
        """Delete up to ``limit`` rows of unused queues.

        An unused queue is not paused, holds no waiting jobs, and was not registered for a week.

        :returns: the number of deleted rows.
        """
        is_old = sa.and_(
            QUEUES.c.paused_at.is_(None),
            QUEUES.c.created_at < self.after(sa.literal(-_KEPT_SECONDS)),
        )
        holds = (
            sa.exists().where(has_status(status), JOBS.c.queue == QUEUES.c.name)
            for status in sorted(UNCLAIMED)
        )
        unused = sa.select(QUEUES.c.name).where(is_old, ~sa.or_(*holds)).limit(limit)

        def work(connection: sa.Connection) -> int:
            names = connection.scalars(unused).all()
            if not names:
                return 0
            # Check again: a queue may have been paused or registered since the query.
            deletion = sa.delete(QUEUES).where(QUEUES.c.name.in_(sorted(names)), is_old)
            return connection.execute(deletion).rowcount

        return self.transaction(work)

    def _pause(self, connection: sa.Connection, name: str, by: Actor | None) -> bool:
        self.register_queues(connection, [name])
        running = sa.update(Queue).where(Queue.name == name, Queue.paused_at.is_(None))
        is_done = bool(connection.execute(running.values(paused_at=self.now)).rowcount)
        if is_done:
            self.notice_queues(connection)
            self.audit(connection, by, "pause", subject=name)
        return is_done


def any_job(status: JobStatus, queues: Sequence[str] | None) -> sa.Exists:
    """The condition that a job with this status exists in ``queues``, or in any queue."""
    found = sa.exists().where(has_status(status))
    if queues is None:
        # Use the condition of a claim from all queues, so that both find the same rows.
        return found.where(sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean))
    return found.where(JOBS.c.queue.in_(queues))
