"""The database's tables: create them without Flask-Migrate, and compare them with the models."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ..enqueue import transactions
from ..models import Base, add_tables
from ..state import AppState


def create_tables(state: AppState) -> list[str]:
    """Create the missing tables, and return their names."""
    missing = missing_tables(state)
    state.store.transaction(lambda connection: Base.metadata.create_all(connection))
    return missing


def missing_tables(state: AppState) -> list[str]:
    """The names of the tables that the database does not have, sorted."""
    with state.store.read() as connection:
        present = set(sa.inspect(connection).get_table_names(schema=state.store.schema))
    return sorted(name for name in Base.metadata.tables if name not in present)


def is_migrated_by_alembic(state: AppState) -> bool:
    """Whether the database has Alembic's revision table."""
    with state.store.read() as connection:
        return sa.inspect(connection).has_table("alembic_version")


def differences(state: AppState) -> list[str]:
    """The differences between the database's tables and the models, one sentence each."""
    # Imported here because Alembic is slow to import, and workers, which load this module, do not
    # need it.
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    names = set(Base.metadata.tables)
    with state.store.read() as connection:
        default_schema = sa.inspect(connection).default_schema_name
        # Alembic calls the default schema None.
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
    """The differences between the database that ``db.session`` uses and the one that workers use.

    :returns: a sentence for each difference, such as another search path.
    """
    if state.store.always_joins:
        return []
    with state.store.read() as connection:
        ours = state.store.session_settings(connection)
    # A new session, because the one of the current context may hold changes.
    with state.db.session.session_factory() as session:
        joined = transactions.connection_to_join(session, state.table, state.store.host_engine)
        assert joined is not None, "the new session's transaction cannot have ended"
        theirs = state.store.session_settings(joined)
    return [
        f"{setting}: db.session has {theirs[setting]}, and flask-bgjobs has {ours[setting]}"
        for setting in ours
        if ours[setting] != theirs[setting]
    ]


def _flat(group: Any) -> list[tuple[Any, ...]]:
    return list(group) if isinstance(group, list) else [group]


def _sentence(change: tuple[Any, ...]) -> str:
    """One entry of Alembic's comparison as a sentence."""
    match change:
        case ("add_table", table):
            return f"table {table.name} is missing"
        case ("add_column", _, table, column):
            return f"column {table}.{column.name} is missing"
        case ("remove_column", _, table, column):
            return f"column {table}.{column.name} is not part of flask-bgjobs"
        case ("add_index", index):
            return f"index {index.name} on {index.table.name} is missing"
        case ("remove_index", index):
            return f"index {index.name} on {index.table.name} is not part of flask-bgjobs"
        case (("modify_type" | "modify_nullable") as kind, _, table, column, _, old, new):
            what = "type" if kind == "modify_type" else "nullable"
            return f"column {table}.{column}: {what} is {old!r} and should be {new!r}"
        case _:
            return f"{change[0]}: {change[1:]!r}"
