"""The results of a run, which can be written and read again."""

from __future__ import annotations

import dataclasses
import json
from typing import Self

from .figures import medians
from .measure import Figures


@dataclasses.dataclass(slots=True)
class Entry:
    """What was measured of one contender by one measurement."""

    runs: list[Figures] = dataclasses.field(default_factory=list)
    failure: str | None = None
    """What it did not do; then its runs do not count."""

    def medians(self) -> dict[str, float]:
        """The median of each figure."""
        return medians(self.runs)


@dataclasses.dataclass(slots=True)
class Results:
    """All of a run."""

    machine: dict[str, str]
    versions: dict[str, str]
    entries: dict[str, dict[str, Entry]] = dataclasses.field(default_factory=dict)
    """By measurement and contender."""
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Contenders that could not be measured, and why."""

    def entry(self, measure: str, contender: str) -> Entry:
        """The entry, new if need be."""
        return self.entries.setdefault(measure, {}).setdefault(contender, Entry())

    def as_json(self) -> str:
        """All of them, for :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`as_json` gave."""
        values = json.loads(text)
        values["entries"] = {
            measure: {contender: Entry(**entry) for contender, entry in entries.items()}
            for measure, entries in values["entries"].items()
        }
        return cls(**values)
