"""The transaction rule: when a job joins a session's transaction, and what its commit triggers.

A listener on the host's engine marks each connection that writes; ORM events would miss Core and
text statements. The mark stays until the outermost commit or rollback, even if a savepoint around
the write is rolled back.
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
"""Key in a session's ``info``: its uncommitted jobs are discarded on purpose or by an exception."""
_EXCEPTION_BEFORE = "bgjobs_handled"
_JOINED = "bgjobs_joined"
_TRANSACTION_ENDS = ("commit", "rollback", "commit_twophase", "rollback_twophase")

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
_TABLE_LOCATIONS: weakref.WeakKeyDictionary[sa.Dialect, list[object]] = weakref.WeakKeyDictionary()
"""Settings of each engine that decide where its connections find a table, such as the search path
for schemas. The key is the engine's dialect, which lives as long as the engine."""

OnCommit = Callable[[Job], object]


class HostSessions:
    """The app's sessions, for the store. They are looked up each time, as tests may replace them.

    :param bind_key: bind key of the tables.
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
        """The open connection to our database to which the app's sessions are bound, if any."""
        for bind in self._binds():
            if (
                isinstance(bind, sa.Connection)
                and not bind.closed
                and is_same(bind.engine, self._engine)
            ):
                return bind
        return None

    def holds_write_lock(self) -> bool:
        """Whether the app's current session may block writes of other connections."""
        if not has_app_context() or current_app._get_current_object() is not self._app:  # type: ignore[attr-defined]  # LocalProxy
            return False
        if not self._db.session.registry.has():
            return False
        return any(
            getattr(connection.connection.driver_connection, "in_transaction", False)
            for connection in _writing_connections(self._db.session(), self._engine)
        )

    def _binds(self) -> Iterator[object]:
        """The binds of the app's sessions. Tests that roll back bind them in several ways."""
        sessions = self._db.session
        factory: object = sessions.session_factory
        if isinstance(factory, sessionmaker):
            yield factory.kw.get("bind")
        if has_app_context() and current_app._get_current_object() is self._app:  # type: ignore[attr-defined]  # LocalProxy
            yield self._db.engines.get(self._bind_key)
            if sessions.registry.has() or not isinstance(factory, sessionmaker):
                yield sessions().bind


def tell_binds_apart(app: Flask, db: SQLAlchemy) -> None:
    """Note in which schema or database each bind finds its tables; their URLs may be the same."""
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
        _TABLE_LOCATIONS[engine.dialect] = [
            found and found[1],
            *(arguments.get(name) for name in _DATABASE_ARGUMENTS),
        ]


def watch(engine: sa.Engine) -> None:
    """Mark the transactions of ``engine`` that write, and track the connections of sessions."""
    _watch_engine(engine)
    if _is_new(Session):
        # On the class, because an app may replace `db.session`, for example in its tests.
        event.listen(Session, "after_begin", _remember_connection)
        event.listen(Session, "after_transaction_end", _forget_connections)


def _watch_engine(engine: sa.Engine) -> None:
    _WATCHED_URLS.add(engine.url)
    if _is_new(engine.pool):
        # An engine made by execution_options() gets the events of its original engine.
        engine = getattr(engine, "_proxied", engine)
        event.listen(engine, "before_cursor_execute", _mark_write)
        for name in _TRANSACTION_ENDS:
            event.listen(engine, name, _clear_mark)


