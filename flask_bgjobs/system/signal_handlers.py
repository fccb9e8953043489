"""Our signal handlers, and the handlers that a forked child gets instead.

A forked child with our handlers could not be ended: ``multiprocessing`` stops its helper processes
with SIGTERM, which a worker treats as a stop request and a child of the process pool ignores.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals by which service managers and terminals stop a process."""

Handler = Callable[[int, FrameType | None], Any] | int | None
"""Type of the handlers of ``signal.signal``; ``None``: the handler was not set by Python."""

_replaced: list[tuple[signal.Signals, Handler, Handler]] = []
"""Each signal with our handler and the former one, in the order in which they were set."""
_before_fork = threading.local()


@contextlib.contextmanager
def handled(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals with ``handler`` within this block; use it in the main thread only."""
    before = {number: signal.signal(number, handler) for number in numbers}
    reset_in_copies(before)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        del _replaced[len(_replaced) - len(before) :]


def reset_in_copies(former: Mapping[signal.Signals, Handler]) -> None:
    """Give forked children of this process the ``former`` handlers instead of the current ones."""
    _replaced.extend((n, signal.getsignal(n), handler) for n, handler in former.items())


def block_for_fork() -> None:
    """Block signals until a forked child has the former handlers.

    Python drops a signal that reaches the child earlier.
    """
    numbers = {number for number, _, _ in _replaced}
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None


def unblock_after_fork() -> None:
    """Undo :func:`block_for_fork`."""
    mask = getattr(_before_fork, "mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def reset_in_this_copy() -> None:
    """Restore the former handlers, except for signals to which the forking code has set its own."""
    if not _replaced:
        return
    signal.set_wakeup_fd(-1)
    present = {number: signal.getsignal(number) for number, _, _ in _replaced}
    for number, ours, former in reversed(_replaced):
        if present[number] == ours:
            present[number] = former
    for number, handler in present.items():
        # Set each only once: even a short SIG_IGN would drop a pending signal.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _replaced.clear()
