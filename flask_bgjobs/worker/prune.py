"""Prune: deleting what is old, step by step."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from ..store import PruneCursor, Retention, Store, database_sentence
from ..system.safe_logging import logger as _logger

_PRUNED_AT_ONCE = 500
"""Jobs per step: others wait for the write lock meanwhile, and the worker for its turn."""


class Pruner:
    """Deletes finished jobs that are older than their retention, a short step at a time.

    A pass looks at each such job once. It ends with the rows of workers that are long gone, of
    queues that nobody uses, and with numbers and audit entries that nobody needs any more.
    """

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._cursor: PruneCursor | None = None
        self._is_denied = False
        self.deleted = 0
        """Jobs that this pass has deleted."""
        self.held = 0
        """Jobs that this pass had to leave: a row of another table refers to them."""

    def step(self) -> bool:
        """Delete up to 500 jobs. ``False``: the pass is finished, and the next step begins anew."""
        if self._cursor is None:
            self.deleted = self.held = 0
        try:
            pruned = self._store.prune(self._retention, _PRUNED_AT_ONCE, self._cursor)
            self.deleted += pruned.deleted
            self.held += pruned.held
            self._cursor = pruned.cursor
            if self._cursor is None:
                self._prune_the_rest()
        except DBAPIError as error:
            if not self._store.is_denied(error):
                raise
            if not self._is_denied:
                _logger.warning(
                    "Pruning not allowed | Grant SELECT, INSERT, UPDATE and DELETE on all tables "
                    "bgjobs_* to the worker's database user | Error: %s",
                    database_sentence(error),
                )
            self._is_denied = True
            self._cursor = None
        return self._cursor is not None

    def _prune_the_rest(self) -> None:
        self._store.prune_workers(_PRUNED_AT_ONCE)
        self._store.prune_queues(_PRUNED_AT_ONCE)
        self._store.prune_rollup()
        self._store.prune_audits(_PRUNED_AT_ONCE)
