"""Queues: which there are, and holding back those that are paused."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import WAITING, JobStatus
from ...models import IS_OF_ANY_QUEUE, Queue, has_status
from ..database import JOBS, QUEUES
from .audit import Actor, Audits

_KEPT_SECONDS = 7 * 86_400.0


PAUSED_QUEUES = sa.select(Queue.name).where(Queue.paused_at.is_not(None))


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
        holding = (sa.select(self.queues_holding(status).c.name) for status in sorted(WAITING))
        names = sa.union_all(sa.select(Queue.name), *holding)
        with self.read() as connection:
            return {name for name in connection.scalars(names) if name is not None}

    def unfinished(self, queues: Sequence[str] | None) -> bool:
        """Whether any job is running in ``queues``, or pending in one that is not paused.

        :param queues: ``None``: all.
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
        """The names of the queues that hold jobs with this status, and ``NULL``.

        It takes one index seek for each, where ``DISTINCT`` would read all their jobs.
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
        """Make sure that the queues have a row of today; others may do so at the same moment."""
        # In one order, so that two workers never wait for each other.
        connection.execute(self._registration, [{"name": name} for name in sorted(names)])

    @functools.cached_property
    def _registration(self) -> Any:
        row = self.insert_into(QUEUES).values(created_at=self.now)
        return row.on_conflict_do_update(
            index_elements=[QUEUES.c.name], set_={"created_at": row.excluded.created_at}
        )

    def prune_queues(self, limit: int) -> int:
        """Delete up to ``limit`` rows of queues that nobody uses.

        Those are not paused, hold no waiting jobs, and no worker has claimed from them for a week.

        :returns: how many were deleted.
        """
        is_old = sa.and_(
            QUEUES.c.paused_at.is_(None),
            QUEUES.c.created_at < self.after(sa.literal(-_KEPT_SECONDS)),
        )
        holds = (
            sa.exists().where(has_status(status), JOBS.c.queue == QUEUES.c.name)
            for status in sorted(WAITING)
        )
        unused = sa.select(QUEUES.c.name).where(is_old, ~sa.or_(*holds)).limit(limit)

        def work(connection: sa.Connection) -> int:
            names = connection.scalars(unused).all()
            if not names:
                return 0
            # Somebody may have paused it or claimed from it since.
            deletion = sa.delete(QUEUES).where(QUEUES.c.name.in_(sorted(names)), is_old)
            return connection.execute(deletion).rowcount

        return self.transaction(work)

    def _pause(self, connection: sa.Connection, name: str, by: Actor | None) -> bool:
        self.register_queues(connection, [name])
        running = sa.update(Queue).where(Queue.name == name, Queue.paused_at.is_(None))
        is_done = bool(connection.execute(running.values(paused_at=self.now)).rowcount)
        if is_done:
            self.audit(connection, by, "pause", subject=name)
        return is_done


def any_job(status: JobStatus, queues: Sequence[str] | None) -> sa.Exists:
    """Whether there is a job with this status in ``queues``, or in all."""
    found = sa.exists().where(has_status(status))
    if queues is None:
        # The same condition as in a claim of all queues, which finds no other rows.
        return found.where(sa.literal_column(IS_OF_ANY_QUEUE, sa.Boolean))
    return found.where(JOBS.c.queue.in_(queues))
