"""The outbox: outcomes that wait to be recorded, also during an outage of the database."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from sqlalchemy.exc import DBAPIError

from ..job.records import JobSpec, Key, Outcome, Report, Settled
from ..job.statuses import OutcomeKind
from ..store import CommitInDoubt, Store, batches, database_sentence, statement_bytes
from ..system.safe_logging import logger as _logger

_ENTRY_BYTES = 500
"""Upper bound for the numbers and times of one outcome in a statement."""

_LOCKED_PAUSE_SECONDS = 0.25
"""Pause before the next try to record outcomes whose rows were locked."""

_Entry = tuple[JobSpec, Outcome]
_Entries = collections.deque[_Entry]
Complete = Callable[[list[_Entry]], list[Settled]]
"""Records completed attempts, as ``Store.complete`` does."""


class Outbox:
    """Outcomes in the order in which they arrived. Any thread may add one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._plain_completions: _Entries = collections.deque()
        """Outcomes of completed attempts without a report, to be recorded in bulk."""
        self._other_outcomes: _Entries = collections.deque()
        """All other outcomes, to be recorded with ``Store.settle``."""
        self._in_doubt: set[Key] = set()
        """Attempts whose outcome was sent with a commit that got no reply."""
        self._reports: dict[Key, Report] = {}
        """Progress and log lines of running attempts that could not be written yet."""
        self._locked: _Entries = collections.deque()
        """Outcomes of jobs whose rows another transaction has locked; tried again after a pause."""
        self._locked_keys: set[Key] = set()
        self._retry_locked_at = 0.0
        self._other_outcomes_first = False

    def __len__(self) -> int:
        return self.unlocked + len(self._locked)

    @property
    def unlocked(self) -> int:
        """Number of outcomes that can be recorded at once, because no lock delays them."""
        return len(self._plain_completions) + len(self._other_outcomes)

    @property
    def _may_retry_locked(self) -> bool:
        return bool(self._locked) and time.monotonic() >= self._retry_locked_at

    def put(self, spec: JobSpec, outcome: Outcome) -> None:
        """Keep the outcome of an attempt until it is recorded."""
        earlier = self._reports.pop(spec.key, None)
        if earlier is not None:
            outcome = outcome._replace(report=earlier.followed_by(outcome.report))
        if spec.key in self._locked_keys:
            self._locked.append((spec, outcome))
            return
        is_plain = outcome.kind is OutcomeKind.COMPLETED and outcome.report is None
        # Only settle() can find out whether a commit without a reply has recorded the outcome.
        in_bulk = is_plain and spec.key not in self._in_doubt
        entries = self._plain_completions if in_bulk else self._other_outcomes
        entries.append((spec, outcome))

    def keep_reports(self, reports: Mapping[Key, Report]) -> None:
        """Keep reports that could not be written, to be recorded with the outcomes."""
        self._reports.update(reports)
        for spec, outcome in self.take_all():
            self.put(spec, outcome)

    def take_reports(self) -> dict[Key, Report]:
        """Remove and return the kept reports of running attempts."""
        taken = {}
        # One at a time: put() may take any of them in another thread, also the last.
        with contextlib.suppress(KeyError):
            while self._reports:
                key, report = self._reports.popitem()
                taken[key] = report
        return taken

    def take_all(self) -> list[_Entry]:
        """Remove and return all outcomes."""
        return [
            *_take(self._plain_completions),
            *_take(self._other_outcomes),
            *_take(self._locked),
        ]

    def record(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        """Record the outcomes, in transactions of limited size, and yield what was recorded.

        Outcomes of jobs whose rows another transaction has locked are kept for later.

        :raises DBAPIError: when the database is not usable. Outcomes not yet recorded are kept.
        """
        if self._may_retry_locked:
            self._other_outcomes.extend(_take(self._locked))
        steps = [
            self._record_plain_completions(worker_id),
            self._record_other_outcomes(worker_id, worker_name),
        ]
        if self._other_outcomes_first:
            steps.reverse()
        try:
            for step in steps:
                yield from step
        except DBAPIError:
            # The first step may break the connection each time; the next call swaps them.
            self._other_outcomes_first = not self._other_outcomes_first
            raise

    def _record_plain_completions(self, worker_id: int) -> Iterator[Settled]:
        waiting = collections.deque(batches(_take(self._plain_completions), _completion_bytes))
        complete = functools.partial(self._store.complete, worker_id)
        try:
            while waiting:
                yield from self._complete(waiting.popleft(), complete)
        finally:
            for batch in reversed(waiting):
                self._plain_completions.extendleft(reversed(batch))

    @property
    def has_limited_completions(self) -> bool:
        """Whether outcomes of jobs with limits are to be recorded in bulk, and no others now."""
        if self._other_outcomes or self._may_retry_locked:
            return False
        return any(spec.limits_json is not None for spec, _ in self._plain_completions.copy())

    def record_by(self, complete: Complete) -> list[Settled]:
        """Record the first of the outcomes that are recorded in bulk, as :meth:`record` does.

        :param complete: records them.
        """
        first, *others = batches(_take(self._plain_completions), _completion_bytes)
        for batch in reversed(others):
            self._plain_completions.extendleft(reversed(batch))
        return self._complete(first, complete)

    def _complete(self, batch: list[_Entry], complete: Complete) -> list[Settled]:
        try:
            settled = complete(batch)
        except CommitInDoubt:
            self._in_doubt |= {spec.key for spec, _ in batch}
            self._other_outcomes.extendleft(reversed(batch))
            raise
        except DBAPIError as error:
            if self._store.refuses(error):
                # _record_other_outcomes() finds the outcome that the database refuses.
                self._other_outcomes.extendleft(reversed(batch))
                return []
            # Put it last: if this batch breaks the connection, the others are recorded first.
            self._plain_completions.extend(batch)
            raise
        except BaseException:
            self._plain_completions.extend(batch)
            raise
        self._put_locked_aside(batch, settled)
        return settled

    def _record_other_outcomes(self, worker_id: int, worker_name: str) -> Iterator[Settled]:
        for batch in batches(list(self._other_outcomes), _outcome_bytes):
            try:
                settled = self._settle(worker_id, worker_name, batch)
            except DBAPIError as error:
                if not self._store.refuses(error):
                    self._other_outcomes.rotate(-len(batch))
                    raise
                # One outcome that the database refuses must not hold back the others.
                for _ in batch:
                    yield from self._record_next(worker_id, worker_name)
                continue
            self._remove_recorded(batch, settled)
            yield from settled

    def _record_next(self, worker_id: int, worker_name: str) -> list[Settled]:
        """Record the next one of the other outcomes. If the database refuses it, its job fails."""
        spec, outcome = entry = self._other_outcomes[0]
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
        self._remove_recorded([entry], settled)
        return settled

    def _settle(self, worker_id: int, worker_name: str, batch: list[_Entry]) -> list[Settled]:
        keys = {spec.key for spec, _ in batch}
        try:
            return self._store.settle(worker_id, worker_name, batch, self._in_doubt & keys)
        except CommitInDoubt:
            self._in_doubt |= keys
            raise

    def _refusal(self, outcome: Outcome, error: DBAPIError) -> str:
        """The job's error text when the database refuses its outcome."""
        if self._store.is_too_large(error):
            size = sum(len(text.encode()) for text in _texts_of(outcome))
            return f"the outcome of {size:,} bytes is too large: {database_sentence(error)}"
        return "the outcome could not be recorded; the worker's log says why"

    def _remove_recorded(self, batch: Sequence[_Entry], settled: Sequence[Settled]) -> None:
        """Remove a recorded batch from the front of the other outcomes."""
        for _ in batch:
            self._other_outcomes.popleft()
        self._put_locked_aside(batch, settled)

    def _put_locked_aside(self, batch: Sequence[_Entry], settled: Sequence[Settled]) -> None:
        """Put outcomes whose rows were locked aside, to be tried again.

        :param settled: the recorded outcomes of ``batch``; the rows of the others were locked.
        """
        done = {each.spec.key for each in settled}
        self._in_doubt -= done
        self._locked_keys -= done
        if len(done) == len(batch):
            return
        left = [entry for entry in batch if entry[0].key not in done]
        self._locked_keys |= {spec.key for spec, _ in left}
        self._locked.extend(left)
        self._retry_locked_at = time.monotonic() + _LOCKED_PAUSE_SECONDS


def _take(entries: _Entries) -> list[_Entry]:
    """Remove and return all entries. Other threads may add entries in the meantime."""
    return [entries.popleft() for _ in range(len(entries))]


def _texts_of(outcome: Outcome) -> Iterator[str]:
    """The texts of an outcome whose size depends on the job's code."""
    texts = (outcome.result_json, outcome.error, outcome.traceback)
    yield from (text for text in texts if text is not None)
    if outcome.report is not None:
        yield outcome.report.meta_json or ""
        yield from outcome.report.lines


def _completion_bytes(entry: _Entry) -> int:
    """Like :func:`_outcome_bytes`, but faster: a plain completion has no text but its result."""
    return _ENTRY_BYTES + statement_bytes(entry[1].result_json)


def _outcome_bytes(entry: _Entry) -> int:
    """Upper bound for the bytes that an outcome takes in a statement."""
    return _ENTRY_BYTES + statement_bytes(*_texts_of(entry[1]))
