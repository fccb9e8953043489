"""The transaction rule: when a job joins a session's transaction, and what follows its commit.

Writes are seen at the connection, by a listener on the host's engine: ORM events would miss
Core and text statements. A mark stays on the connection until the outermost commit or
rollback, also when a savepoint around the write was rolled back.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, object_mapper, scoped_session

from .models import Job

_logger = logging.getLogger("flask_bgjobs")

_WROTE = "bgjobs_wrote"
_CONNECTIONS = "bgjobs_connections"
_JOINED = "bgjobs_joined"
_ENDS = ("commit", "rollback", "commit_twophase", "rollback_twophase")

_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_MAY_HOLD_COMMENT = re.compile(r"--|/\*")
_PLAIN = re.compile(r"[\s(]*select\b", re.IGNORECASE)
_LOCKS_OR_WRITES = re.compile(
    r"\bfor\s+(?:no\s+key\s+update|update|key\s+share|share)\b|\block\s+in\s+share\b|\binto\b",
    re.IGNORECASE,
)
_SECOND_STATEMENT = re.compile(r";\s*\S")
_SAVEPOINT = re.compile(r"(?:savepoint|release|rollback)\b", re.IGNORECASE)

_LISTENED_TO: weakref.WeakSet[object] = weakref.WeakSet()

OnCommit = Callable[[Job], object]


def watch(engine: sa.Engine, session: scoped_session[Any]) -> None:
    """Mark the transactions of ``engine`` that write, and know the connections of ``session``."""
    if _is_new(engine):
        event.listen(engine, "before_cursor_execute", _mark_write)
        for name in _ENDS:
            event.listen(engine, name, _clear_mark)
    if _is_new(session):
        event.listen(session, "after_begin", _remember_connection)
        event.listen(session, "after_transaction_end", _forget_connections)


def holds_writes(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` has changes for ``engine``'s database that are not committed."""
    if _has_unflushed_changes(session, engine):
        return True
    return bool(_writing_connections(session, engine))


def holds_write_lock(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` keeps every other connection from writing, as one on SQLite may."""
    return any(
        getattr(connection.connection.driver_connection, "in_transaction", False)
        for connection in _writing_connections(session, engine)
    )


def follow(session: Session, jobs: Sequence[Job], on_commit: OnCommit) -> None:
    """Call ``on_commit`` for each of the jobs after the session's outermost commit.

    A job whose transaction or savepoint is rolled back instead is logged at DEBUG.
    """
    if _is_new(session):
        event.listen(session, "after_commit", _note_commit)
        event.listen(session, "after_soft_rollback", _drop_rolled_back)
        event.listen(session, "after_transaction_end", _finish_joined)
    transaction = session.get_nested_transaction() or session.get_transaction()
    joined = session.info.setdefault(_JOINED, [])
    for job in jobs:
        job.committed = False
        joined.append((transaction, job, on_commit))


def is_plain_select(statement: str) -> bool:
    """Whether a statement only reads: a SELECT that takes no lock and stores nothing."""
    bare = _COMMENT.sub(" ", statement) if _MAY_HOLD_COMMENT.search(statement) else statement
    if not _PLAIN.match(bare):
        return False
    # Looked for with and without comments: what looks like one may stand in a literal.
    locks = _LOCKS_OR_WRITES.search(statement) or _LOCKS_OR_WRITES.search(bare)
    return not locks and not _SECOND_STATEMENT.search(bare)


def _is_new(target: object) -> bool:
    """Whether nobody listens to ``target`` yet.

    ``event.contains`` knows a target by its address, which a later one may have.
    """
    if target in _LISTENED_TO:
        return False
    _LISTENED_TO.add(target)
    return True


def _writing_connections(session: Session, engine: sa.Engine) -> list[sa.Connection]:
    connections: list[sa.Connection] = session.info.get(_CONNECTIONS, [])
    return [
        connection
        for connection in connections
        if not connection.closed
        and not connection.invalidated
        and connection.engine.pool is engine.pool
        and _WROTE in connection.info
    ]


def _mark_write(connection: sa.Connection, _cursor: object, statement: str, *_rest: object) -> None:
    # Savepoints are the frame of a write and not a write themselves.
    if not is_plain_select(statement) and not _SAVEPOINT.match(statement):
        connection.info[_WROTE] = True


def _clear_mark(connection: sa.Connection, *_two_phase: object) -> None:
    # One that has died has lost its mark with its transaction, and refuses every question.
    if not connection.invalidated:
        connection.info.pop(_WROTE, None)


def _remember_connection(
    session: Session, _transaction: SessionTransaction, connection: sa.Connection
) -> None:
    connections = session.info.setdefault(_CONNECTIONS, [])
    if connection not in connections:
        connections.append(connection)


def _forget_connections(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_CONNECTIONS, None)


def _has_unflushed_changes(session: Session, engine: sa.Engine) -> bool:
    changed = [*session.new, *session.deleted]
    changed += [thing for thing in session.dirty if session.is_modified(thing)]
    return any(_engine_of(session, thing) in (engine, None) for thing in changed)


def _engine_of(session: Session, thing: object) -> sa.Engine | None:
    try:
        return session.get_bind(mapper=object_mapper(thing)).engine
    except sa.exc.UnboundExecutionError:
        return None


def _note_commit(session: Session) -> None:
    # Fires when a savepoint is released as well; only the outermost commit counts.
    if not session.in_nested_transaction():
        for _, job, _ in session.info.get(_JOINED, []):
            job.committed = True


def _drop_rolled_back(session: Session, rolled_back: SessionTransaction) -> None:
    kept = []
    for entry in session.info.pop(_JOINED, []):
        transaction, job, _ = entry
        if _is_within(transaction, rolled_back):
            _logger.debug("Job %s was lost with its transaction: %s", job.id, job.name)
        else:
            kept.append(entry)
    session.info[_JOINED] = kept


def _is_within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer


def _finish_joined(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        return
    for _, job, on_commit in session.info.pop(_JOINED, []):
        if job.committed:
            on_commit(job)
        else:
            _logger.debug("Job %s was lost with its transaction: %s", job.id, job.name)
