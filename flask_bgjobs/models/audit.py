"""The audit trail: changes that people made."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, TABLE_OPTIONS, Base, BigInt, UtcTime, index


class AuditEntry(Base):
    """A change that a person made, and who it was."""

    __tablename__ = "bgjobs_audit"
    __table_args__ = NUMBERED_TABLE_OPTIONS

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    actor: Mapped[str] = mapped_column(sa.String(255))
    source: Mapped[str] = mapped_column(sa.String(16))
    """``dashboard``, ``api`` or ``command line``."""
    action: Mapped[str] = mapped_column(sa.String(16))
    """``dispatch``, ``cancel``, ``retry``, ``delete``, ``pause``, ``resume`` or ``drain``."""
    subject: Mapped[str | None] = mapped_column(sa.String(255))
    """The queue, the worker, or the function of a job."""
    reason: Mapped[str | None] = mapped_column(sa.Text)
    """By what many jobs were chosen."""
    result: Mapped[str | None] = mapped_column(sa.String(255))


class AuditedJob(Base):
    """A job that a person changed."""

    __tablename__ = "bgjobs_audit_job"
    __table_args__ = (index("ix_bgjobs_audit_job_entry", "entry_id"), TABLE_OPTIONS)

    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    entry_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
