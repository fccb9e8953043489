"""The settings that all processes of a run share."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Self

_VARIABLE = "BGJOBS_CHAOS_APP"


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The database and the folder of a run."""

    url: str
    folder: str
    """For the journal and the workers' logs."""
    schema: str | None = None

    @property
    def journal(self) -> Path:
        """The file in which jobs record their start and end."""
        return Path(self.folder) / "journal"

    def environment(self) -> dict[str, str]:
        """The environment variable that gives a worker these settings."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        """The settings in this process's environment."""
        return cls(**json.loads(os.environ[_VARIABLE]))
