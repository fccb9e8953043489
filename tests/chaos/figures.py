"""The figures of a run: how often jobs ran, and how soon they recovered after a kill."""

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
    """Statistics of a run, in addition to its verdict."""

    results: collections.Counter[str]
    """The number of enqueues by result."""
    found_in_doubt: int
    """Jobs that have a row although their enqueue raised."""
    statuses: collections.Counter[str]
    mean_runs: float
    most_runs: int
    rescues: int
    """Attempts that were rescued from a worker that was dead or seemed dead."""
    crashes: int
    """Attempts that ended with their child process."""
    blamed_unseen: int
    """Attempts whose crash was blamed on a job, but that are not in the journal: the process was
    killed between the commit of the start and the first line, or the blame has no reason."""
    worst_release: float
    """The longest time from the kill of a worker to the release of one of its jobs, in seconds."""
    worst_recovery: float
    """The longest time until such a job was started again or was final, in seconds."""
    worst_job: int
    """The id of the job with the worst recovery."""


def figures(evidence: Evidence) -> Figures:
    """Compute the figures from the evidence."""
    rows = evidence.by_token()
    runs = [len(evidence.starts.get(job_id, ())) for job_id in evidence.jobs] or [0]
    outcomes = [failure for failures in evidence.failures.values() for failure in failures]
    recoveries = list(_recoveries(evidence))
    recovery, job_id = max(((seconds, job) for _, seconds, job in recoveries), default=(0.0, 0))
    return Figures(
        results=collections.Counter(planned.result for planned in evidence.planned.values()),
        found_in_doubt=sum(
            planned.result == "in doubt" and planned.token in rows
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
    """For each job of a killed worker: seconds to its release, seconds to its recovery, its id."""
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
    """The time at which a job ran again or was final; ``None`` if neither has happened."""
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
