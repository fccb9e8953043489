"""Prepare text for database columns, log lines and terminals."""

from __future__ import annotations

import re
import reprlib

MAX_TRACEBACK_CHARS = 64 * 1024
"""Maximum length of a stored traceback."""
MAX_MESSAGE_CHARS = 2_000
"""Maximum length of a stored error message. The traceback contains the rest."""

_NOTICE_CHARS = 60
"""Space for the note about omitted characters."""

_SHOWN_CHARACTERS = 255
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN_CHARACTERS

_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that control a terminal or the text direction, and line breaks."""


def storable(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Make a text storable in every database: no NUL, no lone surrogates, limited length.

    :param limit: maximum number of characters. Of a longer text, the beginning and the end are
        kept.
    """
    if len(text) > limit:
        half = max(0, limit - _NOTICE_CHARS) // 2
        notice = f"\n… {len(text) - 2 * half:,} characters left out …\n"
        text = f"{text[:half]}{notice}{text[len(text) - half :]}"[:limit]
    return _NOT_STORABLE.sub("\ufffd", text)


def sentence(text: str) -> str:
    """Capitalize the first letter of a message."""
    return f"{text[:1].upper()}{text[1:]}"


def one_line(text: str) -> str:
    """Escape control characters and line breaks."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """Escape control characters, but keep line breaks."""
    return "\n".join(one_line(line) for line in text.split("\n"))


def printable_json(text: str) -> str:
    """Escape control characters in a JSON text, as JSON of the same value. Keep line breaks."""
    # Outside of strings, JSON of our own has no control characters but line breaks.
    return "\n".join(
        _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in text.split("\n")
    )


def shown(value: object) -> str:
    """The ``repr`` of a value for an error message, truncated to some hundred characters."""
    return _SHORT.repr(value)
