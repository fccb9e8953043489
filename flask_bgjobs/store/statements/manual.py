"""Actions of people on jobs: read, cancel, retry and delete."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from ...job.statuses import JobStatus
from ...models import Job
from .. import transitions
from ..database import JOBS, by_id
from ..transitions import MOVES
from .audit import Actor, Audits
from .enqueue import loaded_job, unique_hash
from .prune import delete_unheld
from .seats import Seats

DONE = {"cancel": "cancelled", "retry": "pending again", "delete": "deleted"}
"""The state of a job after each action, in words."""
_LOCKED_SECONDS, _LOCKED_PAUSE_SECONDS = 2.0, 0.05
"""How long to retry jobs whose rows another transaction has locked, and the pause between tries."""


@dataclasses.dataclass(slots=True)
class ActionResult:
    """The result of an action on the requested jobs."""

    done: list[int] = dataclasses.field(default_factory=list)
    """Ids of the jobs that were changed."""
    requested: list[int] = dataclasses.field(default_factory=list)
    """Ids of the running jobs that were asked to stop."""
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    """The ids of all other jobs, each with the reason why it was not changed."""

    def add(self, other: ActionResult) -> None:
        """Add the result for other jobs to this one."""
        self.done += other.done
        self.requested += other.requested
        self.skipped |= other.skipped

    def in_words(self, done: str) -> str:
        """A summary, such as ``3 cancelled, 2 skipped``.

        :param done: the word for the jobs in :attr:`done`, such as ``cancelled``.
        """
        groups = {done: self.done, "asked to stop": self.requested, "skipped": self.skipped}
        parts = (f"{len(jobs):,} {what}" for what, jobs in groups.items() if jobs)
        return ", ".join(parts) or "nothing to do"


class ByHand(Seats, Audits):
    """The statements behind commands and buttons.

    Each change is allowed only from certain statuses, and recorded in the audit trail if ``by``
    is given.
    """

    def get(self, job_id: int) -> Job | None:
        """The job as a detached :class:`Job`; ``None`` if it does not exist."""
        with self.read() as connection:
            row = connection.execute(sa.select(JOBS).where(JOBS.c.id == job_id)).one_or_none()
        return None if row is None else loaded_job(row)

    def get_many(self, ids: Sequence[int]) -> list[Job]:
        """Those of the jobs that exist, as detached :class:`Job` objects, in the order of ids."""
        statement = sa.select(JOBS).where(JOBS.c.id.in_(ids)).order_by(JOBS.c.id)
        with self.read() as connection:
            return [loaded_job(row) for row in connection.execute(statement)]

    def cancel(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Cancel waiting jobs, and ask running jobs to stop."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            for job_id, status in found.items():
                if status in MOVES["cancel"].sources:
                    result.done.append(job_id)
                elif status == JobStatus.RUNNING:
                    result.requested.append(job_id)
                else:
                    result.skipped[job_id] = f"it is already {status}"
            self._update_each(
                connection, result.done, transitions.cancelled(self.now, self.deleted_at(self.now))
            )
            self._leave_limits(connection, result.done)
            self._update_each(connection, result.requested, transitions.asked_to_stop(self.now))
            return result

        return self._act(ids, work, "cancel", by)

    def retry(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Make failed, cancelled or retrying jobs pending again, or waiting if they have limits,
        with no retry used."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            for job_id, status in found.items():
                if status not in MOVES["retry"].sources:
                    result.skipped[job_id] = f"it is {status}"
                elif self._retake_key(connection, job_id):
                    result.done.append(job_id)
                else:
                    result.skipped[job_id] = "another job holds its unique_key"
            self._update_each(connection, result.done, transitions.retried_by_hand(self.now))
            self.line_up(connection, result.done)
            self.notify(connection)
            return result

        return self._act(ids, work, "retry", by)

    def delete(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Delete jobs that are not running, with their attempts and log lines."""

        def work(connection: sa.Connection, found: Mapping[int, str]) -> ActionResult:
            result = ActionResult()
            # Includes jobs with an unknown status, which an edited row may have.
            idle = [job_id for job_id, status in found.items() if status != JobStatus.RUNNING]
            held = delete_unheld(connection, idle, self.is_lock_timeout)
            for job_id in found:
                if job_id not in idle:
                    result.skipped[job_id] = "it is running; cancel it first"
                elif job_id in held:
                    result.skipped[job_id] = "a row of another table refers to it"
                else:
                    result.done.append(job_id)
            self._leave_limits(connection, result.done)
            return result

        return self._act(ids, work, "delete", by)

    def _leave_limits(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        """Remove the seats of jobs, and let workers give them to others at once."""
        if self.leave_all(connection, ids):
            self.notify(connection)

    def _act(
        self,
        ids: Sequence[int],
        work: Callable[[sa.Connection, Mapping[int, str]], ActionResult],
        action: str,
        by: Actor | None,
    ) -> ActionResult:
        result = ActionResult()
        deadline = time.monotonic() + _LOCKED_SECONDS
        remaining: Sequence[int] = ids
        while remaining:
            part, remaining = self.transaction(
                functools.partial(
                    self._act_on_unlocked, ids=remaining, work=work, action=action, by=by
                )
            )
            result.add(part)
            if remaining and time.monotonic() >= deadline:
                result.skipped |= dict.fromkeys(remaining, "another transaction has locked it")
                break
            if remaining:
                time.sleep(_LOCKED_PAUSE_SECONDS)
        return result

    def _act_on_unlocked(
        self,
        connection: sa.Connection,
        *,
        ids: Sequence[int],
        work: Callable[[sa.Connection, Mapping[int, str]], ActionResult],
        action: str,
        by: Actor | None,
    ) -> tuple[ActionResult, list[int]]:
        """Act on the jobs whose rows are not locked.

        :returns: the result, and the ids of the jobs whose rows another transaction has locked.
        """
        chosen = by_id(sa.select(JOBS.c.id, JOBS.c.status)).where(JOBS.c.id.in_(ids))
        rows = connection.execute(chosen.order_by(JOBS.c.id).with_for_update(skip_locked=True))
        found = {row.id: row.status for row in rows}
        missing = [job_id for job_id in ids if job_id not in found]
        locked: list[int] = []
        if missing:
            # A job that this query finds without locking it was skipped because it is locked.
            existing = sa.select(JOBS.c.id).where(JOBS.c.id.in_(missing))
            locked = list(connection.scalars(existing.order_by(JOBS.c.id)))
        result = work(connection, found)
        deleted = (job_id for job_id in missing if job_id not in locked)
        result.skipped |= dict.fromkeys(deleted, "it does not exist")
        changed = [*result.done, *result.requested]
        if changed:
            summary = result.in_words(DONE[action])
            self.audit(connection, by, action, jobs=changed, result=summary)
        return result, locked

    def _update_each(
        self, connection: sa.Connection, ids: Sequence[int], values: Mapping[str, Any]
    ) -> None:
        if ids:
            connection.execute(sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(values))

    def _retake_key(self, connection: sa.Connection, job_id: int) -> bool:
        """Let a job hold its unique key again; ``False`` if another job holds it.

        A job that gave its key up when it was claimed does not take it again.
        """
        columns = sa.select(JOBS.c.unique_key, JOBS.c.unique_until_start)
        key, until_start = connection.execute(columns.where(JOBS.c.id == job_id)).one()
        if key is None or until_start:
            return True
        try:
            with connection.begin_nested():
                self._update_each(connection, [job_id], {"unique_hash": unique_hash(key)})
        except IntegrityError:
            return False
        return True
