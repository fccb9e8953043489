"""What the row of a job must hold to be run.

An enqueue writes nothing else. But a row can be edited in the database, restored from elsewhere or
written by another program, and one bad row must not stop a worker or the jobs behind it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .records import MAX_ATTEMPT, MAX_INTEGER, UNREADABLE_TIME, JobSpec, Outcome
from .retry import BACKOFFS, MAX_DELAY_SECONDS
from .statuses import OutcomeKind
from .text import storable

_SHOWN_CHARACTERS = 100

_KEPT = object()
"""Stands for the value itself, where it identifies the attempt or harms nobody."""


class _Rule(NamedTuple):
    field: str
    check: Callable[[Any], bool]
    wanted: str
    """What is allowed, in words."""
    instead: Any
    """Replaces a value that is not."""


def checked(spec: JobSpec) -> tuple[JobSpec, str | None]:
    """The job with harmless values in place of bad ones, and a sentence about the first of these.

    The sentence is ``None`` where the row is good, as nearly all are; then the job is ``spec``.
    """
    if _is_good(spec):
        return spec, None
    bad = [rule for rule in _RULES if not _passes(rule.check, getattr(spec, rule.field))]
    name, wanted = bad[0].field, bad[0].wanted
    value = repr(getattr(spec, name))[:_SHOWN_CHARACTERS]
    repaired = spec._replace(**{r.field: r.instead for r in bad if r.instead is not _KEPT})
    return repaired, f"the row's {name} is {value}; it must be {wanted}"


def bad_row(spec: JobSpec, flaw: str) -> Outcome:
    """The outcome of a job whose row cannot be run.

    :param flaw: the sentence of :func:`checked`.
    """
    return Outcome(
        spec.id,
        spec.attempt,
        OutcomeKind.FAILED_FINALLY,
        error_type="InvalidRow",
        error=storable(f"InvalidRow: {flaw}. Correct the row and retry the job, or delete it"),
    )


def _is_good(spec: JobSpec) -> bool:
    return (
        0 < spec.attempt < MAX_ATTEMPT
        and spec.run_at is not UNREADABLE_TIME
        and _are_good_options(
            spec.crash_count,
            spec.retry_count,
            spec.retries,
            spec.retry_delay,
            spec.backoff,
            spec.max_retry_delay,
            spec.jitter,
            spec.timeout,
        )
    )


@functools.lru_cache(maxsize=1024)
def _are_good_options(*values: Any) -> bool:
    """Whether options are good; most jobs of an app have the same ones."""
    rules = zip(_OPTION_RULES, values, strict=True)
    return all(_passes(rule.check, value) for rule, value in rules)


def _passes(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return check(value)
    except (TypeError, ValueError, RecursionError):
        return False


def _is_count(value: Any) -> bool:
    return bool(0 <= value <= MAX_INTEGER)


def _is_duration(value: Any) -> bool:
    return bool(math.isfinite(value) and value >= 0)


def _are_delays(value: Any) -> bool:
    delays = json.loads(value)
    if type(delays) is not list or not delays:
        return False
    return all(type(d) in (int, float) and 0 <= d <= MAX_DELAY_SECONDS for d in delays)


_OPTION_RULES = (
    _Rule("crash_count", _is_count, f"from 0 to {MAX_INTEGER:,}", 0),
    _Rule("retry_count", _is_count, f"from 0 to {MAX_INTEGER:,}", 0),
    _Rule("retries", _is_count, f"from 0 to {MAX_INTEGER:,}", 0),
    _Rule("retry_delay", _are_delays, "a JSON list of seconds", "[5.0]"),
    _Rule("backoff", lambda value: value in BACKOFFS, f"one of {', '.join(BACKOFFS)}", "fixed"),
    _Rule("max_retry_delay", lambda v: v is None or _is_duration(v), "seconds or NULL", None),
    _Rule("jitter", lambda value: 0 <= value <= 1, "a number from 0 to 1", 0.0),
    _Rule("timeout", lambda v: v is None or (_is_duration(v) and v > 0), "seconds or NULL", None),
)
_RULES = (
    # It rises with each claim, so that no outcome of an earlier one counts.
    _Rule("attempt", lambda v: 0 < v < MAX_ATTEMPT, f"between 0 and {MAX_ATTEMPT:,}", _KEPT),
    _Rule("run_at", lambda value: value is not UNREADABLE_TIME, "a time", _KEPT),
    *_OPTION_RULES,
)
