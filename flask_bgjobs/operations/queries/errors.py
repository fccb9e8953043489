"""Failed attempts, grouped by job and exception, with their numbers and times."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa

from ...job.statuses import JobStatus, OutcomeKind
from ...models import Attempt, Job
from ...state import AppState
from .charts import Period
from .listing import jobs_for_authorizer
from .shown import Shown

READ_ATTEMPTS = 10_000
"""How many of the newest failed attempts are read. No index covers them by time, only by id."""
_MAX_ERRORS = 100
"""Highest number of groups."""

_job = cast(sa.Table, Job.__table__)
_attempt = cast(sa.Table, Attempt.__table__)
_FAILED = [kind.value for kind in OutcomeKind if kind is not OutcomeKind.CANCELLED]


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorGroup:
    """The failed attempts of one job class with one exception."""

    target: str
    method: str | None
    error_type: str | None
    attempts: int
    jobs: int
    """Number of jobs with these attempts."""
    first_at: dt.datetime
    last_at: dt.datetime
    last_job_id: int
    last_error: str | None
    """The newest error message, masked."""

    @property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """The failed attempts of a period."""

    period: Period
    now: dt.datetime
    """The database's clock."""
    since: dt.datetime
    """Start of the period."""
    groups: list[ErrorGroup]
    """Most frequent first."""
    is_complete: bool
    """Whether all failed attempts of the period were read."""


def errors_in(
    state: AppState, period: Period, visible: Callable[[Job], bool] | None = None
) -> Errors:
    """The failed attempts of ``period`` in groups, most frequent first, 100 groups at most.

    Attempts of deleted or pruned jobs are not included.

    :param visible: a group is left out when this is false for the job of its newest attempt.
    """
    newest = (
        sa.select(
            _attempt.c.id,
            _attempt.c.job_id,
            _attempt.c.attempt,
            _attempt.c.outcome,
            _attempt.c.error_type,
            _attempt.c.finished_at,
        )
        .where(_attempt.c.outcome.in_(_FAILED))
        .order_by(_attempt.c.id.desc())
        .limit(READ_ATTEMPTS)
        .subquery("newest")
    )
    kind = (_job.c.target, _job.c.method, newest.c.error_type)
    # A retry that the code asked for counts as an error only if no retries were left.
    was_last = sa.and_(_job.c.status == JobStatus.FAILED.value, _job.c.attempt == newest.c.attempt)
    is_error = sa.or_(newest.c.outcome != OutcomeKind.RETRY.value, was_last)
    attempts = sa.func.count().label("attempts")
    last_id = sa.func.max(newest.c.id).label("last_id")
    with state.store.read() as connection:
        now: dt.datetime = connection.execute(sa.select(state.store.now)).scalar_one()
        since = now - dt.timedelta(seconds=period.step_seconds * period.steps)
        found = connection.execute(
            sa.select(
                *kind,
                attempts,
                last_id,
                sa.func.count(newest.c.job_id.distinct()).label("jobs"),
                sa.func.min(newest.c.finished_at).label("first_at"),
                sa.func.max(newest.c.finished_at).label("last_at"),
            )
            .join_from(newest, _job, _job.c.id == newest.c.job_id)
            .where(newest.c.finished_at >= since, is_error)
            .group_by(*kind)
            .order_by(attempts.desc(), last_id.desc())
            .limit(_MAX_ERRORS)
        ).all()
        oldest, number = connection.execute(
            sa.select(sa.func.min(newest.c.finished_at), sa.func.count()).select_from(newest)
        ).one()
        last = {row.id: row for row in connection.execute(_newest_attempts(found))}
    jobs = jobs_for_authorizer(state, [row.job_id for row in last.values()])
    groups = (_group(state, row, last.get(row.last_id), jobs, visible) for row in found)
    return Errors(
        period=period,
        now=now,
        since=since,
        groups=[group for group in groups if group is not None],
        is_complete=number < READ_ATTEMPTS or oldest < since,
    )


def _newest_attempts(found: Sequence[Any]) -> sa.Select[Any]:
    """The newest attempt of each group."""
    return sa.select(_attempt.c.id, _attempt.c.job_id, _attempt.c.error).where(
        _attempt.c.id.in_([row.last_id for row in found])
    )


def _group(
    state: AppState,
    row: Any,
    last: Any,
    jobs: Mapping[int, Job],
    visible: Callable[[Job], bool] | None,
) -> ErrorGroup | None:
    job = None if last is None else jobs.get(last.job_id)
    if job is None or not (visible is None or visible(job)):
        # The job has been deleted meanwhile, or the visitor may not see it.
        return None
    shown = Shown.of(state, row.target, row.method, vars(job).get("parameters_json"))
    return ErrorGroup(
        target=row.target,
        method=row.method,
        error_type=row.error_type,
        attempts=row.attempts,
        jobs=row.jobs,
        first_at=row.first_at,
        last_at=row.last_at,
        last_job_id=job.id,
        last_error=shown.text(last.error, instead=row.error_type),
    )
