"""The stores of the contenders: SQLite files, and servers that are started for the run.

Each server has the settings of a new installation, except that Redis does not write to the disk.
Each contender gets a new, empty database for each run.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest
import sqlalchemy as sa

from tests.servers import PostgresServer, ServerUser, free_port

from . import tracing
from .contender import StoreKind
from .processes import Background, cpu_seconds, interrupts_postponed

_START_SECONDS = 60.0
_numbers = itertools.count(1)
_LOGGED_STATEMENT = re.compile(r"LOG:  (?:statement|execute [^:]+): ")


class Unavailable(Exception):
    """A store cannot be started here. The message gives the reason in one sentence."""


class Store(abc.ABC):
    """A context manager for a store of jobs, which is removed at the end."""

    title: ClassVar[str]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def version(self) -> str:
        """Name and version, for the report."""

    @abc.abstractmethod
    def new_database(self) -> str:
        """Create an empty database.

        :returns: its URL.
        """

    @abc.abstractmethod
    def drop(self, url: str) -> None:
        """Remove a database, even if there are connections to it."""

    def cpu_seconds(self) -> float:
        """CPU time that the server has used so far; 0 if there is no server."""
        return 0.0

    @abc.abstractmethod
    def counting(self, trace: Path) -> AbstractContextManager[Callable[[], int]]:
        """Count statements during a ``with`` block.

        :param trace: the file in which a worker on SQLite counts its statements.
        :returns: a context manager; its value is a function that returns the number so far.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Stop the server and delete its data."""


class Sqlite(Store):
    """SQLite files in a temporary folder."""

    title = "SQLite"

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bgjobs-benchmark-"))

    def version(self) -> str:
        return f"SQLite {sqlite3.sqlite_version}"

    def new_database(self) -> str:
        return f"sqlite:///{self._folder / f'{next(_numbers)}.db'}"

    def drop(self, url: str) -> None:
        for end in ("", "-wal", "-shm"):
            Path(f"{sa.make_url(url).database}{end}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def counting(self, trace: Path) -> Iterator[Callable[[], int]]:
        yield lambda: tracing.count(trace)

    def close(self) -> None:
        shutil.rmtree(self._folder)


class Postgres(Store):
    """A PostgreSQL server with the settings of ``initdb``: each commit is flushed to the disk."""

    title = "PostgreSQL"

    def __init__(self) -> None:
        try:
            self._server = PostgresServer(
                fsync="on",
                max_connections="100",
                shared_buffers="128MB",
                autovacuum="on",
                checkpoint_timeout="5min",
            )
        except (pytest.skip.Exception, pytest.fail.Exception) as missing:
            raise Unavailable(str(missing)) from None
        self._server.__enter__()

    def version(self) -> str:
        return f"PostgreSQL {self._server.execute('SHOW server_version')[0][0].split()[0]}"

    def new_database(self) -> str:
        name = self._server.create_database()
        return f"postgresql+psycopg://{self._server.user}@127.0.0.1:{self._server.port}/{name}"

    def drop(self, url: str) -> None:
        self._server.execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._server.pid)

    @contextlib.contextmanager
    def counting(self, trace: Path) -> Iterator[Callable[[], int]]:
        self._log_statements("all")
        try:
            yield lambda: len(_LOGGED_STATEMENT.findall(self._server.log()))
        finally:
            self._log_statements("none")

    def close(self) -> None:
        self._server.close()

    def _log_statements(self, which: str) -> None:
        self._server.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
        self._server.execute("SELECT pg_reload_conf()")


class _Program(Store):
    """A server program with its own data folder."""

    def __init__(self) -> None:
        self._user = ServerUser.choose()
        self._folder = self._user.make_folder()
        self.port = free_port()
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        try:
            self._server = self._stack.enter_context(self._start())
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _start(self) -> Background: ...

    @abc.abstractmethod
    def _ping(self) -> None:
        """Check that the server responds; raises an exception if it does not."""

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._server.pid)

    def close(self) -> None:
        self._stack.close()

    def _serve(self, command: Sequence[str]) -> Background:
        program, *options = command
        log = self._folder / "log"
        return Background(
            [_program(program), *options], {}, log, folder=self._folder, user=self._user.name
        )

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._ping()
            except Exception as error:
                if self._server.has_ended or time.monotonic() > deadline:
                    raise Unavailable(f"{self.title}: {self._server.last_output()}") from error
            time.sleep(0.05)


class Mariadb(_Program):
    """A MariaDB server with the settings of ``mariadb-install-db``."""

    title = "MariaDB"

    def version(self) -> str:
        return f"MariaDB {self._run('SELECT version()').split('-')[0]}"

    def new_database(self) -> str:
        name = f"benchmark_{next(_numbers)}"
        self._run(f"CREATE DATABASE {name}")
        return self._url(name)

    def drop(self, url: str) -> None:
        self._run(f"DROP DATABASE {sa.make_url(url).database}")

    @contextlib.contextmanager
    def counting(self, trace: Path) -> Iterator[Callable[[], int]]:
        engine = sa.create_engine(self._url("mysql"), isolation_level="AUTOCOMMIT")
        question = "SHOW GLOBAL STATUS LIKE 'Questions'"
        with engine.connect() as connection:
            calls = itertools.count(1)
            # The query itself is counted too.
            yield lambda: int(connection.exec_driver_sql(question).one()[1]) - next(calls)
        engine.dispose()

    def _start(self) -> Background:
        data = f"--datadir={self._folder / 'data'}"
        make = ["mariadb-install-db", "--no-defaults", data, "--skip-test-db"]
        make += ["--auth-root-authentication-method=normal"]
        if self._user.popen([_program(make[0]), *make[1:]], self._folder).wait(_START_SECONDS):
            raise Unavailable(f"MariaDB: {(self._folder / 'log').read_text()}")
        serve = ["mariadbd", "--no-defaults", data, f"--socket={self._folder / 'socket'}"]
        return self._serve([*serve, "--bind-address=127.0.0.1", f"--port={self.port}"])

    def _ping(self) -> None:
        self._run("SELECT 1")

    def _run(self, statement: str) -> str:
        engine = sa.create_engine(self._url("mysql"), poolclass=sa.NullPool)
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return str(result.scalar()) if result.returns_rows else ""

    def _url(self, database: str) -> str:
        return f"mariadb+pymysql://root@127.0.0.1:{self.port}/{database}?charset=utf8mb4"


class Redis(_Program):
    """A Redis server without persistence, so its enqueues are not durable."""

    title = "Redis"

    def version(self) -> str:
        return f"Redis {self._client.info('server')['redis_version']}, nothing on the disk"

    def new_database(self) -> str:
        self._client.flushall()
        return f"redis://127.0.0.1:{self.port}/0"

    def drop(self, url: str) -> None:
        self._client.flushall()

    @contextlib.contextmanager
    def counting(self, trace: Path) -> Iterator[Callable[[], int]]:
        calls = itertools.count(1)
        # The question counts as well.
        yield lambda: self._client.info("stats")["total_commands_processed"] - next(calls)

    def _start(self) -> Background:
        serve = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port)]
        return self._serve([*serve, "--save", "", "--appendonly", "no"])

    def _ping(self) -> None:
        self._client.ping()

    @functools.cached_property
    def _client(self) -> Any:
        import redis

        return redis.Redis(port=self.port)


def _program(name: str) -> str:
    # Debian installs servers in folders that are not in every user's PATH.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed")
    return found


_STORES: dict[StoreKind, type[Store]] = {
    "sqlite": Sqlite,
    "postgresql": Postgres,
    "mariadb": Mariadb,
    "redis": Redis,
}


def title_of(kind: StoreKind) -> str:
    """The name of a store in the tables."""
    return _STORES[kind].title


class Stores:
    """A context manager for the stores. Each is started on first use, and removed at the end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._started: dict[StoreKind, Store] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stack.close()

    def get(self, kind: StoreKind) -> Store:
        """The store of a kind, started if necessary.

        :raises Unavailable: when it cannot be started here.
        """
        if kind not in self._started:
            with interrupts_postponed():
                self._started[kind] = self._stack.enter_context(_STORES[kind]())
        return self._started[kind]
