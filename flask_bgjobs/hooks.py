"""Hooks: functions of the host's that decide or name something, checked when they are given.

A hook that is a coroutine or generator function returns an object instead of an answer, and that
object is true.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .errors import ConfigError


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


def _shown(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
