"""The host's pool listeners, run for the connections of our own engine as well.

A host sets ``search_path``, a role or the key of an encrypted file in a listener on its engine.
Our engine has a pool of its own, so that a request never waits for a second connection of the
host's pool, and connections without those settings would see another database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from ..system.safe_logging import logger as _logger

Listener = Callable[..., object]
Watched = Callable[[Any], AbstractContextManager[None]]

_BEGINNINGS = ("first_connect", "checkout")
"""Events before a connection is used: an error keeps it from being used. ``connect`` is one more,
and is forwarded in two parts."""
_ENDS = ("checkin", "reset", "invalidate", "soft_invalidate", "close", "detach", "close_detached")
"""Events after a connection was used: an error must not look like a failed transaction."""
_OF_ENGINES = frozenset(
    {"sqlalchemy.engine.create", "sqlalchemy.engine.default", "sqlalchemy.util.langhelpers"}
)
"""The modules of the ``connect`` listeners that SQLAlchemy itself adds to each engine."""


def forward(host_engine: sa.Engine, engine: sa.Engine, watched: Watched) -> None:
    """Run the host's pool listeners for ``engine`` too, also those that are added later.

    Call it before ``engine`` gets listeners of its own, so that the host's come first. Listeners on
    the classes ``Pool`` and ``Engine`` are not forwarded: SQLAlchemy runs them for all pools.

    :param watched: limits the time for which a block uses a driver's connection.
    """

    def listeners(name: str) -> tuple[Listener, ...]:
        # SQLAlchemy has no public list of them. The pool is another one after `dispose()`.
        return tuple(getattr(host_engine.pool.dispatch, name).listeners)

    def before_dialect(connection: Any, record: object) -> None:
        before, _ = _split(listeners("connect"))
        begin("connect", before, (connection, record))

    def after_dialect(connection: Any, record: object) -> None:
        before, after = _split(listeners("connect"))
        begin("connect", after, (connection, record))
        if before or after:
            # A host that turns autocommit on would take our transactions away.
            engine.dialect.reset_isolation_level(connection)

    def begin(name: str, theirs: Sequence[Listener], args: tuple[Any, ...]) -> None:
        if not theirs:
            return
        connection = args[0]
        with watched(connection):
            try:
                _call_each(theirs, args)
                # What a listener has set without a commit would go with the first rollback.
                engine.dialect.do_commit(connection)
            except (SQLAlchemyError, engine.dialect.loaded_dbapi.Error):
                raise
            except Exception as error:
                raise OperationalError(f"listener of {name!r}", None, error) from error

    def end(name: str, theirs: Sequence[Listener], args: tuple[Any, ...]) -> None:
        if not theirs:
            return
        with watched(args[0]):
            try:
                _call_each(theirs, args)
                if name == "checkin" and args[0] is not None:
                    engine.dialect.do_commit(args[0])
            except Exception as error:
                if name == "reset":
                    # SQLAlchemy logs the error and closes the connection.
                    raise
                _logger.exception("A listener of %r raised", name)
                if name == "checkin":
                    args[1].invalidate(error)

    sa.event.listen(engine, "connect", before_dialect, insert=True)
    sa.event.listen(engine, "connect", after_dialect)
    for run, names in ((begin, _BEGINNINGS), (end, _ENDS)):
        for name in names:
            sa.event.listen(engine, name, _forwarder(run, name, listeners))


def _forwarder(
    run: Callable[[str, Sequence[Listener], tuple[Any, ...]], None],
    name: str,
    listeners: Callable[[str], tuple[Listener, ...]],
) -> Listener:
    return lambda *args: run(name, listeners(name), args)


def _call_each(listeners: Sequence[Listener], args: tuple[Any, ...]) -> None:
    for listener in listeners:
        listener(*args)


def _split(listeners: tuple[Listener, ...]) -> tuple[list[Listener], list[Listener]]:
    """The host's ``connect`` listeners that come before SQLAlchemy's own, and the others."""
    first = next((i for i, each in enumerate(listeners) if _is_of_engine(each)), len(listeners))
    return list(listeners[:first]), [each for each in listeners[first:] if not _is_of_engine(each)]


def _is_of_engine(listener: Listener) -> bool:
    return getattr(listener, "__module__", None) in _OF_ENGINES
