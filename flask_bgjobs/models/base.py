"""What all tables share: types, options and the metadata that holds them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import SchemaConst
from sqlalchemy.sql.elements import conv

BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows by itself only in a column that is exactly INTEGER."""
UtcTime = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

TABLE_OPTIONS = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
"""Whatever a MySQL database has for defaults: transactions, every letter, and names that are equal
only where they are the same."""
NUMBERED_TABLE_OPTIONS = {"sqlite_autoincrement": True, **TABLE_OPTIONS}
"""No id is used again, also not on SQLite."""


def index(
    name: str,
    *columns: str,
    unique: bool = False,
    where: str | None = None,
    postgresql_where: str | None = None,
) -> sa.Index:
    """An index.

    :param where: which rows stand in it; all of them on MySQL, which has no such indexes. A job
        costs the less, the fewer indexes it stands in.
    :param postgresql_where: the same on PostgreSQL, where it is not as elsewhere.
    """
    conditions = {"sqlite_where": where, "postgresql_where": postgresql_where or where}
    options: Any = {key: sa.text(text) for key, text in conditions.items() if text is not None}
    # conv() keeps a host's naming convention from renaming what the statements rely on.
    return sa.Index(conv(name), *columns, unique=unique, **options)


class Base(DeclarativeBase):
    """Base of our models only; hosts keep their own."""

    # Flask-SQLAlchemy's session looks here for the bind, so db.session can read a Job.
    metadata = sa.MetaData(info={"bind_key": None})


def add_tables(metadata: sa.MetaData) -> None:
    """Add the tables of flask-bgjobs to ``metadata``, in its schema; what is there already stays.

    ``BgJobs(app)`` does it for Flask-SQLAlchemy's metadata of ``BGJOBS_BIND_KEY``. Call it in the
    ``env.py`` of a migration tool that compares the database with another ``MetaData``: it would
    drop the tables otherwise.
    """
    for table in Base.metadata.sorted_tables:
        key = table.name if metadata.schema is None else f"{metadata.schema}.{table.name}"
        if key not in metadata.tables:
            table.to_metadata(metadata, schema=metadata.schema or SchemaConst.RETAIN_SCHEMA)
