"""Tracebacks as text: which of their frames are the application's."""

from __future__ import annotations

import itertools
import re

_FRAME = re.compile(r'  File "([^"]*)", line \d+')
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib/python3|/python3\d*/lib/|^<frozen ", re.I)
_GROUP = "  | "
"""Before each line of a group of exceptions."""


def of_application(text: str, package: str) -> str | None:
    """``text`` without the frames of libraries, with their number instead.

    The frame in which an exception was raised stays, wherever it is.

    :param package: the name of the application's own, which may be installed among the libraries.
    :returns: ``None`` where nothing is to be left out, and for a group of exceptions.
    """
    if any(line.startswith(_GROUP) for line in text.splitlines()):
        return None
    shortened: list[str] = []
    is_any_left_out = False
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
                is_any_left_out = True
                shortened.append(f"  … frames of libraries: {sum(1 for _ in frames)}\n")
            else:
                shortened += frames
        shortened.append(last)
    return "".join(shortened) if is_any_left_out else None


def _parts(text: str) -> list[tuple[bool, str]]:
    """The frames, each with the lines of its source, and the lines between them."""
    parts: list[tuple[bool, str]] = []
    for line in text.splitlines(keepends=True):
        is_frame = _FRAME.match(line) is not None
        # Source and markers are indented further; "[Previous line repeated …]" is as well.
        belongs = parts and parts[-1][0] and line.startswith(("    ", "  ["))
        if belongs and not is_frame:
            parts[-1] = (True, parts[-1][1] + line)
        else:
            parts.append((is_frame, line))
    return parts


def _is_of_library(frame: str, package: str) -> bool:
    match = _FRAME.match(frame)
    path = match[1].replace("\\", "/") if match else ""
    is_own = re.search(rf"-packages/{re.escape(package)}(?:/|\.py$)", path) is not None
    return not is_own and _LIBRARY.search(path) is not None
