"""The tables of schedules and their ticks."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index


class Schedule(Base):
    """A recurring job: what it runs, when it runs next, and who has changed it."""

    __tablename__ = "bgjobs_schedule"
    __table_args__ = (
        index("uq_bgjobs_schedule_name", "name", unique=True),
        index("ix_bgjobs_schedule_due", "due_at", "id"),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(255))
    definition: Mapped[str] = mapped_column(LongText)
    """JSON of the definition in the code of the worker that started last."""
    defined_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When ``definition`` last changed."""
    registered_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When a worker first registered it; ``None`` if only a person has changed it so far."""
    override: Mapped[str | None] = mapped_column(LongText)
    """JSON of the values that a person has set in place of those in ``definition``."""
    overridden_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    overridden_by: Mapped[str | None] = mapped_column(sa.String(255))
    overridden_code: Mapped[str | None] = mapped_column(LongText)
    """JSON of the values in ``definition`` when it was overridden, to notice later changes."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    paused_by: Mapped[str | None] = mapped_column(sa.String(255))
    retired_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When it was due and the code of no live worker had it; ``None`` after such a worker has
    started."""
    revision: Mapped[int] = mapped_column(sa.BigInteger)
    """Increases with each change of the row. It is the fence of every change."""
    next_tick_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """The next tick, or a past one that has not run yet."""
    due_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When a worker must next look at it: at ``next_tick_at``, or later while a tick waits for the
    end of the last job; ``None`` while it is paused or retired."""
    held_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """Since when ticks wait for the end of the last job (``overlap="queue"``)."""
    last_tick_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    last_job_id: Mapped[int | None] = mapped_column(sa.BigInteger)


class ScheduleTick(Base):
    """A tick that ran or was skipped."""

    __tablename__ = "bgjobs_schedule_tick"
    __table_args__ = TABLE_OPTIONS

    schedule_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    tick_at: Mapped[dt.datetime] = mapped_column(UtcTime, primary_key=True)
    """The time of the tick; of a job that a person has run, the time at which they did."""
    outcome: Mapped[str] = mapped_column(sa.String(16))
    """``fired``, ``skipped``, or ``by hand`` if a person has run the job."""
    missed: Mapped[int] = mapped_column(sa.Integer)
    """Number of earlier ticks for which this one stands, because no worker ran them in time."""
    reason: Mapped[str | None] = mapped_column(sa.String(255))
    """Why it was skipped."""
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Its job or, if it was skipped because of another job, that one."""
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
