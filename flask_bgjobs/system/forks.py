"""Forks: what a copy of this process must not have, and where it ends.

A copy must not inherit the connections of its parent. What is shared breaks both: two processes
would talk over one socket. With SQLite it is worse, as its locks stay with the parent while the
child believes that it holds them: the write-ahead log can be deleted under a child that goes on
writing into it, and its commits are lost.

A job that forks makes a copy of the worker. That copy must end with the job's code, or there would
be two workers that record outcomes.
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
    """What holds connections or locks that a copy must not use."""

    def before_fork(self) -> None:
        """Close the connections that are not in use; nothing by default."""
        return None

    def after_fork_in_child(self) -> None:
        """Forget what other threads of the parent may have been doing."""


_generation = 0
"""How many forks made this process out of the one that imported this; cheaper than its pid."""
_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(forkable: Forkable) -> None:
    """Tell ``forkable`` of each fork, for as long as it lives."""
    _watched.add(forkable)


def close_in_copy(end: socket.socket) -> None:
    """Close a copy's descriptor of ``end``; no lock is taken, as a lost thread may hold it."""
    descriptor = end.detach()
    if descriptor >= 0:
        os.close(descriptor)


class CopiesEnd:
    """A block of code that copies of this process, forked within it, do not leave."""

    __slots__ = ("_generation",)

    def __enter__(self) -> None:
        self._generation = _generation

    def __exit__(self, _kind: object, error: BaseException | None, _frames: object) -> None:
        if _generation != self._generation:
            _end_copy(error)


def _end_copy(error: BaseException | None) -> NoReturn:
    """End this process as Python ends a program, but without the parent's exit handlers."""
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
            # Another thread has added one meanwhile.
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
