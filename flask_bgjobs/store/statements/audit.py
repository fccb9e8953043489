"""The audit trail: who changed what, recorded in the transaction of the change itself.

Only a dispatch is recorded afterwards, because the job may have joined a transaction of the app.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import sqlalchemy as sa

from ...job.text import storable
from ...models import AuditedJob, AuditEntry
from ..database import Database

_MAX_NAME, _MAX_SUBJECT = 255, 255
_KEPT_SECONDS = 365 * 86_400.0
"""How long entries are kept: a year. People make few changes compared with workers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Actor:
    """The person who makes a change."""

    name: str
    """Their name in the host's login or the operating system."""
    source: str
    """Where the change is made: ``dashboard``, ``api`` or ``command line``."""
    reason: str | None = None
    """The conditions that selected many jobs, such as the query string of the job list."""


class Audits(Database):
    """The statements of the audit trail."""

    def audit(
        self,
        connection: sa.Connection,
        actor: Actor | None,
        action: str,
        *,
        subject: str | None = None,
        jobs: Collection[int] = (),
        result: str | None = None,
    ) -> None:
        """Record a change in the audit trail.

        :param actor: who made the change; ``None`` for the app's own code: nothing is recorded.
        :param subject: the queue, worker, schedule or function that was changed or dispatched.
        :param jobs: the ids of the jobs that were changed.
        :param result: a summary, such as ``3 cancelled, 2 skipped``.
        """
        if actor is None:
            return
        entry = connection.execute(
            sa.insert(AuditEntry).values(
                created_at=self.now,
                actor=storable(actor.name)[:_MAX_NAME],
                source=actor.source,
                action=action,
                subject=None if subject is None else storable(subject)[:_MAX_SUBJECT],
                reason=None if actor.reason is None else storable(actor.reason),
                result=result,
            )
        )
        (entry_id,) = entry.inserted_primary_key or (0,)
        if jobs:
            connection.execute(
                sa.insert(AuditedJob),
                [{"job_id": job_id, "entry_id": entry_id} for job_id in sorted(jobs)],
            )

    def record(
        self, actor: Actor, action: str, *, subject: str | None = None, jobs: Collection[int] = ()
    ) -> None:
        """Record a change that has already been made, such as a dispatch."""
        self.transaction(lambda c: self.audit(c, actor, action, subject=subject, jobs=jobs))

    def prune_audits(self, limit: int) -> int:
        """Delete up to ``limit`` entries that are older than a year.

        :returns: the number of deleted entries.
        """

        def work(connection: sa.Connection) -> int:
            old = (
                sa.select(AuditEntry.id)
                .where(AuditEntry.created_at < self.after(sa.literal(-_KEPT_SECONDS)))
                .order_by(AuditEntry.id)
            )
            ids = connection.scalars(old.limit(limit)).all()
            if ids:
                connection.execute(sa.delete(AuditedJob).where(AuditedJob.entry_id.in_(ids)))
                connection.execute(sa.delete(AuditEntry).where(AuditEntry.id.in_(ids)))
            return len(ids)

        return self.transaction(work)
