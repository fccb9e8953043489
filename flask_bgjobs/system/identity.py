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
    machine, stat = _machine(), _stat(pid)
    process = f"{machine}/{pid}/{stat[1]}" if machine and stat else None
    return ProcessIdentity(socket.gethostname()[:255], pid, process)


def is_gone(process: str | None) -> bool:
    """Whether a process is known to have ended; ``False`` where that cannot be found out.

    A host name would not do: containers that share one do not see each other's processes. Nor does
    a missing file in ``/proc``: it may hide the processes of other users, and a process that has
    used up its descriptors cannot read it.
    """
    if process is None:
        return False
    try:
        machine, pid_text, started = process.rsplit("/", 2)
        pid = int(pid_text)
    except ValueError:
        # The column was edited by hand.
        return False
    if pid <= 0 or machine != _machine():
        return False
    if not _exists(pid):
        return True
    stat = _stat(pid)
    return stat is not None and (stat[0] in "ZX" or stat[1] != started)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # It belongs to another user.
        return True
    return True


def _machine() -> str | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return None


def _stat(pid: int) -> tuple[str, str] | None:
    """State, and start time in clock ticks since boot; ``None`` when they cannot be read."""
    try:
        # The command's name stands in parentheses and may itself hold spaces and parentheses.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None
