"""Masking: values whose key sounds like a secret are shown as ``***``.

The same functions serve log lines, dashboard and CLI, so that nothing is shown in one place
that is hidden in another.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MASK = "***"
_MIN_SECRET = 3
"""Shorter secrets are not searched for in other text: they would mask half of every word."""


class Redactor:
    """Masks values by key, and collects what it masked.

    :param words: parts of keys, compared without case and punctuation: ``api_key`` also
        masks ``X-Api-Key`` and ``apiKeyOld``.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(_letters(word) for word in words)

    def is_secret(self, key: str) -> bool:
        """Whether the value of ``key`` is masked."""
        letters = _letters(key)
        return any(word in letters for word in self._words)

    def mask(self, value: Any) -> Any:
        """A copy of ``value`` with the values of secret keys replaced."""
        return self._mask(value, [])

    def parameters(self, parameters: Any, target: Callable[..., object] | None) -> Any:
        """Masked parameters of a job.

        :param parameters: a list or tuple of positional ones, or a dict of keyword ones.
        :param target: what the job calls, to know the names of positional parameters. Without
            it they are all masked, because any of them may be the secret.
        """
        return self._parameters(parameters, target, [])

    def text(self, text: str, parameters: Any, target: Callable[..., object] | None) -> str:
        """``text`` (an error, a traceback) without the values masked in ``parameters``."""
        secrets: list[str] = []
        self._parameters(parameters, target, secrets)
        for secret in sorted(set(secrets), key=len, reverse=True):
            if len(secret) >= _MIN_SECRET:
                text = text.replace(secret, MASK)
        return text

    def _parameters(
        self, parameters: Any, target: Callable[..., object] | None, secrets: list[str]
    ) -> Any:
        if isinstance(parameters, Mapping):
            return self._mask(parameters, secrets)
        names = _positional_names(target, len(parameters))
        if names is None:
            _collect(parameters, secrets)
            return [MASK for _ in parameters]
        return [
            self._value(name, value, secrets) for name, value in zip(names, parameters, strict=True)
        ]

    def _mask(self, value: Any, secrets: list[str]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._value(key, item, secrets) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [self._mask(item, secrets) for item in value]
        return value

    def _value(self, key: str, value: Any, secrets: list[str]) -> Any:
        if not self.is_secret(key):
            return self._mask(value, secrets)
        _collect(value, secrets)
        return MASK


def _letters(key: str) -> str:
    return re.sub(r"[\W_]", "", key).lower()


def _collect(value: Any, secrets: list[str]) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for item in value:
            _collect(item, secrets)
    elif value is not None and not isinstance(value, bool):
        text = str(value)
        # As it stands, and as an error or a log shows it: by repr, and as JSON.
        secrets += [text, repr(text)[1:-1], json.dumps(text)[1:-1]]


class _Default:
    def __repr__(self) -> str:
        return "…"


def signature_text(signature: inspect.Signature) -> str:
    """``signature`` without the values of its defaults, one of which may be a secret."""
    parameters = [
        each if each.default is each.empty else each.replace(default=_Default())
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters))


def _positional_names(target: Callable[..., object] | None, count: int) -> list[str] | None:
    """The names that ``count`` positional values bind to, ``None`` when that is unknown."""
    if target is None:
        return [] if count == 0 else None
    names: list[str] = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [parameter.name] * (count - len(names))
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count] if len(names) >= count else None
