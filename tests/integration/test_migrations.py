"""The tables in the host's metadata: autogenerate finds them, and finds no drift."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs, add_tables
from flask_bgjobs.state import AppState
from tests import databases
from tests.apps import build_app

pytestmark = pytest.mark.slow

PLAIN = """
from flask_sqlalchemy import SQLAlchemy
db = SQLAlchemy()
"""
DECLARATIVE_BASE = """
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
class Base(DeclarativeBase):
    note: Mapped[str | None] = mapped_column(sa.String(10))
db = SQLAlchemy(model_class=Base)
"""
NAMING_CONVENTION = """
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
db = SQLAlchemy(metadata=sa.MetaData(naming_convention={
    "ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}))
"""
EXPORTS = """
class Export(db.Model):
    id = sa.Column(sa.Integer, primary_key=True)
    job_id = sa.Column(sa.ForeignKey("bgjobs_job.id"))
"""
FOREIGN_KEY = (
    """
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
db = SQLAlchemy()
"""
    + EXPORTS
)
SCHEMA = """
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
db = SQLAlchemy(metadata=sa.MetaData(schema="main"))
"""
FACTORY = """
from flask import Flask
from flask_migrate import Migrate
from flask_bgjobs import BgJobs
def create_app():
    app = Flask(__name__)
    app.config.update({config!r})
    db.init_app(app)
    BgJobs(app)
    Migrate(app, db)
    return app
"""
JOB = """
def work(value):
    return value * 2
"""


RUN = """
import json, sys
from flask.cli import cli
for words in json.loads(sys.argv[1]):
    cli.main(["--app", "host", *words], prog_name="flask", standalone_mode=False)
"""
"""Runs several commands in one process, because a start takes longer than a command."""


def _flask(folder: Path, *commands: str) -> str:
    """The output of ``flask`` commands, each given as words separated by spaces."""
    words = [command.split() for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _host(folder: Path, base: str, **config: object) -> None:
    settings = {
        "SQLALCHEMY_DATABASE_URI": f"sqlite:///{folder / 'host.db'}",
        "SECRET_KEY": "x",
        "BGJOBS_ALLOWED_JOBS": ["host.work"],
        **config,
    }
    (folder / "host.py").write_text(base + FACTORY.format(config=settings) + JOB)


def _assert_runs_a_job(folder: Path) -> None:
    output = _flask(
        folder,
        "bgjobs check",
        "bgjobs enqueue host.work -p [21]",
        "bgjobs worker --burst",
        "bgjobs show 1 --json",
    )
    assert "matches the models" in output
    assert '"result": 42' in output


@pytest.mark.parametrize(
    "base",
    [PLAIN, DECLARATIVE_BASE, NAMING_CONVENTION, FOREIGN_KEY],
    ids=["plain", "declarative base", "naming convention", "foreign key"],
)
def test_autogenerate_upgrade_and_check_are_clean(tmp_path: Path, base: str) -> None:
    """A new host migrates the tables without code of its own, and ``db check`` then finds no
    difference."""
    _host(tmp_path, base)
    output = _flask(tmp_path, "db init", "db migrate -m first", "db upgrade", "db check")
    assert "No new upgrade operations detected" in output
    (version,) = (tmp_path / "migrations/versions").glob("*.py")
    text = version.read_text()
    for table in ("job", "attempt", "log", "worker", "queue"):
        assert f"'bgjobs_{table}'" in text
    assert "sqlite_autoincrement=True" in text
    _assert_runs_a_job(tmp_path)


def test_bind_key_migrates_its_own_database(tmp_path: Path) -> None:
    """With a bind key, the tables are migrated on that bind, and jobs run there."""
    _host(
        tmp_path,
        PLAIN,
        SQLALCHEMY_BINDS={"jobs": f"sqlite:///{tmp_path / 'jobs.db'}"},
        BGJOBS_BIND_KEY="jobs",
    )
    output = _flask(tmp_path, "db init --multidb", "db migrate -m first", "db upgrade", "db check")
    assert "No new upgrade operations detected" in output
    _assert_runs_a_job(tmp_path)


def test_schema_is_used_by_every_statement(tmp_path: Path) -> None:
    """With a schema in the host's metadata, tables are created and jobs run in that schema."""
    _host(tmp_path, SCHEMA)
    _flask(tmp_path, "bgjobs init-db")
    _assert_runs_a_job(tmp_path)


@pytest.mark.on("postgresql", "mysql")
def test_servers_are_migrated_without_drift(tmp_path: Path, empty_database_url: str) -> None:
    """A new host on a server migrates the tables, ``db check`` finds no difference, and a job
    runs."""
    _host(tmp_path, NAMING_CONVENTION + EXPORTS, SQLALCHEMY_DATABASE_URI=empty_database_url)
    output = _flask(tmp_path, "db init", "db migrate -m first", "db upgrade", "db check")
    assert "No new upgrade operations detected" in output
    _assert_runs_a_job(tmp_path)
    _flask(tmp_path, "db downgrade")


@pytest.mark.on("mysql")
def test_tables_store_all_characters(tmp_path: Path, empty_database_url: str) -> None:
    """In a database with another default character set, the tables store all characters, and
    ``check`` finds no difference."""
    name = sa.make_url(empty_database_url).database
    databases.run("mysql", f"ALTER DATABASE {name} CHARACTER SET latin1")
    _host(tmp_path, PLAIN, SQLALCHEMY_DATABASE_URI=empty_database_url)
    output = _flask(
        tmp_path,
        "bgjobs init-db",
        "bgjobs check",
        'bgjobs enqueue host.work -p ["🦉"]',
        "bgjobs worker --burst",
    )
    assert "matches the models" in output
    assert json.loads(_flask(tmp_path, "bgjobs show 1 --json"))["result"] == "🦉🦉"


def test_add_tables_prevents_drops_by_alembic(app: Flask, state: AppState) -> None:
    """Alembic would drop the tables if it compared only the app's own metadata; ``add_tables``
    prevents that."""
    metadata = sa.MetaData()
    with state.store.read() as connection:
        context = MigrationContext.configure(connection)
        dropped = {
            change[1].name
            for change in compare_metadata(context, metadata)
            if change[0] == "remove_table"
        }
        add_tables(metadata)
        add_tables(metadata)
        left = compare_metadata(context, metadata)
    assert "bgjobs_job" in dropped
    assert left == []


@pytest.mark.on("sqlite")
def test_init_db_with_alembic(empty_database_url: str) -> None:
    """In a database with Alembic's table and an app without Flask-Migrate, ``init-db`` says what to
    add to ``env.py``."""
    app = build_app(empty_database_url)
    with app.app_context():
        engine = app.extensions["sqlalchemy"].engine
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
    runner = app.test_cli_runner()
    assert "add_tables(metadata) in its env.py" in runner.invoke(args=["bgjobs", "init-db"]).output
    assert "Note:" not in runner.invoke(args=["bgjobs", "init-db"]).output
    engine.dispose()


@pytest.mark.on("sqlite")
def test_init_db_with_flask_migrate(empty_database_url: str) -> None:
    """In an app with Flask-Migrate, ``init-db`` says to stamp the database, because a migration
    that creates the tables would fail."""
    app = build_app(empty_database_url)
    Migrate(app, app.extensions["sqlalchemy"])
    runner = app.test_cli_runner()
    first = runner.invoke(args=["bgjobs", "init-db"])
    assert first.exit_code == 0
    assert "Note: this app has Flask-Migrate" in first.output
    assert "`flask db stamp`" in first.output
    assert "Note:" not in runner.invoke(args=["bgjobs", "init-db"]).output
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


@pytest.mark.parametrize("same", [True, False])
def test_bind_of_the_same_database_warns(tmp_path: Path, same: bool) -> None:
    """If the bind is the default database, a warning says that a migration of the default metadata
    would drop the tables."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    jobs = url if same else f"sqlite:///{tmp_path / 'jobs.db'}"
    config = {"SQLALCHEMY_BINDS": {"jobs": jobs}, "BGJOBS_BIND_KEY": "jobs"}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build_app(url, **config)
    messages = [str(warning.message) for warning in found]
    assert any("would drop the tables" in each for each in messages) is same


def test_bind_with_added_tables_does_not_warn(tmp_path: Path) -> None:
    """If the app has added the tables to the default metadata, there is no warning."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_BINDS={"jobs": url}, BGJOBS_BIND_KEY="jobs"
    )
    db = SQLAlchemy()
    add_tables(db.metadata)
    db.init_app(app)
    BgJobs(app)


def test_init_db_without_flask_migrate(tmp_path: Path) -> None:
    """``init-db`` creates the tables and turns WAL mode on; a second call changes nothing."""
    _host(tmp_path, PLAIN)
    first = _flask(tmp_path, "bgjobs init-db")
    assert "Created bgjobs_attempt, bgjobs_audit" in first
    assert "WAL mode is now on" in first
    assert "already exist" in _flask(tmp_path, "bgjobs init-db")
