"""Commands about the tables: init-db and check."""

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
    click.echo(f"Created {', '.join(created)}" if created else "All tables are already there")
    if created and (note := _migrations_note(state)):
        click.echo(f"Note: {note}", err=True)
    if notice:
        click.echo(notice)


def _migrations_note(state: AppState) -> str | None:
    """What else is to be done where another tool makes and drops tables."""
    from ..operations import schema

    if "migrate" in state.app.extensions:
        return (
            "this app has Flask-Migrate, whose migrations do not know of these tables. Where a "
            "migration makes them, `flask db upgrade` will fail in this database now: tell it with "
            "`flask db stamp`. Elsewhere run `flask db migrate` and `flask db upgrade`, and not "
            "this command"
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
    """Compare the database with the models, and what db.session sees with what we see.

    The exit code is 1 when they differ.
    """
    from ..operations import schema

    state = current_state()
    found = schema.differences(state)
    elsewhere = schema.session_differences(state)
    for sentence in [*found, *elsewhere]:
        click.echo(sentence)
    if elsewhere:
        raise click.ClickException(
            "db.session writes jobs where workers do not look: set the schema, role or database "
            "in a `connect` listener on the engine, which runs for flask-bgjobs as well"
        )
    if found:
        raise click.ClickException(
            f"{len(found)} difference(s); run `flask db migrate` and `flask db upgrade` (without "
            "Flask-Migrate, `flask bgjobs init-db` makes missing tables)"
        )
    click.echo("The database matches the models")
    if note := state.store.link_advice():
        click.echo(f"Note: {note}")
