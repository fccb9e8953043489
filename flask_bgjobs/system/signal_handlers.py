"""Signal handlers of ours, and what a forked copy of the process has instead.

A copy that kept our handlers could not be ended: ``multiprocessing`` stops its helpers with
SIGTERM, which a worker takes as a request to stop and a child of the process pool ignores.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What service managers and terminals send to a process that is to stop."""

Handler = Callable[[int, FrameType | None], Any] | int | None
"""What ``signal.signal`` takes and returns; ``None`` for a handler that Python did not set."""

_replaced: list[tuple[signal.Signals, Handler, Handler]] = []
"""Signal, our handler and the former one, in the order in which they were set."""
_before_fork = threading.local()


@contextlib.contextmanager
def handled(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Let ``handler`` answer some signals, and afterwards who did before; in the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    reset_in_copies(before)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        del _replaced[len(_replaced) - len(before) :]


def reset_in_copies(former: Mapping[signal.Signals, Handler]) -> None:
    """Give forked copies of this process the ``former`` handlers instead of the present ones."""
    _replaced.extend((n, signal.getsignal(n), handler) for n, handler in former.items())


def block_for_fork() -> None:
    """Keep signals from a copy until it has the former handlers.

    Python drops a signal that reaches the copy earlier.
    """
    numbers = {number for number, _, _ in _replaced}
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None


def unblock_after_fork() -> None:
    """Undo :func:`block_for_fork`."""
    mask = getattr(_before_fork, "mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def reset_in_this_copy() -> None:
    """Set the former handlers, except where the code that forked has set its own."""
    if not _replaced:
        return
    signal.set_wakeup_fd(-1)
    present = {number: signal.getsignal(number) for number, _, _ in _replaced}
    for number, ours, former in reversed(_replaced):
        if present[number] == ours:
            present[number] = former
    for number, handler in present.items():
        # Once for each: a signal that waits is dropped by a handler that ignores it for a moment.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _replaced.clear()
