"""The table of queues."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import TABLE_OPTIONS, Base, UtcTime, index


class Queue(Base):
    """A queue that is paused, or that a worker has recently claimed jobs from."""

    __tablename__ = "bgjobs_queue"
    __table_args__ = (
        index("ix_bgjobs_queue_paused", "paused_at", where="paused_at IS NOT NULL"),
        TABLE_OPTIONS,
    )

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When the queue was last registered: by a pause, or by a worker that claims jobs from it,
    about once a day."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When the queue was paused; ``None`` if it is not paused."""
