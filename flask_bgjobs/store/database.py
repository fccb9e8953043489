"""The database at hand: its clock, our own engine, and transactions that are redone."""

from __future__ import annotations

import abc
import contextlib
import datetime as dt
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session

from ..models import Attempt, Job, Worker

T = TypeVar("T")

JOBS = cast(sa.Table, Job.__table__)
WORKERS = cast(sa.Table, Worker.__table__)
ATTEMPTS = cast(sa.Table, Attempt.__table__)

_REDO_SECONDS = 30.0
"""How long a transaction that the database turned away is tried again."""
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.005, 0.5


class Database(abc.ABC):
    """One app's database, as far as the statements need it.

    :param engine: the host's engine for the tables.
    :param session: the host's session, for databases that have only one connection.
    :param schema: the schema of the host's metadata, if it has one.
    :param max_crashes: proved crashes at which a job is failed.
    """

    now: sa.ColumnElement[dt.datetime]
    """The database's clock, read when the statement runs."""

    has_one_writer = False
    """Whether an open transaction that wrote keeps all others from writing."""

    def __init__(
        self,
        engine: sa.Engine,
        session: scoped_session[Any],
        *,
        schema: str | None,
        max_crashes: int,
    ) -> None:
        self.host_engine = engine
        self.host_session = session
        self.execution_options: dict[str, Any] = (
            {} if schema is None else {"schema_translate_map": {None: schema}}
        )
        self._max_crashes = max_crashes
        self._own_engine: sa.Engine | None = None
        self._own_engine_pid = 0
        self._own_engine_lock = threading.Lock()

    @abc.abstractmethod
    def after(self, seconds: sa.ColumnElement[float]) -> sa.ColumnElement[dt.datetime]:
        """The database's clock plus ``seconds``."""

    @abc.abstractmethod
    def make_engine(self) -> sa.Engine:
        """A small engine of our own on the host's database."""

    @abc.abstractmethod
    def is_redoable(self, error: DBAPIError) -> bool:
        """Whether the same transaction may succeed when it is simply done again."""

    @property
    def always_joins(self) -> bool:
        """Whether there is only one connection, so that a commit of ours would be the host's."""
        return False

    def prepare(self, *, wal: bool) -> str | None:
        """Make the database ready for workers; what was changed, for the log.

        :param wal: whether SQLite's write-ahead log may be turned on.
        """
        return None

    @property
    def engine(self) -> sa.Engine:
        """Our own engine, made on first use in each process: a fork must not share connections."""
        with self._own_engine_lock:
            if self._own_engine is None or self._own_engine_pid != os.getpid():
                engine = self.make_engine()
                self._own_engine = engine.execution_options(**self.execution_options)
                self._own_engine_pid = os.getpid()
            return self._own_engine

    def dispose(self) -> None:
        """Close the connections of our own engine; the next use opens new ones."""
        with self._own_engine_lock:
            if self._own_engine is not None:
                self._own_engine.dispose()

    def transaction(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` returns, done in a transaction of our own.

        ``work`` runs again, from its start, when the database turns the transaction away for
        a passing reason, for up to 30 s.
        """

        def attempt() -> T:
            with self.engine.begin() as connection:
                return work(connection)

        return self.redo(attempt)

    def redo(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; called again while the database is busy, for up to 30 s."""
        deadline = time.monotonic() + _REDO_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except DBAPIError as error:
                if not self.is_redoable(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read with: it takes no write lock and commits nothing."""
        with self.engine.connect() as connection:
            yield connection
