"""The tables of limits: their definitions, their keys, the seats of jobs, and notices of changes.

A seat is the right of a job to run under a limit, or its place in the line for that right. A job
has a row for each of its limits at which it waits or has the right. A notice says that a worker
must look at a key, because a job has arrived or has left.
"""

from __future__ import annotations

import datetime as dt
import enum

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import NUMBERED_TABLE_OPTIONS, TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index


class LimitRow(Base):
    """A limit: its definition in the code, and what people have changed."""

    __tablename__ = "bgjobs_limit"
    __table_args__ = TABLE_OPTIONS

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The hash of the name."""
    name: Mapped[str] = mapped_column(sa.String(255))
    definition: Mapped[str] = mapped_column(sa.Text)
    """JSON of the rule in the code of the worker that started last."""
    defined_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When ``definition`` last changed."""
    override: Mapped[str | None] = mapped_column(sa.Text)
    """JSON of the values that a person has set in place of those in ``definition``."""
    overridden_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    overridden_by: Mapped[str | None] = mapped_column(sa.String(255))
    overridden_code: Mapped[str | None] = mapped_column(sa.Text)
    """``definition`` when it was overridden, to notice later changes."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    paused_by: Mapped[str | None] = mapped_column(sa.String(255))


class LimitKey(Base):
    """A key of a limit. A transaction locks this row before it gives away free seats."""

    __tablename__ = "bgjobs_limit_key"
    __table_args__ = (
        index("ix_bgjobs_limit_key_name", "limit_id", "name", "id"),
        index("ix_bgjobs_limit_key_due", "due_at", "id", where="due_at IS NOT NULL"),
        TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The hash of the limit's name and the key."""
    limit_id: Mapped[int] = mapped_column(sa.BigInteger)
    name: Mapped[str] = mapped_column(sa.String(255))
    """The key; empty if the limit has no keys."""
    arrival: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Of a rate: when the next job is due if the starts are evenly spaced, as microseconds since
    1970."""
    starts: Mapped[str | None] = mapped_column(LongText)
    """Of a rate: JSON of the newest starts, as in :class:`~flask_bgjobs.job.rates.RateState`."""
    due_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When a worker must look at it again, because a rate then allows another start."""
    used_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When a job last took a seat, at least; rows that nobody uses are deleted."""
    paused_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    paused_by: Mapped[str | None] = mapped_column(sa.String(255))


class SeatState(enum.IntEnum):
    """What a job does at a limit."""

    WAITS = 0
    HOLDS = 1
    """The job is pending or running, or it waits at another of its limits."""
    PARKED = 2
    """The queue of the job is paused or has no worker, so that others go first."""


class Seat(Base):
    """A job at one of its limits."""

    __tablename__ = "bgjobs_seat"
    __table_args__ = (index("ix_bgjobs_seat_job", "state", "job_id"), TABLE_OPTIONS)

    key_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, autoincrement=False)
    """One of :class:`SeatState`."""
    claim_rank: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    run_at: Mapped[dt.datetime] = mapped_column(UtcTime, primary_key=True)
    job_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(sa.SmallInteger)
    """Which of the job's limits it is, counted from 0."""
    further: Mapped[int] = mapped_column(sa.SmallInteger)
    """How many limits follow."""


class Notice(Base):
    """A message to the workers that the seats of a key have changed."""

    __tablename__ = "bgjobs_notice"
    __table_args__ = (index("ix_bgjobs_notice_key", "key_id", "id"), NUMBERED_TABLE_OPTIONS)

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    key_id: Mapped[int] = mapped_column(sa.BigInteger)
    """Id of the key; 0 if a queue was paused or resumed."""
    job_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """A job whose limits have changed, so that it needs another seat."""
    starts: Mapped[str | None] = mapped_column(LongText)
    """JSON of the times at which jobs that have left started, as microseconds since 1970; ``null``
    in place of a time that is not known."""
