"""Who this process is, so that another one on the same host can tell when it is gone."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

_PROC = Path("/proc")


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, told from every other one."""

    host: str
    pid: int
    process: str | None
    """Boot, pid namespace, pid and start time; ``None`` where the system does not tell them."""


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    pid = os.getpid()
    machine, started = _machine(), _start_time(pid)
    process = f"{machine}/{pid}/{started}" if machine and started else None
    return ProcessIdentity(socket.gethostname()[:255], pid, process)


def is_gone(process: str | None) -> bool:
    """Whether a process is known to have ended; ``False`` for one that is out of sight.

    A host name would not do: containers that share one do not see each other's processes.
    """
    if process is None:
        return False
    machine, pid, started = process.rsplit("/", 2)
    return machine == _machine() and _start_time(int(pid)) != started


def _machine() -> str | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """In clock ticks since boot; ``None`` when there is no such process, or only its shell."""
    try:
        # The command's name stands in parentheses and may itself hold spaces and parentheses.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start_time = fields[0], fields[19]
    return None if state in "ZX" else start_time
