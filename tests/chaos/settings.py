"""What all processes of one run must agree on."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Self

_VARIABLE = "BGJOBS_CHAOS_APP"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Where the database and the files of a run are."""

    url: str
    folder: str
    """For the journal and the workers' logs."""
    schema: str | None = None

    @property
    def journal(self) -> Path:
        """The file in which running jobs note what they do."""
        return Path(self.folder) / "journal"

    def environment(self) -> dict[str, str]:
        """What a worker needs to find these settings."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        """The settings that the harness gave to this process."""
        return cls(**json.loads(os.environ[_VARIABLE]))
