"""The keys of unique jobs, and the options that go with them."""

from __future__ import annotations

import hashlib
import inspect
import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..job import durations, serialize
from ..job.redact import Redactor
from ..job.text import shown, storable
from ..options import MAX_KEY, JobOptions
from ..registry import Target
from ..store import Unique

_UNTIL = ("finished", "started")
_ON_DUPLICATE = ("keep", "replace", "raise")
_NEED_KEY = ("unique_until", "unique_for", "on_duplicate")
_EXCLUDED = {
    "debounce": ("throttle", "delay", "run_at", *_NEED_KEY),
    "throttle": ("debounce_max", "delay", "run_at", *_NEED_KEY),
}
"""Options that cannot be combined with these."""

Parameters = Sequence[Any] | Mapping[str, Any]
Bound = Mapping[str, Any]


def check_unique(options: JobOptions, target: Target | None = None) -> None:
    """Check the options of unique jobs.

    :param target: the callable, whose parameters a format must name; ``None``: not checked.
    :raises ValueError: says which option is not valid, and what is allowed.
    """
    has_key = options.unique_key is not None or options.unique not in (None, False)
    if options.unique_key is not None and options.unique not in (None, False):
        raise ValueError("give either unique or unique_key, not both")
    for name, excluded in _EXCLUDED.items():
        if getattr(options, name) is not None:
            for other in excluded:
                if getattr(options, other) is not None:
                    raise ValueError(f"{name} cannot be combined with {other}")
            has_key = True
    for name in _NEED_KEY:
        if getattr(options, name) is not None and not has_key:
            raise ValueError(f"{name} needs unique or unique_key")
    _choice(options.unique_until, "unique_until", _UNTIL)
    _choice(options.on_duplicate, "on_duplicate", _ON_DUPLICATE)
    _seconds(options, "unique_for")
    _seconds(options, "throttle")
    wait, longest = _seconds(options, "debounce"), _seconds(options, "debounce_max")
    if longest is not None and (wait is None or longest < wait):
        raise ValueError("debounce_max needs debounce, and must be at least as long")
    if options.unique not in (None, False, True):
        _check_key_source(options.unique, target)


def unique_jobs(
    options: JobOptions,
    name: str,
    target: Target,
    parameter_sets: Sequence[Parameters],
    redactor: Redactor,
) -> Unique | None:
    """How the jobs with these options are kept unique; ``None`` if they are not.

    :param name: the name of the job, which is part of each key.
    :param parameter_sets: the parameters of each job, which fit ``target``.
    :param redactor: tells which parameters are secrets, which no key may show.
    :raises ValueError: when a key cannot be made from the parameters.
    """
    throttle, debounce = _seconds(options, "throttle"), _seconds(options, "debounce")
    if options.unique_key is not None:
        keys = [options.unique_key for _ in parameter_sets]
    elif options.unique not in (None, False):
        source = options.unique
        keys = [_key(source, name, target, each, redactor) for each in parameter_sets]
    elif throttle is not None or debounce is not None:
        keys = [_shortened(name) for _ in parameter_sets]
    else:
        return None
    return Unique(
        keys=keys,
        until_start=options.unique_until == "started" or debounce is not None,
        for_seconds=_seconds(options, "unique_for"),
        on_duplicate=options.on_duplicate or "keep",
        debounce_seconds=debounce,
        debounce_max_seconds=_seconds(options, "debounce_max"),
        throttle_seconds=throttle,
    )


def _choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")


def _seconds(options: JobOptions, name: str) -> float | None:
    value = getattr(options, name)
    return None if value is None else durations.seconds(value, name, above=True)


def _check_key_source(source: object, target: Target | None) -> None:
    if isinstance(source, str):
        names = _field_names(source)
        if target is not None:
            _check_names(source, names, target.signature)
    elif not callable(source) or isinstance(source, type):
        raise ValueError(
            "unique must be True, a format such as '{order_id}', or a function of the parameters "
            f"that returns a str, not {shown(source)}"
        )


def _field_names(source: str) -> list[str]:
    """The parameters that a format names."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(source)]
    except ValueError as error:
        raise ValueError(f"unique={shown(source)} is not a valid format: {error}") from None
    names = [field for field in fields if field is not None]
    for name in names:
        if not name.isidentifier():
            raise ValueError(
                f"unique={shown(source)} must name parameters, such as '{{order_id}}', not "
                f"{shown(name)}"
            )
    return names


def _check_names(source: str, names: Sequence[str], signature: inspect.Signature) -> None:
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for name in names:
        if name not in signature.parameters:
            raise ValueError(
                f"unique={shown(source)} names the parameter {name!r}; the parameters are "
                f"{', '.join(signature.parameters) or 'none'}"
            )


def _key(
    source: bool | str | Callable[..., str],
    name: str,
    target: Target,
    parameters: Parameters,
    redactor: Redactor,
) -> str:
    if callable(source):
        return _shortened(f"{name}:{_called(source, parameters)}")
    bound = _bound(target.signature, parameters)
    if isinstance(source, str):
        names = _field_names(source)
        _check_names(source, names, target.signature)
        given = {each: _text(bound[each]) for each in names if each in bound}
        if missing := [each for each in names if each not in bound]:
            raise ValueError(f"unique={shown(source)} needs the parameter {missing[0]!r}")
        text = f"{name}:{source.format(**given)}"
        return _digest(name, text) if any(map(redactor.is_secret, names)) else _shortened(text)
    # Not readable, because it may be long, and some of the values may be secrets.
    return _digest(name, _canonical(bound))


def _called(source: Callable[..., str], parameters: Parameters) -> str:
    try:
        if isinstance(parameters, Mapping):
            text: object = source(**parameters)
        else:
            text = source(*parameters)
    except Exception as error:
        raise ValueError(
            f"the function given as unique raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(text, str) or not text:
        raise ValueError(f"the function given as unique must return a str, not {shown(text)}")
    return storable(text)


def _bound(signature: inspect.Signature, parameters: Parameters) -> Bound:
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


def _canonical(bound: Bound) -> str:
    """JSON that is the same for equal parameters."""
    return json.dumps({name: _json(value) for name, value in bound.items()}, sort_keys=True)


def _text(value: object) -> str:
    """The text of a parameter: strings as they are, everything else as JSON."""
    return storable(value) if isinstance(value, str) else _json(value)


def _json(value: object) -> str:
    try:
        return json.dumps(json.loads(serialize.dumps(value)), sort_keys=True)
    except serialize.NotSerializable:
        # A default value, which is the same for each job. All other values can be stored.
        return type(value).__qualname__


def _digest(name: str, text: str) -> str:
    return _shortened(f"{name}:{hashlib.sha256(text.encode()).hexdigest()}")


def _shortened(text: str) -> str:
    """A key that fits into its column. A long one ends with the hash of the whole."""
    if len(text) <= MAX_KEY:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text[: MAX_KEY - len(digest) - 1]}…{digest}"
