"""Column types that read any value, because SQLite can store any type of value in any column.

Without them, a single edited row would make every query that reads it fail.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from ...job.records import UNREADABLE_TIME

UNREADABLE_NUMBER = -1
"""Stands for a value that is not a number. No column that matters to a run may be negative, so this
value is found to be invalid."""


class _Time(sqlite.DATETIME):
    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        read = super().result_processor(dialect, coltype)
        assert read is not None

        def process(value: Any) -> dt.datetime | None:
            try:
                return read(value)
            except (TypeError, ValueError):
                return UNREADABLE_TIME

        return process


class _Integer(sa.Integer):
    def result_processor(self, _dialect: Any, _coltype: Any) -> Any:
        return _read_integer


class _Float(sa.Float[Any]):
    def result_processor(self, _dialect: Any, _coltype: Any) -> Any:
        return _read_float


class _Text(sa.String):
    def result_processor(self, _dialect: Any, _coltype: Any) -> Any:
        return _read_text


def _read_integer(value: Any) -> int | None:
    return value if value is None or type(value) is int else UNREADABLE_NUMBER


def _read_float(value: Any) -> float | None:
    if value is None or type(value) is float:
        return value
    return float(value) if type(value) is int else float(UNREADABLE_NUMBER)


def _read_text(value: Any) -> str | None:
    if value is None or type(value) is str:
        return value
    return value.decode(errors="replace") if type(value) is bytes else str(value)


LENIENT_TYPES: dict[type, type] = {
    sa.DateTime: _Time,
    sa.Integer: _Integer,
    sa.Float: _Float,
    sa.String: _Text,
}
"""The types by the generic type that they replace, in the format of a dialect's ``colspecs``."""
