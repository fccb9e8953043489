"""Databases that already have the tables, because creating them takes longer than most tests.

A SQLite file is a copy of a prepared one. On a server, the tests of a process use the same database
one after the other, and its rows are deleted in between. If a test changes the schema or leaves
many rows, the next test gets a new database.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pymysql.constants import CLIENT

from flask_bgjobs.state import state_of
from tests import databases
from tests.apps import build_app

_MAX_BYTES = 4 * 1024 * 1024
"""A larger database is dropped: deleted rows would slow down the statements of later tests."""

_POSTGRESQL_SCHEMA = """
SELECT string_agg(line, E'\\n' ORDER BY line) FROM (
    SELECT concat_ws(' ', nspname, nspacl::text) FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
    UNION ALL
    SELECT concat_ws(' ', relname, relkind, relacl::text, reloptions::text) FROM pg_class
        WHERE relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', attrelid::regclass, attname, atttypid, attnotnull) FROM pg_attribute
        JOIN pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT concat_ws(' ', conname, contype) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
    UNION ALL
    SELECT tgname FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL
    SELECT setconfig::text FROM pg_db_role_setting WHERE setdatabase =
        (SELECT oid FROM pg_database WHERE datname = current_database())
) AS lines(line)
"""

_SEVERAL_STATEMENTS: dict[str, dict[str, Any]] = {
    "postgresql": {},
    "mysql": {"client_flag": CLIENT.MULTI_STATEMENTS},
}
"""What lets a connection run several statements in one round trip."""
_RESTART_IDS = {
    "postgresql": "SELECT setval(oid::regclass, 1, false) FROM pg_class "
    "WHERE relkind = 'S' AND relnamespace = 'public'::regnamespace",
    # Only the ids of jobs are written in tests.
    "mysql": "ALTER TABLE bgjobs_job AUTO_INCREMENT = 1",
}


class PreparedDatabases:
    """The prepared databases of one test process.

    :param folder: where to keep the SQLite file that is copied.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "prepared.db"
        self._servers = {kind: _ServerDatabase(kind) for kind in databases.URLS}

    @contextlib.contextmanager
    def use(self, kind: str, folder: Path) -> Iterator[str]:
        """Yield the URL of a database with empty tables, for one test.

        :param folder: the folder of the test.
        """
        if kind == "sqlite":
            file = folder / "test.db"
            self.copy_to(file)
            yield f"sqlite:///{file}"
            return
        yield self._servers[kind].url()
        self._servers[kind].clean()

    def copy_to(self, file: Path) -> None:
        """Make ``file`` a SQLite database with empty tables."""
        if not self._file.exists():
            _create_tables(f"sqlite:///{self._file}")
        shutil.copyfile(self._file, file)

    def close(self) -> None:
        """Drop the databases on the servers."""
        for database in self._servers.values():
            database.drop()


class _ServerDatabase:
    """The database on one server that the tests use one after the other."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._name: str | None = None
        self._engine: sa.Engine | None = None
        self._schema = ""
        self._tables: list[str] = []

    def url(self) -> str:
        if self._name is None:
            self._name = databases.create(self._kind)
            # One engine for all tests: a new one would ask the server for its properties each time.
            # It keeps no connection, because tests count those to their database.
            self._engine = sa.create_engine(
                self._url,
                isolation_level="AUTOCOMMIT",
                poolclass=sa.NullPool,
                connect_args=_SEVERAL_STATEMENTS[self._kind],
            )
            self._tables = _create_tables(self._url)
            with self._connect() as connection:
                self._schema = _schema(connection)
        return self._url

    @property
    def _url(self) -> str:
        assert self._name is not None
        return databases.url(self._kind, self._name)

    def clean(self) -> None:
        """Empty the tables, or drop the database if the test changed more than rows."""
        assert self._name is not None
        databases.end_connections(self._kind, self._name)
        with self._connect() as connection:
            is_usable = _schema(connection) == self._schema
            if not is_usable:
                _drop_others(connection, self._tables)
                is_usable = _schema(connection) == self._schema
            is_usable = is_usable and _is_small(connection)
            if is_usable:
                _delete_rows(connection, self._tables)
        if not is_usable:
            self.drop()

    def drop(self) -> None:
        if self._name is not None:
            databases.drop(self._kind, self._name)
            self._name = None

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        assert self._engine is not None
        with self._engine.connect() as connection:
            yield connection


def _create_tables(url: str) -> list[str]:
    """Create the tables; returns their names, referring tables before the referenced ones."""
    app = build_app(url)
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        db.create_all()
        db.engine.dispose()
    state_of(app).store.dispose()
    return [table.name for table in reversed(db.metadata.sorted_tables)]


def _drop_others(connection: sa.Connection, tables: Collection[str]) -> None:
    """Drop the tables that a test has added."""
    others = set(sa.inspect(connection).get_table_names()) - set(tables)
    if connection.dialect.name == "postgresql":
        for table in others:
            connection.exec_driver_sql(f'DROP TABLE "{table}" CASCADE')
    elif others:
        connection.exec_driver_sql("SET foreign_key_checks = 0")
        for table in others:
            connection.exec_driver_sql(f"DROP TABLE `{table}`")


def _delete_rows(connection: sa.Connection, tables: Sequence[str]) -> None:
    _run_all(
        connection, [*(f"DELETE FROM {t}" for t in tables), _RESTART_IDS[connection.dialect.name]]
    )


def _run_all(connection: sa.Connection, statements: Sequence[str]) -> list[Any]:
    """Run statements in one round trip, and return their rows."""
    driver_connection: Any = connection.connection.driver_connection
    rows: list[Any] = []
    with driver_connection.cursor() as cursor:
        cursor.execute("; ".join(statements))
        has_more = True
        while has_more:
            if cursor.description is not None:
                rows += cursor.fetchall()
            # psycopg2 has no further results.
            has_more = connection.dialect.name == "mysql" and cursor.nextset()
    return rows


def _is_small(connection: sa.Connection) -> bool:
    size = {
        "postgresql": "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' "
        "AND relnamespace = 'public'::regnamespace",
        "mysql": "SELECT sum(data_length + index_length) FROM information_schema.tables "
        "WHERE table_schema = DATABASE()",
    }[connection.dialect.name]
    return int(connection.exec_driver_sql(size).scalar() or 0) <= _MAX_BYTES


def _schema(connection: sa.Connection) -> str:
    """A text that changes if a test changes anything except rows."""
    if connection.dialect.name == "postgresql":
        return str(connection.exec_driver_sql(_POSTGRESQL_SCHEMA).scalar())
    tables = connection.exec_driver_sql("SHOW TABLES").scalars().all()
    rows = _run_all(connection, ["SHOW TRIGGERS", *(f"SHOW CREATE TABLE {t}" for t in tables)])
    text = "\n".join(str(value) for row in rows for value in row)
    return re.sub(r" AUTO_INCREMENT=\d+", "", text)
