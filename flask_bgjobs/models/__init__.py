"""The tables. ``init_app`` copies them into the host's metadata, so that its migrations and
``db.create_all()`` find them.

They are static models on a metadata of our own, written so that Alembic's autogenerate finds
no drift on SQLite, PostgreSQL and MySQL/MariaDB: plain types with MySQL variants, explicit
names, no descending and no partial index. Times are UTC with microseconds and without a
``tzinfo``. Our own tables have no foreign keys among themselves: a late log line of a deleted
job must not break the transaction that records other jobs' outcomes.
"""

from __future__ import annotations

from .attempt import Attempt, JobLog
from .audit import AuditedJob, AuditEntry
from .base import Base, BigInt, LongText, UtcTime, add_tables
from .job import (
    IS_OF_ANY_QUEUE,
    Job,
    by_index,
    detached_job,
    has_status,
    last_event,
    provide_actions,
)
from .queue import Queue
from .rollup import Rollup
from .worker import Worker

__all__ = [
    "IS_OF_ANY_QUEUE",
    "Attempt",
    "AuditEntry",
    "AuditedJob",
    "Base",
    "BigInt",
    "Job",
    "JobLog",
    "LongText",
    "Queue",
    "Rollup",
    "UtcTime",
    "Worker",
    "add_tables",
    "by_index",
    "detached_job",
    "has_status",
    "last_event",
    "provide_actions",
]
