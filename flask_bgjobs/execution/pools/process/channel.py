"""Messages between the worker and one child: JSON, each after its length, over a socket pair."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

from ....system import forks
from ....system.safe_logging import logger as _logger

_LENGTH = struct.Struct("!I")
_CHUNK_BYTES = 256 * 1024
_MAX_BYTES = 0x20202020 - 1
"""Longer than any message, as ``BGJOBS_MAX_PAYLOAD`` is limited. Printable text that was written in
place of a length reads as more."""


class ParentEnd(forks.Forkable):
    """The worker's end: it never waits, or a child that does not read would stop all others."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        forks.watch(self)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self.is_closed = False
        """Whether the other end was closed, or sent data that is not a message."""

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    @property
    def has_outgoing(self) -> bool:
        """Whether something waits for the child to read what came before it."""
        return bool(self._outgoing)

    def send(self, message: Any) -> None:
        """Send ``message`` as soon as the other end takes it."""
        self._outgoing += _framed(message)

    def flush(self) -> None:
        """Send as much as the other end takes at the moment."""
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[:_CHUNK_BYTES])
            except BlockingIOError:
                return
            except OSError:
                # The child is gone; its exit tells the rest.
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def receive(self) -> Iterator[Any]:
        """The messages that have come whole."""
        while not self.is_closed:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.is_closed = not data
            self._incoming += data
        yield from self._whole_messages()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def after_fork_in_child(self) -> None:
        """Close a copy's end."""
        forks.close_in_copy(self._socket)

    def _whole_messages(self) -> Iterator[Any]:
        start = 0
        while len(self._incoming) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > _MAX_BYTES:
                self._distrust()
                return
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            message = self._incoming[start + _LENGTH.size : end]
            start = end
            try:
                yield json.loads(message)
            except ValueError:
                self._distrust()
                return
        del self._incoming[:start]

    def _distrust(self) -> None:
        """Read no further: where the next message would begin is not known."""
        _logger.error("A child process sent data that is not a message; it is replaced")
        self._incoming.clear()
        self.is_closed = True


class ChildEnd(forks.Forkable):
    """The child's end: it waits."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        forks.watch(self)
        self._incoming = end.makefile("rb")
        self.lock = threading.Lock()
        """Held while something is told, so that what was told first also arrives first."""

    def send(self, message: Any) -> None:
        """Send ``message``; the caller holds :attr:`lock`."""
        self._socket.sendall(_framed(message))

    def receive(self) -> Any:
        """The next message.

        :raises EOFError: when the worker is gone.
        """
        head = self._incoming.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise EOFError
        (length,) = _LENGTH.unpack(head)
        return json.loads(self._incoming.read(length))

    def close(self) -> None:
        """Tell the worker that nothing more comes."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def after_fork_in_child(self) -> None:
        """Close a copy's end: what the copy of a job says is not for the worker."""
        forks.close_in_copy(self._socket)


def _framed(message: Any) -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text
