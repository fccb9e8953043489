"""The tables of the documentation are complete."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import flask_bgjobs
from flask_bgjobs import Job

_DOCS = Path(__file__).parents[2] / "docs"
_CODE = Path(flask_bgjobs.__file__).parent
_LEVELS = {"debug", "info", "warning", "error", "exception", "log"}
_SHOWN = 40
"""Number of characters of a line that the page must contain."""
_ONLY_COLUMNS = {"claim_rank", "unique_hash", "metadata", "registry"}
"""Names of ``Job`` that only our statements and SQLAlchemy use."""


def log_lines() -> Iterator[str]:
    """The beginning of each log line that has fields, such as ``Worker dead``."""
    nodes = itertools.chain.from_iterable(
        ast.walk(ast.parse(file.read_text())) for file in _CODE.rglob("*.py")
    )
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in _LEVELS:
            texts = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
            yield from (text.partition(" | ")[0] for text in texts if " | " in text)


def test_log_lines_are_documented() -> None:
    """The page about logging names each line that has fields."""
    lines = set(log_lines())
    assert len(lines) > 20
    page = (_DOCS / "logging.rst").read_text()
    assert [line for line in sorted(lines) if f"``{line[:_SHOWN]}" not in page] == []


def test_attributes_of_jobs_are_documented() -> None:
    """The page about the API names each attribute and method of a job."""
    names = {name for name in dir(Job) if not name.startswith("_")} - _ONLY_COLUMNS
    page = (_DOCS / "api.rst").read_text()
    marks = ("``{}``", ":: {}\n")
    missing = {n for n in names if not any(mark.format(n) in page for mark in marks)}
    assert {name for name in missing if not name.endswith("_json")} == set()
