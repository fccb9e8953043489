"""The outbox: it loses no outcome, whatever error the database raises."""

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
from flask_bgjobs.worker import outbox
from flask_bgjobs.worker.outbox import Outbox
from flask_bgjobs.worker.registration import register
from tests.conftest import stored
from tests.integration.test_worker import rows

REFUSED = DataError("settle", None, Exception("refused"))
GONE = OperationalError("settle", None, Exception("gone"))
IN_DOUBT = CommitInDoubt("settle", None, Exception("gone"))


class ClaimedJobs:
    """Jobs that a worker has claimed, its outbox, and a database that raises the given errors."""

    def __init__(self, state: AppState, patch: pytest.MonkeyPatch) -> None:
        self.state = state
        self.worker = register(state, "one")
        self.outbox = Outbox(state.store)
        self.errors: dict[str, collections.deque[Exception | None]] = {}
        """Errors for the next calls of ``complete`` and ``settle``; ``None``: no error."""
        for name in ("complete", "settle"):
            self.errors[name] = collections.deque()
            patch.setattr(state.store, name, self._with_errors(name))

    def _with_errors(self, name: str) -> Any:
        real = getattr(self.state.store, name)

        def call(*args: Any) -> Any:
            error = self.errors[name].popleft() if self.errors[name] else None
            if error is not None:
                raise error
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
def claimed(state: AppState, monkeypatch: pytest.MonkeyPatch) -> ClaimedJobs:
    return ClaimedJobs(state, monkeypatch)


def test_completions_and_failures_are_recorded(claimed: ClaimedJobs) -> None:
    """Completed and failed jobs are recorded together."""
    done, failed = claimed.jobs(2)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.put(done)
    assert claimed.record() == [(done.id, "completed"), (failed.id, "failed")]
    assert len(claimed.outbox) == 0


def test_outage_loses_no_outcome(claimed: ClaimedJobs) -> None:
    """Outcomes that could not be recorded during an outage are kept and recorded later."""
    done, failed = claimed.jobs(2)
    claimed.put(done)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.errors["complete"].append(GONE)
    claimed.errors["settle"].append(GONE)
    for _ in range(2):
        with pytest.raises(OperationalError):
            claimed.record()
        assert len(claimed.outbox) == 2
    assert claimed.record() == [(done.id, "completed"), (failed.id, "failed")]


@pytest.mark.parametrize("breaking", ["complete", "settle"])
def test_broken_connection_does_not_starve_other_outcomes(
    claimed: ClaimedJobs, breaking: str
) -> None:
    """If recording one kind of outcome always breaks the connection, the other kind is still
    recorded."""
    done, failed = claimed.jobs(2)
    claimed.put(done)
    claimed.put(failed, OutcomeKind.FAILED_FINALLY)
    claimed.errors[breaking].extend([GONE] * 3)
    for _ in range(3):
        with pytest.raises(OperationalError):
            claimed.record()
    assert len(claimed.outbox) == 1
    assert len(claimed.record()) == 1


def test_refused_outcome_fails_only_its_job(claimed: ClaimedJobs) -> None:
    """If the database refuses one outcome, that job fails and the other outcomes are recorded
    unchanged."""
    first, second = claimed.jobs(2)
    claimed.put(first)
    claimed.put(second)
    claimed.errors["complete"].append(REFUSED)
    claimed.errors["settle"].extend([REFUSED, REFUSED])
    assert claimed.record() == [(first.id, "failed"), (second.id, "completed")]
    assert len(claimed.outbox) == 0


def test_outage_after_a_refusal_loses_no_outcome(claimed: ClaimedJobs) -> None:
    """If the connection breaks while outcomes are recorded one by one, the remaining outcomes are
    kept."""
    first, second, third = claimed.jobs(3)
    for spec in (first, second, third):
        claimed.put(spec, OutcomeKind.FAILED_FINALLY)
    claimed.errors["settle"].extend([REFUSED, None, GONE])
    recorded = claimed.outbox.record(claimed.worker, "one")
    assert next(recorded).job_id == first.id
    with pytest.raises(OperationalError):
        next(recorded)
    assert len(claimed.outbox) == 2
    assert claimed.record() == [(second.id, "failed"), (third.id, "failed")]


