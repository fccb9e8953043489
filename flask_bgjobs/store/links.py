"""Links to a database server: opened in good time, and not used once they are dead."""

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
_connecting = contextvars.ContextVar["_Limits | None"]("bgjobs_connecting", default=None)
"""What is limited while this thread or greenlet connects for us, and not for the host."""


@dataclasses.dataclass(slots=True)
class _Limits:
    wanted: Mapping[str, float]
    added: set[str] = dataclasses.field(default_factory=set)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def prepare_limits(host_engine: sa.Engine) -> None:
    """Let :func:`limited` work with an engine.

    Call it before other threads use the engine: SQLAlchemy raises in a thread that connects while
    another one adds a listener.
    """
    if not sa.event.contains(host_engine, "do_connect", _add_limits):
        sa.event.listen(host_engine, "do_connect", _add_limits)


@contextlib.contextmanager
def limited(limits: Mapping[str, float]) -> Iterator[set[str]]:
    """Limit the connections that this thread opens with an engine of a host.

    :param limits: options of the driver's ``connect()``; what the host sets itself is kept.
    :returns: the names of those that were added, once there is a connection.
    """
    connecting = _Limits(limits)
    token = _connecting.set(connecting)
    try:
        yield connecting.added
    finally:
        _connecting.reset(token)
        for name in connecting.added:
            # The dictionary is the one of the host's engine: it is left as it was found.
            connecting.options.pop(name, None)


def _add_limits(_dialect: object, _record: object, _args: object, options: dict[str, Any]) -> None:
    connecting = _connecting.get()
    if connecting is None:
        return
    for name, limit in connecting.wanted.items():
        if name not in options:
            options[name] = limit
            connecting.added.add(name)
            connecting.options = options


def refuse_dead(engine: sa.Engine, descriptor: Callable[[Any], int]) -> None:
    """Let no connection out of the engine's pool that the server has closed meanwhile.

    On an idle connection nothing is to be read but the server's farewell. To look costs no round
    trip, as asking the server would.

    :param descriptor: gives the file descriptor of a driver's connection.
    """

    def check(connection: Any, record: Any, _proxy: object) -> None:
        if record.info.pop(_IDLE, False) and is_readable(descriptor(connection), 0):
            raise sa.exc.DisconnectionError("the server has closed the connection")

    sa.event.listen(engine, "checkin", _note_idle)
    sa.event.listen(engine, "checkout", check)


def _note_idle(_connection: object, record: Any) -> None:
    record.info[_IDLE] = True


def is_readable(descriptor: int, timeout: float) -> bool:
    """Whether there is something to read, or comes within ``timeout`` seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def shut_down(descriptor: int) -> None:
    """End a link, also for another thread that waits for it."""
    # A copy of the descriptor: shutting it down ends the link for both.
    with (
        contextlib.suppress(OSError),
        socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as link,
    ):
        link.shutdown(socket.SHUT_RDWR)
