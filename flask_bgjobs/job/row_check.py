"""Validation of the rows of claimed jobs.

An enqueue writes only valid rows. But a row can be edited in the database, restored from elsewhere
or written by another program, and one invalid row must not stop a worker or block other jobs.
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

_NOT_REPLACED = object()
"""Marks values that are not replaced, because they identify the attempt or do no harm."""


class _Rule(NamedTuple):
    field: str
    check: Callable[[Any], bool]
    allowed: str
    """The allowed values, in words."""
    replacement: Any
    """Replacement for an invalid value, or ``_NOT_REPLACED``."""


def checked(spec: JobSpec) -> tuple[JobSpec, str | None]:
    """Validate a job, and replace its invalid values by harmless ones.

    :returns: the job and a sentence about its first invalid value. For a valid row, as nearly all
        are, ``spec`` itself and ``None``.
    """
    if _is_valid(spec):
        return spec, None
    invalid = [rule for rule in _RULES if not _passes(rule.check, getattr(spec, rule.field))]
    name, allowed = invalid[0].field, invalid[0].allowed
    value = repr(getattr(spec, name))[:_SHOWN_CHARACTERS]
    repaired = spec._replace(
        **{r.field: r.replacement for r in invalid if r.replacement is not _NOT_REPLACED}
    )
    return repaired, f"the row's {name} is {value}; it must be {allowed}"


def bad_row(spec: JobSpec, flaw: str) -> Outcome:
    """The outcome of a job with an invalid row.

    :param flaw: the sentence of :func:`checked`.
    """
    return Outcome(
        spec.id,
        spec.attempt,
        OutcomeKind.FAILED_FINALLY,
        error_type="InvalidRow",
        error=storable(f"InvalidRow: {flaw}. Correct the row and retry the job, or delete it"),
    )


def _is_valid(spec: JobSpec) -> bool:
    return (
        0 < spec.attempt < MAX_ATTEMPT
        and spec.run_at is not UNREADABLE_TIME
        and _are_valid_options(
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
def _are_valid_options(*values: Any) -> bool:
    """Whether options are valid. Cached, because most jobs of an app have the same options."""
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
    # Not replaced: with each claim it rises, so that no outcome of an earlier claim is recorded.
    _Rule(
        "attempt", lambda v: 0 < v < MAX_ATTEMPT, f"between 0 and {MAX_ATTEMPT:,}", _NOT_REPLACED
    ),
    _Rule("run_at", lambda value: value is not UNREADABLE_TIME, "a time", _NOT_REPLACED),
    *_OPTION_RULES,
)
