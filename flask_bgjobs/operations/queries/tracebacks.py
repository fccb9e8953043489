"""Shorten tracebacks to the frames of the application."""

from __future__ import annotations

import itertools
import re

_FRAME = re.compile(r'  File "([^"]*)", line \d+')
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib/python3|/python3\d*/lib/|^<frozen ", re.I)
_GROUP = "  | "
"""The prefix of the lines of an exception group."""


def of_application(text: str, package: str) -> str | None:
    """A traceback in which a number replaces the frames of libraries.

    The frame that raised an exception stays, even if it belongs to a library.

    :param package: the application's package, which may be installed in ``site-packages`` too.
    :returns: the shortened traceback; ``None`` when it has no frames to leave out, and for
        exception groups.
    """
    if any(line.startswith(_GROUP) for line in text.splitlines()):
        return None
    shortened: list[str] = []
    is_shortened = False
    for is_frame, group in itertools.groupby(_parts(text), key=lambda part: part[0]):
        parts = [part for _, part in group]
        if not is_frame:
            shortened += parts
            continue
        *others, last = parts
        for is_library, frames in itertools.groupby(
            others, key=lambda frame: _is_of_library(frame, package)
        ):
            if is_library:
                is_shortened = True
                shortened.append(f"  … library frames: {sum(1 for _ in frames)}\n")
            else:
                shortened += frames
        shortened.append(last)
    return "".join(shortened) if is_shortened else None


def _parts(text: str) -> list[tuple[bool, str]]:
    """The parts of a traceback: frames with their source lines, and the lines between frames.

    The flag of a part says whether it is a frame.
    """
    parts: list[tuple[bool, str]] = []
    for line in text.splitlines(keepends=True):
        is_frame = _FRAME.match(line) is not None
        # Source lines and markers are indented further than frames. "[Previous line repeated …]"
        # belongs to the frame before it, too.
        continues_frame = parts and parts[-1][0] and line.startswith(("    ", "  ["))
        if continues_frame and not is_frame:
            parts[-1] = (True, parts[-1][1] + line)
        else:
            parts.append((is_frame, line))
    return parts


def _is_of_library(frame: str, package: str) -> bool:
    match = _FRAME.match(frame)
    path = match[1].replace("\\", "/") if match else ""
    is_own = re.search(rf"-packages/{re.escape(package)}(?:/|\.py$)", path) is not None
    return not is_own and _LIBRARY.search(path) is not None
