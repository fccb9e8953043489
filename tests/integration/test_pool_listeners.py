"""Pool listeners of a host apply to the connections of flask-bgjobs, too."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import OperationalError

from flask_bgjobs import run_background_job
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.worker import Worker
from tests.apps import build_app
from tests.conftest import wait_until

TENANT = "tenant"


def _db(app: Flask) -> SQLAlchemy:
    db: SQLAlchemy = app.extensions["sqlalchemy"]
    return db


@pytest.fixture
def make_host(database_url: str) -> Iterator[Callable[..., AppState]]:
    """Creates apps without tables, whose context stays pushed."""
    hosts: list[Any] = []

    def make(url: str = database_url, **config: Any) -> AppState:
        app = build_app(url, **config)
        context = app.app_context()
        context.push()
        hosts.append((app, context))
        return state_of(app)

    yield make
    for app, context in reversed(hosts):
        _db(app).session.remove()
        _db(app).engine.dispose()
        state_of(app).store.dispose()
        context.pop()


@pytest.fixture
def host(make_host: Callable[..., AppState]) -> AppState:
    """An app without tables."""
    return make_host()


def _listen(state: AppState, event: str, listener: Callable[..., Any], **options: Any) -> None:
    sa.event.listen(_db(state.app).engine, event, listener, **options)


def _execute_on_connection(statement: str) -> Callable[..., None]:
    """A listener that executes a statement without a commit."""

    def listener(connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()

    return listener


def _create_tables(state: AppState) -> None:
    _db(state.app).create_all()


def _enqueue_joined_and_saved(state: AppState) -> tuple[int, int]:
    session = _db(state.app).session
    joined = run_background_job("tests.jobs.echo", parameters=["joined"], session=session)
    session.commit()
    saved = run_background_job("tests.jobs.echo", parameters=["saved"], session=None)
    return joined.id, saved.id


def _run_all(state: AppState) -> int:
    worker = Worker(state, WorkerOptions(burst=True))
    worker.run()
    return sum(worker.counts.values())


def _check(state: AppState, code: int) -> str:
    result = state.app.test_cli_runner().invoke(args=["bgjobs", "check"])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.on("postgresql")
@pytest.mark.parametrize("event", ["connect", "checkout"])
@pytest.mark.parametrize("insert", [False, True], ids=["after SQLAlchemy's", "before SQLAlchemy's"])
def test_search_path_applies_to_all_jobs(host: AppState, event: str, insert: bool) -> None:
    """With a listener that sets ``search_path``, joined jobs, saved jobs and workers use the same
    table. The listener need not commit its setting."""
    with _db(host.app).engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {TENANT}")
    _db(host.app).engine.dispose()
    _listen(host, event, _execute_on_connection(f"SET search_path TO {TENANT}"), insert=insert)
    _create_tables(host)
    _enqueue_joined_and_saved(host)
    with host.store.read() as connection:
        found = connection.exec_driver_sql(f"SELECT count(*) FROM {TENANT}.bgjobs_job").scalar()
    assert found == 2
    assert _run_all(host) == 2
    assert "matches the models" in _check(host, 0)


@pytest.mark.on("postgresql", "mysql")
def test_listener_added_later_runs(host: AppState, database_kind: str) -> None:
    """A listener added after the engine of flask-bgjobs was created runs for its next
    connections."""
    _create_tables(host)
    with host.store.read():
        pass
    host.store.dispose()
    setting = {
        "postgresql": ("SET application_name TO 'later'", "SHOW application_name"),
        "mysql": ("SET @later = 'later'", "SELECT @later"),
    }
    set_it, show_it = setting[database_kind]
    _listen(host, "connect", _execute_on_connection(set_it))
    with host.store.read() as connection:
        assert connection.exec_driver_sql(show_it).scalar() == "later"


@pytest.mark.on("postgresql")
def test_role_applies_to_all_statements(host: AppState) -> None:
    """With a listener that sets a role, the statements of flask-bgjobs run as that role."""
    role = f"bgjobs_role_{os.getpid()}"
    _db(host.app).drop_all()
    with _db(host.app).engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        connection.exec_driver_sql(f"GRANT ALL ON SCHEMA public TO {role}")
    _db(host.app).engine.dispose()
    try:
        _listen(host, "connect", _execute_on_connection(f"SET ROLE {role}"))
        _create_tables(host)
        _enqueue_joined_and_saved(host)
        with host.store.read() as connection:
            assert connection.exec_driver_sql("SELECT current_user").scalar() == role
        assert _run_all(host) == 2
    finally:
        _db(host.app).session.remove()
        _db(host.app).engine.dispose()
        host.store.dispose()
        engine = sa.create_engine(_db(host.app).engine.url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role} CASCADE")
            connection.exec_driver_sql(f"DROP ROLE {role}")


@pytest.mark.on("postgresql")
def test_listener_cannot_turn_autocommit_on(host: AppState) -> None:
    """A listener that turns autocommit on does not disable the transactions of flask-bgjobs."""

    def autocommit(connection: Any, _record: object) -> None:
        connection.autocommit = True

    _create_tables(host)
    _listen(host, "connect", autocommit)

    def fail(connection: sa.Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        host.store.transaction(fail)
    with host.store.read() as connection:
        assert not sa.inspect(connection).has_table("half")


class _EncryptedConnection(sqlite3.Connection):
    """Refuses every statement before ``PRAGMA key``, as for an encrypted file."""

    is_open = False

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return super().cursor(_EncryptedCursor, *args, **kwargs)


class _EncryptedCursor(sqlite3.Cursor):
    def execute(self, statement: str, *args: Any) -> Any:
        connection: Any = self.connection
        if statement.startswith("PRAGMA key"):
            connection.is_open = True
        if not connection.is_open:
            raise sqlite3.DatabaseError("file is not a database")
        return super().execute(statement, *args)


@pytest.mark.on("sqlite")
def test_key_of_encrypted_file_is_set_first(make_host: Callable[..., AppState]) -> None:
    """A listener that sets the key of an encrypted file runs before any statement of
    flask-bgjobs."""
    state = make_host(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"factory": _EncryptedConnection}})
    _listen(state, "connect", _execute_on_connection("PRAGMA key = 'secret'"), insert=True)
    _create_tables(state)
    _enqueue_joined_and_saved(state)
    assert _run_all(state) == 2
    assert "matches the models" in _check(state, 0)


def test_pool_listeners_run_in_order(host: AppState) -> None:
    """The host's listeners get all events of the connections of flask-bgjobs, each once."""
    _create_tables(host)
    _db(host.app).session.remove()
    _db(host.app).engine.dispose()
    events: list[str] = []
    for name in ("connect", "checkout", "reset", "checkin", "close"):
        _listen(host, name, lambda *_, name=name: events.append(name))
    engine_connections: list[object] = []

    def on_class(connection: object, _record: object) -> None:
        engine_connections.append(connection)

    sa.event.listen(sa.Engine, "connect", on_class)
    try:
        with host.store.read() as connection:
            connection.execute(sa.select(1))
        assert events == ["connect", "checkout", "reset", "checkin"]
        assert len(engine_connections) == 1
        host.store.dispose()
        assert events[-1] == "close"
    finally:
        sa.event.remove(sa.Engine, "connect", on_class)


