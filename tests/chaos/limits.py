"""The limits of some of the jobs, jobs that take turns, and the checks that both were kept."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flask_bgjobs import Job, Limit
from flask_bgjobs.job.limits import LimitUse, uses_from_json
from flask_bgjobs.store.statements.turns import rank_range

from .history import Change
from .journal import Run

_LIMITED_SHARE, _FAIR_SHARE = 0.4, 0.3
_SLOTS = 4
_LATE_NOTE_SECONDS = 0.05
"""How much later than its start a job on a busy machine may write the time into the journal."""


def _slot(token: int, *_others: Any) -> str:
    """The key of a job: one of a few."""
    return str(token % _SLOTS)


_ONE = Limit("one at a time", concurrency=1, key=_slot)
_THREE = Limit("three at once", concurrency=3)
_FAST = Limit("fast rate", rate=6, per=1, burst=6)
_RATE = Limit("even rate", rate=10, per=2)
_EACH_RATE = Limit("rate of each", rate=4, per=2, burst=2, key=_slot)
_CHOICES: tuple[list[Limit], ...] = (
    [_ONE],
    [_THREE],
    [_ONE, _THREE],
    [_FAST],
    [_RATE],
    [_EACH_RATE, _THREE],
)


def draw_limits(chance: random.Random) -> dict[str, Any]:
    """The option ``limits`` of a job, or none."""
    if chance.random() >= _LIMITED_SHARE:
        return {}
    return {"limits": chance.choice(_CHOICES)}


def draw_fairness(chance: random.Random) -> dict[str, Any]:
    """The option ``fair`` of a job, or none."""
    return {"fair": _slot} if chance.random() < _FAIR_SHARE else {}


def without_turn(jobs: Iterable[Job]) -> Iterator[tuple[int, str]]:
    """Find jobs that have run without having got a turn."""
    for job in jobs:
        first, last = rank_range(job.priority)
        if job.fair_key is not None and job.attempt and not first <= job.claim_rank <= last:
            yield job.id, f"it ran, but has no turn: its claim rank is {job.claim_rank}"


def exceeded(
    limits: Mapping[int, str | None],
    runs: Mapping[tuple[int, int], Sequence[Run]],
    history: Mapping[int, Sequence[Change]],
    clock_offset: float,
) -> Iterator[tuple[int, str]]:
    """Find moments at which more jobs ran, and periods in which more jobs started, than a limit
    allows.

    A run ends when its code ends, or when the database has recorded another status: the code of a
    worker that has lost its lease may still run then.

    :param limits: the limits of each job, as in its row.
    """
    intervals: dict[LimitUse, list[tuple[float, float, int]]] = collections.defaultdict(list)
    for (job_id, attempt), each in runs.items():
        settled = next(
            (
                change.at - clock_offset
                for change in history.get(job_id, ())
                if change.old_status == "running" and change.old_attempt == attempt
            ),
            float("inf"),
        )
        for run in each:
            end = settled if run.ended_at is None else min(run.ended_at, settled)
            for use in uses_from_json(limits.get(job_id)):
                intervals[use].append((run.start.at, end, job_id))
    for use, found in intervals.items():
        found.sort()
        yield from _too_many_at_once(use, found)
        yield from _too_many_starts(use, found)


def _too_many_at_once(
    use: LimitUse, found: Sequence[tuple[float, float, int]]
) -> Iterator[tuple[int, str]]:
    for start, _, job_id in found if use.rule.concurrency is not None else ():
        others = [other for begun, end, other in found if begun <= start < end]
        if len(others) > (use.rule.concurrency or 0):
            yield job_id, f"at its start at {start:.3f}, jobs {others} ran at {use.name} {use.key}"


def _too_many_starts(
    use: LimitUse, found: Sequence[tuple[float, float, int]]
) -> Iterator[tuple[int, str]]:
    rate, per = use.rule.rate, use.rule.per_seconds
    if rate is None or per is None:
        return
    for first, later in zip(found, found[rate:], strict=False):
        if later[0] - first[0] < per - _LATE_NOTE_SECONDS:
            yield (
                later[2],
                f"it started {later[0] - first[0]:.4f} s after the {rate} before it at {use.name} "
                f"{use.key}, which allows that after {per:g} s",
            )
