"""Queries of the audit trail, newest entries first."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any, cast

import sqlalchemy as sa

from ...models import AuditedJob, AuditEntry
from ...state import AppState
from .cursors import Cursor, decode_cursor

_entry = cast(sa.Table, AuditEntry.__table__)
_audited = cast(sa.Table, AuditedJob.__table__)


@dataclasses.dataclass(frozen=True, slots=True)
class AuditRow:
    """An entry of the audit trail: a change that a person made."""

    id: int
    created_at: dt.datetime
    actor: str
    source: str
    action: str
    subject: str | None
    reason: str | None
    result: str | None
    jobs: list[int]
    """The lowest id of the jobs that it changed, or the id of the job whose trail is read; empty
    for changes of queues and workers."""
    more_jobs: int
    """How many other jobs it changed; 0 in the trail of one job."""


@dataclasses.dataclass(frozen=True, slots=True)
class AuditPage:
    """A page of the audit trail, newest entries first."""

    rows: list[AuditRow]
    now: dt.datetime
    """The database's clock."""
    older: str | None
    """The cursor of the page with older entries, to pass as ``after``; ``None`` at the end."""


def list_audit(state: AppState, *, after: str | None = None, per: int = 50) -> AuditPage:
    """A page of the audit trail.

    :param after: the ``older`` cursor of the previous page (default: start at the newest entry).
    :param per: entries on a page.
    :raises InvalidCursor: when ``after`` is malformed.
    """
    cursor = decode_cursor(after, is_timed=False)
    statement = sa.select(_entry).order_by(_entry.c.id.desc()).limit(per + 1)
    if cursor is not None:
        statement = statement.where(_entry.c.id < cursor.id)
    with state.store.read() as connection:
        now: dt.datetime = connection.execute(sa.select(state.store.now)).scalar_one()
        found = connection.execute(statement).all()
        entries = found[:per]
        rows = _rows(connection, entries)
    older = Cursor(entries[-1].id).encoded() if len(found) > per else None
    return AuditPage(rows, now, older)


def audit_of(connection: sa.Connection, job_id: int, limit: int = 20) -> list[AuditRow]:
    """The trail of one job, newest entries first."""
    statement = (
        sa.select(_entry)
        .join_from(_audited, _entry, _entry.c.id == _audited.c.entry_id)
        .where(_audited.c.job_id == job_id)
        .order_by(_audited.c.entry_id.desc())
        .limit(limit)
    )
    return [_row(entry, [job_id], 1) for entry in connection.execute(statement)]


def _rows(connection: sa.Connection, entries: Any) -> list[AuditRow]:
    """The entries, each with its number of jobs and the lowest of their ids."""
    ids = [entry.id for entry in entries]
    counts = {
        entry_id: (number, first)
        for entry_id, number, first in connection.execute(
            sa.select(_audited.c.entry_id, sa.func.count(), sa.func.min(_audited.c.job_id))
            .where(_audited.c.entry_id.in_(ids))
            .group_by(_audited.c.entry_id)
        )
    }
    rows = []
    for entry in entries:
        number, first = counts.get(entry.id, (0, None))
        rows.append(_row(entry, [] if first is None else [first], number))
    return rows


def _row(entry: Any, jobs: list[int], number: int) -> AuditRow:
    return AuditRow(
        id=entry.id,
        created_at=entry.created_at,
        actor=entry.actor,
        source=entry.source,
        action=entry.action,
        subject=entry.subject,
        reason=entry.reason,
        result=entry.result,
        jobs=jobs,
        more_jobs=number - len(jobs),
    )
