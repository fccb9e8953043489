"""Text made fit for where it goes: a database column, or a single line of a log."""

from __future__ import annotations

import re
import reprlib

MAX_TRACEBACK_CHARS = 64 * 1024
MAX_MESSAGE_CHARS = 2_000
"""Of an error's message: what a person reads; the traceback holds the rest."""

_NOTICE_CHARS = 60
"""Room for saying how much was left out."""

_SHOWN_CHARACTERS = 255
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN_CHARACTERS

_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What steers a terminal or turns the direction of the text around it, and line breaks."""


def storable(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """``text`` as every database takes it: no NUL, no lone surrogate, not too long.

    :param limit: most characters; of a longer text head and tail are kept.
    """
    if len(text) > limit:
        half = max(0, limit - _NOTICE_CHARS) // 2
        notice = f"\n… {len(text) - 2 * half:,} characters left out …\n"
        text = f"{text[:half]}{notice}{text[len(text) - half :]}"[:limit]
    return _NOT_STORABLE.sub("\ufffd", text)


def sentence(text: str) -> str:
    """``text`` with a capital letter, for the beginning of what a person reads."""
    return f"{text[:1].upper()}{text[1:]}"


def one_line(text: str) -> str:
    """``text`` with control characters and line breaks written as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """``text`` with its line breaks, and all other control characters written as escapes."""
    return "\n".join(one_line(line) for line in text.split("\n"))


def printable_json(text: str) -> str:
    """JSON of the same value, with control characters written as its own escapes."""
    # Between values there are none but line breaks.
    return "\n".join(
        _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in text.split("\n")
    )


def shown(value: object) -> str:
    """A value in an error: its ``repr``, at most some hundred characters of it."""
    return _SHORT.repr(value)
