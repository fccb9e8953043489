"""Tracebacks of jobs, without the frames that call their code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from types import TracebackType

from ..registry import Target

_MAX_CHAIN = 20
"""Most exceptions of a chain in a traceback. Formatting hundreds of them takes seconds."""
_MAX_FRAMES = 50
_OURS = frozenset(
    f"flask_bgjobs.execution.{module}" for module in ("execute", "interrupt", "pools.process.child")
)


def frames_of_job(error: BaseException) -> TracebackType | None:
    """The part of the traceback in the job's code: the frames after our last frame.

    Our frames at the end, from an interruption in a signal handler, are left out first.
    """
    frames = list(_frames(error.__traceback__))
    while frames and _is_ours(frames[-1]):
        frames.pop()
    ours = [number for number, frame in enumerate(frames) if _is_ours(frame)]
    # New objects, because the exception keeps its own traceback.
    found: TracebackType | None = None
    for frame in reversed(frames[ours[-1] + 1 :] if ours else frames):
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


def redacted(error: BaseException, message: str) -> BaseException:
    """An exception with the same class name and traceback, another message, and no chain.

    It is for log handlers that format exceptions themselves: they would show the unmasked message.
    """
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: BaseException = type(kind.__name__, (Exception,), names)(message)
    return made.with_traceback(error.__traceback__)


def formatted(error: BaseException) -> str:
    """The traceback of any exception as text, even if the exception itself cannot be formatted."""
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
    """Cut the chain of exceptions after 20.

    :returns: whether the chain can be shown; ``False`` if it is too long and cannot be cut.
    """
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
        # The exception does not allow its attributes to be set.
        return False
    return True