def holds_writes(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` has uncommitted changes for ``engine``'s database, flushed or not."""
    # After a commit or rollback, unflushed changes belong to no transaction.
    if session.is_active and _has_unflushed_changes(session, engine):
        return True
    return bool(_writing_connections(session, engine))


def has_written(session: Session, engine: sa.Engine) -> bool:
    """Whether ``session`` has sent uncommitted changes to ``engine``'s database."""
    return bool(_writing_connections(session, engine))


def flush(session: Session) -> None:
    """Flush the session's changes, unless it is inactive or in a flush, as in some events."""
    if session.is_active and not session._flushing:
        session.flush()


def connection_to_join(
    session: Session, table: sa.Table, engine: sa.Engine
) -> sa.Connection | None:
    """The session's connection to the database of ``engine``.

    :param table: the host's copy of one of our tables.
    :returns: ``None`` if the transaction has ended and cannot be joined, for example in an
        ``after_commit`` event.
    :raises InvalidRequestError: when the transaction was rolled back, but the host has not called
        ``rollback()`` yet.
    """
    writing = _writing_connections(session, engine)
    if session.is_active:
        bind = writing[0].engine if writing else _bind_of(session, table, engine)
        # Through the session, because it begins its open savepoints on the connection.
        return session.connection(bind_arguments={"bind": bind})
    if writing:
        # A savepoint has ended, but the transaction around it is still open.
        return writing[0]
    return session.bind if isinstance(session.bind, sa.Connection) else None


def was_rolled_back(session: Session) -> bool:
    """Whether the transaction was rolled back, but ``rollback()`` was not called on the session."""
    transaction = session._transaction
    return transaction is not None and transaction._state is SessionTransactionState.DEACTIVE


def follow(session: Session, jobs: Sequence[Job], on_commit: OnCommit) -> None:
    """Call ``on_commit`` for each job after the session's outermost commit.

    If the transaction or savepoint of a job is rolled back, this is logged at DEBUG. If the session
    is closed without a commit, a warning is logged, because the app has probably forgotten it. The
    warning is omitted if an exception ended the block, or if the response to the request is an
    error.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    while transaction is not None and not transaction.is_active:
        # This savepoint has ended, so the job is part of the transaction around it.
        transaction = transaction.parent
    if transaction is None:
        for job in jobs:
            on_commit(job)
        return
    if _is_new(session):
        event.listen(session, "after_commit", _note_commit)
        event.listen(session, "after_rollback", _note_rollback)
        event.listen(session, "after_soft_rollback", _drop_rolled_back)
        event.listen(session, "after_transaction_end", _finish_joined_jobs)
    # A caller may be handling an exception now. That one does not end this transaction.
    session.info.setdefault(_EXCEPTION_BEFORE, sys.exc_info()[1])
    joined = session.info.setdefault(_JOINED, [])
    for job in jobs:
        job.committed = False
        joined.append((transaction, job, on_commit))


def is_plain_select(statement: str) -> bool:
    """Whether a statement is a SELECT that takes no lock and stores no result."""
    bare = _without_comments(statement) if _MAY_HOLD_COMMENT.search(statement) else statement
    if not _PLAIN.match(bare):
        return False
    # Searched with and without comments, because a string literal may look like a comment.
    locks = _LOCKS_OR_WRITES.search(statement) or _LOCKS_OR_WRITES.search(bare)
    return not locks and not _SECOND_STATEMENT.search(bare)


def _without_comments(statement: str) -> str:
    # Block comments are removed only up to the last "*/". After it, the pattern would search the
    # whole rest for each "/*", which takes quadratic time.
    before, end, rest = statement.rpartition("*/")
    return _COMMENT.sub(" ", before + end) + _LINE_COMMENT.sub(" ", rest)


def _is_new(target: object) -> bool:
    """Whether ``target`` has no listeners of ours yet. Later calls return ``False``.

    ``event.contains`` identifies a target by its address, which a later object may reuse.
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
    # Savepoint statements write nothing.
    if not is_plain_select(statement) and not _SAVEPOINT.match(statement):
        connection.info[_WROTE] = True


def _clear_mark(connection: sa.Connection, *_two_phase: object) -> None:
    # An invalidated connection has lost its transaction, and its `info` cannot be read.
    if not connection.invalidated:
        connection.info.pop(_WROTE, None)


def _remember_connection(
    session: Session, transaction: SessionTransaction, connection: sa.Connection
) -> None:
    if connection.engine.url not in _WATCHED_URLS:
        return
    if transaction.parent is None:
        # A mark of an earlier transaction, if the session is bound to a shared connection.
        connection.info.pop(_WROTE, None)
    # It may be another engine of the same database, if the session routes reads to replicas.
    _watch_engine(connection.engine)
    connections = session.info.setdefault(_CONNECTIONS, [])
    if connection not in connections:
        connections.append(connection)


def _forget_connections(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_CONNECTIONS, None)


def _has_unflushed_changes(session: Session, engine: sa.Engine) -> bool:
    changed = [*session.new, *session.deleted]
    changed += [instance for instance in session.dirty if session.is_modified(instance)]
    if not changed:
        return False
    with _binds_for_writes(session):
        return any(_belongs_to(session, instance, engine) for instance in changed)


def _belongs_to(session: Session, instance: object, engine: sa.Engine) -> bool:
    try:
        bind = session.get_bind(mapper=object_mapper(instance))
    except sa.exc.UnboundExecutionError:
        return True
    return is_same(bind.engine, engine)


def _bind_of(session: Session, table: sa.Table, engine: sa.Engine) -> sa.Engine | sa.Connection:
    """The bind of the session for writes to ``table``; ``engine`` if it is another database."""
    bind: sa.Engine | sa.Connection | None = session.bind
    if not isinstance(bind, sa.Connection):
        try:
            with _binds_for_writes(session):
                bind = session.get_bind(clause=sa.insert(table))
        except sa.exc.UnboundExecutionError:
            bind = None
    return engine if bind is None or not is_same(bind.engine, engine) else bind


@contextlib.contextmanager
def _binds_for_writes(session: Session) -> Iterator[None]:
    """Let ``get_bind`` return the bind for writes, as in a flush.

    Sessions that route reads to replicas check this attribute, as SQLAlchemy's documentation shows.
    """
    before, session._flushing = session._flushing, True
    try:
        yield
    finally:
        session._flushing = before


def is_same(one: sa.Engine, other: sa.Engine) -> bool:
    """Whether two engines use the same database."""
    if one.pool is other.pool:
        return True
    # Each engine of an in-memory database has its own database.
    if one.url != other.url or is_in_memory(one):
        return False
    locations = [_TABLE_LOCATIONS.get(engine.dialect) for engine in (one, other)]
    return None in locations or locations[0] == locations[1]


def _note_commit(session: Session) -> None:
    # Also called when a savepoint is released, but only the outermost commit counts.
    if not session.in_nested_transaction():
        for _, job, _ in session.info.get(_JOINED, []):
            job.committed = True


def discard_on_error(db: SQLAlchemy, error: BaseException | None) -> None:
    """At the end of an application context: note that an exception ended it, if one did."""
    if error is not None:
        _discard(db)


def discard_on_refusal(db: SQLAlchemy, response: Response) -> Response:
    """At the end of a request: note that its jobs are discarded, if the response is an error."""
    if response.status_code >= HTTPStatus.BAD_REQUEST:
        _discard(db)
    return response


def _discard(db: SQLAlchemy) -> None:
    if db.session.registry.has() and db.session().info.get(_JOINED):
        db.session().info[_IS_DISCARDED] = True


def _note_rollback(session: Session) -> None:
    # Also called for a savepoint, whose outer transaction continues.
    if not session.in_nested_transaction():
        session.info[_IS_DISCARDED] = True


def _drop_rolled_back(session: Session, rolled_back: SessionTransaction) -> None:
    kept = []
    for entry in session.info.pop(_JOINED, []):
        transaction, job, _ = entry
        if _is_within(transaction, rolled_back):
            _log_lost_job(job)
        else:
            kept.append(entry)
    session.info[_JOINED] = kept


def _is_within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer


def _finish_joined_jobs(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        return
    exception, exception_before = sys.exc_info()[1], session.info.pop(_EXCEPTION_BEFORE, None)
    was_raised = exception is not None and exception is not exception_before
    is_discarded = session.info.pop(_IS_DISCARDED, False) or was_raised
    for _, job, on_commit in session.info.pop(_JOINED, []):
        if job.committed:
            on_commit(job)
        elif is_discarded:
            _log_lost_job(job)
        else:
            _logger.warning(
                "Job lost | Job: %s | Class: %s | Its session was closed without a commit: call "
                "db.session.commit() after the enqueue, or db.session.rollback() to discard it",
                job.id,
                job.name,
            )


def _log_lost_job(job: Job) -> None:
    """Log at DEBUG that a job was lost, to help find missing jobs."""
    _logger.debug("Job %s was lost with its transaction: %s", job.id, job.name)
