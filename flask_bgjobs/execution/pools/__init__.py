"""Where jobs run: each pool offers the same few methods to the worker."""

from __future__ import annotations

_is_child = False


def is_child() -> bool:
    """Whether this process is a child of a process pool."""
    return _is_child


def become_child() -> None:
    """Make :func:`is_child` true, for the rest of this process's life."""
    global _is_child
    _is_child = True
