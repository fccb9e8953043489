"""Tracebacks of jobs, without the frames that call their code."""

from __future__ import annotations

import traceback
from types import TracebackType

from .registry import Target

_MAX_CHAIN = 20
"""Exceptions of a chain that a traceback shows; formatting hundreds takes seconds."""
_MAX_FRAMES = 50
_CALLERS = frozenset(f"{__package__}.{module}" for module in ("execute", "window"))


def frames_of_job(error: BaseException) -> TracebackType | None:
    """The traceback from the first frame of the job's code: what calls it tells nothing."""
    start = frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") in _CALLERS:
            start = frame.tb_next
        frame = frame.tb_next
    if start is not None and start.tb_frame.f_code is Target.call.__code__:
        start = start.tb_next
    return start


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
