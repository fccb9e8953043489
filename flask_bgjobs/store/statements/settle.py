"""Settle: record the outcomes of attempts, fenced by attempt and worker."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from ...job.limits import has_rate, uses_from_json
from ...job.records import JobSpec, Key, Outcome, Report, Settled, code_name, settlement_of
from ...job.statuses import FINAL, JobStatus, OutcomeKind, Settlement, WaitsFor
from ...models import SeatState, UtcTime
from .. import transitions
from ..database import ATTEMPTS, JOBS, WORKERS
from .progress import Runs, by_key
from .seats import Leaving, Seats

_NO_BULK_SECONDS = 10.0
"""How long :meth:`Settles.complete` avoids bulk statements after a locked row made one fail. A job
that keeps its own row locked is often followed by jobs that do the same."""
_NO_ERROR = frozenset(
    {
        OutcomeKind.COMPLETED,
        OutcomeKind.GIVEN_BACK,
        OutcomeKind.UNKNOWN,
        OutcomeKind.SNOOZED,
        OutcomeKind.CANCELLED,
    }
)
"""Outcomes that are no failure, so the error of the job is cleared."""
_WITHOUT_START = frozenset({OutcomeKind.GIVEN_BACK, OutcomeKind.UNKNOWN})
"""Outcomes of attempts whose code has not started, unless they have a start time."""
_LOST = frozenset({OutcomeKind.LOST, OutcomeKind.LOST_AMONG, OutcomeKind.CRASHED})
"""Outcomes of attempts of which only a committed start is known."""
_NO_ATTEMPT_ROW = frozenset({OutcomeKind.EXPIRED, *_NO_ERROR} - {OutcomeKind.CANCELLED})
"""Outcomes for which no row is added to the table of attempts."""


class Completion(TypedDict):
    """The data recorded for an attempt that completed."""

    job_id: int
    fence_attempt: int
    started_after: float
    """Seconds from the claim to the start of the code."""
    finished_after: float
    """Seconds from the claim to the end of the code."""
    new_result: str | None


_COMPLETION_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "job_id": sa.BigInteger(),
    "fence_attempt": sa.Integer(),
    "started_after": sa.Double(),
    "finished_after": sa.Double(),
    "new_result": sa.Text(),
}
"""The column types of a :class:`Completion`."""


class Recorded(NamedTuple):
    """The result of recording completed attempts in bulk."""

    leaving: Sequence[Leaving]
    """The jobs with limits. Their seats are removed."""
    seats: int
    """Number of removed seats."""


Record = Callable[[], Recorded]
"""Records completed attempts, and removes the seats of their jobs."""


class _RowsLocked(Exception):
    """Another transaction has locked a row that has to be changed."""


class _LeaseLost(Exception):
    """The worker has lost the lease of at least one of the attempts."""


class Settles(Runs, Seats):
    """The statements that record outcomes."""

    _no_bulk_until = -math.inf
    """Until when no bulk statements are used, by ``time.monotonic()``."""

    def complete(
        self, worker_id: int, finished: Iterable[tuple[JobSpec, Outcome]]
    ) -> list[Settled]:
        """Record completed attempts without a report in one statement.

        Does the same as :meth:`settle`, but faster.

        :returns: one entry for each attempt; ``status`` is ``None`` if the lease was lost. Attempts
            whose rows another transaction has locked are left out: they are not recorded yet.
        """
        settled, _ = self.complete_with(
            worker_id, finished, lambda c, record: self.notice_left(c, record().leaving)
        )
        return settled

    def complete_with(
        self,
        worker_id: int,
        finished: Iterable[tuple[JobSpec, Outcome]],
        work: Callable[[sa.Connection, Record], None],
    ) -> tuple[list[Settled], bool]:
        """Do the work of :meth:`complete` as a part of a larger transaction.

        :param work: the work of that transaction.
        :returns: the result of :meth:`complete`, and whether that transaction was committed.
            Otherwise, :meth:`settle` has recorded the outcomes.
        """
        # All transactions lock rows in the order of ids, so that they cannot deadlock.
        ordered = sorted(finished, key=_job_id)
        if time.monotonic() < self._no_bulk_until:
            return self.settle(worker_id, "", ordered), False
        # Attempts claimed under another worker id are lost, even if the rest matches by chance, as
        # in another database.
        ended = [_completion(s, outcome) for s, outcome in ordered if s.worker_id == worker_id]
        leaving = [
            _leaving(spec, outcome)
            for spec, outcome in ordered
            if spec.limits_json is not None and spec.worker_id == worker_id
        ]
        try:
            if ended:
                self.transaction(
                    lambda c: work(c, lambda: self._record_all(c, worker_id, ended, leaving))
                )
        except _RowsLocked:
            self._no_bulk_until = time.monotonic() + _NO_BULK_SECONDS
            return self.settle(worker_id, "", ordered), False
        except _LeaseLost:
            # The bulk statement does not tell which attempts it would have changed.
            return self.settle(worker_id, "", ordered), False
        settled = [
            Settled(
                spec,
                outcome,
                JobStatus.COMPLETED if spec.worker_id == worker_id else None,
                spec.retry_count,
            )
            for spec, outcome in ordered
        ]
        return settled, bool(ended)

    def _record_all(
        self,
        connection: sa.Connection,
        worker_id: int,
        ended: Sequence[Completion],
        leaving: Sequence[Leaving],
    ) -> Recorded:
        parameters = {"ended": self.sendable(json.dumps(ended)), "fence_worker": worker_id}
        try:
            ids = [each.job_id for each in leaving]
            changed, seats = self.complete_and_leave(connection, parameters, ids)
        except DBAPIError as error:
            if self.is_lock_timeout(error):
                # Do not redo the same statement: settle() leaves out the locked rows.
                raise _RowsLocked from error
            raise
        if changed != len(ended):
            raise _LeaseLost
        return Recorded(leaving, seats)

    def complete_and_leave(
        self, connection: sa.Connection, parameters: Mapping[str, Any], ids: Sequence[int]
    ) -> tuple[int, int]:
        """Run :attr:`complete_all`, and remove the seats of running jobs.

        :param ids: those of the jobs with limits.
        :returns: the numbers of changed jobs and of removed seats.
        """
        changed = connection.execute(self.complete_all, parameters).rowcount
        return changed, self.delete_seats(connection, [SeatState.HOLDS], ids) if ids else 0

    @functools.cached_property
    def complete_all(self) -> sa.Update:
        """The statement that records completed attempts."""
        # One statement for all: one statement for each takes up to ten times as long.
        given = self.json_rows(sa.bindparam("ended", type_=sa.Text), _COMPLETION_TYPES).c
        is_ours = transitions.is_running_for(sa.bindparam("fence_worker"), given.fence_attempt)
        return (
            sa.update(JOBS)
            # CASE hides the fence from the planner, which could otherwise begin with all running
            # jobs because it expects few of them.
            .where(JOBS.c.id == given.job_id, sa.case((is_ours, sa.true()), else_=sa.false()))
            .values(
                transitions.completed(
                    self.add_seconds(JOBS.c.claimed_at, given.started_after),
                    self.add_seconds(JOBS.c.claimed_at, given.finished_after),
                    given.new_result,
                    self.deleted_at(
                        self.add_seconds(JOBS.c.claimed_at, given.finished_after),
                    ),
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
        """Record the outcomes of attempts in one transaction, each only if the worker still holds
        the job.

        :param in_doubt: attempts among them whose outcomes an earlier commit may or may not have
            recorded. If it has, the result says so, and nothing is recorded again.
        :returns: one entry for each attempt, in order; ``status`` is ``None`` if the lease was
            lost. Attempts whose rows another transaction has locked are left out, as in
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
        """Do the work of :meth:`settle` within a larger transaction of ours."""
        keys = {spec.key for spec, _ in finished}
        ours, locked = self.lock_running(connection, worker_id, keys)
        recorded = self._recorded(connection, worker_id, in_doubt)
        settled: list[Settled] = []
        updates: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = []
        leaving: list[Leaving] = []
        again: list[int] = []
        for spec, outcome in finished:
            if spec.key in locked:
                continue
            cancel_requested = ours.get(spec.key, recorded.get(spec.key))
            if cancel_requested is None or spec.worker_id != worker_id:
                settled.append(Settled(spec, outcome, None))
                continue
            decided = self._decide(spec, outcome, cancel_requested)
            if _needs_admission(spec, outcome, decided):
                decided = dataclasses.replace(decided, status=JobStatus.WAITING)
                again.append(spec.id)
            if spec.limits_json is not None and decided.status is not JobStatus.PENDING:
                leaving.append(_leaving(spec, outcome))
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
        # Those that were recorded before have left before.
        recorded_ids = {job_id for job_id, _ in recorded}
        self.leave(connection, [each for each in leaving if each.job_id not in recorded_ids])
        self.line_up(connection, [job_id for job_id in again if job_id not in recorded_ids])
        return settled

    def _recorded(
        self, connection: sa.Connection, worker_id: int, in_doubt: Collection[Key]
    ) -> dict[Key, bool]:
        """The attempts in doubt that are recorded, each with whether a cancel was requested.

        While a worker is alive, only the worker itself can have recorded them.
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
        found = by_key(rows).items()
        return {key: is_cancelling for key, is_cancelling in found if key in in_doubt}

    def _decide(self, spec: JobSpec, outcome: Outcome, cancel_requested: bool) -> Settlement:
        return settlement_of(
            spec, outcome, max_crashes=self._max_crashes, cancel_requested=cancel_requested
        )

    @functools.cached_property
    def _settle_update(self) -> sa.Update:
        delay = self.seconds_parameter("delay_seconds")
        is_final = sa.bindparam("is_final", type_=sa.Boolean)
        new_meta = sa.bindparam("new_meta", type_=sa.Text)
        columns = {
            name: sa.bindparam(f"new_{name}", type_=JOBS.c[name].type)
            for name in (
                "status",
                "waits_for",
                "waiting_on",
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
                    waits=sa.bindparam("waits", type_=sa.Boolean),
                    now=self.now,
                    is_final=is_final,
                    has_started=sa.bindparam("has_started", type_=sa.Boolean),
                    finished_at=self._or_now("new_finished_at"),
                    deleted_at=self.deleted_at(self._or_now("new_finished_at")),
                    due_at=sa.case((delay.is_not(None), self.after(delay)), else_=JOBS.c.run_at),
                    meta=sa.func.coalesce(new_meta, JOBS.c.meta),
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
        """The time in the parameter ``name``, or the database's clock if it is ``NULL``."""
        return sa.func.coalesce(sa.bindparam(name, type_=UtcTime), self.now, type_=UtcTime)


