"""``flask --app example_app seed`` and ``sample-jobs``."""

from __future__ import annotations

from pathlib import Path

import click
from flask import Flask, current_app
from flask.cli import with_appcontext

from . import samples
from .config import kept_secret

ADMIN_PASSWORD_BYTES = 9


def register(app: Flask) -> None:
    """Add the commands to ``app``."""
    app.cli.add_command(seed)
    app.cli.add_command(sample_jobs)


def admin_password() -> str:
    """The administrator's password: from ``SHOP_ADMIN_PASSWORD``, or generated once and stored."""
    configured: str | None = current_app.config["SHOP_ADMIN_PASSWORD"]
    kept = Path(current_app.instance_path) / "admin_password"
    return configured or kept_secret(kept, ADMIN_PASSWORD_BYTES)


@click.command("seed")
@with_appcontext
def seed() -> None:
    """Create the administrator, products, orders and photos, if they are missing."""
    password = admin_password()
    added = samples.seed(password)
    click.echo(f"Added {added.products} products, {added.orders} orders and {added.photos} photos.")
    click.echo(f"Administrator: {samples.ADMIN_EMAIL}, password: {password}")


@click.command("sample-jobs")
@with_appcontext
def sample_jobs() -> None:
    """Enqueue a mix of jobs that succeed, wait, retry and fail."""
    for job in samples.enqueue_sample_jobs():
        click.echo(f"{job.id:>6}  {job.status:<10} {job.name}")
