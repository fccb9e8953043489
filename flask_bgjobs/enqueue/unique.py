"""The keys of unique jobs, and the options that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..job import durations
from ..job.redact import Redactor
from ..job.text import shown
from ..options import MAX_KEY, JobOptions
from ..registry import Target
from ..store import Unique
from .keys import (
    Parameters,
    bound_parameters,
    canonical,
    check_key_source,
    digest,
    key_text,
    shortened,
)

_UNTIL = ("finished", "started")
_ON_DUPLICATE = ("keep", "replace", "raise")
_NEED_KEY = ("unique_until", "unique_for", "on_duplicate")
_EXCLUDED = {
    "debounce": ("throttle", "delay", "run_at", *_NEED_KEY),
    "throttle": ("debounce_max", "delay", "run_at", *_NEED_KEY),
}
"""Options that cannot be combined with these."""


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
        check_key_source("unique", options.unique, target, or_else="True, ")


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
        keys = [shortened(name, MAX_KEY) for _ in parameter_sets]
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


def _key(
    source: bool | str | Callable[..., str],
    name: str,
    target: Target,
    parameters: Parameters,
    redactor: Redactor,
) -> str:
    if isinstance(source, bool):
        # Not readable, because it may be long, and some of the values may be secrets.
        text = digest(canonical(bound_parameters(target.signature, parameters)))
    else:
        text = key_text("unique", source, target, parameters, redactor)
    return shortened(f"{name}:{text}", MAX_KEY)
