"""Run the host's pool listeners for the connections of our own engine as well.

A listener on the host's engine may set ``search_path``, a role, or the key of an encrypted file.
Our engine has its own pool, so that a request never waits for a second connection of the host's
pool. Without these settings, its connections would see another database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from ..system.safe_logging import logger as _logger

Listener = Callable[..., object]
Watch = Callable[[Any], AbstractContextManager[object]]

_EVENTS_BEFORE_USE = ("first_connect", "checkout")
"""Events before a connection is used. An error prevents its use. ``connect`` also belongs to these,
but is forwarded in two parts."""
_EVENTS_AFTER_USE = (
    "checkin",
    "reset",
    "invalidate",
    "soft_invalidate",
    "close",
    "detach",
    "close_detached",
)
"""Events after a connection was used. An error must not look like a failed transaction."""
_SQLALCHEMY_MODULES = frozenset(
    {"sqlalchemy.engine.create", "sqlalchemy.engine.default", "sqlalchemy.util.langhelpers"}
)
"""Modules of the ``connect`` listeners that SQLAlchemy itself adds to each engine."""


def forward(host_engine: sa.Engine, engine: sa.Engine, watch: Watch) -> None:
    """Run the host's pool listeners for ``engine`` as well, including listeners added later.

    Call this before ``engine`` gets listeners of its own, so that the host's run first. Listeners
    on the classes ``Pool`` and ``Engine`` are not forwarded: SQLAlchemy runs them for all pools.

    :param watch: returns a context manager that limits how long its block may use a driver
        connection.
    """

    def listeners(name: str) -> tuple[Listener, ...]:
        # SQLAlchemy has no public API for this. `dispose()` replaces the pool: read it each time.
        return tuple(getattr(host_engine.pool.dispatch, name).listeners)

    def before_dialect(connection: Any, record: object) -> None:
        before, _ = _split(listeners("connect"))
        run_before_use("connect", before, (connection, record))

    def after_dialect(connection: Any, record: object) -> None:
        before, after = _split(listeners("connect"))
        run_before_use("connect", after, (connection, record))
        if before or after:
            # A listener of the host may have turned autocommit on: our transactions need it off.
            engine.dialect.reset_isolation_level(connection)

    def run_before_use(
        name: str, host_listeners: Sequence[Listener], args: tuple[Any, ...]
    ) -> None:
        if not host_listeners:
            return
        connection = args[0]
        with watch(connection):
            try:
                _call_each(host_listeners, args)
                # Commit, or the first rollback would undo the settings of the listeners.
                engine.dialect.do_commit(connection)
            except (SQLAlchemyError, engine.dialect.loaded_dbapi.Error):
                raise
            except Exception as error:
                raise OperationalError(f"listener of {name!r}", None, error) from error

    def run_after_use(name: str, host_listeners: Sequence[Listener], args: tuple[Any, ...]) -> None:
        if not host_listeners:
            return
        with watch(args[0]):
            try:
                _call_each(host_listeners, args)
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
    for run, names in ((run_before_use, _EVENTS_BEFORE_USE), (run_after_use, _EVENTS_AFTER_USE)):
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
    """The host's ``connect`` listeners before SQLAlchemy's own, and those after."""
    first = next(
        (i for i, each in enumerate(listeners) if _is_sqlalchemy_listener(each)), len(listeners)
    )
    return list(listeners[:first]), [
        each for each in listeners[first:] if not _is_sqlalchemy_listener(each)
    ]


def _is_sqlalchemy_listener(listener: Listener) -> bool:
    return getattr(listener, "__module__", None) in _SQLALCHEMY_MODULES
