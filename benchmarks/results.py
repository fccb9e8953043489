"""The results of a benchmark, which can be saved as JSON and loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import Self

from .figures import medians
from .measure import Figures


@dataclasses.dataclass(slots=True)
class Entry:
    """The results of one measurement for one contender."""

    runs: list[Figures] = dataclasses.field(default_factory=list)
    failure: str | None = None
    """The error of a run that failed; the other runs then do not count."""

    def medians(self) -> dict[str, float]:
        """The median of each figure."""
        return medians(self.runs)


@dataclasses.dataclass(slots=True)
class Results:
    """All results of a benchmark."""

    machine: dict[str, str]
    versions: dict[str, str]
    entries: dict[str, dict[str, Entry]] = dataclasses.field(default_factory=dict)
    """The results by measurement and contender."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Contenders that could not be measured, with the reason."""

    def entry(self, measure: str, contender: str) -> Entry:
        """The entry for a measurement and a contender, created if missing."""
        return self.entries.setdefault(measure, {}).setdefault(contender, Entry())

    def as_json(self) -> str:
        """The results as JSON, for :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Load results saved with :meth:`as_json`."""
        values = json.loads(text)
        values["entries"] = {
            measure: {contender: Entry(**entry) for contender, entry in entries.items()}
            for measure, entries in values["entries"].items()
        }
        return cls(**values)
