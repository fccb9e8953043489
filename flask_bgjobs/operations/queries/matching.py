"""All jobs that match a filter, for bulk actions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import sqlalchemy as sa

from ...job.statuses import CAN_CHANGE, FINAL, JobStatus
from ...models import Job, has_status, last_event
from ...state import AppState
from ...store import Conditions
from .conditions import sql_conditions
from .filters import JobFilters

_job = cast(sa.Table, Job.__table__)


def highest_id(state: AppState) -> int:
    """The id of the newest job, or 0. A bulk action does not change jobs enqueued later."""
    with state.store.read() as connection:
        return connection.scalar(sa.select(sa.func.max(_job.c.id))) or 0


def count_matching(state: AppState, filters: JobFilters, verb: str, up_to: int) -> int:
    """How many jobs match ``filters`` and have a status that ``verb`` can change.

    :param up_to: the highest id.
    """
    return state.store.count_where(_conditions_by_status(state, filters, verb, up_to))


def matching_ids(
    state: AppState, filters: JobFilters, verb: str, up_to: int, limit: int
) -> Iterator[list[int]]:
    """The ids of the jobs that :func:`count_matching` counts, without jobs that end meanwhile.

    :param limit: ids in a batch, at most.
    """
    return state.store.ids_where(_conditions_by_status(state, filters, verb, up_to), limit)


def _conditions_by_status(
    state: AppState, filters: JobFilters, verb: str, up_to: int
) -> list[Conditions]:
    """The conditions on the jobs of each status that ``verb`` can change."""
    now = state.store.clock()
    common = [*sql_conditions(filters), _job.c.id <= up_to]

    def conditions(status: JobStatus) -> Conditions:
        column = _job.c.finished_at if status in FINAL else last_event()
        times = [column <= now] if status in FINAL else []
        if filters.since is not None:
            times.append(column >= filters.since)
        if filters.until is not None:
            times.append(column <= filters.until)
        return [has_status(status), *common, *times]

    listed = filters.ranges
    return [conditions(each) for each in CAN_CHANGE[verb] if listed is None or each in listed]
