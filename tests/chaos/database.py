"""The databases that chaos runs on: each creates itself, injects its faults and drops itself."""

from __future__ import annotations

import abc
import contextlib
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)

from tests.servers import MariaServer, PostgresServer, Server

S = TypeVar("S", bound=Server)

_SHORTEST_LOCK_SECONDS, _LONGEST_LOCK_SECONDS = 1.0, 5.0
_LOCK_WAIT_SECONDS = 300.0
"""A worker that is stalled while it holds the lock makes this process wait as well."""
_LONGEST_OUTAGE_SECONDS = 3.0
_HOLD_LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=float(sys.argv[3]), isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""


class CannotRun(Exception):
    """Chaos cannot run on the given database; the message says why in one sentence."""


class Database(abc.ABC):
    """A database for one run, initially empty."""

    url: str
    schema: str | None = None

    @property
    @abc.abstractmethod
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        """The faults of this database by name; each function returns when its fault is over."""

    @abc.abstractmethod
    def close(self) -> None:
        """Delete everything that was created, even if the database is broken at this moment."""


class Sqlite(Database):
    """A file. Its fault is another process that holds the write lock."""

    def __init__(self, file: Path) -> None:
        if file.exists():
            raise CannotRun(f"the file {file} exists; name a file that chaos can create and delete")
        if not file.parent.is_dir():
            raise CannotRun(f"there is no directory {file.parent}")
        self._file = file
        self.url = f"sqlite:///{file}"

    @property
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        return {"write lock held": self._hold_lock}

    def close(self) -> None:
        for end in ("", "-wal", "-shm"):
            Path(f"{self._file}{end}").unlink(missing_ok=True)

    def _hold_lock(self, rng: random.Random) -> None:
        seconds = rng.uniform(_SHORTEST_LOCK_SECONDS, _LONGEST_LOCK_SECONDS)
        arguments = [str(self._file), str(seconds), str(_LOCK_WAIT_SECONDS)]
        subprocess.run([sys.executable, "-c", _HOLD_LOCK, *arguments], check=True)


class TemporarySqlite(Sqlite):
    """A SQLite file in a temporary folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bgjobs-chaos-")
        super().__init__(Path(self._folder.name) / "chaos.db")

    def close(self) -> None:
        self._folder.cleanup()


class Postgres(Database):
    """A new schema in the user's database. Its fault is that connections end.

    Only the connections of this run end; the server keeps running.
    """

    def __init__(self, url: sa.URL) -> None:
        self._name = f"bgjobs_chaos_{uuid.uuid4().hex[:12]}"
        self.schema = self._name
        own_url = url.update_query_dict({"application_name": self._name})
        self.url = own_url.render_as_string(hide_password=False)
        self._engine = sa.create_engine(
            url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True
        )
        self._run(f"CREATE SCHEMA {self._name}")

    @property
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        return {"connections cut": self._cut}

    def close(self) -> None:
        self._run(f"DROP SCHEMA {self._name} CASCADE")

    def _cut(self, _rng: random.Random) -> None:
        self._run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE application_name = '{self._name}'"
        )

    def _run(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


class Mysql(Database):
    """A new database on the user's server. Its fault is that connections end.

    Only the connections of this run end; the server keeps running.
    """

    def __init__(self, url: sa.URL) -> None:
        self._name = f"bgjobs_chaos_{uuid.uuid4().hex[:12]}"
        self.url = url.set(database=self._name).render_as_string(hide_password=False)
        self._engine = sa.create_engine(
            url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True
        )
        self._run(f"CREATE DATABASE {self._name}")

    @property
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        return {"connections cut": self._cut}

    def close(self) -> None:
        self._cut()
        self._run(f"DROP DATABASE {self._name}")

    def _cut(self, _rng: random.Random | None = None) -> None:
        found = f"SELECT id FROM information_schema.processlist WHERE db = '{self._name}'"
        with self._engine.connect() as connection:
            for number in connection.exec_driver_sql(found).scalars().all():
                # KILL fails for a connection that has already ended.
                with contextlib.suppress(OperationalError):
                    connection.exec_driver_sql(f"KILL {number}")

    def _run(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


def _restarts(server: Server) -> Mapping[str, Callable[[random.Random], None]]:
    """The faults of a server that belongs to the run."""

    def restart(mode: Literal["fast", "immediate"], rng: random.Random) -> None:
        server.stop(mode)
        time.sleep(rng.uniform(0, _LONGEST_OUTAGE_SECONDS))
        server.start()

    return {
        "fast restart": lambda rng: restart("fast", rng),
        "immediate restart": lambda rng: restart("immediate", rng),
    }


class OwnPostgres(Postgres):
    """A new PostgreSQL server, which is also stopped and started."""

    def __init__(self) -> None:
        with _close_on_error(PostgresServer()) as self._server:
            super().__init__(sa.make_url(self._server.url(self._server.create_database())))

    @property
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        return {**super().faults, **_restarts(self._server)}

    def close(self) -> None:
        self._server.close()


class OwnMysql(Mysql):
    """A new MariaDB server, which is also stopped and started."""

    def __init__(self) -> None:
        with _close_on_error(MariaServer()) as self._server:
            super().__init__(sa.make_url(self._server.url()))

    @property
    def faults(self) -> Mapping[str, Callable[[random.Random], None]]:
        return {**super().faults, **_restarts(self._server)}

    def close(self) -> None:
        self._server.close()


@contextlib.contextmanager
def _close_on_error(server: S) -> Iterator[S]:
    """Start the server, and close it only if the block fails."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(server)
        stack.pop_all()


_OWN: dict[str, Callable[[], Database]] = {
    "sqlite": TemporarySqlite,
    "postgresql": OwnPostgres,
    "mysql": OwnMysql,
}
_ON_A_USERS_SERVER: dict[str, Callable[[sa.URL], Database]] = {
    "postgresql": Postgres,
    "mysql": Mysql,
    "mariadb": Mysql,
}


def open_database(name: str) -> Database:
    """Open the database that the user named.

    :param name: ``sqlite``, ``postgresql``, ``mysql`` or a URL.
    :raises CannotRun: if there is no such database, or it cannot be used.
    """
    if name in _OWN:
        return _OWN[name]()
    try:
        url = sa.make_url(name)
        dialect = url.get_dialect().name
    except (ArgumentError, NoSuchModuleError) as error:
        raise CannotRun(
            f"{name!r} is neither {', '.join(_OWN)} nor the URL of a database: {error}"
        ) from None
    if dialect == "sqlite":
        if not url.database or url.database == ":memory:":
            raise CannotRun("workers cannot share an in-memory database; name a file")
        return Sqlite(Path(url.database).absolute())
    if dialect not in _ON_A_USERS_SERVER:
        raise CannotRun(f"chaos does not run on {dialect}; it runs on {', '.join(_OWN)}")
    try:
        return _ON_A_USERS_SERVER[dialect](url)
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        where = url.render_as_string(hide_password=True)
        raise CannotRun(f"cannot create a schema or a database in {where}: {reason}") from None
