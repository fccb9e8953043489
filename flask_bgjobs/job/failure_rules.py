"""Which exceptions are retried: the options ``retry_on`` and ``fail_on``.

A job's row holds the dotted names of the classes. They are compared with those of an exception's
class and its base classes, so nothing is imported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from .text import shown

_MAX_CLASSES = 50


def exception_names(value: object, option: str) -> tuple[str, ...]:
    """The dotted names of exception classes.

    :param value: a class, a dotted name such as ``"requests.exceptions.Timeout"``, or a list of
        them. The name is that of the module that defines the class.
    :param option: the name of the option in the error message.
    :raises ValueError: when one of them is neither.
    """
    items = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if not 0 < len(items) <= _MAX_CLASSES:
        raise ValueError(f"{option} must be 1 to {_MAX_CLASSES} exception classes")
    return tuple(sorted({_name(item, option) for item in items}))


def _name(item: object, option: str) -> str:
    if isinstance(item, type) and issubclass(item, Exception):
        return _dotted(item)
    if isinstance(item, str) and all(part.isidentifier() for part in item.split(".")):
        return item if "." in item else f"builtins.{item}"
    raise ValueError(
        f"{option} must be subclasses of Exception, or dotted names of them such as "
        f"'requests.exceptions.Timeout', not {shown(item)}"
    )


def rules_json(retry_on: Sequence[str] | None, fail_on: Sequence[str] | None) -> str | None:
    """The rules as stored with a job; ``None`` if there are none."""
    rules = {"retry_on": retry_on, "fail_on": fail_on}
    given = {name: list(names) for name, names in rules.items() if names is not None}
    return json.dumps(given) if given else None


def is_final(rules: str | None, error: BaseException) -> bool:
    """Whether a job fails without a retry when its code raises ``error``."""
    if rules is None:
        return False
    retry_on, fail_on = _read(rules)
    names = {_dotted(cls) for cls in type(error).__mro__}
    return bool(names & fail_on) or (retry_on is not None and not names & retry_on)


@functools.lru_cache(maxsize=1_000)
def _read(rules: str) -> tuple[frozenset[str] | None, frozenset[str]]:
    """The names of ``retry_on`` and ``fail_on``. A row without valid rules has none."""
    try:
        stored = json.loads(rules)
        retry_on = stored.get("retry_on")
        allowed = None if retry_on is None else frozenset(map(str, retry_on))
        return allowed, frozenset(map(str, stored.get("fail_on", ())))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None, frozenset()


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
