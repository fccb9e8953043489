"""Hooks: functions of the host's that decide or name something, checked when they are given.

A hook that is a coroutine or generator function returns an object instead of an answer, and that
object is true.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from flask import Flask

from .errors import ConfigError

_MOST_LAYERS = 20
"""Of decorators: a function may be said to wrap itself."""


def require_plain_function(
    function: Callable[..., Any], name: str, *arguments: object, **named: object
) -> None:
    """Refuse a hook that cannot answer.

    :param name: of the decorator, for the error.
    :param arguments: examples of those that it will be called with.
    :param named: those that it will be called with by name.
    :raises ConfigError: when it cannot be called, is a class, a coroutine or a generator function,
        or does not take the arguments.
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
        # Such as a function in C, which tells nothing.
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        by_name = "".join(f" and {each}=" for each in named)
        raise ConfigError(
            f"{name} calls its function with {len(arguments)} arguments{by_name}, and "
            f"{_shown(function)} takes {signature}"
        ) from None


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two hooks are one and the same function of a factory that ran twice.

    They have the same source, and use the same objects; only their apps may be different.
    """
    pairs = list(itertools.zip_longest(_layers(one), _layers(other)))
    return bool(pairs) and all(_is_same_layer(*pair) for pair in pairs)


def discard(answer: object) -> None:
    """Close a coroutine or generator that nobody will run; Python would warn of it later."""
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


def _layers(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A function, and those that its decorators have wrapped."""
    layers: list[Callable[..., Any]] = []
    layer: Callable[..., Any] | None = function
    while layer is not None and hasattr(layer, "__code__") and len(layers) < _MOST_LAYERS:
        layers.append(layer)
        layer = getattr(layer, "__wrapped__", None)
    return layers


def _is_same_layer(one: Callable[..., Any] | None, other: Callable[..., Any] | None) -> bool:
    if one is None or other is None or one.__code__ is not other.__code__:
        return False
    if getattr(one, "__self__", None) is not getattr(other, "__self__", None):
        return False
    return all(map(_is_same_value, _closure(one), _closure(other)))


def _closure(function: Callable[..., Any]) -> list[object]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _is_same_value(one: object, other: object) -> bool:
    if one is other or (isinstance(one, Flask) and isinstance(other, Flask)):
        return True
    if inspect.isroutine(one) and inspect.isroutine(other):
        return is_same(one, other)
    try:
        return bool(one == other)
    except Exception:
        return False


def _shown(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
