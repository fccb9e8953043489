"""Product files: a CSV with the columns ``sku,name,category,price,stock``.

Only sku, name and price are required. This module does not use the database.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

REQUIRED_COLUMNS = ("sku", "name", "price")
COLUMNS = ("sku", "name", "category", "price", "stock")
MAX_PRICE = Decimal(1_000_000)
MAX_STOCK = 1_000_000


class NotAProductFile(ValueError):
    """The file as a whole cannot be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProductRow:
    """A valid line."""

    sku: str
    name: str
    category: str
    price_cents: int
    stock: int


@dataclasses.dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be imported, and the reason."""

    line: int
    reason: str


def parse(content: bytes) -> Iterator[ProductRow | BadRow]:
    """Iterate over the lines of the file, valid or not.

    :raises NotAProductFile: when the file is not UTF-8 text, or a required column is missing.
    """
    reader = csv.DictReader(io.StringIO(_decode(content), newline=""))
    try:
        reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise NotAProductFile(f"the file is not CSV: {error}") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in reader.fieldnames]
    if missing:
        raise NotAProductFile(f"the first line lacks the columns {', '.join(missing)}")
    return _rows(reader)


def count(content: bytes) -> int:
    """The number of items that :func:`parse` yields."""
    return sum(1 for _ in parse(content))


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotAProductFile(f"the file is not UTF-8 text (byte {error.start})") from error


def _rows(reader: csv.DictReader[str]) -> Iterator[ProductRow | BadRow]:
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(reader.line_num, str(error))
            continue
        try:
            yield _row(fields)
        except ValueError as error:
            yield BadRow(reader.line_num, str(error))


def _row(fields: dict[str, str]) -> ProductRow:
    return ProductRow(
        sku=_text(fields, "sku", 40),
        name=_text(fields, "name", 200),
        category=_text(fields, "category", 60, required=False),
        price_cents=_cents(_text(fields, "price", 20)),
        stock=_stock(_text(fields, "stock", 20, required=False)),
    )


def _text(fields: dict[str, str], column: str, longest: int, *, required: bool = True) -> str:
    value = (fields.get(column) or "").strip()
    if required and not value:
        raise ValueError(f"{column} is empty")
    if len(value) > longest:
        raise ValueError(f"{column} has more than {longest} characters")
    if not value.isprintable():
        raise ValueError(f"{column} contains control characters")
    return value


def _cents(text: str) -> int:
    try:
        price = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"price {text!r} is not a number") from None
    if not price.is_finite() or not 0 <= price <= MAX_PRICE:
        raise ValueError(f"price {text} is not between 0 and {MAX_PRICE}")
    if price != price.quantize(Decimal("0.01")):
        raise ValueError(f"price {text} has more than two decimals")
    return int(price * 100)


def _stock(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_STOCK:
        raise ValueError(f"stock {text!r} is not a whole number from 0 to {MAX_STOCK}")
    return int(text)
