"""Forks: what a forked child of this process must not inherit, and where it ends.

A forked child must not use the connections of its parent. A shared connection breaks both
processes, because they talk over one socket. With SQLite, the locks stay with the parent, but the
child's copy of the connection counts on them: the write-ahead log can be deleted while the child
writes to it, and its commits are lost.

A job that forks makes a copy of the worker. That copy must end with the job's code, or two workers
would record outcomes.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
import weakref
from typing import NoReturn, Protocol

from . import signal_handlers


class Forkable(Protocol):
    """An object with connections or locks that a forked child must not use."""

    def before_fork(self) -> None:
        """Close unused connections; the default does nothing."""
        return None

    def after_fork_in_child(self) -> None:
        """Reset connections and locks that other threads of the parent may have been using."""


_generation = 0
"""Number of forks between this process and the one that imported this module; cheaper to read than
the pid."""
_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(forkable: Forkable) -> None:
    """Call the methods of ``forkable`` at each fork, as long as the object lives."""
    _watched.add(forkable)


def close_in_copy(end: socket.socket) -> None:
    """Close a socket in a forked child.

    It takes no lock, because a thread that does not exist in the child may hold it.
    """
    descriptor = end.detach()
    if descriptor >= 0:
        os.close(descriptor)


class CopiesEnd:
    """A block of code. A child that is forked inside the block ends where the block ends."""

    __slots__ = ("_generation",)

    def __enter__(self) -> None:
        self._generation = _generation

    def __exit__(self, _kind: object, error: BaseException | None, _frames: object) -> None:
        if _generation != self._generation:
            _end_copy(error)


def _end_copy(error: BaseException | None) -> NoReturn:
    """End this process like a Python program, but without running the parent's exit handlers."""
    code = 1
    try:
        code = _exit_code(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _all_watched() -> list[Forkable]:
    while True:
        try:
            return list(_watched)
        except RuntimeError:
            # Another thread has changed the set during the iteration.
            continue


def _before() -> None:
    for each in _all_watched():
        each.before_fork()
    signal_handlers.block_for_fork()


def _after_in_child() -> None:
    global _generation
    _generation += 1
    for each in _all_watched():
        each.after_fork_in_child()
    signal_handlers.reset_in_this_copy()
    signal_handlers.unblock_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before,
        after_in_parent=signal_handlers.unblock_after_fork,
        after_in_child=_after_in_child,
    )
