"""The file of a SQLite database, watched for being replaced while connections to it are open.

A connection goes on with the file that it opened, also when its name stands for another one by
now: what it writes would be lost. Old connections are worse than useless: while one is open,
its ``-shm`` file misleads those that open the new database.
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
"""Device, inode, size and time of the last change."""


class User(Protocol):
    """Who has connections to the file."""

    def leave_file(self) -> None:
        """Close the connections, and forget what was known of the database."""


class DatabaseFile:
    """The file that is found under a path, and who has connections to it in this process."""

    def __init__(self, path: str) -> None:
        self.path = path
        """Absolute."""
        self.number = 0
        """Counts the files that were found under the path."""
        self._numbers_of_workers: dict[int, int] = {}
        self._wal_path = f"{path}-wal"
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        self._lock = Lock()
        self._opened: _Identity | None = None
        self._wal: _Identity | None = None
        self._left_wal: _Stamp | None = None

    def add_user(self, user: User) -> None:
        """Tell ``user`` from now on when the file was replaced; it is not kept alive by that."""
        self._users.add(user)

    def add_worker(self, worker_id: int) -> None:
        """Remember that a worker of this process registered in the file that is there now."""
        self._numbers_of_workers[worker_id] = self.number

    def has_worker(self, worker_id: int) -> bool:
        """Whether the file is still the one in which the worker registered."""
        return self._numbers_of_workers.get(worker_id, self.number) == self.number

    def look(self) -> None:
        """Make sure that connections are to the file that is there now. Cheap when they are.

        :raises sqlite3.OperationalError: when no file is there any more, or the new one must not
            be opened yet.
        """
        # Before the database: what is beside the same database afterwards is its own.
        wal = _identity(self._wal_path)
        if self._opened is not None and self._opened == _identity(self.path):
            self._wal = wal or self._wal
            return
        with self._lock:
            self._look_again()

    def _look_again(self) -> None:
        found = _identity(self.path)
        if self._opened is not None and found != self._opened:
            self._leave()
        if found is None:
            if self.number:
                raise sqlite3.OperationalError(f"the database file {self.path} is gone")
            return
        if self._opened is None:
            # Of a link, SQLite keeps its other files beside the target.
            self._wal_path = f"{os.path.realpath(self.path)}-wal"
            self._refuse_left_wal()
            self._opened = found
            self.number += 1
            if self.number > 1:
                _logger.warning("Database file replaced | File: %s | It was opened anew", self.path)

    def _leave(self) -> None:
        """Close all connections, and remember which log they leave behind."""
        # As long as they are open, no other file has this inode.
        is_left = _identity(self._wal_path) == self._wal
        self._left_wal = _stamp(self._wal_path) if is_left else None
        self._opened = self._wal = None
        for user in list(self._users):
            user.leave_file()

    def _refuse_left_wal(self) -> None:
        if self._left_wal is not None and _stamp(self._wal_path) == self._left_wal:
            shm = self._wal_path.removesuffix("wal") + "shm"
            raise sqlite3.OperationalError(
                f"the database file was replaced, but {self._wal_path} of the old one is still "
                "there, and SQLite would write what it holds into the new one: stop whatever else "
                f"uses the database, and delete {self._wal_path} and {shm}"
            )
        self._left_wal = None


_FILES: weakref.WeakKeyDictionary[sa.Engine, DatabaseFile] = weakref.WeakKeyDictionary()


def file_of(engine: sa.Engine) -> DatabaseFile:
    """The file of the database that ``engine`` connects to, one for all that ask."""
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
