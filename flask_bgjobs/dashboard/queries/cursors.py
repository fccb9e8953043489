"""Cursors: where a page of a list begins."""

from __future__ import annotations

import base64
import binascii
import re


class InvalidCursor(ValueError):
    """The cursor of a page was not made by us."""


def encode_cursor(job_id: int) -> str:
    """The cursor of a page that ends at the job."""
    return base64.urlsafe_b64encode(f"id:{job_id}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> int | None:
    """The job at which a page ended; ``None`` for no cursor.

    :raises InvalidCursor: when it is not one of ours.
    """
    if cursor is None:
        return None
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
    except (binascii.Error, ValueError):
        text = b""
    match = re.fullmatch(rb"id:(\d{1,18})", text)
    if match is None:
        raise InvalidCursor("the page's cursor is not one of ours; start at the first page")
    return int(match[1])
