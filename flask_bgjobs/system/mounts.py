"""The type of the file system that holds a file, on systems with ``/proc/mounts``."""

from __future__ import annotations

import os
from pathlib import Path

_MOUNTS = Path("/proc/mounts")
_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "glusterfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
        "virtiofs",
        "fuse.cephfs",
        "fuse.davfs2",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
    }
)


def network_file_system(path: str, mounts: Path | None = None) -> str | None:
    """The type of the network file system that holds ``path``, such as ``nfs4``.

    :param mounts: the table of mounts; default: ``/proc/mounts``.
    :returns: ``None`` for a local file system, and if there is no such table.
    """
    try:
        table = (mounts or _MOUNTS).read_text(errors="surrogateescape")
    except OSError:
        return None
    kind = _file_system(os.path.realpath(path), table)
    return kind if kind in _NETWORK else None


def _file_system(path: str, table: str) -> str | None:
    """The type of the innermost mount that contains ``path``; of equal ones, the last applies."""
    nearest, found = "", None
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        folder = _unescaped(fields[1])
        is_above = path == folder or path.startswith(folder.rstrip("/") + "/")
        if is_above and len(folder) >= len(nearest):
            nearest, found = folder, fields[2]
    return found


def _unescaped(folder: str) -> str:
    """The name of a folder; the table has octal escapes for white space and backslashes."""
    for character in " \t\n\\":
        folder = folder.replace(f"\\{ord(character):03o}", character)
    return folder
