"""The pools in which jobs run. All have the same methods, those of :class:`.protocol.Pool`."""

from __future__ import annotations

_is_child = False


def is_child() -> bool:
    """Whether this process is a child of a process pool."""
    return _is_child


def become_child() -> None:
    """Make :func:`is_child` return true in this process from now on."""
    global _is_child
    _is_child = True
