"""The outbox: no outcome is lost, whatever the database answers."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from sqlalchemy.exc import DataError, OperationalError

from flask_bgjobs import run_background_job
from flask_bgjobs.app_state import AppState
from flask_bgjobs.models import JobLog
from flask_bgjobs.outbox import Outbox
from flask_bgjobs.spec import JobSpec, Outcome, Report
from flask_bgjobs.states import OutcomeKind
from flask_bgjobs.store import CommitInDoubt
from flask_bgjobs.worker import register
from tests.integration.test_worker import rows

REFUSED = DataError("settle", None, Exception("refused"))
GONE = OperationalError("settle", None, Exception("gone"))
IN_DOUBT = CommitInDoubt("settle", None, Exception("gone"))


class Claimed:
    """Jobs that a worker has claimed, its outbox, and a database that answers as it is told."""

    def __init__(self, state: AppState, patch: pytest.MonkeyPatch) -> None:
        self.state = state
        self.worker = register(state, "one")
        self.outbox = Outbox(state.store)
        self.answers: dict[str, collections.deque[Exception | None]] = {}
        """To the next calls of ``complete`` and ``settle``; ``None`` is the real one."""
        for name in ("complete", "settle"):
            self.answers[name] = collections.deque()
            patch.setattr(state.store, name, self._answering(name))

    def _answering(self, name: str) -> Any:
        real = getattr(self.state.store, name)

        def call(*args: Any) -> Any:
            answer = self.answers[name].popleft() if self.answers[name] else None
            if answer is not None:
                raise answer
            return real(*args)

        return call

    def jobs(self, number: int) -> list[JobSpec]:
        for _ in range(number):
            run_background_job("tests.jobs.echo")
        return self.state.store.claim(self.worker, number)

    def put(self, spec: JobSpec, kind: OutcomeKind = OutcomeKind.COMPLETED) -> None:
        self.outbox.put(spec, Outcome(spec.id, spec.attempt, kind, wait_seconds=0.0))

    def record(self) -> list[tuple[int, str | None]]:
        return [(s.job_id, s.status) for s in self.outbox.record(self.worker, "one")]


@pytest.fixture
def claimed(state: AppState, monkeypatch: pytest.MonkeyPatch) -> Claimed:
    return Claimed(state, monkeypatch)


def test_each_in_its_way(claimed: Claimed) -> None:
    """What completed and what did not are recorded together."""
    done, failed = claimed.jobs(2)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.put(done)
    assert claimed.record() == [(done.id, "completed"), (failed.id, "failed")]
    assert len(claimed.outbox) == 0


def test_an_outage_loses_none(claimed: Claimed) -> None:
    """What could not be recorded is kept, and recorded later."""
    done, failed = claimed.jobs(2)
    claimed.put(done)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.answers["complete"].append(GONE)
    claimed.answers["settle"].append(GONE)
    for left in (2, 1):
        with pytest.raises(OperationalError):
            claimed.record()
        assert len(claimed.outbox) == left
    assert claimed.record() == [(failed.id, "failed")]


def test_a_refused_outcome_fails_only_its_own_job(claimed: Claimed) -> None:
    """Where the database refuses one outcome, that job fails and the others are as they were."""
    first, second = claimed.jobs(2)
    claimed.put(first)
    claimed.put(second)
    claimed.answers["complete"].append(REFUSED)
    claimed.answers["settle"].extend([REFUSED, REFUSED])
    assert claimed.record() == [(first.id, "failed"), (second.id, "completed")]
    assert len(claimed.outbox) == 0


def test_an_outage_after_a_refusal_loses_none(claimed: Claimed) -> None:
    """Where the link breaks while outcomes are recorded one by one, the rest is kept."""
    first, second, third = claimed.jobs(3)
    for spec in (first, second, third):
        claimed.put(spec, OutcomeKind.FAILED_FINALLY)
    claimed.answers["settle"].extend([REFUSED, None, GONE])
    recorded = claimed.outbox.record(claimed.worker, "one")
    assert next(recorded).job_id == first.id
    with pytest.raises(OperationalError):
        next(recorded)
    assert len(claimed.outbox) == 2
    assert claimed.record() == [(second.id, "failed"), (third.id, "failed")]


def test_what_is_in_doubt_is_looked_at_again(claimed: Claimed) -> None:
    """Where nobody knows whether a commit was done, what it recorded is not called lost."""
    (spec,) = claimed.jobs(1)
    claimed.put(spec)
    claimed.state.store.complete(
        claimed.worker, [(spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED))]
    )
    claimed.answers["complete"].append(IN_DOUBT)
    with pytest.raises(CommitInDoubt):
        claimed.record()
    assert claimed.record() == [(spec.id, "completed")]


def test_what_is_in_doubt_stays_in_doubt(claimed: Claimed) -> None:
    """Also where outcomes are taken out and put in again before the next try."""
    (spec,) = claimed.jobs(1)
    claimed.put(spec)
    claimed.state.store.complete(
        claimed.worker, [(spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED))]
    )
    claimed.answers["complete"].append(IN_DOUBT)
    with pytest.raises(CommitInDoubt):
        claimed.record()
    claimed.outbox.keep_told({})
    assert claimed.record() == [(spec.id, "completed")]


@pytest.mark.parametrize("comes", ["before", "after"])
def test_what_was_told_before_stays_with_its_attempt(claimed: Claimed, comes: str) -> None:
    """Lines that could not be written while a job ran are written with its outcome, whether that
    came before or comes after."""
    (spec,) = claimed.jobs(1)
    if comes == "before":
        claimed.put(spec)
    claimed.outbox.keep_told({spec.key: Report(lines=("one", "two"))})
    if comes == "after":
        claimed.put(spec)
    assert claimed.record() == [(spec.id, "completed")]
    assert [row.message for row in rows(claimed.state, JobLog)] == ["one", "two"]
