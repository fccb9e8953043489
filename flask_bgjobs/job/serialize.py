"""Serialize parameters, results and metadata as JSON, and restore equal values.

Besides JSON's own types, datetime, date, time, timedelta, Decimal, UUID, bytes, tuple and set
round-trip. Each is written as a tagged object, ``{"__bgjobs__": "uuid", "v": "…"}``. A user's dict
that has the tag as a key is escaped, so that it is not mistaken for a tagged object. Every other
type is refused, and the error gives the path of the value. Pickle is never used.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import math
import uuid
from collections.abc import Callable
from typing import Any

TAG = "__bgjobs__"
MAX_DEPTH = 100
"""Maximum levels of nesting: more than a job needs, but far fewer than would overflow the stack."""


_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class NotSerializable(ValueError):
    """The value cannot be stored as JSON. The message gives its path and the reason."""


def dumps(value: object, *, name: str = "value", max_bytes: int | None = None) -> str:
    """Serialize a value to a JSON text that :func:`loads` turns into an equal value.

    :param value: the value to serialize.
    :param name: the name of the value in error messages, where paths begin with it.
    :param max_bytes: maximum length of the text; no limit by default.
    :raises NotSerializable: if the value has an unsupported type, number, key, text or depth, or
        its JSON is too long.
    """
    if value is None:
        return "null"
    try:
        text = _encoder.encode(_encode(value, name, ()))
    except NotSerializable:
        raise
    except (ValueError, RecursionError) as error:
        # For example, an integer with more digits than Python converts to text.
        raise NotSerializable(f"{name}: {error}") from None
    except Exception as error:
        # For example, a time zone class of the caller raised, or another thread changed a dict.
        raise NotSerializable(f"{name}: reading it raised {type(error).__name__}") from error
    if max_bytes is not None and len(text) > max_bytes:
        raise NotSerializable(
            f"{name}: {len(text):,} bytes of JSON; BGJOBS_MAX_PAYLOAD allows {max_bytes:,}. "
            "Store the data elsewhere and pass its id"
        )
    return text


def loads(text: str) -> Any:
    """Restore the value from a text of :func:`dumps`.

    :raises ValueError: when the text is not JSON, or contains an unknown or invalid tag.
    """
    try:
        plain = json.loads(text)
        return _decode(plain) if TAG in text else plain
    except (AttributeError, KeyError, TypeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"not written by flask-bgjobs: {error!r}") from error


def dumps_plain(value: object) -> str:
    """Serialize a value for people and other programs: the same types, written without tags."""
    return json.dumps(value, default=_readable, ensure_ascii=False, separators=(",", ":"))


def _readable(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    # The stored format, so that a search for the displayed text finds it.
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)


def _encode(value: object, path: str, parents: tuple[int, ...]) -> object:
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return value
    if kind is str:
        return _encode_text(value, path)  # type: ignore[arg-type]  # kind is str
    if kind is float:
        if not math.isfinite(value):  # type: ignore[arg-type]  # kind is float
            raise NotSerializable(f"{path}: {value!r} is not a number that JSON can hold")
        return value
    if kind in _TO_TEXT:
        return _encode_scalar(value, path)
    if kind in (list, tuple, set, dict):
        if id(value) in parents:
            raise NotSerializable(f"{path}: it contains itself")
        if len(parents) >= MAX_DEPTH:
            raise NotSerializable(f"{path[:200]}…: nested more than {MAX_DEPTH} levels deep")
        return _encode_container(value, path, (*parents, id(value)))
    raise NotSerializable(
        f"{path}: {_name(kind)} cannot be stored as JSON. Pass an id, a str, a number, a list "
        "or a dict instead"
    )


def _encode_text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NotSerializable(f"{path}: the text holds a lone surrogate") from None
    return value


def _encode_scalar(value: Any, path: str) -> object:
    if isinstance(value, decimal.Decimal) and not value.is_finite():
        raise NotSerializable(f"{path}: {value} is not a number that JSON can hold")
    if isinstance(value, dt.datetime | dt.time):
        offset = value.utcoffset()
        # Python does not read such an offset back.
        if offset is not None and offset.microseconds:
            raise NotSerializable(f"{path}: its UTC offset {offset} is not in whole seconds")
    tag, to_text = _TO_TEXT[type(value)]
    return {TAG: tag, "v": to_text(value)}


def _encode_container(value: Any, path: str, parents: tuple[int, ...]) -> object:
    if isinstance(value, dict):
        plain = {
            _encode_key(key, path): _encode(item, f"{path}.{key}", parents)
            for key, item in value.items()
        }
        return {TAG: "dict", "v": plain} if TAG in plain else plain
    encoded = [_encode(item, f"{path}[{index}]", parents) for index, item in enumerate(value)]
    if isinstance(value, set):
        # Sorted, so that equal sets give equal texts. Sorting by JSON runs no code of the items.
        encoded.sort(key=_encoder.encode)
    return encoded if isinstance(value, list) else {TAG: type(value).__name__, "v": encoded}


def _encode_key(key: object, path: str) -> str:
    if type(key) is not str:
        raise NotSerializable(f"{path}: the key {key!r} is not a str")
    return _encode_text(key, path)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(TAG)
    if tag is None:
        return {key: _decode(item) for key, item in value.items()}
    content = value["v"]
    if tag == "dict":
        return {key: _decode(item) for key, item in content.items()}
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](_decode(item) for item in content)
    return _FROM_TEXT[tag](content)


def _name(kind: type) -> str:
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _timedelta_to_list(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


_TO_TEXT: dict[type, tuple[str, Callable[[Any], object]]] = {
    dt.datetime: ("datetime", dt.datetime.isoformat),
    dt.date: ("date", dt.date.isoformat),
    dt.time: ("time", dt.time.isoformat),
    dt.timedelta: ("timedelta", _timedelta_to_list),
    decimal.Decimal: ("decimal", str),
    uuid.UUID: ("uuid", str),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
}
_FROM_TEXT: dict[str, Callable[[Any], object]] = {
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "timedelta": lambda value: dt.timedelta(*value),
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "bytes": lambda value: base64.b64decode(value, validate=True),
}
_CONTAINERS: dict[str, Callable[[Any], object]] = {"tuple": tuple, "set": set}
