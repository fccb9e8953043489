"""The file of a SQLite database: detects that it was replaced, and closes the old connections.

A connection keeps using the file that it opened, even if its path belongs to another file by now.
What it writes is then lost. Open connections to the old file also do harm: as long as one is open,
its ``-shm`` file misleads connections to the new database.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import weakref
from typing import Protocol
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from ...system.safe_logging import logger as _logger
from ...system.threading_patches import Lock

_Identity = tuple[int, int]
"""Device and inode."""
_Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of the last change, in nanoseconds."""


class ConnectionOwner(Protocol):
    """An object with connections to the file."""

    def close_file_connections(self) -> None:
        """Close the connections, and clear what is cached about the database."""


class DatabaseFile:
    """The file at a path, and the owners of the connections to it in this process.

    :param path: absolute path.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        """The absolute path."""
        self.generation = 0
        """Number of different files that have been opened at the path."""
        self._worker_generations: dict[int, int] = {}
        self._wal_path = f"{path}-wal"
        self._owners: weakref.WeakSet[ConnectionOwner] = weakref.WeakSet()
        self._lock = Lock()
        self._opened: _Identity | None = None
        """The file to which the connections are; ``None``: none is open."""
        self._wal: _Identity | None = None
        """The ``-wal`` of that file, once it has been seen."""
        self._stale_wal: _Stamp | None = None
        """The ``-wal`` that the replaced file left behind."""

    def add_owner(self, owner: ConnectionOwner) -> None:
        """Close the connections of ``owner`` when the file is replaced. The reference is weak."""
        self._owners.add(owner)

    def add_worker(self, worker_id: int) -> None:
        """Note that a worker of this process has registered in the current file."""
        self._worker_generations[worker_id] = self.generation

    def has_worker(self, worker_id: int) -> bool:
        """Whether the current file is the one in which the worker has registered."""
        return self._worker_generations.get(worker_id, self.generation) == self.generation

    def check(self) -> None:
        """If the file was replaced, close the connections to the old file. Otherwise this is cheap.

        :raises sqlite3.OperationalError: when the file was deleted, or the new file must not be
            opened yet, because the ``-wal`` of the old file is still there.
        """
        # Read this before the identity of the database file: if the file is then still the same,
        # this ``-wal`` belongs to it.
        wal = _identity(self._wal_path)
        if self._opened is not None and self._opened == _identity(self.path):
            self._wal = wal or self._wal
            return
        with self._lock:
            self._check_locked()

    def _check_locked(self) -> None:
        found = _identity(self.path)
        if self._opened is not None and found != self._opened:
            self._close_connections()
        if found is None:
            if self.generation:
                raise sqlite3.OperationalError(f"the database file {self.path} is gone")
            return
        if self._opened is None:
            # If the path is a symbolic link, SQLite puts its other files next to the target.
            self._wal_path = f"{os.path.realpath(self.path)}-wal"
            self._refuse_stale_wal()
            self._opened = found
            self.generation += 1
            if self.generation > 1:
                _logger.warning(
                    "Database file replaced | File: %s | Opening the new file", self.path
                )

    def _close_connections(self) -> None:
        """Close all connections, and note the ``-wal`` that the old file leaves behind."""
        # Compare before closing: while connections are open, no other file can get this inode.
        is_stale = _identity(self._wal_path) == self._wal
        self._stale_wal = _stamp(self._wal_path) if is_stale else None
        self._opened = self._wal = None
        for owner in list(self._owners):
            owner.close_file_connections()

    def _refuse_stale_wal(self) -> None:
        if self._stale_wal is not None and _stamp(self._wal_path) == self._stale_wal:
            shm = self._wal_path.removesuffix("wal") + "shm"
            raise sqlite3.OperationalError(
                f"the database file was replaced, but {self._wal_path} of the old one still "
                "exists, and SQLite would write its contents into the new file: stop all other "
                f"programs that use the database, and delete {self._wal_path} and {shm}"
            )
        self._stale_wal = None


_FILES: weakref.WeakKeyDictionary[sa.Engine, DatabaseFile] = weakref.WeakKeyDictionary()


def file_of(engine: sa.Engine) -> DatabaseFile:
    """The database file of an engine. All callers with the same engine get the same object."""
    database = engine.url.database or ""
    if database.startswith("file:"):
        database = unquote(urlsplit(database).path)
    return _FILES.setdefault(engine, DatabaseFile(os.path.abspath(database)))


def _identity(path: str) -> _Identity | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


def _stamp(path: str) -> _Stamp | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None
