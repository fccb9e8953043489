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

POSTGRES_URL = sa.make_url(
    os.environ.get(
        "BGJOBS_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
    )
)
KINDS = ("sqlite", "postgresql")
_CONNECT_SECONDS = 5


def missing_servers() -> list[str]:
    """A sentence for each server that does not answer."""
    try:
        with _server().connect():
            return []
    except OperationalError as error:
        where = POSTGRES_URL.render_as_string()
        said = str(error.orig).partition("\n")[0]
        return [f"no PostgreSQL at {where} (BGJOBS_TEST_POSTGRES_URL): {said}"]


@contextlib.contextmanager
def new_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database, which is dropped at the end."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'test.db'}"
        return
    name = f"bgjobs_test_{uuid.uuid4().hex}"
    _run(f"CREATE DATABASE {name}")
    try:
        yield POSTGRES_URL.set(database=name).render_as_string(hide_password=False)
    finally:
        _run(f"DROP DATABASE {name} WITH (FORCE)")


def _run(statement: str) -> None:
    with _server().connect() as connection:
        connection.exec_driver_sql(statement)


@functools.cache
def _server() -> sa.Engine:
    return sa.create_engine(
        POSTGRES_URL,
        isolation_level="AUTOCOMMIT",
        poolclass=sa.NullPool,
        connect_args={"connect_timeout": _CONNECT_SECONDS},
    )
