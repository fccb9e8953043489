"""Hooks: functions of the app that flask-bgjobs calls, checked when they are registered.

Coroutine functions and generator functions are refused: calling one returns an object without
running its code, and that object is true.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask

from .errors import ConfigError

_NOT_ASSIGNED_YET = object()
_SCALARS = (str, bytes, int, float, complex, type(None))
"""Types whose values are interchangeable if they are equal."""


def require_plain_function(
    function: Callable[..., Any], name: str, *arguments: object, **named: object
) -> None:
    """Check that a hook is a plain function with the right parameters.

    :param name: name of the decorator, for the error message.
    :param arguments: examples of the positional arguments that it will be called with.
    :param named: examples of its keyword arguments.
    :raises ConfigError: when it is not callable, is a class, a coroutine function or a generator
        function, or does not accept the arguments.
    """
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"{name} needs a function, not {_shown(function)}")
    bare = _bare(function)
    if inspect.iscoroutinefunction(bare) or inspect.isasyncgenfunction(bare):
        raise ConfigError(f"{name} needs a plain function: {_shown(function)} is async")
    if inspect.isgeneratorfunction(bare):
        raise ConfigError(f"{name} needs a plain function: {_shown(function)} is a generator")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        # A function written in C, for example, may have no signature.
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        by_name = "".join(f" and {each}=" for each in named)
        raise ConfigError(
            f"{name} calls its function with {len(arguments)} arguments{by_name}, but "
            f"{_shown(function)} takes {signature}"
        ) from None


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two hooks are the same function, defined twice by an app factory that ran twice.

    They have the same code, and their defaults and enclosing variables refer to the same objects.
    Only the Flask app may be a different one.
    """
    return _is_same_function(one, other, set())


def discard(answer: object) -> None:
    """Close a coroutine or generator that was returned by mistake, so that Python does not warn
    that it was never awaited."""
    if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
        answer.close()


def _bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs when ``function`` is called."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if inspect.isroutine(function):
        return function
    method: Callable[..., Any] = type(function).__call__
    return method


def _is_same_function(one: Any, other: Any, compared: set[tuple[int, int]]) -> bool:
    if (id(one), id(other)) in compared:
        # The functions refer to themselves or to each other.
        return True
    compared.add((id(one), id(other)))
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(other, "__code__", None):
        return False
    if getattr(one, "__self__", None) is not getattr(other, "__self__", None):
        return False
    pairs = zip(_values_of(one), _values_of(other), strict=True)
    return all(_is_same_value(*pair, compared) for pair in pairs)


def _values_of(function: Any) -> Iterator[object]:
    """The values that a function uses besides its arguments: defaults and enclosing variables."""
    yield function.__defaults__
    yield tuple(sorted((function.__kwdefaults__ or {}).items()))
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield _NOT_ASSIGNED_YET


def _is_same_value(one: object, other: object, compared: set[tuple[int, int]]) -> bool:
    if one is other or one is _NOT_ASSIGNED_YET or other is _NOT_ASSIGNED_YET:
        return True
    if isinstance(one, Flask) and isinstance(other, Flask):
        return True
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return all(_is_same_value(*pair, compared) for pair in pairs)
    if inspect.isroutine(one) and inspect.isroutine(other):
        return _is_same_function(one, other, compared)
    return isinstance(one, _SCALARS) and type(one) is type(other) and one == other


def _shown(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
