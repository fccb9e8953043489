"""The roll-up: counts that workers add to, so that charts need not read the jobs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ...job.rollup import HOUR, MINUTE, Cell
from ..database import ROLLUPS, Database

_KEPT_SECONDS = {MINUTE: 2 * 3_600.0, HOUR: 8 * 86_400.0}
"""A little more than the charts of an hour and of seven days show."""


class Rollups(Database):
    """The statements about the roll-up."""

    def add_to_rollup(self, counts: Mapping[Cell, int]) -> None:
        """Add counts to those that are there.

        A commit that gets no answer may have counted: what is added again is then there twice.
        """
        # In one order, so that two workers never wait for each other.
        rows = [{**cell._asdict(), "jobs": number} for cell, number in sorted(counts.items())]
        self.transaction(lambda connection: connection.execute(self._addition, rows))

    def prune_rollup(self) -> None:
        """Delete what no chart shows any more."""
        old = (
            sa.and_(
                ROLLUPS.c.seconds == seconds,
                ROLLUPS.c.begins_at < self.after(sa.literal(-kept)),
            )
            for seconds, kept in _KEPT_SECONDS.items()
        )
        deletion = sa.delete(ROLLUPS).where(sa.or_(*old))
        self.transaction(lambda connection: connection.execute(deletion))

    @functools.cached_property
    def _addition(self) -> Any:
        insert = self.insert_into(ROLLUPS)
        return insert.on_conflict_do_update(
            index_elements=list(ROLLUPS.primary_key),
            set_={"jobs": ROLLUPS.c.jobs + insert.excluded.jobs},
        )
