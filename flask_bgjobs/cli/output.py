"""Output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ..job import serialize
from ..job.text import one_line, printable_json

_COLUMN_WIDTH = 60


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows as a table whose columns are as wide as their widest cell."""
    cells = [list(heads), *([one_line(str(cell))[:_COLUMN_WIDTH] for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def print_json(data: Any) -> None:
    """Print ``data`` as indented JSON."""
    plain = json.loads(serialize.dumps_plain(data))
    click.echo(printable_json(json.dumps(plain, indent=2, ensure_ascii=False)))


@contextlib.contextmanager
def progress_bar(length: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if standard error is a terminal.

    :returns: a context manager. Its value is a function to call with the number of steps done.
    """
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 job``, ``1,200 jobs``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
