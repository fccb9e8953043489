"""JSON in, JSON out: how parameters, results and meta become text and come back the same.

Beside JSON's own types, datetime, date, time, timedelta, Decimal, UUID, bytes, tuple and set
round-trip. Each is written as a tagged object, ``{"__bgjobs__": "uuid", "v": "…"}``; a dict
of the user's that has the tag as a key is wrapped, so that it is never taken for one.
Everything else is refused with the path of the offending value. Never pickle.
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
"""Levels of nesting: far beyond what a job needs, far below what exhausts a parser's stack."""


_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class NotSerializable(ValueError):
    """The value cannot be stored as JSON; the message says where and why."""


def dumps(value: object, *, name: str = "value", max_bytes: int | None = None) -> str:
    """The text that :func:`loads` turns into an equal value.

    :param value: what to store.
    :param name: what the value is called in error messages, as the root of paths.
    :param max_bytes: the longest text accepted; no limit by default.
    :raises NotSerializable: for a type, number, key or depth that JSON cannot hold the same
        on every database, or a text that is too long.
    """
    if value is None:
        return "null"
    try:
        text = _encoder.encode(_encode(value, name, ()))
    except NotSerializable:
        raise
    except (ValueError, RecursionError) as error:
        # An integer beyond Python's own limit of digits ends here.
        raise NotSerializable(f"{name}: {error}") from None
    except Exception as error:
        # A time zone or a key of the caller's own raises, or another thread changes a dict.
        raise NotSerializable(f"{name}: reading it raised {type(error).__name__}") from error
    if max_bytes is not None and len(text) > max_bytes:
        raise NotSerializable(
            f"{name}: {len(text):,} bytes of JSON; BGJOBS_MAX_PAYLOAD allows {max_bytes:,}. "
            "Store the data elsewhere and pass its id"
        )
    return text


def loads(text: str) -> Any:
    """The value that :func:`dumps` was given.

    :raises ValueError: when the text is not JSON, or a tag in it is unknown or broken.
    """
    try:
        plain = json.loads(text)
        return _decode(plain) if TAG in text else plain
    except (AttributeError, KeyError, TypeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"not written by flask-bgjobs: {error!r}") from error


def dumps_plain(value: object) -> str:
    """JSON for people and programs to read: the same types, as untagged text."""
    return json.dumps(value, default=_readable, ensure_ascii=False, separators=(",", ":"))


def _readable(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    # As it is stored, so that a search for what is shown finds it.
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
        # Python itself does not read such an offset back.
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
        # Equal sets give equal texts. No code of the items runs here, not even their repr().
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
