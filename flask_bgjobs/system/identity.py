"""The identity of a process, by which other processes on its host can tell that it has ended."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

_PROC = Path("/proc")


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Identifies one process, also after its pid is used again."""

    host: str
    pid: int
    process: str | None
    """Boot id, pid namespace, pid and start time; ``None`` if the system does not show them."""


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    pid = os.getpid()
    machine, stat = _machine(), _stat(pid)
    process = f"{machine}/{pid}/{stat[1]}" if machine and stat else None
    return ProcessIdentity(socket.gethostname()[:255], pid, process)


def is_gone(process: str | None) -> bool:
    """Whether a process is known to have ended; ``False`` if this cannot be determined.

    The host name is not enough: containers with the same host name do not see each other's
    processes. Nor is a missing file in ``/proc``: the processes of other users may be hidden there,
    and a process without free file descriptors cannot read it.

    :param process: from :attr:`ProcessIdentity.process`.
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
        # The process belongs to another user.
        return True
    return True


def _machine() -> str | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return None


def _stat(pid: int) -> tuple[str, str] | None:
    """State and start time (clock ticks since boot) of a process; ``None`` if not readable."""
    try:
        # The command name is in parentheses, and may itself contain spaces and parentheses.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None
