"""All jobs that a filter lists, to act on every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import sqlalchemy as sa

from ...app_state import AppState
from ...models import Job, has_status
from ...states import JobStatus
from .conditions import sql_conditions
from .filters import JobFilters

_job = cast(sa.Table, Job.__table__)


def highest_id(state: AppState) -> int:
    """The newest job's id: what is enqueued later is not among the jobs of an action."""
    with state.store.read() as connection:
        return connection.scalar(sa.select(sa.func.max(_job.c.id))) or 0


def count_matching(
    state: AppState, filters: JobFilters, statuses: Sequence[JobStatus], up_to: int
) -> int:
    """How many jobs with one of ``statuses`` the ``filters`` list, up to an id."""
    with state.store.read() as connection:
        return sum(
            connection.scalar(
                sa.select(sa.func.count()).where(*_wanted(filters, status), _job.c.id <= up_to)
            )
            or 0
            for status in _chosen(filters, statuses)
        )


def matching_ids(
    state: AppState,
    filters: JobFilters,
    statuses: Sequence[JobStatus],
    up_to: int,
    limit: int,
) -> Iterator[list[int]]:
    """The ids of these jobs, in batches of ``limit`` at most, status by status.

    Each batch is read when it is asked for, behind the one before, so that it does not matter
    what was done to that one.
    """
    for status in _chosen(filters, statuses):
        after = 0
        while True:
            ids = (
                sa.select(_job.c.id)
                .where(*_wanted(filters, status), _job.c.id > after, _job.c.id <= up_to)
                .order_by(_job.c.id)
                .limit(limit)
            )
            with state.store.read() as connection:
                found = list(connection.scalars(ids))
            if not found:
                break
            yield found
            after = found[-1]


def _chosen(filters: JobFilters, statuses: Sequence[JobStatus]) -> list[JobStatus]:
    listed = filters.ranges
    return [status for status in statuses if listed is None or status in listed]


def _wanted(filters: JobFilters, status: JobStatus) -> list[sa.ColumnElement[bool]]:
    column = filters.order.column if filters.order.is_timed else _job.c.created_at
    wanted = [has_status(status), *sql_conditions(filters)]
    if filters.since is not None:
        wanted.append(column >= filters.since)
    if filters.until is not None:
        wanted.append(column <= filters.until)
    return wanted
