"""The interface of the measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from .contender import Contender
from .stores import Stores

Curve = list[tuple[float, float]]
"""The points of a curve."""
Figures = Mapping[str, float | Curve]
"""The results of one run of a measurement for one contender, by name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """The size of the measurements."""

    jobs: int | None = None
    """Number of jobs in a run, instead of the contender's own number."""
    idle_seconds: float | None = None
    """Seconds to watch an idle worker, instead of a minute."""
    share: float = 1.0
    """Factor for all numbers and times; below 1 for a quick run."""

    def jobs_for(self, contender: type[Contender]) -> int:
        """The number of jobs in a run of this contender."""
        return self.jobs or self.number(contender.jobs)

    def number(self, whole: int) -> int:
        """A number of jobs or rows, scaled by ``share``."""
        return max(1, round(whole * self.share))

    def seconds(self, whole: float) -> float:
        """A time, scaled by ``share``."""
        return whole * self.share


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """One measurement."""

    name: str
    """Its name for ``--measure``."""
    run: Callable[[type[Contender], Stores, Scale], Figures]
    """Performs one run, and returns its figures.

    :raises TrialFailed: when the contender did not complete its jobs.
    """
    suits: Callable[[type[Contender]], bool] = lambda _: True
    """Whether the measurement applies to a contender."""
    most_runs: int = 100
    """Limit of ``--runs`` for measurements that take long and vary little."""
