"""Settle: recording how attempts ended, fenced by attempt and worker."""

from __future__ import annotations

import abc
import datetime as dt
import functools
import json
import math
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypedDict

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from ...job.records import JobSpec, Key, Outcome, Report, Settled, settlement_of
from ...job.statuses import FINAL, JobStatus, OutcomeKind, Settlement
from ...models import UtcTime
from .. import transitions
from ..database import ATTEMPTS, JOBS, WORKERS
from .progress import Runs, by_key

_CAREFUL_SECONDS = 10.0
"""After a lock was in the way of a bulk completion, jobs are settled one by one: a job that keeps
its row locked may have others like it."""
_NO_ATTEMPT_ROW = frozenset({OutcomeKind.COMPLETED, OutcomeKind.GIVEN_BACK, OutcomeKind.SNOOZED})
_NO_ERROR = frozenset({*_NO_ATTEMPT_ROW, OutcomeKind.CANCELLED})
"""Nothing went wrong, so that nothing is shown as the job's error."""


class Completion(TypedDict):
    """What is recorded of an attempt that completed."""

    job_id: int
    fence_attempt: int
    started_after: float
    """Seconds from the claim, as is the next."""
    finished_after: float
    new_result: str | None


COMPLETION_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "job_id": sa.BigInteger(),
    "fence_attempt": sa.Integer(),
    "started_after": sa.Double(),
    "finished_after": sa.Double(),
    "new_result": sa.Text(),
}
"""The columns of a :class:`Completion`."""


class _RowsLocked(Exception):
    """Another transaction keeps a row locked that is to be changed."""


class _LeaseLost(Exception):
    """At least one of the attempts is no longer the worker's."""


