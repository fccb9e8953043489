"""Attempts that did not complete, and log lines of jobs."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index


class Attempt(Base):
    """A finished attempt that did not complete. Attempts that completed, were snoozed or given back
    have no row."""

    __tablename__ = "bgjobs_attempt"
    __table_args__ = (
        index("ix_bgjobs_attempt_job", "job_id", "attempt"),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(sa.Integer)
    outcome: Mapped[str] = mapped_column(sa.String(16))
    """One of :class:`~flask_bgjobs.job.statuses.OutcomeKind`."""
    worker_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    worker_name: Mapped[str | None] = mapped_column(sa.String(255))
    due_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    started_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    finished_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    error_type: Mapped[str | None] = mapped_column(sa.String(255))
    error: Mapped[str | None] = mapped_column(sa.Text)
    traceback: Mapped[str | None] = mapped_column(LongText)


class JobLog(Base):
    """A log line that a job wrote with ``current_job.log``."""

    __tablename__ = "bgjobs_log"
    __table_args__ = (
        index("ix_bgjobs_log_job", "job_id", "id"),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(sa.Integer)
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    message: Mapped[str] = mapped_column(sa.Text)
