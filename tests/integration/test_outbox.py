"""The outbox: no outcome is lost, whatever the database answers."""

from __future__ import annotations

import collections
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import DataError, OperationalError

from flask_bgjobs import run_background_job
from flask_bgjobs.job.records import JobSpec, Outcome, Report
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.models import JobLog
from flask_bgjobs.state import AppState
from flask_bgjobs.store import CommitInDoubt
from flask_bgjobs.store.dialects import mysql
from flask_bgjobs.worker.outbox import Outbox
from flask_bgjobs.worker.worker import register
from tests.conftest import stored
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

    def put(self, spec: JobSpec, kind: OutcomeKind = OutcomeKind.COMPLETED, **more: Any) -> None:
        self.outbox.put(spec, Outcome(spec.id, spec.attempt, kind, wait_seconds=0.0, **more))

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
    for _ in range(2):
        with pytest.raises(OperationalError):
            claimed.record()
        assert len(claimed.outbox) == 2
    assert claimed.record() == [(done.id, "completed"), (failed.id, "failed")]


@pytest.mark.parametrize("breaking", ["complete", "settle"])
def test_what_breaks_the_link_each_time_starves_no_others(claimed: Claimed, breaking: str) -> None:
    """Also where one kind of outcome cannot be sent, the other kind is recorded."""
    done, failed = claimed.jobs(2)
    claimed.put(done)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.answers[breaking].extend([GONE] * 3)
    for _ in range(3):
        with pytest.raises(OperationalError):
            claimed.record()
    assert len(claimed.outbox) == 1
    assert len(claimed.record()) == 1


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
    claimed.outbox.keep_reports({})
    assert claimed.record() == [(spec.id, "completed")]


@pytest.mark.parametrize("comes", ["before", "after"])
def test_what_was_told_before_stays_with_its_attempt(claimed: Claimed, comes: str) -> None:
    """Lines that could not be written while a job ran are written with its outcome, whether that
    came before or comes after."""
    (spec,) = claimed.jobs(1)
    if comes == "before":
        claimed.put(spec)
    claimed.outbox.keep_reports({spec.key: Report(lines=("one", "two"))})
    if comes == "after":
        claimed.put(spec)
    assert claimed.record() == [(spec.id, "completed")]
    assert [row.message for row in rows(claimed.state, JobLog)] == ["one", "two"]


LARGE = json.dumps('"' * 500_000)
"""A result whose every letter has to be escaped, twice in a bulk settle on MySQL."""


class TestSizes:
    """Results of any size that ``BGJOBS_MAX_PAYLOAD`` may allow."""

    def test_large_results_are_recorded(self, app: Flask, claimed: Claimed) -> None:
        """Results that do not fit into one statement together are recorded in several."""
        specs = claimed.jobs(10)
        for spec in specs:
            claimed.put(spec, result_json=LARGE)
        assert claimed.record() == [(spec.id, "completed") for spec in specs]
        assert {stored(app, spec.id).result_json for spec in specs} == {LARGE}

    def test_small_results_are_recorded_together(
        self, claimed: Claimed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hundred small results take one statement."""
        sizes = []
        complete = claimed.state.store.complete

        def count(worker: int, batch: Sequence[Any]) -> Any:
            sizes.append(len(batch))
            return complete(worker, batch)

        for spec in claimed.jobs(100):
            claimed.put(spec, result_json='"0123456789"')
        monkeypatch.setattr(claimed.state.store, "complete", count)
        claimed.record()
        assert sizes == [100]

    def test_an_outage_between_batches_loses_none(self, claimed: Claimed) -> None:
        """What was recorded before an outage is not recorded again, and the rest is kept."""
        ids = [spec.id for spec in claimed.jobs(6) if not claimed.put(spec, result_json=LARGE)]
        claimed.answers["complete"].extend([None, GONE])
        recorded: list[tuple[int, str | None]] = []
        settled = ((s.job_id, s.status) for s in claimed.outbox.record(claimed.worker, "one"))
        with pytest.raises(OperationalError):
            recorded.extend(settled)
        assert 0 < len(recorded) < 6
        recorded += claimed.record()
        assert sorted(recorded) == [(job_id, "completed") for job_id in ids]

    def test_a_batch_that_fails_lets_the_others_go_first(self, claimed: Claimed) -> None:
        """What the link breaks over again and again does not hold back other outcomes."""
        specs = claimed.jobs(3)
        for spec in specs:
            claimed.put(spec, result_json=LARGE)
        claimed.answers["complete"].extend([GONE, None, None, GONE])
        for _ in range(2):
            with pytest.raises(OperationalError):
                claimed.record()
        assert [stored_status(claimed, spec) for spec in specs] == [
            "running",
            "completed",
            "completed",
        ]

    @pytest.mark.parametrize("kind", [OutcomeKind.COMPLETED, OutcomeKind.FAILED])
    def test_one_that_is_too_large_fails_alone(
        self, app: Flask, claimed: Claimed, small_limit: str, kind: OutcomeKind
    ) -> None:
        """A result that the database cannot take fails its job, which names size and limit."""
        large, small = claimed.jobs(2)
        report = None if kind is OutcomeKind.COMPLETED else Report(lines=("a line",))
        claimed.put(large, kind, result_json=json.dumps("x" * 2_000_000), report=report)
        claimed.put(small, kind, result_json='"x"', report=report)
        after = "completed" if kind is OutcomeKind.COMPLETED else "retrying"
        assert sorted(claimed.record()) == [(large.id, "failed"), (small.id, after)]
        assert len(claimed.outbox) == 0
        error = stored(app, large.id).error
        assert error is not None
        assert "2,000,0" in error
        assert small_limit in error

    @pytest.mark.on("mysql")
    def test_a_packet_that_a_proxy_refuses_fails_alone(self, app: Flask, claimed: Claimed) -> None:
        """The same answer of a proxy, whose limit may be lower than the server's, is no outage."""
        refusal = OperationalError("settle", None, Exception(1153, "… max_allowed_packet …"))
        large, small = claimed.jobs(2)
        claimed.put(large)
        claimed.put(small)
        claimed.answers["complete"].append(refusal)
        claimed.answers["settle"].extend([refusal, refusal])
        assert sorted(claimed.record()) == [(large.id, "failed"), (small.id, "completed")]
        assert "max_allowed_packet" in str(stored(app, large.id).error)


def stored_status(claimed: Claimed, spec: JobSpec) -> str:
    job = claimed.state.store.get(spec.id)
    assert job is not None
    return job.status


@pytest.fixture
def small_limit(
    state: AppState, database_kind: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A database that takes a million bytes, and what an error says of that limit."""
    store = state.store
    if database_kind == "postgresql":
        monkeypatch.setattr("flask_bgjobs.store.statements.progress.BATCH_BYTES", 1_000)
        monkeypatch.setattr(type(store), "largest_text", 1_000_000)
        yield "1,000,000"
        return
    if database_kind == "mysql":
        store.dispose()
        within = mysql._query_within_packet
        monkeypatch.setattr(mysql, "_query_within_packet", lambda link, _: within(link, 1_000_000))
        yield "max_allowed_packet, 1,000,000"
        return

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)

    sa.event.listen(store.engine, "connect", limit)
    store.dispose()
    yield "SQLITE_LIMIT_LENGTH"
