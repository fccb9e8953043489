"""Cursors: the positions at which the pages of a list begin."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import re
from typing import NamedTuple

_EPOCH = dt.datetime(1970, 1, 1)
_MICROSECOND = dt.timedelta(microseconds=1)


class InvalidCursor(ValueError):
    """A cursor is malformed, or belongs to a list with another order."""


class Cursor(NamedTuple):
    """The position of the job at which a page ended."""

    id: int
    when: dt.datetime | None = None
    """The time by which the list is sorted, in UTC without ``tzinfo``; ``None`` in a list sorted
    by id."""

    def encoded(self) -> str:
        """The cursor as text for a URL."""
        text = str(self.id)
        if self.when is not None:
            text += f":{(self.when - _EPOCH) // _MICROSECOND}"
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(text: str | None, *, is_timed: bool) -> Cursor | None:
    """The position that ``text`` encodes; ``None`` for no text.

    :param is_timed: whether the list is sorted by a time.
    :raises InvalidCursor: when the text is malformed, or comes from a list with another order.
    """
    if text is None:
        return None
    try:
        decoded = base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        decoded = b""
    found = re.fullmatch(rb"(\d{1,18})(?::(-?\d{1,17}))?", decoded)
    if found is None or (found[2] is not None) != is_timed:
        raise InvalidCursor("the cursor is invalid for this list; start at the first page")
    when = None
    if is_timed:
        try:
            when = _EPOCH + dt.timedelta(microseconds=int(found[2]))
        except OverflowError:
            raise InvalidCursor("the cursor is invalid; start at the first page") from None
    return Cursor(int(found[1]), when)
