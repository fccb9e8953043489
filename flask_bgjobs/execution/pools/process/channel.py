"""The channel between the worker and one child: JSON messages over a socket pair.

Each message has its length as prefix.
"""

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
"""Largest accepted length. ``BGJOBS_MAX_PAYLOAD`` has a limit, so every message is shorter. If job
code writes printable text into the socket, its first bytes read as a larger length."""


class ParentEnd(forks.Forkable):
    """The worker's end. It never blocks, so a child that does not read cannot delay the others."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        forks.watch(self)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self.is_closed = False
        """Whether the child has closed its end, or has sent invalid data."""

    def fileno(self) -> int:
        """The file descriptor of the socket, for a selector."""
        return self._socket.fileno()

    @property
    def has_outgoing(self) -> bool:
        """Whether there is data that the socket's buffer could not take yet."""
        return bool(self._outgoing)

    def send(self, message: Any) -> None:
        """Add a message to the outgoing data, which :meth:`flush` sends."""
        self._outgoing += _frame(message)

    def flush(self) -> None:
        """Send as much outgoing data as possible without blocking."""
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[:_CHUNK_BYTES])
            except BlockingIOError:
                return
            except OSError:
                # The child has ended. The fork server reports its exit.
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def receive(self) -> Iterator[Any]:
        """Return the complete messages that have arrived."""
        while not self.is_closed:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.is_closed = not data
            self._incoming += data
        yield from self._complete_messages()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def after_fork_in_child(self) -> None:
        """Close the copied end."""
        forks.close_in_copy(self._socket)

    def _complete_messages(self) -> Iterator[Any]:
        start = 0
        while len(self._incoming) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > _MAX_BYTES:
                self._close_as_invalid()
                return
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            message = self._incoming[start + _LENGTH.size : end]
            start = end
            try:
                yield json.loads(message)
            except ValueError:
                self._close_as_invalid()
                return
        del self._incoming[:start]

    def _close_as_invalid(self) -> None:
        """Stop reading: the start of the next message is unknown."""
        _logger.error("A child process sent invalid data and is being replaced")
        self._incoming.clear()
        self.is_closed = True


class ChildEnd(forks.Forkable):
    """The child's end. It blocks until data is sent or received."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        forks.watch(self)
        self._incoming = end.makefile("rb")
        self.lock = threading.Lock()
        """Held from taking a report until it is sent, so that messages arrive in order."""

    def send(self, message: Any) -> None:
        """Send a message. The caller must hold :attr:`lock`."""
        self._socket.sendall(_frame(message))

    def receive(self) -> Any:
        """Wait for the next message, and return it.

        :raises EOFError: when the worker has ended.
        """
        prefix = self._incoming.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise EOFError
        (length,) = _LENGTH.unpack(prefix)
        return json.loads(self._incoming.read(length))

    def close(self) -> None:
        """Close the connection, so that the worker reads end of file."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def after_fork_in_child(self) -> None:
        """Close the copied end: a process that a job forks must not send messages to the worker."""
        forks.close_in_copy(self._socket)


def _frame(message: Any) -> bytes:
    """A message as bytes: its length, then its JSON."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text
