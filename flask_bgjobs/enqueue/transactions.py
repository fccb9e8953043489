"""The transaction rule: when a job joins a session's transaction, and what follows its commit.

Writes are seen at the connection, by a listener on the host's engine: ORM events would miss
Core and text statements. A mark stays on the connection until the outermost commit or
rollback, also when a savepoint around the write was rolled back.
"""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask, Response, current_app, has_app_context
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, object_mapper, scoped_session, sessionmaker
from sqlalchemy.orm.session import SessionTransactionState

from ..models import Job
from ..store import is_in_memory
from ..system.safe_logging import logger as _logger

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

_WROTE = "bgjobs_wrote"
_CONNECTIONS = "bgjobs_connections"
_IS_DISCARDED = "bgjobs_is_discarded"
"""In a session's info: that what it has not committed is lost on purpose, or by an exception."""
_HANDLED = "bgjobs_handled"
_JOINED = "bgjobs_joined"
_ENDS = ("commit", "rollback", "commit_twophase", "rollback_twophase")

_LINE_COMMENT = re.compile(r"--[^\n]*+")
_COMMENT = re.compile(rf"{_LINE_COMMENT.pattern}|/\*.*?\*/", re.DOTALL)
_MAY_HOLD_COMMENT = re.compile(r"--|/\*")
_PLAIN = re.compile(r"[\s(]*+select\b", re.IGNORECASE)
_LOCKS_OR_WRITES = re.compile(
    r"\bfor\s++(?:no\s++key\s++update|update|key\s++share|share)\b"
    r"|\block\s++in\s++share\b|\binto\b",
    re.IGNORECASE,
)
_SECOND_STATEMENT = re.compile(r";\s*+\S")
_SAVEPOINT = re.compile(r"(?:savepoint|release|rollback)\b", re.IGNORECASE)

_WATCHED_URLS: set[sa.URL] = set()
_LISTENED_TO: weakref.WeakSet[object] = weakref.WeakSet()
_SEARCH_PATH = re.compile(r"search_path\s*+=\s*+((?:\\.|\S)++)")
_DATABASE_ARGUMENTS = ("database", "db", "dbname")
_FINDS_TABLES: weakref.WeakKeyDictionary[sa.Dialect, list[object]] = weakref.WeakKeyDictionary()
"""What decides where connections find a table, of the engines in an app's configuration. An engine
keeps its dialect."""

OnCommit = Callable[[Job], object]


class HostSessions:
    """An app's sessions, as the store asks for them; what they are may change in tests.

    :param bind_key: of the tables.
    """

    def __init__(self, app: Flask, db: SQLAlchemy, engine: sa.Engine, bind_key: str | None) -> None:
        self._app = app
        self._db = db
        self._engine = engine
        self._bind_key = bind_key

    def session(self) -> scoped_session[Any]:
        """The app's session."""
        return self._db.session

    def outer_connection(self) -> sa.Connection | None:
        """The connection to which the app's sessions are bound, if they are bound to one."""
        for bind in self._binds():
            if (
                isinstance(bind, sa.Connection)
                and not bind.closed
                and is_same(bind.engine, self._engine)
            ):
                return bind
        return None

    def holds_write_lock(self) -> bool:
        """Whether the app's session of this context may keep other connections from writing."""
        if not has_app_context() or current_app._get_current_object() is not self._app:  # type: ignore[attr-defined]  # LocalProxy
            return False
        if not self._db.session.registry.has():
            return False
        return any(
            getattr(connection.connection.driver_connection, "in_transaction", False)
            for connection in _writing_connections(self._db.session(), self._engine)
        )

    def _binds(self) -> Iterator[object]:
        """To what tests bind sessions that they roll back, in each of the usual ways."""
        sessions = self._db.session
        factory: object = sessions.session_factory
        if isinstance(factory, sessionmaker):
            yield factory.kw.get("bind")
        if has_app_context() and current_app._get_current_object() is self._app:  # type: ignore[attr-defined]  # LocalProxy
            yield self._db.engines.get(self._bind_key)
            if sessions.registry.has() or not isinstance(factory, sessionmaker):
                yield sessions().bind


def tell_binds_apart(app: Flask, db: SQLAlchemy) -> None:
    """Note which of an app's binds look at other schemas, as they may have one URL."""
    with app.app_context():
        engines = dict(db.engines)
    for key, engine in engines.items():
        options = dict(db._engine_options)
        if key is None:
            options |= app.config.get("SQLALCHEMY_ENGINE_OPTIONS", {})
        bind = app.config.get("SQLALCHEMY_BINDS", {}).get(key)
        if isinstance(bind, Mapping):
            options |= bind
        arguments = options.get("connect_args") or {}
        found = _SEARCH_PATH.search(str(arguments.get("options", "")))
        _FINDS_TABLES[engine.dialect] = [
            found and found[1],
            *(arguments.get(name) for name in _DATABASE_ARGUMENTS),
        ]