class Settles(Runs):
    """The statements of a settle."""

    _careful_until = -math.inf
    """By ``time.monotonic()``: until then nothing is completed in bulk."""

    def complete(
        self, worker_id: int, finished: Iterable[tuple[JobSpec, Outcome]]
    ) -> list[Settled]:
        """The same as :meth:`settle` for attempts that completed and told nothing more, in bulk.

        :returns: one per attempt; ``status`` is ``None`` where the lease was lost. Attempts whose
            rows another transaction keeps locked are left out: nothing is recorded of them yet.
        """
        # In the order in which rows are locked everywhere.
        ordered = sorted(finished, key=_job_id)
        if time.monotonic() < self._careful_until:
            return self.settle(worker_id, "", ordered)
        # Another id's are lost, also in a database in which all else happens to be the same.
        ended = [_completion(s, outcome) for s, outcome in ordered if s.worker_id == worker_id]
        try:
            if ended:
                self.transaction(lambda c: self._complete_in_bulk(c, worker_id, ended))
        except _RowsLocked:
            self._careful_until = time.monotonic() + _CAREFUL_SECONDS
            return self.settle(worker_id, "", ordered)
        except _LeaseLost:
            # One statement cannot tell which of them it has changed.
            return self.settle(worker_id, "", ordered)
        return [
            Settled(
                spec,
                outcome,
                JobStatus.COMPLETED if spec.worker_id == worker_id else None,
                spec.retry_count,
            )
            for spec, outcome in ordered
        ]

    def _complete_in_bulk(
        self, connection: sa.Connection, worker_id: int, ended: Sequence[Completion]
    ) -> None:
        parameters = {"ended": self.sendable(json.dumps(ended)), "fence_worker": worker_id}
        try:
            changed = connection.execute(self._complete_all, parameters).rowcount
        except DBAPIError as error:
            if self.is_lock_timeout(error):
                # Not to be redone as it is, but without the rows that are locked.
                raise _RowsLocked from error
            raise
        if changed != len(ended):
            raise _LeaseLost

    @abc.abstractmethod
    def completions(self, array: sa.BindParameter[str]) -> sa.FromClause:
        """The :class:`Completion` objects in a JSON array, as rows."""

    @functools.cached_property
    def _complete_all(self) -> sa.Update:
        # In one statement: one each takes up to ten times as long.
        given = self.completions(sa.bindparam("ended", type_=sa.Text)).c
        is_ours = transitions.is_running_for(sa.bindparam("fence_worker"), given.fence_attempt)
        return (
            sa.update(JOBS)
            # As one value: no database may begin with all that run, believing that they are few.
            .where(JOBS.c.id == given.job_id, sa.case((is_ours, sa.true()), else_=sa.false()))
            .values(
                transitions.completed(
                    self.add_seconds(JOBS.c.claimed_at, given.started_after),
                    self.add_seconds(JOBS.c.claimed_at, given.finished_after),
                    given.new_result,
                )
            )
        )

    def settle(
        self,
        worker_id: int,
        worker_name: str,
        finished: Sequence[tuple[JobSpec, Outcome]],
        in_doubt: Collection[Key] = (),
    ) -> list[Settled]:
        """Record how attempts ended, all in one transaction; only those still ours change.

        :param in_doubt: attempts whose outcome was recorded by a commit of which nobody knows
            whether it was done. If it was, that is what is returned.
        :returns: one per attempt, in order; ``status`` is ``None`` where the lease was lost.
            Attempts whose rows another transaction keeps locked are left out, as in
            :meth:`complete`.
        """
        return self.transaction(
            lambda c: self.settle_within(c, worker_id, worker_name, finished, in_doubt)
        )

    def settle_within(
        self,
        connection: sa.Connection,
        worker_id: int,
        worker_name: str,
        finished: Sequence[tuple[JobSpec, Outcome]],
        in_doubt: Collection[Key] = (),
    ) -> list[Settled]:
        """The same as :meth:`settle`, as part of a larger transaction of ours."""
        keys = {spec.key for spec, _ in finished}
        ours, locked = self.lock_running(connection, worker_id, keys)
        recorded = self._recorded(connection, worker_id, in_doubt)
        settled: list[Settled] = []
        updates: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = []
        for spec, outcome in finished:
            if spec.key in locked:
                continue
            cancel_requested = ours.get(spec.key, recorded.get(spec.key))
            if cancel_requested is None or spec.worker_id != worker_id:
                settled.append(Settled(spec, outcome, None))
                continue
            decided = self._decide(spec, outcome, cancel_requested)
            settled.append(
                Settled(spec, outcome, decided.status, decided.retry_count, decided.delay_seconds)
            )
            if spec.key in recorded:
                continue
            self.sendable(outcome.result_json or "")
            updates.append(_settle_parameters(worker_id, spec, outcome, decided))
            if outcome.kind not in _NO_ATTEMPT_ROW:
                attempts.append(_attempt_values(worker_id, worker_name, spec, outcome))
            if outcome.report is not None:
                self.write_lines(connection, spec.id, spec.attempt, outcome.report)
        if updates:
            connection.execute(self._settle_update, updates)
        if attempts:
            connection.execute(self._attempt_insert, attempts)
        return settled

    def _recorded(
        self, connection: sa.Connection, worker_id: int, in_doubt: Collection[Key]
    ) -> dict[Key, bool]:
        """Those of the attempts in doubt that have ended, and whether a cancel was asked for.

        As long as the worker is alive, nobody but itself can have ended them.
        """
        if not in_doubt:
            return {}
        rows = connection.execute(
            sa.select(JOBS.c.id, JOBS.c.attempt, JOBS.c.cancel_requested_at)
            .join_from(JOBS, WORKERS, WORKERS.c.id == JOBS.c.worker_id)
            .where(
                JOBS.c.id.in_([job_id for job_id, _ in in_doubt]),
                JOBS.c.worker_id == worker_id,
                JOBS.c.status != JobStatus.RUNNING.value,
                WORKERS.c.status == "alive",
            )
        )
        return {key: asked for key, asked in by_key(rows).items() if key in in_doubt}

    def _decide(self, spec: JobSpec, outcome: Outcome, cancel_requested: bool) -> Settlement:
        return settlement_of(
            spec, outcome, max_crashes=self._max_crashes, cancel_requested=cancel_requested
        )

    @functools.cached_property
    def _settle_update(self) -> sa.Update:
        delay = self.seconds_parameter("delay_seconds")
        is_final = sa.bindparam("is_final", type_=sa.Boolean)
        keep_meta = sa.bindparam("new_meta", type_=sa.Text)
        columns = {
            name: sa.bindparam(f"new_{name}", type_=JOBS.c[name].type)
            for name in (
                "status",
                "retry_count",
                "crash_count",
                "suspect",
                "started_at",
                "result",
                "error_type",
                "error",
            )
        }
        return (
            sa.update(JOBS)
            .where(
                JOBS.c.id == sa.bindparam("job_id"),
                transitions.is_running_for(
                    sa.bindparam("fence_worker"), sa.bindparam("fence_attempt")
                ),
            )
            .values(
                transitions.settled(
                    is_final=is_final,
                    finished_at=self._or_now("new_finished_at"),
                    due_at=sa.case((delay.is_not(None), self.after(delay)), else_=JOBS.c.run_at),
                    meta=sa.func.coalesce(keep_meta, JOBS.c.meta),
                    progress=sa.func.coalesce(
                        sa.bindparam("new_progress", type_=sa.Double), JOBS.c.progress
                    ),
                    progress_note=sa.func.coalesce(
                        sa.bindparam("new_note", type_=sa.String), JOBS.c.progress_note
                    ),
                    **columns,
                )
            )
        )

    @functools.cached_property
    def _attempt_insert(self) -> sa.Insert:
        return sa.insert(ATTEMPTS).values(finished_at=self._or_now("ended_at"))

    def _or_now(self, name: str) -> sa.ColumnElement[dt.datetime]:
        """A time that is given, or the database's clock where it is not."""
        return sa.func.coalesce(sa.bindparam(name, type_=UtcTime), self.now, type_=UtcTime)


def _job_id(entry: tuple[JobSpec, Outcome]) -> int:
    return entry[0].id


def _completion(spec: JobSpec, outcome: Outcome) -> Completion:
    waited = outcome.wait_seconds or 0.0
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "started_after": waited,
        "finished_after": waited + outcome.run_seconds,
        "new_result": outcome.result_json,
    }


def _settle_parameters(
    worker_id: int, spec: JobSpec, outcome: Outcome, decided: Settlement
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    report = outcome.report or Report()
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "fence_worker": worker_id,
        "delay_seconds": decided.delay_seconds,
        "is_final": decided.status in FINAL,
        "new_status": decided.status.value,
        "new_retry_count": decided.retry_count,
        "new_crash_count": decided.crash_count,
        "new_suspect": decided.suspect,
        "new_started_at": started_at,
        "new_finished_at": finished_at,
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
        "due_at": spec.run_at,
        "started_at": started_at,
        "ended_at": finished_at,
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
