"""Workers and their leases."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index


class Worker(Base):
    """A worker process: who holds which lease, and when it was last heard of."""

    __tablename__ = "bgjobs_worker"
    __table_args__ = (
        index("ix_bgjobs_worker_status", "status"),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(255))
    status: Mapped[str] = mapped_column(sa.String(16))
    """``alive``, ``stopped`` after a clean end, or ``dead`` once its lease was taken away."""
    host: Mapped[str] = mapped_column(sa.String(255))
    pid: Mapped[int] = mapped_column(sa.Integer)
    process: Mapped[str | None] = mapped_column(sa.String(255))
    """What tells this process from every other on its host, also after its pid is used again."""
    version: Mapped[str] = mapped_column(sa.String(32))
    pool: Mapped[str] = mapped_column(sa.String(16))
    concurrency: Mapped[int] = mapped_column(sa.Integer)
    queues: Mapped[str | None] = mapped_column(LongText)
    """JSON list of the queues that it serves, in order; ``None`` serves all."""
    beats: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    """Heartbeats so far: a sweeper watches it change by a clock of its own."""
    heartbeat_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    started_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    drain_requested_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """Set when somebody asked it to finish what it runs and to end."""
    stopped_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
