"""Limits: how many jobs may run at once or start per time, over all workers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from . import durations
from .text import shown

MAX_LIMITS = 10
"""Maximum number of limits of one job."""
MAX_KEY = 255
"""Maximum length of the name of a limit, and of a key."""
_MAX_NUMBER = 1_000_000
"""The largest concurrency and rate."""
_MIN_PER_SECONDS = 0.01
_CACHED_TEXTS = 1_000
"""Most jobs have one of a few texts, and each is read several times."""
_ID_BITS = 63
"""Ids are positive 64-bit integers."""


class Rule(NamedTuple):
    """The numbers of a limit."""

    concurrency: int | None = None
    """How many jobs may run at once; ``None``: any number."""
    rate: int | None = None
    """How many jobs may start in ``per_seconds``; ``None``: any number."""
    per_seconds: float | None = None
    burst: int = 1
    """How many jobs may start at once after a pause."""

    def to_json(self) -> dict[str, Any]:
        """The numbers that differ from the defaults."""
        defaults = Rule._field_defaults
        return {name: v for name, v in self._asdict().items() if v != defaults[name]}

    def in_words(self) -> str:
        """The rule for people, such as ``2 at once, 100 in 60 s``."""
        parts = []
        if self.concurrency is not None:
            parts.append(f"{self.concurrency:,} at once")
        if self.rate is not None:
            burst = f", {self.burst:,} in a burst" if self.burst > 1 else ""
            parts.append(f"{self.rate:,} in {self.per_seconds:g} s{burst}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """How many jobs may run at once, or start per time, over all workers.

    Jobs with limits of the same name share them. Without a name, the limit belongs to the job that
    it is given to.

    :raises ConfigError: when a value is not valid.
    """

    name: str | None = None
    """The name of the limit; default: the name of the job."""
    concurrency: int | None = dataclasses.field(default=None, kw_only=True)
    """How many jobs may run at once, 1 to 1,000,000; default any number."""
    rate: int | None = dataclasses.field(default=None, kw_only=True)
    """How many jobs may start in any period of ``per``, 1 to 1,000,000; default any number."""
    per: durations.Duration | None = dataclasses.field(default=None, kw_only=True)
    """The period of ``rate``: seconds or a ``timedelta``, at least 0.01 s."""
    burst: int | None = dataclasses.field(default=None, kw_only=True)
    """How many of ``rate`` may start at once after a pause, up to ``rate``. By default, 1: starts
    are evenly spaced."""
    key: str | Callable[..., object] | None = dataclasses.field(default=None, kw_only=True)
    """What the limit counts separately: a format over the parameters of the job, such as
    ``"{account_id}"``, or a function of the parameters; default: it counts all jobs together."""

    def __post_init__(self) -> None:
        try:
            _check(self)
        except ValueError as error:
            named = "" if self.name is None else f" {shown(self.name)}"
            raise ConfigError(f"the limit{named} is not valid: {error}") from None

    @property
    def rule(self) -> Rule:
        """Its numbers."""
        per = None if self.per is None else durations.seconds(self.per, "per")
        return Rule(self.concurrency, self.rate, per, self.burst or 1)

    @property
    def order(self) -> tuple[int, str]:
        """Sort key of the order in which a job takes its limits.

        A job keeps its seat at one limit while it waits for the next. So it first takes those that
        only few other jobs need. Every job takes them in this order, or two jobs
        could wait for each other.
        """
        return _order(self.name or "", self.rule, has_key=self.key is not None)


class LimitUse(NamedTuple):
    """One limit of a job, with the key that the job has there."""

    name: str
    key: str
    """Empty if the limit has no key."""
    rule: Rule

    @property
    def key_id(self) -> int:
        """The id of the limit and the key together."""
        return key_id(self.name, self.key)

    def order_by(self, rule: Rule) -> tuple[int, str]:
        """Sort key as :attr:`Limit.order`, if the limit has this rule."""
        return _order(self.name, rule, has_key=bool(self.key))


def _order(name: str, rule: Rule, *, has_key: bool) -> tuple[int, str]:
    if has_key:
        return (0 if rule.rate is None else 1), name
    return (2 if rule.rate is not None else 3), name


def key_id(name: str, key: str) -> int:
    """The id of a key of a limit: a hash with 63 bits, so that it needs no look-up.

    Two keys with the same hash would share one limit, which is not to be expected before there are
    hundreds of millions of keys.
    """
    return hashed(name, key)


def limit_id(name: str) -> int:
    """The id of a limit: a hash with 63 bits."""
    return hashed(name)


def uses_to_json(uses: Sequence[LimitUse]) -> str:
    """The limits of a job as stored in its row."""
    return json.dumps([[use.name, use.key, use.rule.to_json()] for use in uses])


@functools.lru_cache(maxsize=_CACHED_TEXTS)
def uses_from_json(text: str | None) -> tuple[LimitUse, ...]:
    """The limits of a job from its row; none if the text is not valid."""
    try:
        return tuple(
            LimitUse(str(name), str(key), rule_of(rule))
            for name, key, rule in json.loads(text or "[]")
        )
    except (ValueError, TypeError, RecursionError):
        return ()


def has_rate(text: str | None) -> bool:
    """Whether one of the limits of a job, as stored in its row, is a rate."""
    return text is not None and any(use.rule.rate is not None for use in uses_from_json(text))


def rule_of(values: Mapping[str, Any]) -> Rule:
    """The rule with these values.

    :raises TypeError: when they are not the values of a rule.
    """
    return Rule(**values)


def named(limits: Iterable[Limit], job_name: str) -> list[Limit]:
    """The limits of a job in the order in which it takes them, each with a name.

    Limits without a name get that of the job, the second and later ones with a number.
    """
    found: list[Limit] = []
    unnamed = 0
    for limit in limits:
        if limit.name is None:
            unnamed += 1
            name = job_name if unnamed == 1 else f"{job_name}:{unnamed}"
            limit = dataclasses.replace(limit, name=name)
        found.append(limit)
    return sorted(found, key=lambda each: each.order)


def checked_rule(rule: Rule) -> Rule:
    """The rule, if its numbers are valid.

    :raises ValueError: says which is not.
    """
    _number(rule.concurrency, "concurrency", _MAX_NUMBER)
    _number(rule.rate, "rate", _MAX_NUMBER)
    _number(rule.burst, "burst", rule.rate or 1, most_is="rate")
    if rule.concurrency is None and rule.rate is None:
        raise ValueError("give concurrency, or rate with per")
    if (rule.rate is None) != (rule.per_seconds is None):
        raise ValueError("rate and per need each other, as in rate=100, per=60")
    return rule


def checked_per(value: object) -> float | None:
    """The seconds of a ``per``.

    :raises ValueError: when it is not a duration, or is shorter than 0.01 s.
    """
    return None if value is None else durations.seconds(value, "per", minimum=_MIN_PER_SECONDS)


def _check(limit: Limit) -> None:
    if limit.name is not None and not is_name(limit.name):
        raise ValueError("name must be a str of 1 to 255 printable characters")
    if limit.burst is not None and limit.rate is None:
        raise ValueError("burst needs rate")
    checked_rule(Rule(limit.concurrency, limit.rate, checked_per(limit.per), limit.burst or 1))
    if limit.burst is not None:
        _number(limit.burst, "burst", limit.rate or 1, most_is="rate")
    if limit.key is not None and (
        isinstance(limit.key, type) or not (isinstance(limit.key, str) or callable(limit.key))
    ):
        raise ValueError(
            "key must be a format such as '{account_id}', or a function of the parameters, not "
            f"{shown(limit.key)}"
        )


def is_name(value: object) -> bool:
    """Whether a value can be the name of a limit."""
    return isinstance(value, str) and 0 < len(value) <= MAX_KEY and value.isprintable()


def _number(value: object, name: str, most: int, *, most_is: str | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        limit = f"{most:,}" if most_is is None else f"{most_is} ({most:,})"
        raise ValueError(f"{name} must be a whole number from 1 to {limit}, not {shown(value)}")


def hashed(*texts: str) -> int:
    """A hash of texts with 63 bits, as an id."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _ID_BITS)
