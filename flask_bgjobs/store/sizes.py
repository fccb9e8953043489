"""Sizes: how many bytes a text takes in a statement, and batches that stay below a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DataError

T = TypeVar("T")

BATCH_BYTES = 4 * 1024 * 1024
"""Of user data in one statement. It is well below the smallest limit of a server, 16 MiB on
MariaDB, and crosses a slow link within the deadline of a worker's transaction."""
_PER_ASCII_CHARACTER = 4
"""A quote takes four bytes: JSON and PyMySQL each put a backslash before what is to be escaped."""
_PER_CHARACTER = 14
"""An emoji takes two escapes of JSON, such as ``\\\\ud83d``, whose backslashes PyMySQL doubles."""


class StatementTooLarge(DataError):
    """A value is larger than the database accepts; nothing was sent."""


def statement_bytes(*texts: str | None) -> int:
    """The most bytes that the texts can take in a statement, on any database."""
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
    """The items in order, in lists whose sizes add up to ``limit`` at most.

    An item that is larger than the limit is alone in its list.

    :param size_of: gives the size of an item, in the unit of the limit.
    :param limit: in bytes by default.
    :param most_items: items per list; no limit by default.
    """
    batch: list[T] = []
    room = limit
    for item in items:
        size = size_of(item)
        if batch and (size > room or len(batch) == most_items):
            yield batch
            batch, room = [], limit
        batch.append(item)
        room -= size
    if batch:
        yield batch
