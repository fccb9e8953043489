"""Tables, for the terminal and for the documentation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

_FIGURE = re.compile(r"[\d,]+(\.\d+)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table whose first columns are words and whose others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """The table as text with aligned columns; figures are right-aligned."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if _FIGURE.fullmatch(cell) else cell.ljust(width)
                for cell, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in lines
        )

    def as_rst(self) -> str:
        """The table as a ``list-table`` of reStructuredText."""
        parts = [".. list-table::", "   :header-rows: 1", ""]
        for row in (self.header, *self.rows):
            first, *others = (cell or "–" for cell in row)  # noqa: RUF001  # an en dash is meant
            parts += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        return "\n".join(parts) + "\n"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with commas, rounded to significant digits; an empty string for ``None``."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"
