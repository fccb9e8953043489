"""Settle: recording how attempts ended, fenced by attempt and worker."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from ..spec import JobSpec, Outcome, Report, Settled
from ..states import FINAL, JobStatus, OutcomeKind, Settlement, settlement
from .database import ATTEMPTS, JOBS
from .runs import RUNNING_OF, Runs

_NO_ATTEMPT_ROW = frozenset({OutcomeKind.COMPLETED, OutcomeKind.GIVEN_BACK, OutcomeKind.SNOOZED})
_NO_ERROR = frozenset({*_NO_ATTEMPT_ROW, OutcomeKind.CANCELLED})
"""Nothing went wrong, so that nothing is shown as the job's error."""


class Settles(Runs):
    """The statements of a settle."""

    def settle(
        self, worker_id: int, worker_name: str, finished: Sequence[tuple[JobSpec, Outcome]]
    ) -> list[Settled]:
        """Record how attempts ended, all in one transaction; only those still ours change.

        :returns: one per attempt, in order; ``status`` is ``None`` where the lease was lost.
        """
        return self.transaction(lambda c: self.settle_within(c, worker_id, worker_name, finished))

    def settle_within(
        self,
        connection: sa.Connection,
        worker_id: int,
        worker_name: str,
        finished: Sequence[tuple[JobSpec, Outcome]],
    ) -> list[Settled]:
        """The same as :meth:`settle`, as part of a larger transaction of ours."""
        ours = self._still_running(connection, worker_id, [spec.id for spec, _ in finished])
        settled: list[Settled] = []
        updates: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = []
        for spec, outcome in finished:
            if ours.get(spec.id, (0, False))[0] != spec.attempt:
                settled.append(Settled(spec, outcome, None))
                continue
            decided = settlement(
                outcome.kind,
                retry_count=spec.retry_count,
                retries=spec.retries,
                crash_count=spec.crash_count,
                max_crashes=self._max_crashes,
                cancel_requested=ours[spec.id][1],
                retry_delay=spec.retry_policy.delay,
                delay_seconds=outcome.delay_seconds,
            )
            updates.append(_settle_parameters(worker_id, spec, outcome, decided))
            if outcome.kind not in _NO_ATTEMPT_ROW:
                attempts.append(_attempt_values(worker_id, worker_name, spec, outcome))
            if outcome.report is not None:
                self.write_lines(connection, spec.id, spec.attempt, outcome.report)
            settled.append(
                Settled(spec, outcome, decided.status, decided.retry_count, decided.delay_seconds)
            )
        if updates:
            connection.execute(self._settle_update, updates)
        if attempts:
            connection.execute(sa.insert(ATTEMPTS), attempts)
        return settled

    def _still_running(
        self, connection: sa.Connection, worker_id: int, ids: Sequence[int]
    ) -> dict[int, tuple[int, bool]]:
        rows = connection.execute(
            RUNNING_OF.where(JOBS.c.id.in_(ids)).order_by(JOBS.c.id).with_for_update(),
            {"worker": worker_id},
        )
        return {row.id: (row.attempt, row.cancel_requested_at is not None) for row in rows}

    @functools.cached_property
    def _settle_update(self) -> sa.Update:
        delay = sa.bindparam("delay_seconds", type_=sa.Double)
        keep_meta = sa.bindparam("new_meta", type_=sa.Text)
        columns = {
            name: sa.bindparam(f"new_{name}", type_=JOBS.c[name].type)
            for name in (
                "status",
                "retry_count",
                "crash_count",
                "suspect",
                "started_at",
                "finished_at",
                "result",
                "error_type",
                "error",
            )
        }
        return (
            sa.update(JOBS)
            .where(
                JOBS.c.id == sa.bindparam("job_id"),
                JOBS.c.status == JobStatus.RUNNING.value,
                JOBS.c.attempt == sa.bindparam("fence_attempt"),
                JOBS.c.worker_id == sa.bindparam("fence_worker"),
            )
            .values(
                **columns,
                run_at=sa.case((delay.is_not(None), self.after(delay)), else_=JOBS.c.run_at),
                meta=sa.func.coalesce(keep_meta, JOBS.c.meta),
                progress=sa.func.coalesce(
                    sa.bindparam("new_progress", type_=sa.Double), JOBS.c.progress
                ),
                progress_note=sa.func.coalesce(
                    sa.bindparam("new_note", type_=sa.String), JOBS.c.progress_note
                ),
                unique_hash=sa.case(
                    (sa.bindparam("is_final", type_=sa.Boolean), None), else_=JOBS.c.unique_hash
                ),
            )
        )


def _settle_parameters(
    worker_id: int, spec: JobSpec, outcome: Outcome, decided: Settlement
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    is_final = decided.status in FINAL
    report = outcome.report or Report()
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "fence_worker": worker_id,
        "delay_seconds": decided.delay_seconds,
        "is_final": is_final,
        "new_status": decided.status.value,
        "new_retry_count": decided.retry_count,
        "new_crash_count": decided.crash_count,
        "new_suspect": decided.suspect,
        "new_started_at": started_at,
        "new_finished_at": (finished_at or dt.datetime.now(dt.UTC).replace(tzinfo=None))
        if is_final
        else None,
        "new_result": outcome.result_json,
        "new_error_type": None if outcome.kind in _NO_ERROR else outcome.error_type,
        "new_error": None if outcome.kind in _NO_ERROR else outcome.error,
        "new_meta": report.meta_json,
        "new_progress": report.progress,
        "new_note": report.progress_note,
    }


def _attempt_values(
    worker_id: int, worker_name: str, spec: JobSpec, outcome: Outcome
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    return {
        "job_id": spec.id,
        "attempt": spec.attempt,
        "outcome": outcome.kind.value,
        "worker_id": worker_id,
        "worker_name": worker_name,
        "started_at": started_at,
        "finished_at": finished_at or dt.datetime.now(dt.UTC).replace(tzinfo=None),
        "error_type": outcome.error_type,
        "error": outcome.error,
        "traceback": outcome.traceback,
    }


def _times(spec: JobSpec, outcome: Outcome) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Start and end of an attempt's code by the database's clock, from local durations."""
    if outcome.wait_seconds is None:
        return spec.started_at, None
    started = spec.claimed_at + dt.timedelta(seconds=outcome.wait_seconds)
    return started, started + dt.timedelta(seconds=outcome.run_seconds)
