"""The tables. ``init_app`` copies them into the host's metadata, so that its migrations and
``db.create_all()`` find them.

They are static models on our own metadata, written so that Alembic's autogenerate finds no
differences on SQLite, PostgreSQL and MySQL/MariaDB: plain types with MySQL variants, explicit
names, and no descending indexes. Partial indexes exist only on SQLite and PostgreSQL. Times are UTC
with microseconds and without a ``tzinfo``. The tables have no foreign keys to each other, because a
late log line of a deleted job must not break the transaction that records outcomes of other jobs.
"""

from __future__ import annotations

from .attempt import Attempt, JobLog
from .audit import AuditedJob, AuditEntry
from .base import Base, BigInt, LongText, UtcTime, add_tables
from .fairness import FairKey, FairQueue, Weight
from .job import (
    IS_OF_ANY_QUEUE,
    Job,
    by_index,
    detached_job,
    has_status,
    last_event,
    provide_actions,
)
from .limit import LimitKey, LimitRow, Notice, Seat, SeatState
from .queue import Queue
from .rollup import Rollup
from .schedule import Schedule, ScheduleTick
from .worker import Worker

__all__ = [
    "IS_OF_ANY_QUEUE",
    "Attempt",
    "AuditEntry",
    "AuditedJob",
    "Base",
    "BigInt",
    "FairKey",
    "FairQueue",
    "Job",
    "JobLog",
    "LimitKey",
    "LimitRow",
    "LongText",
    "Notice",
    "Queue",
    "Rollup",
    "Schedule",
    "ScheduleTick",
    "Seat",
    "SeatState",
    "UtcTime",
    "Weight",
    "Worker",
    "add_tables",
    "by_index",
    "detached_job",
    "has_status",
    "last_event",
    "provide_actions",
]
