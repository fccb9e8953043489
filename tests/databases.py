"""The databases that the tests run on, each test in one of its own."""

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
"""Where the environment may name another server."""
URLS = {
    kind: sa.make_url(os.environ.get(VARIABLES[kind], url))
    for kind, url in (
        ("postgresql", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"),
        # Without TLS: PyMySQL reads the certificates of the system anew for each connection.
        ("mysql", "mysql+pymysql://root@127.0.0.1:3306/?ssl_disabled=true"),
    )
}
"""Of the servers that the tests use."""
KINDS = ("sqlite", *URLS)
_CONNECT_SECONDS = 5
END_CONNECTION = {"postgresql": "SELECT pg_terminate_backend({})", "mysql": "KILL {}"}
"""The statement that ends a connection, by its :func:`number_of`."""
_OWN_NUMBER = {"postgresql": "pg_backend_pid()", "mysql": "CONNECTION_ID()"}


def missing_servers() -> dict[str, str]:
    """A sentence for each server that does not answer, by kind."""
    return {kind: sentence for kind in URLS if (sentence := _missing(kind))}


def _missing(kind: str) -> str | None:
    try:
        with _server(kind).connect():
            return None
    except OperationalError as error:
        where = URLS[kind].render_as_string()
        said = str(error.orig).partition("\n")[0]
        return f"no {kind} at {where} ({VARIABLES[kind]}): {said}"


@contextlib.contextmanager
def new_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database, which is dropped at the end."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'test.db'}"
        return
    name = create(kind)
    try:
        yield url(kind, name)
    finally:
        drop(kind, name)


def create(kind: str) -> str:
    """The name of a new database on a server."""
    name = f"bgjobs_test_{uuid.uuid4().hex}"
    run(kind, f"CREATE DATABASE {name}")
    return name


def url(kind: str, name: str) -> str:
    """The URL of a database on a server."""
    return URLS[kind].set(database=name).render_as_string(hide_password=False)


def drop(kind: str, name: str) -> None:
    """Drop a database, whoever still uses it."""
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
    """A query that counts 900 rows times ``sizes``, on any database; two of 900 take minutes."""
    number = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
    tables = [f"n AS t{index}" for index in range(len(sizes) + 1)]
    limits = [f"t{index}.i <= {size}" for index, size in enumerate(sizes)]
    # A condition on all of them, or the numbers of each might be multiplied instead.
    limits.append(" + ".join(f"t{index}.i" for index in range(len(tables))) + " > 0")
    return f"{number} SELECT count(*) FROM {', '.join(tables)} WHERE {' AND '.join(limits)}"


def run(kind: str, statement: str) -> None:
    """Run a statement on the server, in no database of a test."""
    with _server(kind).connect() as connection:
        connection.exec_driver_sql(statement)


def number_of(connection: sa.Connection) -> int | None:
    """By what the server knows a connection; ``None`` where there is no server."""
    number = _OWN_NUMBER.get(connection.dialect.name)
    return number and connection.exec_driver_sql(f"SELECT {number}").scalar()


@functools.cache
def _server(kind: str) -> sa.Engine:
    return sa.create_engine(
        URLS[kind],
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
        connect_args={"connect_timeout": _CONNECT_SECONDS},
    )
