"""Prune: delete old jobs in small steps."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy.exc import DBAPIError, IntegrityError

from ..store import PruneCursor, Retention, Store, database_sentence
from ..system.safe_logging import logger as _logger

_PRUNED_AT_ONCE = 500
"""Jobs per step. A step blocks other writers and the worker's loop, so it must be short."""


class Pruner:
    """Deletes finished jobs that are older than their retention, in short steps.

    A pass looks at each such job once. Its last step also deletes old rows of dead workers, of
    unused queues, of the roll-up, of the audit log, of unused limits, of unused keys of limits and
    turns, and old ticks of schedules.

    :param kept_limits: the names of the limits in the code, which are kept although unused.
    """

    def __init__(
        self, store: Store, retention: Retention, kept_limits: Collection[str] = ()
    ) -> None:
        self._store = store
        self._kept_limits = kept_limits
        self._retention = retention
        self._cursor: PruneCursor | None = None
        self._is_denied = False
        self.deleted = 0
        """Number of jobs that this pass has deleted."""
        self.held = 0
        """Number of jobs that this pass kept, because a row of another table refers to them."""

    def step(self) -> bool:
        """Delete up to 500 jobs.

        :returns: ``False`` when the pass is finished; the next step starts a new one.
        """
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
        self._store.prune_schedules(_PRUNED_AT_ONCE)
        self._store.prune_limit_keys(_PRUNED_AT_ONCE)
        self._store.prune_limits(_PRUNED_AT_ONCE, self._kept_limits)
        self._store.prune_fair_keys(_PRUNED_AT_ONCE)


class Pruning:
    """The pruning of one worker: a pass in every interval, in one step per turn of its loop.

    :param worker: the worker's name, for the log.
    :param is_due: whether the first pass begins at once.
    """

    def __init__(self, pruner: Pruner, worker: str, *, is_due: bool) -> None:
        self._pruner = pruner
        self._worker = worker
        self.is_due = is_due
        """Whether a pass is under way, or is to begin."""

    def begin(self) -> None:
        """Begin a pass. Called from another thread."""
        self.is_due = True

    def step(self) -> None:
        """Do one step, if a pass is due."""
        if not self.is_due:
            return
        try:
            self.is_due = self._pruner.step()
        except IntegrityError as error:
            # A foreign key that is checked at the commit does not say which row it holds.
            _logger.warning("Jobs not pruned | Worker: %s | Error: %s", self._worker, error.orig)
            self.is_due = False
        if not self.is_due and self._pruner.deleted:
            _logger.info(
                "Jobs pruned | Worker: %s | Deleted: %d | Held by other tables: %d",
                self._worker,
                self._pruner.deleted,
                self._pruner.held,
            )