def _job_id(entry: tuple[JobSpec, Outcome]) -> int:
    return entry[0].id


def _completion(spec: JobSpec, outcome: Outcome) -> Completion:
    wait_seconds = outcome.wait_seconds or 0.0
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "started_after": wait_seconds,
        "finished_after": wait_seconds + outcome.run_seconds,
        "new_result": outcome.result_json,
    }


def _settle_parameters(
    worker_id: int, spec: JobSpec, outcome: Outcome, decided: Settlement
) -> dict[str, Any]:
    started_at, finished_at = _times(spec, outcome)
    report = outcome.report or Report()
    waits_for = None
    if decided.status is JobStatus.WAITING:
        waits_for = WaitsFor.CODE if outcome.kind is OutcomeKind.UNKNOWN else WaitsFor.LIMIT
    waits_for_code = waits_for is WaitsFor.CODE
    return {
        "job_id": spec.id,
        "fence_attempt": spec.attempt,
        "fence_worker": worker_id,
        "delay_seconds": decided.delay_seconds,
        "is_final": decided.status in FINAL,
        "has_started": _may_have_started(spec, outcome),
        "waits": waits_for_code,
        "new_status": decided.status.value,
        "new_waits_for": waits_for,
        "new_waiting_on": code_name(spec) if waits_for_code else None,
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


def _may_have_started(spec: JobSpec, outcome: Outcome) -> bool:
    """Whether the code of an attempt has started, or of a dead worker, may have started."""
    return outcome.kind not in _WITHOUT_START or _times(spec, outcome)[0] is not None


def _needs_admission(spec: JobSpec, outcome: Outcome, decided: Settlement) -> bool:
    """Whether a job that is to run again must wait for a rate limit first, because each start
    counts there."""
    if decided.status is not JobStatus.PENDING:
        return False
    return has_rate(spec.limits_json) and _may_have_started(spec, outcome)


def _leaving(spec: JobSpec, outcome: Outcome) -> Leaving:
    """The job when it gives up its seats."""
    started_at, _ = _times(spec, outcome)
    is_lost = outcome.kind in _LOST
    has_started = started_at is not None or is_lost
    return Leaving(spec.id, uses_from_json(spec.limits_json), has_started, started_at)


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
    """Start and end of an attempt's code on the database's clock, computed from the time of the
    claim and local durations."""
    if outcome.wait_seconds is None:
        return spec.started_at, None
    started = spec.claimed_at + dt.timedelta(seconds=outcome.wait_seconds)
    return started, started + dt.timedelta(seconds=outcome.run_seconds)
