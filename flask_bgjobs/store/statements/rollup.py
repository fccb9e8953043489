"""The roll-up: counters for charts, which workers increase, so that no chart reads all jobs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from ...job.rollup import HOUR, MINUTE, Cell
from ..database import ROLLUPS, Database

_KEPT_SECONDS = {MINUTE: 2 * 3_600.0, HOUR: 8 * 86_400.0}
"""How long counts are kept, by the seconds of their period: a little longer than the charts of an
hour and of seven days need."""


class Rollups(Database):
    """The statements about the roll-up."""

    def add_to_rollup(self, counts: Mapping[Cell, int]) -> None:
        """Add counts to the stored ones.

        A commit without a reply may have succeeded. If the caller adds the same counts again after
        one, they are counted twice.
        """
        # Sorted, so that all workers lock the rows in the same order and cannot deadlock.
        rows = [{**cell._asdict(), "jobs": number} for cell, number in sorted(counts.items())]
        self.transaction(lambda connection: connection.execute(self._addition, rows))

    def prune_rollup(self) -> None:
        """Delete counts that are too old for all charts."""
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
