"""What a worker does for limits: it admits waiting jobs, and heals what does not match."""

from __future__ import annotations

import time

from ...state import AppState
from ...store import Cursors, Store
from ...system.safe_logging import logger as _logger
from .definition import rules

_SLICE_SECONDS = 0.05
"""How long one call admits jobs before the worker does something else."""


def admit_all(store: Store) -> None:
    """Admit all jobs that the limits allow now."""
    while store.admit().more:
        pass


class LimitKeeper:
    """The limits, as one worker sees them.

    :param store: the worker's store.
    :param worker: the worker's name.
    """

    def __init__(self, state: AppState, store: Store, worker: str) -> None:
        self._state = state
        self._store = store
        self._worker = worker
        self._cursors = Cursors()
        self.is_due = True
        """Whether there may be jobs to admit."""

    def register(self) -> None:
        """Store the limits in the code, so that all workers use their numbers from now on.

        :raises ConfigError: when the limits in the code contradict each other.
        """
        found = rules(self._state)
        if found:
            self._store.define_limits(found)

    def admit(self) -> int:
        """Admit waiting jobs for a short time.

        :returns: the number of jobs that became pending.
        """
        ends = time.monotonic() + _SLICE_SECONDS
        total = 0
        while self.is_due:
            admitted = self._store.admit()
            total += admitted.jobs
            self.is_due = admitted.more
            if time.monotonic() >= ends:
                break
        return total

    def admit_all(self) -> None:
        """Admit all jobs that the limits allow now."""
        admit_all(self._store)
        self.is_due = False

    def sweep(self) -> None:
        """Compare some seats with their jobs, and put right what does not match."""
        if not self._store.has_limits():
            return
        if self._store.balance_queues():
            self.is_due = True
        healed = self._store.heal(self._cursors)
        if healed:
            self.is_due = True
            _logger.warning(
                "Limits healed | Worker: %s | Seats without a job: %d | Jobs without a seat: %d | "
                "Jobs with another order: %d | Keys with free seats that no worker looked at: %d",
                self._worker,
                healed.seats,
                healed.jobs,
                healed.orders,
                healed.keys,
            )
