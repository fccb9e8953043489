"""Masking: show values as ``***`` if their key looks like the name of a secret.

Log lines, dashboard and CLI use the same functions, so that a value hidden in one place is not
shown in another. Texts from a job's code are masked before they are truncated and stored, because
the rest of a truncated secret could not be found.

Every regular expression here runs in time proportional to the length of the text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MASK = "***"
_MIN_SECRET = 3
"""Minimum length of secrets that are searched for in text. Shorter ones would mask parts of many
words."""
_MANY_SECRETS = 500
"""With more secrets than this, only those are searched for whose first and last characters occur in
the text."""
_LONG_PART = 8
"""Number of first and last characters compared for secrets of at least this length. Of shorter
secrets, ``_MIN_SECRET`` characters are compared."""
_URL_WITH_PASSWORD = re.compile(r"(://[^\s/@:\"']*+:)[^\s/@\"']++(?=@)")
_CREDENTIALS = re.compile(r"\b(Bearer|Basic)([ \t]++)[A-Za-z0-9._~+/=-]{8,}+", re.IGNORECASE)
_PAIR = re.compile(
    r"""
    (?<![\w-])(?P<key>[\w-]++)
    (?P<between>["']?[ \t]*+[=:][ \t]*+(?:[bBrRuUfF]{1,2}(?=["']))?)
    (?P<value>
        (?:(?:Bearer|Basic|Digest|Token|Negotiate)[ \t]++(?=[^\s"']))?
        (?:"[^"\n]*+"?|'[^'\n]*+'?|[^\s,;&"'(){}<>\[\]]++)
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""``password=x``, ``token: x``, ``'Authorization': 'Bearer x'``."""


class Redactor:
    """Masks values by key.

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
        """Mask the parameters of a job.

        :param parameters: a list or tuple of positional or a dict of keyword parameters.
        :param target: the callable of the job, which gives the names of positional parameters.
            Without it, all of them are masked, because any may be a secret.
        """
        return self._parameters(parameters, target, [])

    def text(self, text: str, parameters: Any, target: Callable[..., object] | None) -> str:
        """Mask a text such as an error or a traceback: the values masked in ``parameters``, and
        everything that looks like a secret."""
        return self.masker(parameters, target)(text)

    def masker(self, parameters: Any, target: Callable[..., object] | None) -> Callable[[str], str]:
        """A function that masks several texts of one job as :meth:`text` does."""
        secrets: list[str] = []
        self._parameters(parameters, target, secrets)
        long_enough = {secret for secret in secrets if len(secret) >= _MIN_SECRET}
        longest_first = sorted(long_enough, key=len, reverse=True)
        return lambda text: self.forms(_mask_secrets(longest_first, text))

    def forms(self, text: str) -> str:
        """Mask everything in a text that looks like a secret: passwords in URLs, HTTP credentials,
        and values after keys that are masked."""
        if not self._words:
            return text
        text = _URL_WITH_PASSWORD.sub(rf"\1{MASK}", text)
        text = _PAIR.sub(self._masked_pair, text)
        return _CREDENTIALS.sub(rf"\1\2{MASK}", text)

    def _masked_pair(self, pair: re.Match[str]) -> str:
        if not self.is_secret(pair["key"]):
            return pair[0]
        quote = pair["value"][0] if pair["value"][0] in "\"'" else ""
        return f"{pair['key']}{pair['between']}{quote}{MASK}{quote}"

    def _parameters(
        self, parameters: Any, target: Callable[..., object] | None, secrets: list[str]
    ) -> Any:
        if isinstance(parameters, Mapping):
            return self._mask(parameters, secrets)
        if not isinstance(parameters, list | tuple):
            # Only an edited row can have another type.
            _collect(parameters, secrets)
            return MASK
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


def _mask_secrets(secrets: Sequence[str], text: str) -> str:
    if len(secrets) > _MANY_SECRETS:
        parts = {
            size: {text[i : i + size] for i in range(len(text) - size + 1)}
            for size in (_MIN_SECRET, _LONG_PART)
        }
        secrets = [secret for secret in secrets if _may_hold(parts, secret)]
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def _may_hold(parts: Mapping[int, set[str]], secret: str) -> bool:
    """Whether a text may contain ``secret``.

    :param parts: all substrings of the text, by length.
    """
    size = _LONG_PART if len(secret) >= _LONG_PART else _MIN_SECRET
    return secret[:size] in parts[size] and secret[-size:] in parts[size]


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
        # The text itself, and its forms in errors and logs: repr() and JSON.
        secrets += [text, repr(text)[1:-1], json.dumps(text)[1:-1]]
        # Each line too: other text may indent the lines, or put a prefix before them.
        lines = text.splitlines()
        if len(lines) > 1:
            for line in map(str.strip, lines):
                secrets += [line, repr(line)[1:-1], json.dumps(line)[1:-1]]


class _Default:
    def __repr__(self) -> str:
        return "…"


def signature_text(signature: inspect.Signature) -> str:
    """The signature as text, without default values, because a default may be a secret."""
    parameters = [
        each if each.default is each.empty else each.replace(default=_Default())
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters))


def _positional_names(target: Callable[..., object] | None, count: int) -> list[str] | None:
    """The parameter names of ``count`` positional values; ``None`` if they are unknown."""
    if target is None:
        return [] if count == 0 else None
    names: list[str] = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [parameter.name] * (count - len(names))
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count] if len(names) >= count else None
