"""Forks: a child process must not inherit the connections of its parent.

What is shared breaks both: two processes would talk over one socket. With SQLite it is worse, as
its locks stay with the parent while the child believes that it holds them: the write-ahead log
can be deleted under a child that goes on writing into it, and its commits are lost.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What holds connections."""

    def before_fork(self) -> None:
        """Close the connections that are not in use."""

    def after_fork_in_child(self) -> None:
        """Forget what other threads of the parent may have been doing."""


_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(forkable: Forkable) -> None:
    """Tell ``forkable`` of each fork, for as long as it lives."""
    _watched.add(forkable)


def _before() -> None:
    for each in list(_watched):
        each.before_fork()


def _after_in_child() -> None:
    for each in list(_watched):
        each.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
