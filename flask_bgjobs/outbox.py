"""The outbox: outcomes that wait to be recorded, through any outage of the database."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator, Mapping

from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from .spec import JobSpec, Key, Outcome, Report, Settled
from .states import OutcomeKind
from .store import CommitInDoubt, Store

_logger = logging.getLogger("flask_bgjobs")

_REFUSED = (DataError, IntegrityError, ProgrammingError)
"""What the database would answer each time."""


_Entries = collections.deque[tuple[JobSpec, Outcome]]


class Outbox:
    """Outcomes in the order in which they came; safe to fill from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._smooth: _Entries = collections.deque()
        """Of attempts that completed and told nothing more, to be recorded in bulk."""
        self._others: _Entries = collections.deque()
        self._in_doubt: set[Key] = set()
        self._told: dict[Key, Report] = {}
        """What attempts told while they ran, and could not be written then."""

    def __len__(self) -> int:
        return len(self._smooth) + len(self._others)

    def put(self, spec: JobSpec, outcome: Outcome) -> None:
        """Keep the outcome of an attempt until it is recorded."""
        earlier = self._told.pop(spec.key, None)
        if earlier is not None:
            outcome = outcome._replace(report=earlier.followed_by(outcome.report))
        is_smooth = outcome.kind is OutcomeKind.COMPLETED and outcome.report is None
        # Only the other way can tell what a commit without an answer has recorded.
        in_bulk = is_smooth and spec.key not in self._in_doubt
        (self._smooth if in_bulk else self._others).append((spec, outcome))

    def keep_told(self, reports: Mapping[Key, Report]) -> None:
        """Keep what attempts told, and could not be written, for their outcomes."""
        self._told.update(reports)
        for spec, outcome in self.take_all():
            self.put(spec, outcome)

    def take_told(self) -> dict[Key, Report]:
        """What running attempts told before; it is not kept any longer."""
        told = {}
        # One by one, as each may be taken by an outcome that comes meanwhile, also the last.
        with contextlib.suppress(KeyError):
            while self._told:
                key, report = self._told.popitem()
                told[key] = report
        return told

    def take_all(self) -> list[tuple[JobSpec, Outcome]]:
        """What waits; it is not kept any longer."""
        return [*_taken(self._smooth), *_taken(self._others)]

    def record(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        """What was recorded of all that waited, in two transactions at most.

        :raises DBAPIError: when the database is not usable; what was not recorded is kept.
        """
        yield from self._record_smooth(worker_id)
        yield from self._record_others(worker_id, worker_name)

    def _record_smooth(self, worker_id: int) -> list[Settled]:
        batch = _taken(self._smooth)
        if not batch:
            return []
        try:
            return self._store.complete(worker_id, batch)
        except _REFUSED:
            # The other way looks at each.
            self._others.extendleft(reversed(batch))
            return []
        except CommitInDoubt:
            self._in_doubt |= {spec.key for spec, _ in batch}
            self._others.extendleft(reversed(batch))
            raise
        except BaseException:
            self._smooth.extendleft(reversed(batch))
            raise

    def _record_others(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        batch = list(self._others)
        if not batch:
            return
        try:
            settled = self._store.settle(worker_id, worker_name, batch, self._in_doubt)
        except _REFUSED:
            # One outcome that the database refuses must not keep the others from being recorded.
            for _ in batch:
                yield from self._record_first(worker_id, worker_name)
            return
        except CommitInDoubt:
            self._in_doubt |= {spec.key for spec, _ in batch}
            raise
        self._forget(len(batch))
        yield from settled

    def _record_first(self, worker_id: int, worker_name: str) -> list[Settled]:
        spec, outcome = self._others[0]
        try:
            settled = self._store.settle(
                worker_id, worker_name, [(spec, outcome)], self._in_doubt & {spec.key}
            )
        except _REFUSED as error:
            _logger.exception("The outcome of job %s was refused by the database", spec.id)
            plain = Outcome(
                spec.id,
                spec.attempt,
                OutcomeKind.FAILED_FINALLY,
                error_type=type(error).__name__,
                error="the outcome could not be recorded; the worker's log says why",
            )
            settled = self._store.settle(worker_id, worker_name, [(spec, plain)])
        except CommitInDoubt:
            self._in_doubt.add(spec.key)
            raise
        self._forget(1)
        return settled

    def _forget(self, recorded: int) -> None:
        """Forget the oldest of the others; they were kept until they were recorded."""
        for _ in range(recorded):
            spec, _outcome = self._others.popleft()
            self._in_doubt.discard(spec.key)


def _taken(entries: _Entries) -> list[tuple[JobSpec, Outcome]]:
    """All entries, removed; others may be put in meanwhile."""
    return [entries.popleft() for _ in range(len(entries))]