# SQLAlchemy 2.0 leaves the connection of a failed listener to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("event", ["connect", "checkout"])
def test_failing_listener_is_a_database_error(host: AppState, event: str) -> None:
    """An exception in a listener is raised as a database error, and a worker waits until the
    listener works again."""
    _create_tables(host)
    _enqueue_joined_and_saved(host)
    worker = Worker(host, WorkerOptions(burst=True))
    host.store.dispose()
    broken = True

    def fail(*_: object) -> None:
        if broken:
            raise ValueError("no tenant")

    _listen(host, event, fail)
    with pytest.raises(OperationalError, match="no tenant"), host.store.read():
        pass
    broken = False
    worker.run()
    assert sum(worker.counts.values()) == 2


def test_failing_checkin_listener_does_not_hide_a_commit(
    host: AppState, caplog: pytest.LogCaptureFixture
) -> None:
    """If a ``checkin`` listener raises, the commit before it still succeeds, and the connection is
    not reused."""
    _create_tables(host)
    closed: list[object] = []

    def fail(_connection: Any, _record: Any) -> None:
        raise ValueError("no tenant")

    with host.store.read():
        pass
    _listen(host, "close", lambda *_: closed.append(1))
    _listen(host, "checkin", fail)
    job = run_background_job("tests.jobs.echo", session=None)
    assert host.store.get(job.id) is not None
    assert closed
    assert "A listener of 'checkin' raised" in caplog.text


