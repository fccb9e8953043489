"""Sizes of texts in statements, and batches that stay within a size limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DataError

T = TypeVar("T")

BATCH_BYTES = 4 * 1024 * 1024
"""Limit for user data in one statement. It is well below the smallest limit of a server, 16 MiB on
MariaDB, and small enough to be sent over a slow link within the deadline of a worker's
transaction."""
_PER_ASCII_CHARACTER = 4
"""Most bytes for an ASCII character. A quote takes four: JSON escapes it with a backslash, and
PyMySQL escapes both characters."""
_PER_CHARACTER = 14
"""Most bytes for any character. An emoji takes two JSON escapes, such as ``\\\\ud83d``, whose
backslashes PyMySQL doubles."""


class StatementTooLarge(DataError):
    """A value is larger than the database accepts. Nothing was sent."""


def statement_bytes(*texts: str | None) -> int:
    """The maximum number of bytes that the texts can take in a statement, on any database."""
    size = 0
    for text in texts:
        if text:
            size += len(text) * (_PER_ASCII_CHARACTER if text.isascii() else _PER_CHARACTER)
    return size


def batches(
    items: Iterable[T],
    size_of: Callable[[T], int],
    *,
    limit: int = BATCH_BYTES,
    most_items: int | None = None,
) -> Iterator[list[T]]:
    """Split the items, in order, into lists whose sizes add up to at most ``limit``.

    An item that is larger than the limit gets a list of its own.

    :param size_of: returns the size of an item, in the unit of ``limit``.
    :param limit: maximum size of a list; 4 MiB by default.
    :param most_items: maximum number of items in a list; no limit by default.
    """
    batch: list[T] = []
    remaining = limit
    for item in items:
        size = size_of(item)
        if batch and (size > remaining or len(batch) == most_items):
            yield batch
            batch, remaining = [], limit
        batch.append(item)
        remaining -= size
    if batch:
        yield batch
