"""The tables in the database: made for hosts without Flask-Migrate, and compared."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ..enqueue import transactions
from ..models import Base, add_tables
from ..state import AppState


def create_tables(state: AppState) -> list[str]:
    """The names of the tables that were missing and are made now."""
    missing = missing_tables(state)
    state.store.transaction(lambda connection: Base.metadata.create_all(connection))
    return missing


def missing_tables(state: AppState) -> list[str]:
    """The names of the tables that the database lacks."""
    with state.store.read() as connection:
        present = set(sa.inspect(connection).get_table_names(schema=state.store.schema))
    return sorted(name for name in Base.metadata.tables if name not in present)


def is_migrated_by_alembic(state: AppState) -> bool:
    """Whether the database has the table in which Alembic keeps its revision."""
    with state.store.read() as connection:
        return sa.inspect(connection).has_table("alembic_version")


def differences(state: AppState) -> list[str]:
    """A sentence for each difference between the database and the models; empty when none."""
    # Here, as a worker imports this module and does without Alembic, which takes long to import.
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    names = set(Base.metadata.tables)
    with state.store.read() as connection:
        default_schema = sa.inspect(connection).default_schema_name
        # Alembic knows the default schema by no name.
        schema = None if state.store.schema == default_schema else state.store.schema

        def ours_only(name: str | None, kind: str, parents: Any) -> bool:
            return name == schema if kind == "schema" else kind != "table" or name in names

        options = {"include_name": ours_only, "include_schemas": schema is not None}
        wanted = sa.MetaData(schema=schema)
        add_tables(wanted)
        found = compare_metadata(MigrationContext.configure(connection, opts=options), wanted)
    changes = [change for group in found for change in _flat(group)]
    missing = {change[1].name for change in changes if change[0] == "add_table"}
    return [_sentence(c) for c in changes if c[0] != "add_index" or c[1].table.name not in missing]


def session_differences(state: AppState) -> list[str]:
    """A sentence for each way in which ``db.session`` uses another database than workers do."""
    if state.store.always_joins:
        return []
    with state.store.read() as connection:
        ours = state.store.seen_by(connection)
    # Another one than that of this context, which may hold changes.
    with state.db.session.session_factory() as session:
        joined = transactions.connection_to_join(session, state.table, state.store.host_engine)
        assert joined is not None, "its transaction has just begun"
        theirs = state.store.seen_by(joined)
    return [
        f"{what}: db.session has {theirs[what]}, and flask-bgjobs has {ours[what]}"
        for what in ours
        if ours[what] != theirs[what]
    ]


def _flat(group: Any) -> list[tuple[Any, ...]]:
    return list(group) if isinstance(group, list) else [group]


def _sentence(change: tuple[Any, ...]) -> str:
    """What one entry of Alembic's comparison says, in words."""
    match change:
        case ("add_table", table):
            return f"table {table.name} is missing"
        case ("add_column", _, table, column):
            return f"column {table}.{column.name} is missing"
        case ("remove_column", _, table, column):
            return f"column {table}.{column.name} is not one of ours"
        case ("add_index", index):
            return f"index {index.name} on {index.table.name} is missing"
        case ("remove_index", index):
            return f"index {index.name} on {index.table.name} is not one of ours"
        case (("modify_type" | "modify_nullable") as kind, _, table, column, _, old, new):
            what = "type" if kind == "modify_type" else "nullable"
            return f"column {table}.{column}: {what} is {old!r} and should be {new!r}"
        case _:
            return f"{change[0]}: {change[1:]!r}"
