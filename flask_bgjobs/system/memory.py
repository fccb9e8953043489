"""The memory use of this process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def memory_in_use() -> float:
    """Resident memory of this process in MiB; without ``/proc``, its highest value so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGESIZE") / (1024 * 1024)
