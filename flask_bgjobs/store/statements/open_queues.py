"""Queues that are paused or have no worker: their jobs hold no seats of limits."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from ...job.statuses import JobStatus, WaitsFor
from ...models import SeatState, by_index
from .. import transitions
from ..database import JOBS, NOTICES, SEATS, WORKERS, by_id
from .queue import PAUSED_QUEUES
from .seats import ALL_QUEUES, Seats, first_seat

_QUEUES_SECONDS = 1.0
"""How long it is remembered which queues are open."""
_JOBS_PER_STEP = 1_000
"""Jobs of one queue that one transaction changes because the queue was paused or resumed."""
_JOB_COLUMNS = (
    *("id", "status", "waits_for", "queue"),
    *("limits", "limit_key_id", "claim_rank", "run_at"),
)
_PARKED_JOBS = by_index(
    sa.select(JOBS.c.id).where(
        JOBS.c.waits_for == sa.literal_column(f"'{WaitsFor.QUEUE.value}'", sa.String)
    ),
    "ix_bgjobs_job_waits",
)
"""The query for jobs that wait for their queue. The literal lets a partial index be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Open:
    """The queues whose jobs may take seats."""

    read_at: float
    paused: frozenset[str]
    served: frozenset[str] | None
    """``None``: all queues."""

    def __contains__(self, queue: str) -> bool:
        return queue not in self.paused and (self.served is None or queue in self.served)


class OpenQueues(Seats):
    """The statements on jobs with limits whose queues are opened and closed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: Open | None = None

    def open_queues(self, connection: sa.Connection, max_age: float = _QUEUES_SECONDS) -> Open:
        """The queues that are not paused and that a live worker serves.

        :param max_age: seconds for which an earlier result may be used; 1 by default.
        """
        found = self._open
        if found is None or time.monotonic() - found.read_at >= max_age:
            found = self._open = _read(connection)
        return found

    def balance_queues(self) -> int:
        """Take seats from pending jobs whose queue is paused or has no live worker, and let jobs of
        other queues wait for their limits again.

        :returns: the number of jobs that were changed, up to 1,000 for each queue.
        """
        return self.transaction(self.balance_queues_within)

    def take_queue_notices(self, connection: sa.Connection) -> None:
        """Act on the notices that queues were paused or resumed."""
        self.delete_notices(connection, NOTICES.c.key_id == ALL_QUEUES)
        self.balance_queues_within(connection)

    def balance_queues_within(self, connection: sa.Connection) -> int:
        """Do the work of :meth:`balance_queues` within a larger transaction of ours."""
        found = self._open = _read(connection)
        holders = (
            sa.select(JOBS.c.id, JOBS.c.queue)
            .join_from(SEATS, JOBS, JOBS.c.id == SEATS.c.job_id)
            .where(SEATS.c.state == SeatState.HOLDS.value, JOBS.c.status == JobStatus.PENDING.value)
        )
        closed = sorted({row.id for row in connection.execute(holders) if row.queue not in found})
        rows = self.lock_jobs(connection, closed[:_JOBS_PER_STEP], JobStatus.PENDING)
        self.send_back(connection, list(rows.values()), is_parked=True)
        changed = len(rows)
        for queue in _parked_queues(connection):
            if queue in found:
                parked = _PARKED_JOBS.where(JOBS.c.queue == queue).limit(_JOBS_PER_STEP)
                ids = connection.scalars(parked).all()
                rows = self.lock_jobs(connection, ids, JobStatus.WAITING)
                self.send_back(connection, list(rows.values()), is_parked=False)
                changed += len(rows)
                if len(ids) == _JOBS_PER_STEP:
                    self.notice_queues(connection)
        return changed

    def lock_jobs(
        self, connection: sa.Connection, ids: Sequence[int], *statuses: JobStatus
    ) -> dict[int, Any]:
        """Lock the rows of jobs with these statuses that nobody else has locked, by id."""
        if not ids:
            return {}
        chosen = by_id(sa.select(*(JOBS.c[name] for name in _JOB_COLUMNS))).where(
            JOBS.c.id.in_(ids), JOBS.c.status.in_([status.value for status in statuses])
        )
        rows = connection.execute(chosen.order_by(JOBS.c.id).with_for_update(skip_locked=True))
        return {row.id: row for row in rows}

    def remove_seats(
        self,
        connection: sa.Connection,
        ids: Sequence[int],
        state: SeatState,
        may_have: sa.ColumnElement[bool],
    ) -> int:
        """Remove the seats with a state of jobs that cannot have them, or that are gone.

        :param ids: the jobs, as they were found without a lock. They may have changed since, so
            their rows are locked first; those that another transaction has locked are left out.
        :param may_have: the condition that a job may have such a seat.
        :returns: the number of removed seats.
        """
        if not ids:
            return 0
        others = by_id(sa.select(JOBS.c.id)).where(JOBS.c.id.in_(ids), ~may_have)
        locked = set(connection.scalars(others.with_for_update(skip_locked=True)))
        existing = set(connection.scalars(sa.select(JOBS.c.id).where(JOBS.c.id.in_(ids))))
        wrong = [job_id for job_id in ids if job_id in locked or job_id not in existing]
        mine = SEATS.c.state == state.value, SEATS.c.job_id.in_(wrong)
        keys = connection.scalars(sa.select(SEATS.c.key_id).where(*mine)).all() if wrong else []
        if keys:
            self.delete_seats(connection, [state], wrong)
            self.notice(connection, dict.fromkeys(keys, ()))
        return len(keys)

    def send_back(self, connection: sa.Connection, rows: Sequence[Any], *, is_parked: bool) -> None:
        """Take all seats of jobs, and let them wait at their first limit again.

        :param rows: the rows of the jobs, which are locked.
        :param is_parked: whether others go first, until their queue is open.
        """
        if not rows:
            return
        ids = [row.id for row in rows]
        self.leave_all(connection, ids)
        first = [
            first_seat(row.id, row.limit_key_id, row.limits, row.claim_rank, row.run_at)
            for row in rows
        ]
        if is_parked:
            first = [{**values, "state": SeatState.PARKED.value} for values in first]
        self.insert_seats(connection, first)
        values = transitions.waiting_for_queue() if is_parked else transitions.waiting_for_limits()
        connection.execute(sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(values))


def _read(connection: sa.Connection) -> Open:
    paused = frozenset(connection.scalars(PAUSED_QUEUES))
    served: set[str] = set()
    alive = sa.select(WORKERS.c.queues).where(WORKERS.c.status == "alive").distinct()
    for queues in connection.scalars(alive):
        if queues is None:
            return Open(time.monotonic(), paused, None)
        served |= set(json.loads(queues))
    return Open(time.monotonic(), paused, frozenset(served))


def _parked_queues(connection: sa.Connection) -> list[str]:
    """The queues with parked jobs, by one index seek each."""
    first = _PARKED_JOBS.with_only_columns(sa.func.min(JOBS.c.queue))
    queues: list[str] = []
    name = connection.scalar(first)
    while name is not None:
        queues.append(name)
        name = connection.scalar(first.where(JOBS.c.queue > name))
    return queues
