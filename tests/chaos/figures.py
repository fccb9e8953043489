"""The figures of a run: how often jobs ran, and how soon they were taken up after a kill."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Iterator

from flask_bgjobs.job.statuses import FINAL

from .crew import Death
from .evidence import CRASHED, LOST, Evidence
from .history import Change


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a run tells beside its verdict."""

    results: collections.Counter[str]
    """What the enqueues said."""
    found_in_doubt: int
    """Jobs that are there although their enqueue raised."""
    statuses: collections.Counter[str]
    mean_runs: float
    most_runs: int
    rescues: int
    """Attempts that were taken from a worker which was dead, or taken for dead."""
    crashes: int
    """Attempts that died with the child process which ran them."""
    blamed_unseen: int
    """Attempts whose crash was blamed on a job, and that the journal does not know: it was killed
    between the commit of its start and its first line, or blamed without a reason."""
    worst_release: float
    """Seconds from the kill of a worker until the last of its jobs was free again."""
    worst_recovery: float
    """Seconds until the last of them was started again, or final."""
    worst_job: int
    """Which that was."""


def figures(evidence: Evidence) -> Figures:
    """The figures of the evidence."""
    there = evidence.by_token()
    runs = [len(evidence.starts.get(job_id, ())) for job_id in evidence.jobs] or [0]
    outcomes = [failure for failures in evidence.failures.values() for failure in failures]
    recoveries = list(_recoveries(evidence))
    recovery, job_id = max(((seconds, job) for _, seconds, job in recoveries), default=(0.0, 0))
    return Figures(
        results=collections.Counter(planned.result for planned in evidence.planned.values()),
        found_in_doubt=sum(
            planned.result == "in doubt" and planned.token in there
            for planned in evidence.planned.values()
        ),
        statuses=collections.Counter(job.status for job in evidence.jobs.values()),
        mean_runs=statistics.fmean(runs),
        most_runs=max(runs),
        rescues=sum(
            outcome in LOST or (outcome == CRASHED and "only suspect" in error)
            for _, outcome, error in outcomes
        ),
        crashes=sum(outcome == CRASHED and "alone" not in error for _, outcome, error in outcomes),
        blamed_unseen=sum(
            outcome == CRASHED and (job_id, attempt) not in evidence.runs
            for job_id, failures in evidence.failures.items()
            for attempt, outcome, _ in failures
        ),
        worst_release=max((release for release, _, _ in recoveries), default=0.0),
        worst_recovery=recovery,
        worst_job=job_id,
    )


def _recoveries(evidence: Evidence) -> Iterator[tuple[float, float, int]]:
    """Seconds to release and to recovery, and the job, of each that a killed worker held."""
    claims = collections.defaultdict(list)
    for changes in evidence.history.values():
        for claim, after in itertools.pairwise(changes):
            if claim.status == "running":
                claims[claim.worker_id].append((claim, after))
    for death, worker_ids in evidence.deaths:
        at = death.at + evidence.clock_offset
        for worker_id in worker_ids:
            for claim, after in claims[worker_id]:
                if claim.at <= at < after.at:
                    recovered = _recovered_at(evidence, claim, death)
                    if recovered is not None:
                        yield after.at - at, recovered - at, claim.job_id


def _recovered_at(evidence: Evidence, held: Change, death: Death) -> float | None:
    """When a job ran again, or was final; ``None``: it is not there yet."""
    starts = (
        start.at + evidence.clock_offset
        for start in evidence.starts.get(held.job_id, ())
        if start.at > death.at and start.attempt > held.attempt
    )
    finals = (
        change.at
        for change in evidence.history[held.job_id]
        if change.seq > held.seq and change.status in FINAL
    )
    return min([*starts, *finals], default=None)
