"""Queues."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import TABLE_OPTIONS, Base, UtcTime, index


class Queue(Base):
    """A queue that has had work, and whether it is paused."""

    __tablename__ = "bgjobs_queue"
    __table_args__ = (
        index("ix_bgjobs_queue_paused", "paused_at", where="paused_at IS NOT NULL"),
        TABLE_OPTIONS,
    )

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When a worker has last registered it: within the last day, while it has work."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
