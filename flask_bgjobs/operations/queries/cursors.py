"""Cursors: where a page of a list begins."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import re
from typing import NamedTuple

_EPOCH = dt.datetime(1970, 1, 1)
_MICROSECOND = dt.timedelta(microseconds=1)


class InvalidCursor(ValueError):
    """The cursor of a page was not made by us."""


class Cursor(NamedTuple):
    """The job at which a page ended, and what it was sorted by."""

    id: int
    when: dt.datetime | None = None
    """UTC without ``tzinfo``; ``None`` in a list that is in the order of ids."""

    def encoded(self) -> str:
        """As it stands in an address."""
        text = str(self.id)
        if self.when is not None:
            text += f":{(self.when - _EPOCH) // _MICROSECOND}"
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(text: str | None, *, is_timed: bool) -> Cursor | None:
    """The job at which a page ended; ``None`` for no cursor.

    :param is_timed: whether the list is sorted by a time.
    :raises InvalidCursor: when it is not one of ours, or of a list that was sorted otherwise.
    """
    if text is None:
        return None
    try:
        decoded = base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        decoded = b""
    found = re.fullmatch(rb"(\d{1,18})(?::(-?\d{1,17}))?", decoded)
    if found is None or (found[2] is not None) != is_timed:
        raise InvalidCursor("the page's cursor is not one of this list; start at the first page")
    when = None
    if is_timed:
        try:
            when = _EPOCH + dt.timedelta(microseconds=int(found[2]))
        except OverflowError:
            raise InvalidCursor("the page's cursor is not one of ours") from None
    return Cursor(int(found[1]), when)
