"""Tracebacks of jobs, without the frames that call their code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import TracebackType

from ..registry import Target

_MAX_CHAIN = 20
"""Exceptions of a chain that a traceback shows; formatting hundreds takes seconds."""
_MAX_FRAMES = 50
_OURS = frozenset(
    f"flask_bgjobs.execution.{module}" for module in ("execute", "interrupt", "pools.process.child")
)


def frames_of_job(error: BaseException) -> TracebackType | None:
    """The traceback within the job's code: neither what calls it, nor what interrupts it from a
    signal handler."""
    frames = list(_frames(error.__traceback__))
    while frames and _is_ours(frames[-1]):
        frames.pop()
    calls = [number for number, frame in enumerate(frames) if _is_ours(frame)]
    # Made anew, as the exception keeps its own.
    found: TracebackType | None = None
    for frame in reversed(frames[calls[-1] + 1 :] if calls else frames):
        found = TracebackType(found, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return found


def _frames(frame: TracebackType | None) -> Iterator[TracebackType]:
    while frame is not None:
        yield frame
        frame = frame.tb_next


def _is_ours(frame: TracebackType) -> bool:
    if frame.tb_frame.f_code is Target.call.__code__:
        return True
    return frame.tb_frame.f_globals.get("__name__") in _OURS


def stand_in(error: BaseException, message: str) -> BaseException:
    """An exception of the same name and place with another message, and without a chain.

    Log handlers may format an exception by themselves, and would show what the message masks.
    """
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: BaseException = type(kind.__name__, (Exception,), names)(message)
    return made.with_traceback(error.__traceback__)


def formatted(error: BaseException) -> str:
    """The traceback as text, whatever the exception is."""
    frames = frames_of_job(error)
    chain = _cut_chain(error)
    try:
        return "".join(
            traceback.format_exception(type(error), error, frames, limit=-_MAX_FRAMES, chain=chain)
        )
    except BaseException as broken:
        text = "".join(traceback.format_tb(frames, limit=-_MAX_FRAMES))
        return f"{text}{type(error).__qualname__} (cannot be shown: {type(broken).__name__})"


def _cut_chain(error: BaseException) -> bool:
    """Whether the chain can be shown: one that is too long is cut, if it lets itself be."""
    link: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if link is None:
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if link is None:
        return True
    try:
        link.__cause__ = None
        link.__suppress_context__ = True
    except Exception:
        # An exception that forbids its attributes to be set.
        return False
    return True
