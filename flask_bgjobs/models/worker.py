"""The table of workers and their leases."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index


class Worker(Base):
    """A worker process, its lease and its last heartbeat."""

    __tablename__ = "bgjobs_worker"
    __table_args__ = (
        index("ix_bgjobs_worker_status", "status"),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(255))
    status: Mapped[str] = mapped_column(sa.String(16))
    """``alive``, ``stopped`` after a clean end, or ``dead`` after another worker took its lease."""
    host: Mapped[str] = mapped_column(sa.String(255))
    pid: Mapped[int] = mapped_column(sa.Integer)
    process: Mapped[str | None] = mapped_column(sa.String(255))
    """Identifies the process on its host uniquely, even after its pid is used again."""
    version: Mapped[str] = mapped_column(sa.String(32))
    pool: Mapped[str] = mapped_column(sa.String(16))
    concurrency: Mapped[int] = mapped_column(sa.Integer)
    queues: Mapped[str | None] = mapped_column(LongText)
    """JSON list of the queues that the worker serves, in order; ``None``: all queues."""
    schedules: Mapped[str | None] = mapped_column(LongText)
    """JSON list of the names of the recurring jobs that its code has; ``None``: it runs none."""
    beats: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    """Number of heartbeats. A sweeper checks by its own clock whether this number changes."""
    heartbeat_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    started_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    drain_requested_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When the worker was asked to finish its running jobs and then to end."""
    stopped_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
