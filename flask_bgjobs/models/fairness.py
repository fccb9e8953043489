"""The tables of fairness: where queues and keys are in their turns, and the weights of keys."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import TABLE_OPTIONS, Base, UtcTime, index


class FairQueue(Base):
    """A queue whose jobs take turns, within one priority. Whoever gives out turns locks this row
    first."""

    __tablename__ = "bgjobs_fair_queue"
    __table_args__ = TABLE_OPTIONS

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The hash of queue and priority."""
    queue: Mapped[str] = mapped_column(sa.String(64))
    priority: Mapped[int] = mapped_column(sa.Integer)
    turn: Mapped[float] = mapped_column(sa.Double)
    """The current turn when one was last given out."""
    last: Mapped[float] = mapped_column(sa.Double)
    """The end of the latest turn that was given out."""
    round: Mapped[int] = mapped_column(sa.BigInteger)
    """How often the queue has run out of jobs with turns."""


class FairKey(Base):
    """A key whose jobs take turns with those of other keys in the same queue and priority."""

    __tablename__ = "bgjobs_fair_key"
    __table_args__ = (
        index("ix_bgjobs_fair_key_queue", "fair_queue_id", "following", "id"),
        TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The hash of queue, priority and key."""
    fair_queue_id: Mapped[int] = mapped_column(sa.BigInteger)
    name: Mapped[str] = mapped_column(sa.String(255))
    """The key."""
    following: Mapped[float] = mapped_column(sa.Double)
    """The end of the latest turn of its jobs."""
    round: Mapped[int] = mapped_column(sa.BigInteger)
    """The round of the queue in which its jobs had that turn."""
    used_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When a job last got a turn; rows that nobody uses are deleted."""


class Weight(Base):
    """The weight of a key that a person has set in place of the one in the configuration."""

    __tablename__ = "bgjobs_weight"
    __table_args__ = TABLE_OPTIONS

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    """The hash of the key."""
    name: Mapped[str] = mapped_column(sa.String(255))
    """The key."""
    weight: Mapped[float] = mapped_column(sa.Double)
    """How many jobs it runs in each turn."""
    overridden_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    overridden_by: Mapped[str | None] = mapped_column(sa.String(255))
    overridden_code: Mapped[float] = mapped_column(sa.Double)
    """The weight in the configuration when it was overridden, to notice later changes."""
