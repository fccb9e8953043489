"""Links to a database server: opened in good time, and not used once they are dead."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

_IDLE = "bgjobs_idle"
_connecting = threading.local()
"""What this thread limits while it connects for us, and not for the host."""


@contextlib.contextmanager
def limited(host_engine: sa.Engine, limits: Mapping[str, float]) -> Iterator[set[str]]:
    """Limit the connections that this thread opens with the host's engine.

    :param limits: options of the driver's ``connect()``; what the host sets itself is kept.
    :returns: the names of those that were added, once there is a connection.
    """
    if limits and not sa.event.contains(host_engine, "do_connect", _add_limits):
        sa.event.listen(host_engine, "do_connect", _add_limits)
    _connecting.limits, _connecting.added, _connecting.options = limits, set(), {}
    try:
        yield _connecting.added
    finally:
        _connecting.limits = {}
        for name in _connecting.added:
            # The dictionary is the one of the host's engine: it is left as it was found.
            _connecting.options.pop(name, None)


def _add_limits(_dialect: object, _record: object, _args: object, options: dict[str, Any]) -> None:
    for name, limit in getattr(_connecting, "limits", {}).items():
        if name not in options:
            options[name] = limit
            _connecting.added.add(name)
            _connecting.options = options


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
