"""Counts of finished attempts, which are kept when the jobs are pruned."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from .base import TABLE_OPTIONS, Base, UtcTime


class Rollup(Base):
    """Number of attempts that ended in a minute or an hour; see :mod:`flask_bgjobs.job.rollup`."""

    __tablename__ = "bgjobs_rollup"
    __table_args__ = TABLE_OPTIONS

    seconds: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    begins_at: Mapped[dt.datetime] = mapped_column(UtcTime, primary_key=True)
    queue: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    outcome: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    measure: Mapped[str] = mapped_column(sa.String(8), primary_key=True)
    bucket: Mapped[int] = mapped_column(sa.Integer, primary_key=True, autoincrement=False)
    jobs: Mapped[int] = mapped_column(sa.BigInteger)
