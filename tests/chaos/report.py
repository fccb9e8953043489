"""The report: a table of figures, and the history of each job that violates a promise."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .evidence import Evidence
from .figures import Figures
from .verify import PROMISES, Violation

_SHOWN = 20
"""The largest number of jobs whose history is shown."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results of a run."""

    seed: int
    seconds: float
    """How long chaos lasted, without the drain."""
    wall_seconds: float
    database: str
    figures: Figures
    cancels: int
    workers: int
    """Workers started."""
    workers_killed_by_jobs: int
    late_outcomes: int
    """Outcomes that workers could not record, because their lease was lost."""
    faults: Mapping[str, int]
    violations: Sequence[Violation]
    too_few: Sequence[str]
    """The faults that were injected too seldom to prove anything."""
    badly_ended: Sequence[str]
    """Workers that did not exit with code 0 after SIGTERM."""
    evidence: Evidence

    @property
    def is_good(self) -> bool:
        """Whether all promises were kept and there were enough faults."""
        return not (self.violations or self.too_few or self.badly_ended)

    def __str__(self) -> str:
        return "\n".join([*self._problems(), *_aligned(list(self._rows()))])

    def write_evidence(self, path: Path) -> None:
        """Write the history of each job to a file."""
        histories = ("\n".join(self.evidence.describe_job(job_id)) for job_id in self.evidence.jobs)
        path.write_text("\n\n".join(histories))

    def _rows(self) -> Iterator[tuple[str, str]]:
        figures = self.figures
        enqueued = figures.results["enqueued"] + figures.found_in_doubt
        yield "seed", str(self.seed)
        yield "database", self.database
        yield "chaos, total", f"{self.seconds:.0f} s, {self.wall_seconds:.0f} s"
        yield "jobs enqueued", f"{enqueued:,}"
        for status, count in sorted(figures.statuses.items()):
            yield f"  {status}", f"{count:,}"
        yield "enqueues rolled back", f"{figures.results['rolled back']:,}"
        yield "enqueues deduplicated", f"{figures.results['deduplicated']:,}"
        in_doubt = (
            f"{figures.results['in doubt']:,}, of which {figures.found_in_doubt:,} have a row"
        )
        yield "enqueues that raised", in_doubt
        yield "cancels", f"{self.cancels:,}"
        broken = collections.Counter(violation.promise for violation in self.violations)
        for promise in PROMISES:
            yield promise, f"{broken[promise]:,}"
        yield "runs per job", f"{figures.mean_runs:.2f} on average, {figures.most_runs} at most"
        yield "rescued from workers", f"{figures.rescues:,}"
        yield "crashed with children", f"{figures.crashes:,}"
        yield "blamed before they ran", f"{figures.blamed_unseen:,}"
        yield "worst release", f"{figures.worst_release:.2f} s"
        yield "worst recovery", f"{figures.worst_recovery:.2f} s, of job {figures.worst_job}"
        yield "late outcomes refused", f"{self.late_outcomes:,}"
        yield "workers started", f"{self.workers:,}"
        yield "workers killed by jobs", f"{self.workers_killed_by_jobs:,}"
        for fault, count in self.faults.items():
            yield fault, f"{count:,}"

    def _problems(self) -> Iterator[str]:
        by_job: dict[int | None, list[Violation]] = collections.defaultdict(list)
        for violation in self.violations:
            by_job[violation.job_id].append(violation)
        for job_id, violations in list(by_job.items())[:_SHOWN]:
            for violation in violations:
                yield f"{violation.promise.upper()}: job {job_id}: {violation.sentence}"
            yield from self.evidence.describe_job(job_id) if job_id is not None else ()
            yield ""
        if len(by_job) > _SHOWN:
            yield f"… and {len(by_job) - _SHOWN:,} more jobs\n"
        for sentence in self.too_few:
            yield f"TOO LITTLE CHAOS: {sentence}"
        for name in self.badly_ended:
            yield f"BAD EXIT: worker {name} did not exit with code 0 after SIGTERM"


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name:<{width}}  {value}"