def test_outcome_in_doubt_is_checked_again(claimed: ClaimedJobs) -> None:
    """If a commit got no reply, its outcome is checked again and not reported as lost."""
    (spec,) = claimed.jobs(1)
    claimed.put(spec)
    claimed.state.store.complete(
        claimed.worker, [(spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED))]
    )
    claimed.errors["complete"].append(IN_DOUBT)
    with pytest.raises(CommitInDoubt):
        claimed.record()
    assert claimed.record() == [(spec.id, "completed")]


def test_outcome_in_doubt_stays_in_doubt(claimed: ClaimedJobs) -> None:
    """An outcome in doubt stays in doubt if it is taken out and put back before the next try."""
    (spec,) = claimed.jobs(1)
    claimed.put(spec)
    claimed.state.store.complete(
        claimed.worker, [(spec, Outcome(spec.id, spec.attempt, OutcomeKind.COMPLETED))]
    )
    claimed.errors["complete"].append(IN_DOUBT)
    with pytest.raises(CommitInDoubt):
        claimed.record()
    claimed.outbox.keep_reports({})
    assert claimed.record() == [(spec.id, "completed")]


def test_other_outcomes_do_not_wait_for_handovers(
    claimed: ClaimedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completed jobs with limits are handed over, unless other outcomes, or locked ones that are
    tried again, would wait."""
    first, second, third = claimed.jobs(3)
    assert not claimed.outbox.has_limited_completions
    claimed.put(first)
    assert not claimed.outbox.has_limited_completions
    claimed.put(second._replace(limits_json="[]"))
    assert claimed.outbox.has_limited_completions
    claimed.put(third, OutcomeKind.FAILED, error="x")
    assert not claimed.outbox.has_limited_completions
    monkeypatch.setattr(claimed.state.store, "settle", lambda *args: [])
    claimed.record()
    claimed.put(first._replace(limits_json="[]"))
    assert claimed.outbox.has_limited_completions
    monkeypatch.setattr(outbox.time, "monotonic", lambda: float("inf"))
    assert not claimed.outbox.has_limited_completions


def test_record_by_takes_one_batch(claimed: ClaimedJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into the transaction of a handover stays in the outbox."""
    monkeypatch.setattr(outbox, "batches", lambda entries, _: [entries[:2], entries[2:]])
    specs = claimed.jobs(5)
    for spec in specs:
        claimed.put(spec)
    settled = claimed.outbox.record_by(lambda batch: claimed.state.store.complete(1, batch))
    assert [each.spec.id for each in settled] == [spec.id for spec in specs[:2]]
    assert len(claimed.outbox) == 3


@pytest.mark.parametrize("outcome_arrives", ["before", "after"])
def test_kept_reports_are_recorded_with_the_outcome(
    claimed: ClaimedJobs, outcome_arrives: str
) -> None:
    """Log lines that could not be written while a job ran are recorded with its outcome, in either
    order of arrival."""
    (spec,) = claimed.jobs(1)
    if outcome_arrives == "before":
        claimed.put(spec)
    claimed.outbox.keep_reports({spec.key: Report(lines=("one", "two"))})
    if outcome_arrives == "after":
        claimed.put(spec)
    assert claimed.record() == [(spec.id, "completed")]
    assert [row.message for row in rows(claimed.state, JobLog)] == ["one", "two"]


LARGE = json.dumps('"' * 500_000)
"""A result in which every character must be escaped, in a bulk settle on MySQL twice."""


class TestSizes:
    """Results of all sizes that ``BGJOBS_MAX_PAYLOAD`` may allow."""

    def test_large_results_are_recorded_in_several_statements(
        self, app: Flask, claimed: ClaimedJobs
    ) -> None:
        """Results that are too large for one statement are recorded in several."""
        specs = claimed.jobs(10)
        for spec in specs:
            claimed.put(spec, result_json=LARGE)
        assert claimed.record() == [(spec.id, "completed") for spec in specs]
        assert {stored(app, spec.id).result_json for spec in specs} == {LARGE}

    def test_small_results_are_recorded_together(
        self, claimed: ClaimedJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hundred small results are recorded in one statement."""
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

    def test_outage_between_batches_loses_no_outcome(self, claimed: ClaimedJobs) -> None:
        """Outcomes recorded before an outage are not recorded again, and the others are kept."""
        ids = [spec.id for spec in claimed.jobs(6) if not claimed.put(spec, result_json=LARGE)]
        claimed.errors["complete"].extend([None, GONE])
        recorded: list[tuple[int, str | None]] = []
        settled = ((s.job_id, s.status) for s in claimed.outbox.record(claimed.worker, "one"))
        with pytest.raises(OperationalError):
            recorded.extend(settled)
        assert 0 < len(recorded) < 6
        recorded += claimed.record()
        assert sorted(recorded) == [(job_id, "completed") for job_id in ids]

    def test_failed_batch_is_retried_last(self, claimed: ClaimedJobs) -> None:
        """A batch that breaks the connection again and again does not delay other outcomes."""
        specs = claimed.jobs(3)
        for spec in specs:
            claimed.put(spec, result_json=LARGE)
        claimed.errors["complete"].extend([GONE, None, None, GONE])
        for _ in range(2):
            with pytest.raises(OperationalError):
                claimed.record()
        assert [stored_status(claimed, spec) for spec in specs] == [
            "running",
            "completed",
            "completed",
        ]

    @pytest.mark.parametrize("kind", [OutcomeKind.COMPLETED, OutcomeKind.FAILED])
    def test_oversized_result_fails_only_its_job(
        self, app: Flask, claimed: ClaimedJobs, small_limit: str, kind: OutcomeKind
    ) -> None:
        """A result that the database cannot store fails its job, and the error names the size and
        the limit."""
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
    def test_packet_refused_by_a_proxy_fails_only_its_job(
        self, app: Flask, claimed: ClaimedJobs
    ) -> None:
        """A packet size error of a proxy, whose limit may be below the server's, is not an
        outage."""
        refusal = OperationalError("settle", None, Exception(1153, "… max_allowed_packet …"))
        large, small = claimed.jobs(2)
        claimed.put(large)
        claimed.put(small)
        claimed.errors["complete"].append(refusal)
        claimed.errors["settle"].extend([refusal, refusal])
        assert sorted(claimed.record()) == [(large.id, "failed"), (small.id, "completed")]
        assert "max_allowed_packet" in str(stored(app, large.id).error)


def stored_status(claimed: ClaimedJobs, spec: JobSpec) -> str:
    job = claimed.state.store.get(spec.id)
    assert job is not None
    return job.status


@pytest.fixture
def small_limit(
    state: AppState, database_kind: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A database that accepts at most 1,000,000 bytes; the value is the limit as an error message
    shows it."""
    store = state.store
    if database_kind == "postgresql":
        monkeypatch.setattr("flask_bgjobs.store.statements.progress.BATCH_BYTES", 1_000)
        monkeypatch.setattr(type(store), "largest_text", 1_000_000)
        yield "1,000,000"
        return
    if database_kind == "mysql":
        store.dispose()
        within_packet = mysql._query_within_packet
        monkeypatch.setattr(
            mysql, "_query_within_packet", lambda link, _: within_packet(link, 1_000_000)
        )
        yield "max_allowed_packet, 1,000,000"
        return

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)

    sa.event.listen(store.engine, "connect", limit)
    store.dispose()
    yield "SQLITE_LIMIT_LENGTH"
