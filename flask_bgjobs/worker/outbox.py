"""The outbox: outcomes that wait to be recorded, through any outage of the database."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy.exc import DBAPIError

from ..job.records import JobSpec, Key, Outcome, Report, Settled
from ..job.statuses import OutcomeKind
from ..store import CommitInDoubt, Store, batches, database_sentence, statement_bytes
from ..system.safe_logging import logger as _logger

_ENTRY_BYTES = 500
"""More than the numbers and times of an outcome take in a statement."""

_LOCKED_PAUSE_SECONDS = 0.25
"""Before a job whose row was locked is looked at again."""

_Entry = tuple[JobSpec, Outcome]
_Entries = collections.deque[_Entry]


class Outbox:
    """Outcomes in the order in which they came; safe to fill from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._smooth: _Entries = collections.deque()
        """Of attempts that completed and told nothing more, to be recorded in bulk."""
        self._others: _Entries = collections.deque()
        self._in_doubt: set[Key] = set()
        self._reports: dict[Key, Report] = {}
        """What attempts told while they ran, and could not be written then."""
        self._locked: _Entries = collections.deque()
        """Of jobs whose rows another transaction keeps locked; tried again every now and then."""
        self._locked_keys: set[Key] = set()
        self._retry_locked_at = 0.0
        self._others_first = False

    def __len__(self) -> int:
        return self.unlocked + len(self._locked)

    @property
    def unlocked(self) -> int:
        """How many outcomes wait for nothing but to be recorded."""
        return len(self._smooth) + len(self._others)

    def put(self, spec: JobSpec, outcome: Outcome) -> None:
        """Keep the outcome of an attempt until it is recorded."""
        earlier = self._reports.pop(spec.key, None)
        if earlier is not None:
            outcome = outcome._replace(report=earlier.followed_by(outcome.report))
        if spec.key in self._locked_keys:
            self._locked.append((spec, outcome))
            return
        is_smooth = outcome.kind is OutcomeKind.COMPLETED and outcome.report is None
        # Only the other way can tell what a commit without an answer has recorded.
        in_bulk = is_smooth and spec.key not in self._in_doubt
        (self._smooth if in_bulk else self._others).append((spec, outcome))

    def keep_told(self, reports: Mapping[Key, Report]) -> None:
        """Keep what attempts told, and could not be written, for their outcomes."""
        self._reports.update(reports)
        for spec, outcome in self.take_all():
            self.put(spec, outcome)

    def take_reports(self) -> dict[Key, Report]:
        """What running attempts told before; it is not kept any longer."""
        told = {}
        # One by one, as each may be taken by an outcome that comes meanwhile, also the last.
        with contextlib.suppress(KeyError):
            while self._reports:
                key, report = self._reports.popitem()
                told[key] = report
        return told

    def take_all(self) -> list[_Entry]:
        """What waits; it is not kept any longer."""
        return [*_taken(self._smooth), *_taken(self._others), *_taken(self._locked)]

    def record(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        """What was recorded of all that waited, in transactions of limited size.

        Outcomes of jobs whose rows another transaction keeps locked are kept for later.

        :raises DBAPIError: when the database is not usable; what was not recorded is kept.
        """
        if self._locked and time.monotonic() >= self._retry_locked_at:
            self._others.extend(_taken(self._locked))
        ways = [self._record_smooth(worker_id), self._record_others(worker_id, worker_name)]
        if self._others_first:
            ways.reverse()
        try:
            for way in ways:
                yield from way
        except DBAPIError:
            # It may be what came first that breaks the link, each time.
            self._others_first = not self._others_first
            raise

    def _record_smooth(self, worker_id: int) -> Iterator[Settled]:
        waiting = collections.deque(batches(_taken(self._smooth), _bytes_of_smooth))
        try:
            while waiting:
                yield from self._complete(worker_id, waiting.popleft())
        finally:
            for batch in reversed(waiting):
                self._smooth.extendleft(reversed(batch))

    def _complete(self, worker_id: int, batch: list[_Entry]) -> list[Settled]:
        try:
            settled = self._store.complete(worker_id, batch)
        except CommitInDoubt:
            self._in_doubt |= {spec.key for spec, _ in batch}
            self._others.extendleft(reversed(batch))
            raise
        except DBAPIError as error:
            if self._store.refuses(error):
                # The other way looks at each.
                self._others.extendleft(reversed(batch))
                return []
            # The other batches go first the next time: it may be this one that breaks the link.
            self._smooth.extend(batch)
            raise
        except BaseException:
            self._smooth.extend(batch)
            raise
        self._sort_out(batch, settled)
        return settled

    def _record_others(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        for batch in batches(list(self._others), _bytes_of):
            try:
                settled = self._settle(worker_id, worker_name, batch)
            except DBAPIError as error:
                if not self._store.refuses(error):
                    self._others.rotate(-len(batch))
                    raise
                # One outcome that the database refuses must not hold back the others.
                for _ in batch:
                    yield from self._record_first(worker_id, worker_name)
                continue
            self._forget(batch, settled)
            yield from settled

    def _record_first(self, worker_id: int, worker_name: str) -> list[Settled]:
        spec, outcome = entry = self._others[0]
        try:
            settled = self._settle(worker_id, worker_name, [entry])
        except DBAPIError as error:
            if not self._store.refuses(error):
                raise
            _logger.exception("The outcome of job %s was refused by the database", spec.id)
            plain = Outcome(
                spec.id,
                spec.attempt,
                OutcomeKind.FAILED_FINALLY,
                error_type=type(error).__name__,
                error=self._refusal(outcome, error),
            )
            settled = self._store.settle(worker_id, worker_name, [(spec, plain)])
        self._forget([entry], settled)
        return settled

    def _settle(self, worker_id: int, worker_name: str, batch: list[_Entry]) -> list[Settled]:
        keys = {spec.key for spec, _ in batch}
        try:
            return self._store.settle(worker_id, worker_name, batch, self._in_doubt & keys)
        except CommitInDoubt:
            self._in_doubt |= keys
            raise

    def _refusal(self, outcome: Outcome, error: DBAPIError) -> str:
        if self._store.is_too_large(error):
            size = sum(len(text.encode()) for text in _texts_of(outcome))
            return f"the outcome of {size:,} bytes is too large: {database_sentence(error)}"
        return "the outcome could not be recorded; the worker's log says why"

    def _forget(self, batch: Sequence[_Entry], settled: Sequence[Settled]) -> None:
        """Forget the oldest of the others; they were kept until they were recorded."""
        for _ in batch:
            self._others.popleft()
        self._sort_out(batch, settled)

    def _sort_out(self, batch: Sequence[_Entry], settled: Sequence[Settled]) -> None:
        """Keep those of the batch that were not settled, because their rows are locked."""
        done = {each.spec.key for each in settled}
        self._in_doubt -= done
        self._locked_keys -= done
        if len(done) == len(batch):
            return
        left = [entry for entry in batch if entry[0].key not in done]
        self._locked_keys |= {spec.key for spec, _ in left}
        self._locked.extend(left)
        self._retry_locked_at = time.monotonic() + _LOCKED_PAUSE_SECONDS


def _taken(entries: _Entries) -> list[_Entry]:
    """All entries, removed; others may be put in meanwhile."""
    return [entries.popleft() for _ in range(len(entries))]


def _texts_of(outcome: Outcome) -> Iterator[str]:
    """What an outcome holds whose size only the job's code decides."""
    texts = (outcome.result_json, outcome.error, outcome.traceback)
    yield from (text for text in texts if text is not None)
    if outcome.report is not None:
        yield outcome.report.meta_json or ""
        yield from outcome.report.lines


def _bytes_of_smooth(entry: _Entry) -> int:
    """The same for an attempt that completed and told nothing more; nearly all do."""
    return _ENTRY_BYTES + statement_bytes(entry[1].result_json)


def _bytes_of(entry: _Entry) -> int:
    return _ENTRY_BYTES + statement_bytes(*_texts_of(entry[1]))
