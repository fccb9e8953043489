"""Why a job waits for one of its limits."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from typing import Any

from ...job.limits import Rule
from ...job.statuses import JobStatus
from ...job.text import one_line
from ...models import Job
from ...state import AppState
from ...store import MAX_COUNTED, effective_rule

_SHOWN_HOLDERS = 3


def limit_reasons(state: AppState, job: Job, *, with_totals: bool) -> Iterator[str]:
    """Sentences that say which limit a waiting job waits for, and why it must wait there.

    :param job: a job that waits for a limit.
    :param with_totals: whether they may tell of other jobs.
    """
    found = state.store.seat_of(job.id)
    if found is None:
        yield "It waits for one of its limits. A worker will let it run as soon as they allow it."
        return
    key, ahead = found
    rule = effective_rule(key.definition, key.override)
    limit = _name(key.limit_name, key.name)
    if key.limit_paused_at is not None or key.paused_at is not None:
        what = f"the limit {limit}"
        by = key.paused_by or key.limit_paused_by
        yield f"It waits, because {what} is paused{f' by {by}' if by else ''}. Resume it first."
    else:
        facts = [*(_queue(ahead) if with_totals else ()), *_next_start(key, rule)]
        yield f"It waits for the limit {limit} ({rule.in_words()}){_listed(facts)}."
    if rule.concurrency is not None and with_totals:
        yield from _holders(state, key, rule)


def _name(limit: str, key: str) -> str:
    return one_line(f"{limit}, key {key}" if key else limit)


def _queue(ahead: int) -> Iterator[str]:
    if ahead:
        number = f"more than {MAX_COUNTED:,}" if ahead > MAX_COUNTED else f"{ahead:,}"
        yield f"{number} {'job is' if ahead == 1 else 'jobs are'} ahead of it"


def _next_start(key: Any, rule: Rule) -> Iterator[str]:
    if rule.rate is not None and key.due_at is not None:
        seconds = max(0.0, (key.due_at - key.now).total_seconds())
        yield f"the next start is allowed in {seconds:.1f} s"


def _listed(facts: list[str]) -> str:
    return f": {', '.join(facts)}" if facts else ""


def _holders(state: AppState, key: Any, rule: Rule) -> Iterator[str]:
    """Which jobs hold the seats of a key."""
    held = state.store.holders(key.id, _SHOWN_HOLDERS + 1)
    words = [_holder(row._mapping, key.now) for row in held[:_SHOWN_HOLDERS]]
    if not words:
        return
    if len(held) > _SHOWN_HOLDERS:
        words.append("others")
    yield f"The seats are taken: {', '.join(words)}."


def _holder(row: Mapping[str, Any], now: dt.datetime) -> str:
    if row["status"] == JobStatus.RUNNING.value:
        since = row["started_at"] or row["claimed_at"]
        seconds = max(0, round((now - since).total_seconds())) if since else 0
        return f"job {row['id']} has run for {seconds:,} s"
    if row["status"] == JobStatus.PENDING.value:
        return f"job {row['id']} is pending"
    return f"job {row['id']} waits for another limit"
