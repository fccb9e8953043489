"""What every measurement has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from .contender import Contender
from .stores import Stores

Curve = list[tuple[float, float]]
"""Points."""
Figures = Mapping[str, float | Curve]
"""What one run of a measurement tells of one contender, by name of the figure."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How much is done for a figure."""

    jobs: int | None = None
    """Jobs of a run, where the contender's own number is not wanted."""
    idle_seconds: float | None = None
    """How long an idle worker is looked at, where a minute is not wanted."""
    share: float = 1.0
    """Of all numbers and times; less for a quick look."""

    def jobs_for(self, contender: type[Contender]) -> int:
        """How many jobs a run of this contender takes."""
        return self.jobs or self.number(contender.jobs)

    def number(self, whole: int) -> int:
        """The share of a number of jobs or rows."""
        return max(1, round(whole * self.share))

    def seconds(self, whole: float) -> float:
        """The share of a time."""
        return whole * self.share


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """One measurement."""

    name: str
    """For ``--measure``."""
    run: Callable[[type[Contender], Stores, Scale], Figures]
    """The figures of one run.

    :raises TrialFailed: when the contender did not do what it was given.
    """
    suits: Callable[[type[Contender]], bool] = lambda _: True
    """Whether it is made of this contender."""
    most_runs: int = 100
    """Some take too long to be repeated, and are steady."""
