"""Network connections to a database server: limit the time to open them, and detect dead ones."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import selectors
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

_IDLE = "bgjobs_idle"
_connecting = contextvars.ContextVar["_ConnectLimits | None"]("bgjobs_connecting", default=None)
"""The limits in effect while this thread or greenlet connects for us; ``None`` when the host
connects."""


@dataclasses.dataclass(slots=True)
class _ConnectLimits:
    limits: Mapping[str, float]
    """Options to add to the driver's ``connect()``."""
    added_names: set[str] = dataclasses.field(default_factory=set)
    """Names of the options that were added."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The host's dictionary of options, to which they were added."""


def prepare_limits(host_engine: sa.Engine) -> None:
    """Prepare an engine of the host for :func:`connect_limits`.

    Call this before other threads use the engine: SQLAlchemy raises an error in a thread that
    connects while another thread adds a listener.
    """
    if not sa.event.contains(host_engine, "do_connect", _add_limits):
        sa.event.listen(host_engine, "do_connect", _add_limits)


@contextlib.contextmanager
def connect_limits(limits: Mapping[str, float]) -> Iterator[set[str]]:
    """Limit the time in which this thread opens a connection with an engine of the host.

    :param limits: options of the driver's ``connect()``. Options that the host sets itself are
        kept.
    :returns: a context manager for the set of the names that were added. It is filled when the
        block connects.
    """
    current = _ConnectLimits(limits)
    token = _connecting.set(current)
    try:
        yield current.added_names
    finally:
        _connecting.reset(token)
        for name in current.added_names:
            # Restore the dictionary, which belongs to the host's engine.
            current.options.pop(name, None)


def _add_limits(_dialect: object, _record: object, _args: object, options: dict[str, Any]) -> None:
    current = _connecting.get()
    if current is None:
        return
    for name, limit in current.limits.items():
        if name not in options:
            options[name] = limit
            current.added_names.add(name)
            current.options = options


def discard_dead_connections(engine: sa.Engine, descriptor: Callable[[Any], int]) -> None:
    """Replace idle connections of the engine's pool that the server has closed.

    An idle connection has nothing to read unless the server has closed it. This check costs no
    round trip; a ping would.

    :param descriptor: returns the file descriptor of a driver connection.
    """

    def check(connection: Any, record: Any, _proxy: object) -> None:
        if record.info.pop(_IDLE, False) and is_readable(descriptor(connection), 0):
            raise sa.exc.DisconnectionError("the server has closed the connection")

    sa.event.listen(engine, "checkin", _mark_idle)
    sa.event.listen(engine, "checkout", check)


def _mark_idle(_connection: object, record: Any) -> None:
    record.info[_IDLE] = True


def is_readable(descriptor: int, timeout: float) -> bool:
    """Whether data can be read, after waiting for it up to ``timeout`` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def shut_down(descriptor: int) -> None:
    """Shut a network connection down, which also wakes a thread that waits for its data."""
    # The socket object owns a copy of the descriptor. Shutting it down affects the original too.
    with (
        contextlib.suppress(OSError),
        socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as link,
    ):
        link.shutdown(socket.SHUT_RDWR)
