"""Which limits a job has, and its keys there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..config import Config
from ..job.limits import MAX_KEY, MAX_LIMITS, Limit, LimitUse, named, uses_to_json
from ..job.redact import Redactor
from ..job.text import shown
from ..options import JobOptions
from ..registry import Target
from .keys import Parameters, check_key_source, key_text, shortened

NO_LIMITS: Mapping[str, Any] = {"limits_json": None, "limit_key_id": None}
"""The values of a job without limits."""


def check_limits(options: JobOptions, target: Target | None = None) -> None:
    """Check the limits among the options of a job.

    :param target: the callable, whose parameters the keys must name; ``None``: not checked.
    :raises ValueError: says what is not valid.
    """
    for limit in _given(options):
        if isinstance(limit, Limit) and limit.key is not None:
            check_key_source("key", limit.key, target)


def limits_of(config: Config, options: JobOptions, target: str, method: str | None) -> list[Limit]:
    """The limits of a job, each with a name, in the order in which it takes them.

    :raises ValueError: when a limit is given by a name that ``BGJOBS_LIMITS`` does not have, when
        two have the same name, or when there are too many.
    """
    job_name = target if method is None else f"{target}.{method}"
    limits = [_found(config, limit) for limit in _given(options)]
    limits += (
        entry.limit
        for entry in config.limits.values()
        if {target, job_name} & set(entry.jobs) and entry.limit not in limits
    )
    found = [_configured(config, limit) for limit in named(limits, job_name)]
    names = [limit.name for limit in found]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two limits of {job_name} have the name {shown(doubled)}")
    if len(found) > MAX_LIMITS:
        raise ValueError(f"{job_name} has {len(found)} limits; at most {MAX_LIMITS} are possible")
    return found


def limit_values(
    limits: Sequence[Limit], target: Target, parameters: Parameters, redactor: Redactor
) -> Mapping[str, Any]:
    """The values of a job for its limits, by attribute name of ``Job``.

    :param limits: from :func:`limits_of`.
    :raises ValueError: when a key cannot be made from the parameters.
    """
    uses = list(_uses(limits, target, parameters, redactor))
    if not uses:
        return NO_LIMITS
    return {"limits_json": uses_to_json(uses), "limit_key_id": uses[0].key_id}


def _uses(
    limits: Sequence[Limit], target: Target, parameters: Parameters, redactor: Redactor
) -> Iterator[LimitUse]:
    for limit in limits:
        key = ""
        if limit.key is not None:
            key = key_text("key", limit.key, target, parameters, redactor)
        assert limit.name is not None
        yield LimitUse(limit.name, shortened(key, MAX_KEY), limit.rule)


def _given(options: JobOptions) -> list[Limit | str]:
    """The limits among the options.

    :raises ValueError: when they are not limits.
    """
    given = options.limits
    if given is None:
        return []
    each: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    for limit in each:
        if not isinstance(limit, Limit | str):
            raise ValueError(
                "limits must be a Limit, the name of one in BGJOBS_LIMITS, or a list of them, not "
                f"{shown(limit)}"
            )
    return each


def _found(config: Config, limit: Limit | str) -> Limit:
    if isinstance(limit, Limit):
        return limit
    if limit not in config.limits:
        raise ValueError(
            f"BGJOBS_LIMITS has no limit {shown(limit)}; it has "
            f"{', '.join(config.limits) or 'none'}"
        )
    return config.limits[limit].limit


def _configured(config: Config, limit: Limit) -> Limit:
    """The limit with the numbers in ``BGJOBS_LIMITS``, if it is there."""
    entry = config.limits.get(limit.name or "")
    if entry is None:
        return limit
    return dataclasses.replace(entry.limit, key=limit.key or entry.limit.key)
