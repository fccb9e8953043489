"""Keys of jobs, made from their parameters: for unique jobs and for limits."""

from __future__ import annotations

import hashlib
import inspect
import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..job import serialize
from ..job.redact import Redactor
from ..job.text import shown, storable
from ..registry import Target

Parameters = Sequence[Any] | Mapping[str, Any]
Bound = Mapping[str, Any]
KeySource = str | Callable[..., object]
"""A format over the names of parameters, or a function of the parameters."""


def check_key_source(
    option: str, source: object, target: Target | None, *, or_else: str = ""
) -> None:
    """Check where a key comes from.

    :param option: the name of the option, for error messages.
    :param or_else: other values of the option, for error messages.
    :param target: the callable, whose parameters a format must name; ``None``: not checked.
    :raises ValueError: says what is not valid.
    """
    if isinstance(source, str):
        names = _field_names(option, source)
        if target is not None:
            _check_names(option, source, names, target.signature)
    elif not callable(source) or isinstance(source, type):
        raise ValueError(
            f"{option} must be {or_else}a format such as '{{order_id}}', or a function of the "
            f"parameters, not {shown(source)}"
        )


def key_text(
    option: str, source: KeySource, target: Target, parameters: Parameters, redactor: Redactor
) -> str:
    """The key of a job with these parameters.

    :param option: the name of the option, for error messages.
    :param redactor: tells which parameters are secrets. They are replaced by a hash.
    :raises ValueError: when the key cannot be made from the parameters.
    """
    if callable(source):
        return _called(option, source, parameters)
    bound = bound_parameters(target.signature, parameters)
    names = _field_names(option, source)
    _check_names(option, source, names, target.signature)
    given = {each: _text(bound[each]) for each in names if each in bound}
    if missing := [each for each in names if each not in bound]:
        raise ValueError(f"{option}={shown(source)} needs the parameter {missing[0]!r}")
    text = source.format(**given)
    return digest(text) if any(map(redactor.is_secret, names)) else text


def bound_parameters(signature: inspect.Signature, parameters: Parameters) -> Bound:
    """The parameters by name, with defaults, so that it does not matter how they were passed."""
    if isinstance(parameters, Mapping):
        bound = signature.bind(**parameters)
    else:
        bound = signature.bind(*parameters)
    bound.apply_defaults()
    by_name = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            by_name |= by_name.pop(parameter.name, {})
    return by_name


def canonical(bound: Bound) -> str:
    """JSON that is the same for equal parameters."""
    return json.dumps({name: _json(value) for name, value in bound.items()}, sort_keys=True)


def digest(text: str) -> str:
    """The hash of a text, in place of one that must not be shown."""
    return hashlib.sha256(text.encode()).hexdigest()


def shortened(text: str, limit: int) -> str:
    """A key that fits into a column of ``limit`` characters. A long one ends with the hash of the
    whole."""
    if len(text) <= limit:
        return text
    whole = digest(text)
    return f"{text[: limit - len(whole) - 1]}…{whole}"


def _field_names(option: str, source: str) -> list[str]:
    """The parameters that a format names."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(source)]
    except ValueError as error:
        raise ValueError(f"{option}={shown(source)} is not a valid format: {error}") from None
    names = [field for field in fields if field is not None]
    for name in names:
        if not name.isidentifier():
            raise ValueError(
                f"{option}={shown(source)} must name parameters, such as '{{order_id}}', not "
                f"{shown(name)}"
            )
    return names


def _check_names(
    option: str, source: str, names: Sequence[str], signature: inspect.Signature
) -> None:
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for name in names:
        if name not in signature.parameters:
            raise ValueError(
                f"{option}={shown(source)} names the parameter {name!r}; the parameters are "
                f"{', '.join(signature.parameters) or 'none'}"
            )


def _called(option: str, source: Callable[..., object], parameters: Parameters) -> str:
    try:
        if isinstance(parameters, Mapping):
            text: object = source(**parameters)
        else:
            text = source(*parameters)
    except Exception as error:
        raise ValueError(
            f"the function given as {option} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(text, str) or not text:
        raise ValueError(f"the function given as {option} must return a str, not {shown(text)}")
    return storable(text)


def _text(value: object) -> str:
    """The text of a parameter: strings as they are, everything else as JSON."""
    return storable(value) if isinstance(value, str) else _json(value)


def _json(value: object) -> str:
    try:
        return json.dumps(json.loads(serialize.dumps(value)), sort_keys=True)
    except serialize.NotSerializable:
        # A default value, which is the same for each job. All other values can be stored.
        return type(value).__qualname__
