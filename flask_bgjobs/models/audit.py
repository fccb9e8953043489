"""The audit trail: changes that people made."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, TABLE_OPTIONS, Base, BigInt, UtcTime, index


class AuditEntry(Base):
    """A change that a person made."""

    __tablename__ = "bgjobs_audit"
    __table_args__ = NUMBERED_TABLE_OPTIONS

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    actor: Mapped[str] = mapped_column(sa.String(255))
    """Name of the person."""
    source: Mapped[str] = mapped_column(sa.String(16))
    """Where the change was made: ``dashboard``, ``api`` or ``command line``."""
    action: Mapped[str] = mapped_column(sa.String(16))
    """``dispatch``, ``cancel``, ``retry`` or ``delete``; of queues ``pause`` or ``resume``; of
    workers ``drain``; of schedules ``run schedule``, ``pause schedule``, ``resume schedule``,
    ``edit schedule`` or ``reset schedule``."""
    subject: Mapped[str | None] = mapped_column(sa.String(255))
    """Name of the queue, the worker, the schedule or the dispatched function."""
    reason: Mapped[str | None] = mapped_column(sa.Text)
    """The conditions that selected many jobs."""
    result: Mapped[str | None] = mapped_column(sa.String(255))
    """Summary of the result, such as ``3 cancelled, 2 skipped``."""


class AuditedJob(Base):
    """A job that a change affected."""

    __tablename__ = "bgjobs_audit_job"
    __table_args__ = (index("ix_bgjobs_audit_job_entry", "entry_id"), TABLE_OPTIONS)

    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    entry_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