def watch(engine: sa.Engine) -> None:
    """Mark the transactions of ``engine`` that write, and know the connections of sessions."""
    _watch_engine(engine)
    if _is_new(Session):
        # On the class, as an app may replace `db.session`, in its tests for instance.
        event.listen(Session, "after_begin", _remember_connection)
        event.listen(Session, "after_transaction_end", _forget_connections)


def _watch_engine(engine: sa.Engine) -> None:
    _WATCHED_URLS.add(engine.url)
    if _is_new(engine.pool):
        # An engine with options passes the events of the one that it was made of.
        engine = getattr(engine, "_proxied", engine)
        event.listen(engine, "before_cursor_execute", _mark_write)
        for name in _ENDS:
            event.listen(engine, name, _clear_mark)


def holds_writes(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` has changes for ``engine``'s database that are not committed."""
    # After a commit or rollback, what is left unflushed belongs to no transaction.
    if session.is_active and _has_unflushed_changes(session, engine):
        return True
    return bool(_writing_connections(session, engine))


def has_written(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` has sent changes to ``engine``'s database that are not committed."""
    return bool(_writing_connections(session, engine))


def flush(session: Session) -> None:
    """Flush the session's changes, except in one of its events that cannot."""
    if session.is_active and not session._flushing:
        session.flush()


def connection_to_join(
    session: Session, table: sa.Table, engine: sa.Engine
) -> sa.Connection | None:
    """The session's connection to the database of ``engine``; whatever else it is bound to.

    ``None``: its transaction has ended, as in an ``after_commit`` event, and nothing can join it.

    :param table: the host's copy of a table of ours.
    :raises InvalidRequestError: when it was rolled back, and the host has not seen that yet.
    """
    writing = _writing_connections(session, engine)
    if session.is_active:
        bind = writing[0].engine if writing else _bind_of(session, table, engine)
        # By way of the session, which begins the savepoints that are open.
        return session.connection(bind_arguments={"bind": bind})
    if writing:
        # A savepoint has ended, and the transaction around it goes on.
        return writing[0]
    return session.bind if isinstance(session.bind, sa.Connection) else None


def was_rolled_back(session: Session) -> bool:
    """Whether the session's transaction has been rolled back, and the session is not told yet."""
    transaction = session._transaction
    return transaction is not None and transaction._state is SessionTransactionState.DEACTIVE


def follow(session: Session, jobs: Sequence[Job], on_commit: OnCommit) -> None:
    """Call ``on_commit`` for each of the jobs after the session's outermost commit.

    A job whose transaction or savepoint is rolled back instead is logged at DEBUG, and one whose
    session is closed without a commit as a warning: somebody has probably forgotten it. If an
    exception ended the block, or the request was answered with an error, no warning is logged.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    while transaction is not None and not transaction.is_active:
        # A savepoint that has ended: the job is part of the transaction around it.
        transaction = transaction.parent
    if transaction is None:
        for job in jobs:
            on_commit(job)
        return
    if _is_new(session):
        event.listen(session, "after_commit", _note_commit)
        event.listen(session, "after_rollback", _note_rollback)
        event.listen(session, "after_soft_rollback", _drop_rolled_back)
        event.listen(session, "after_transaction_end", _finish_joined)
    # A caller may be handling an exception now. That one does not end this transaction.
    session.info.setdefault(_HANDLED, sys.exc_info()[1])
    joined = session.info.setdefault(_JOINED, [])
    for job in jobs:
        job.committed = False
        joined.append((transaction, job, on_commit))


def is_plain_select(statement: str) -> bool:
    """Whether a statement only reads: a SELECT that takes no lock and stores nothing."""
    bare = _without_comments(statement) if _MAY_HOLD_COMMENT.search(statement) else statement
    if not _PLAIN.match(bare):
        return False
    # Looked for with and without comments: what looks like one may stand in a literal.
    locks = _LOCKS_OR_WRITES.search(statement) or _LOCKS_OR_WRITES.search(bare)
    return not locks and not _SECOND_STATEMENT.search(bare)


def _without_comments(statement: str) -> str:
    # Where no comment can end any more, none is looked for: from each of many beginnings the rest
    # would be searched in vain.
    before, end, rest = statement.rpartition("*/")
    return _COMMENT.sub(" ", before + end) + _LINE_COMMENT.sub(" ", rest)


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
        and is_same(connection.engine, engine)
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
    session: Session, transaction: SessionTransaction, connection: sa.Connection
) -> None:
    if connection.engine.url not in _WATCHED_URLS:
        return
    if transaction.parent is None:
        # Of the one before, where the session is bound to a connection that others use as well.
        connection.info.pop(_WROTE, None)
    # It may be another engine of the same database, as of a session that routes to replicas.
    _watch_engine(connection.engine)
    connections = session.info.setdefault(_CONNECTIONS, [])
    if connection not in connections:
        connections.append(connection)


def _forget_connections(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_CONNECTIONS, None)


def _has_unflushed_changes(session: Session, engine: sa.Engine) -> bool:
    changed = [*session.new, *session.deleted]
    changed += [thing for thing in session.dirty if session.is_modified(thing)]
    if not changed:
        return False
    with _as_in_a_flush(session):
        return any(_is_for(session, thing, engine) for thing in changed)


def _is_for(session: Session, thing: object, engine: sa.Engine) -> bool:
    try:
        bind = session.get_bind(mapper=object_mapper(thing))
    except sa.exc.UnboundExecutionError:
        return True
    return is_same(bind.engine, engine)


def _bind_of(session: Session, table: sa.Table, engine: sa.Engine) -> sa.Engine | sa.Connection:
    """To what the session is bound for writes to ``table``; ``engine`` when not to its database."""
    bind: sa.Engine | sa.Connection | None = session.bind
    if not isinstance(bind, sa.Connection):
        try:
            with _as_in_a_flush(session):
                bind = session.get_bind(clause=sa.insert(table))
        except sa.exc.UnboundExecutionError:
            bind = None
    return engine if bind is None or not is_same(bind.engine, engine) else bind


@contextlib.contextmanager
def _as_in_a_flush(session: Session) -> Iterator[None]:
    """Let ``get_bind`` answer as it does in a flush.

    A session that routes reads to a replica tells by this attribute, as in SQLAlchemy's
    documentation.
    """
    before, session._flushing = session._flushing, True
    try:
        yield
    finally:
        session._flushing = before


def is_same(one: sa.Engine, other: sa.Engine) -> bool:
    """Whether two engines are of the same database."""
    if one.pool is other.pool:
        return True
    # In memory each engine has a database of its own.
    if one.url != other.url or is_in_memory(one):
        return False
    places = [_FINDS_TABLES.get(engine.dialect) for engine in (one, other)]
    return None in places or places[0] == places[1]


def _note_commit(session: Session) -> None:
    # Fires when a savepoint is released as well; only the outermost commit counts.
    if not session.in_nested_transaction():
        for _, job, _ in session.info.get(_JOINED, []):
            job.committed = True


def discard_on_error(db: SQLAlchemy, error: BaseException | None) -> None:
    """Note, at the end of an application context, whether an exception ended it."""
    if error is not None:
        _discard(db)


def discard_on_refusal(db: SQLAlchemy, response: Response) -> Response:
    """Note, at the end of a request, that an error handler has answered it, or ``abort()``."""
    if response.status_code >= HTTPStatus.BAD_REQUEST:
        _discard(db)
    return response


def _discard(db: SQLAlchemy) -> None:
    if db.session.registry.has() and db.session().info.get(_JOINED):
        db.session().info[_IS_DISCARDED] = True


def _note_rollback(session: Session) -> None:
    # Fires for a savepoint as well, and the transaction goes on.
    if not session.in_nested_transaction():
        session.info[_IS_DISCARDED] = True


def _drop_rolled_back(session: Session, rolled_back: SessionTransaction) -> None:
    kept = []
    for entry in session.info.pop(_JOINED, []):
        transaction, job, _ = entry
        if _is_within(transaction, rolled_back):
            _log_loss(job)
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
    handled, handled_before = sys.exc_info()[1], session.info.pop(_HANDLED, None)
    was_raised = handled is not None and handled is not handled_before
    is_discarded = session.info.pop(_IS_DISCARDED, False) or was_raised
    for _, job, on_commit in session.info.pop(_JOINED, []):
        if job.committed:
            on_commit(job)
        elif is_discarded:
            _log_loss(job)
        else:
            _logger.warning(
                "Job lost | Job: %s | Class: %s | Its session was closed without a commit: call "
                "db.session.commit() after the enqueue, or db.session.rollback() to discard it",
                job.id,
                job.name,
            )


def _log_loss(job: Job) -> None:
    """Log, for who looks for a job, that its transaction was rolled back."""
    _logger.debug("Job %s was lost with its transaction: %s", job.id, job.name)
