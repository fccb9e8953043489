"""Column types, table options and metadata of all tables."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import SchemaConst
from sqlalchemy.sql.elements import conv

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""64-bit ids. SQLite generates ids only for a column whose type is exactly INTEGER."""
UtcTime = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

TABLE_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
"""Options that do not depend on the defaults of a MySQL database: transactions, all Unicode
characters, and comparisons that respect case and accents."""
NUMBERED_TABLE_OPTIONS = {"sqlite_autoincrement": True, **TABLE_OPTIONS}
"""Options of tables with generated ids. SQLite too must never use an id again."""


def index(
    name: str,
    *columns: str,
    unique: bool = False,
    where: str | None = None,
    postgresql_where: str | None = None,
) -> sa.Index:
    """Define an index.

    :param where: SQL condition for the rows in the index; all rows by default, and always on MySQL,
        which has no partial indexes. Every index that contains a job makes writing it slower.
    :param postgresql_where: the condition on PostgreSQL, if it is different there.
    """
    conditions = {"sqlite_where": where, "postgresql_where": postgresql_where or where}
    options: Any = {key: sa.text(text) for key, text in conditions.items() if text is not None}
    # conv() prevents a host's naming convention from renaming indexes that statements rely on.
    return sa.Index(conv(name), *columns, unique=unique, **options)


class Base(DeclarativeBase):
    """Declarative base of our models. The host's models have their own."""

    # Flask-SQLAlchemy's session reads the bind from here, so that db.session can query jobs.
    metadata = sa.MetaData(info={"bind_key": None})


def add_tables(metadata: sa.MetaData) -> None:
    """Add the tables of flask-bgjobs to ``metadata``, in its schema, unless they are there already.

    ``BgJobs(app)`` does this for Flask-SQLAlchemy's metadata of ``BGJOBS_BIND_KEY``. Call it in the
    ``env.py`` of a migration tool that compares the database with another ``MetaData``. Otherwise
    the tool would drop the tables.
    """
    for table in Base.metadata.sorted_tables:
        key = table.name if metadata.schema is None else f"{metadata.schema}.{table.name}"
        if key not in metadata.tables:
            table.to_metadata(metadata, schema=metadata.schema or SchemaConst.RETAIN_SCHEMA)
