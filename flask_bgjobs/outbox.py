"""The outbox: outcomes that wait to be recorded, through any outage of the database."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence

from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from .spec import JobSpec, Key, Outcome, Settled
from .states import OutcomeKind
from .store import CommitInDoubt, Store

_logger = logging.getLogger("flask_bgjobs")

_REFUSED = (DataError, IntegrityError, ProgrammingError)
"""What the database would answer each time."""


class Outbox:
    """Outcomes in the order in which they came; safe to fill from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: collections.deque[tuple[JobSpec, Outcome]] = collections.deque()
        self._in_doubt: set[Key] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, spec: JobSpec, outcome: Outcome) -> None:
        """Keep the outcome of an attempt until it is recorded."""
        self._waiting.append((spec, outcome))

    def take_all(self) -> list[tuple[JobSpec, Outcome]]:
        """What waits; it is not kept any longer."""
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def record(self, worker_id: int, worker_name: str) -> list[Settled]:
        """What was recorded of all that waited, in one transaction.

        :raises DBAPIError: when the database is not usable; all of it is kept.
        """
        batch = self.take_all()
        if not batch:
            return []
        try:
            settled = self._store.settle(worker_id, worker_name, batch, self._in_doubt)
        except _REFUSED:
            settled = self._record_one_by_one(worker_id, worker_name, batch)
        except BaseException as error:
            if isinstance(error, CommitInDoubt):
                self._in_doubt |= {spec.key for spec, _ in batch}
            self._waiting.extendleft(reversed(batch))
            raise
        self._in_doubt.clear()
        return settled

    def _record_one_by_one(
        self, worker_id: int, worker_name: str, batch: Sequence[tuple[JobSpec, Outcome]]
    ) -> list[Settled]:
        """One outcome that the database refuses must not keep the others from being recorded."""
        settled: list[Settled] = []
        for spec, outcome in batch:
            try:
                settled += self._store.settle(worker_id, worker_name, [(spec, outcome)])
            except _REFUSED as error:
                _logger.exception("The outcome of job %s was refused by the database", spec.id)
                plain = Outcome(
                    spec.id,
                    spec.attempt,
                    OutcomeKind.FAILED_FINALLY,
                    error_type=type(error).__name__,
                    error="the outcome could not be recorded; the worker's log says why",
                )
                settled += self._store.settle(worker_id, worker_name, [(spec, plain)])
        return settled