@pytest.mark.on("postgresql")
@pytest.mark.parametrize("schema", [None, "shop"])
def test_schema_translate_map_of_engine(
    make_host: Callable[..., AppState], schema: str | None
) -> None:
    """``schema_translate_map`` in the engine's options applies to all jobs."""
    options = {"execution_options": {"schema_translate_map": {schema: TENANT}}}
    app = Flask("shop")
    app.config.update(make_host().app.config, SQLALCHEMY_ENGINE_OPTIONS=options)
    db = SQLAlchemy(metadata=sa.MetaData(schema=schema))
    db.init_app(app)
    from flask_bgjobs import BgJobs

    BgJobs(app)
    state = state_of(app)
    try:
        with app.app_context():
            with db.engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE SCHEMA {TENANT}")
            db.create_all()
            _enqueue_joined_and_saved(state)
            with state.store.read() as connection:
                found = connection.exec_driver_sql(f"SELECT count(*) FROM {TENANT}.bgjobs_job")
                assert found.scalar() == 2
            assert _run_all(state) == 2
            assert "matches the models" in _check(state, 0)
    finally:
        with app.app_context():
            db.session.remove()
            db.engine.dispose()
        state.store.dispose()


@pytest.mark.on("postgresql")
def test_schema_translate_map_of_session(host: AppState) -> None:
    """A job that joins a session with a translated schema is saved where workers look for it, and
    the session keeps its own schema."""
    _create_tables(host)
    session = _db(host.app).session
    options = {"schema_translate_map": {None: TENANT}}
    connection = session.connection(execution_options=options)
    connection.exec_driver_sql(f"CREATE SCHEMA {TENANT}")
    _create_tables_with(connection)
    run_background_job("tests.jobs.echo", session=session)
    assert connection.get_execution_options()["schema_translate_map"][None] == TENANT
    session.commit()
    assert _run_all(host) == 1


def _create_tables_with(connection: sa.Connection) -> None:
    from flask_bgjobs.models import Base

    Base.metadata.create_all(connection)


class TestCheck:
    @pytest.mark.on("postgresql")
    def test_reports_another_schema(self, host: AppState) -> None:
        """``check`` reports if the host's session uses a different schema than flask-bgjobs."""
        with _db(host.app).engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {TENANT}")
        _create_tables(host)
        session = _db(host.app).session

        def set_path(_session: Any, _transaction: Any, connection: sa.Connection) -> None:
            connection.exec_driver_sql(f"SET LOCAL search_path TO {TENANT}")

        sa.event.listen(session, "after_begin", set_path)
        output = _check(host, 1)
        assert f"search_path: db.session has {TENANT}, and flask-bgjobs has public" in output
        assert "table of jobs: db.session has None" in output
        assert "`connect` listener" in output

    @pytest.mark.on("mysql")
    def test_reports_another_database(self, host: AppState) -> None:
        """``check`` reports if the host's session uses a different database than flask-bgjobs."""
        _create_tables(host)
        own = _db(host.app).engine.url.database

        def use(_session: Any, _transaction: Any, connection: sa.Connection) -> None:
            connection.exec_driver_sql("USE mysql")

        sa.event.listen(_db(host.app).session, "after_begin", use)
        output = _check(host, 1)
        assert f"database: db.session has mysql, and flask-bgjobs has {own}" in output


def test_idle_connection_has_no_transaction(host: AppState) -> None:
    """If a ``checkin`` listener begins a transaction, it is ended before the connection is idle."""
    _create_tables(host)
    _listen(host, "checkin", _execute_on_connection("SELECT 1"))
    with host.store.read() as connection:
        connection.execute(sa.select(1))
    wait_until(lambda: not _in_transaction(host), "an idle connection")


def _in_transaction(state: AppState) -> bool:
    """Whether the idle connection of flask-bgjobs is in a transaction."""
    taken = state.store.engine.pool._do_get()  # type: ignore[attr-defined]  # without the events of a checkout
    try:
        connection: Any = taken.dbapi_connection
        if state.store.engine.dialect.name == "postgresql":
            return bool(connection.info.transaction_status)
        if state.store.engine.dialect.name == "sqlite":
            return bool(connection.in_transaction)
        return bool(connection.server_status & 1)
    finally:
        state.store.engine.pool._do_return_conn(taken)  # type: ignore[attr-defined]  # the same
