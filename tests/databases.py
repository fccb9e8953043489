"""The databases that the tests run on; each test uses its own database."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

VARIABLES = {"postgresql": "BGJOBS_TEST_POSTGRES_URL", "mysql": "BGJOBS_TEST_MYSQL_URL"}
"""The environment variables that select another server."""
URLS = {
    kind: sa.make_url(os.environ.get(VARIABLES[kind], url))
    for kind, url in (
        ("postgresql", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
        # Without TLS: PyMySQL reads the system's certificates again for each connection.
        ("mysql", "mysql+pymysql://root@127.0.0.1:3306/?ssl_disabled=true"),
    )
}
"""The servers that the tests use."""
KINDS = ("sqlite", *URLS)
_CONNECT_SECONDS = 5
END_CONNECTION = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}
"""The statement that ends a connection, by its :func:`number_of`."""
_OWN_NUMBER = {"postgresql": "pg_backend_pid()", "mysql": "CONNECTION_ID()"}


def missing_servers() -> dict[str, str]:
    """One sentence for each server that does not answer, by kind."""
    return {kind: sentence for kind in URLS if (sentence := _reason_if_missing(kind))}


def _reason_if_missing(kind: str) -> str | None:
    try:
        with _server(kind).connect():
            return None
    except OperationalError as error:
        server = URLS[kind].render_as_string()
        reason = str(error.orig).partition("\n")[0]
        return f"no {kind} at {server} ({VARIABLES[kind]}): {reason}"


@contextlib.contextmanager
def new_database(kind: str, folder: Path) -> Iterator[str]:
    """Create an empty database; yields its URL, and drops it at the end."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'test.db'}"
        return
    name = create(kind)
    try:
        yield url(kind, name)
    finally:
        drop(kind, name)


def create(kind: str) -> str:
    """Create a database on a server; returns its name."""
    name = f"bgjobs_test_{uuid.uuid4().hex}"
    run(kind, f"CREATE DATABASE {name}")
    return name


def url(kind: str, name: str) -> str:
    """The URL of a database on a server."""
    return URLS[kind].set(database=name).render_as_string(hide_password=False)


def drop(kind: str, name: str) -> None:
    """Drop a database, even if it is still in use."""
    end_connections(kind, name)
    run(kind, f"DROP DATABASE {name}" + (" WITH (FORCE)" if kind == "postgresql" else ""))


def end_connections(kind: str, name: str) -> None:
    """End all connections to a database."""
    ids = {
        "postgresql": f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'",
        "mysql": f"SELECT id FROM information_schema.processlist WHERE db = '{name}'",
    }[kind]
    with _server(kind).connect() as connection:
        for number in connection.exec_driver_sql(ids).scalars():
            with contextlib.suppress(OperationalError):
                connection.exec_driver_sql(END_CONNECTION[kind].format(number))


def product_of(*sizes: int) -> str:
    """A slow query for any database: it counts 900 rows times ``sizes``. Two 900s take minutes."""
    number = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
    tables = [f"n AS t{index}" for index in range(len(sizes) + 1)]
    limits = [f"t{index}.i <= {size}" for index, size in enumerate(sizes)]
    # A condition on all tables, or an optimizer could multiply their counts instead.
    limits.append(" + ".join(f"t{index}.i" for index in range(len(tables))) + " > 0")
    return f"{number} SELECT count(*) FROM {', '.join(tables)} WHERE {' AND '.join(limits)}"


def run(kind: str, statement: str) -> None:
    """Run a statement on the server, outside the databases of tests."""
    with _server(kind).connect() as connection:
        connection.exec_driver_sql(statement)


def number_of(connection: sa.Connection) -> int | None:
    """The server's id of a connection; ``None`` on SQLite."""
    number = _OWN_NUMBER.get(connection.dialect.name)
    return number and connection.exec_driver_sql(f"SELECT {number}").scalar()


@functools.cache
def _server(kind: str) -> sa.Engine:
    return sa.create_engine(
        URLS[kind],
        isolation_level="AUTOCOMMIT",
        pool_pre_ping=True,
        connect_args={"connect_timeout": _CONNECT_SECONDS},
    )
