"""Commands about the tables: ``init-db`` and ``check``."""

from __future__ import annotations

import click

from ..state import AppState, current_state
from .group import bgjobs_commands, one_sentence


@bgjobs_commands.command("init-db")
@one_sentence
def init_db_command() -> None:
    """Create the tables, for apps without Flask-Migrate."""
    from ..operations import schema

    state = current_state()
    created = schema.create_tables(state)
    notice = state.store.prepare(wal=state.config.sqlite_wal)
    click.echo(f"Created {', '.join(created)}" if created else "All tables already exist")
    if created and (note := _migrations_note(state)):
        click.echo(f"Note: {note}", err=True)
    if notice:
        click.echo(notice)


def _migrations_note(state: AppState) -> str | None:
    """What the user has to do if another tool creates and drops tables in this database."""
    from ..operations import schema

    if "migrate" in state.app.extensions:
        return (
            "this app has Flask-Migrate, whose migrations do not know that these tables exist. If "
            "one of them creates the tables, `flask db upgrade` will fail in this database: mark "
            "it as applied with `flask db stamp`. In other databases, run `flask db migrate` and "
            "`flask db upgrade` instead of this command"
        )
    if schema.is_migrated_by_alembic(state):
        return (
            "this database is migrated by Alembic, whose next `--autogenerate` will drop these "
            "tables unless its target_metadata has them: call flask_bgjobs.add_tables(metadata) in "
            "its env.py"
        )
    return None


@bgjobs_commands.command("check")
@one_sentence
def check_command() -> None:
    """Compare the database with the models, and check that db.session and workers use the same
    tables.

    The exit code is 1 if there are differences.
    """
    from ..operations import schema

    state = current_state()
    found = schema.differences(state)
    elsewhere = schema.session_differences(state)
    for sentence in [*found, *elsewhere]:
        click.echo(sentence)
    if elsewhere:
        raise click.ClickException(
            "db.session writes jobs to tables that workers do not read: set the schema, role or "
            "database in a `connect` listener on the engine, which also runs for flask-bgjobs"
        )
    if found:
        raise click.ClickException(
            f"{len(found)} difference(s); run `flask db migrate` and `flask db upgrade` (without "
            "Flask-Migrate, `flask bgjobs init-db` creates missing tables)"
        )
    click.echo("The database matches the models")
    if note := state.store.link_advice():
        click.echo(f"Note: {note}")
