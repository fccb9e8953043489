"""Commands about the tables: init-db and check."""

from __future__ import annotations

import click

from ..app_state import current_state
from .group import bgjobs_commands, one_sentence


@bgjobs_commands.command("init-db")
@one_sentence
def init_db_command() -> None:
    """Create the tables, for apps without Flask-Migrate."""
    from .. import schema

    state = current_state()
    created = schema.create_tables(state)
    notice = state.store.prepare(wal=state.config.sqlite_wal)
    click.echo(f"Created {', '.join(created)}" if created else "All tables are already there")
    if notice:
        click.echo(notice)


@bgjobs_commands.command("check")
@one_sentence
def check_command() -> None:
    """Compare the database with the models, and what db.session sees with what we see.

    The exit code is 1 when they differ.
    """
    from .. import schema

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
