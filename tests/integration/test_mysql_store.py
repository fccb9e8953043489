"""Features and limits of MySQL and MariaDB."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Callable
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.enqueue.enqueue import enqueue
from flask_bgjobs.errors import DatabaseNotSupported, InvalidJob
from flask_bgjobs.job.records import Outcome, Report
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.job.text import storable
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store.dialects.mysql import require_skip_locked
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.registration import register
from flask_bgjobs.worker.worker import Worker
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, count_jobs, stored

pytestmark = pytest.mark.on("mysql")

MakeApp = Callable[..., Flask]
OWLS = "🦉'\\\"%s"
"""A character of four bytes, and characters with a meaning in SQL and in PyMySQL."""


def session_config(**variables: Any) -> dict[str, Any]:
    """Configuration of a host whose sessions have these variables."""
    assignments = ", ".join(f"SESSION {name} = {value}" for name, value in variables.items())
    return {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"init_command": f"SET {assignments}"}}}


def variable(connection: sa.Connection, name: str) -> Any:
    row = connection.exec_driver_sql(f"SHOW VARIABLES LIKE '{name}'").one()
    return row[1]


def isolation(connection: sa.Connection) -> Any:
    name = "tx_isolation" if connection.dialect.is_mariadb else "transaction_isolation"  # type: ignore[attr-defined]
    return variable(connection, name)


def test_transactions_are_read_committed(make_app: MakeApp) -> None:
    """Transactions of flask-bgjobs are READ COMMITTED, and the host's isolation level does not
    change."""
    options = {"SQLALCHEMY_ENGINE_OPTIONS": {"isolation_level": "SERIALIZABLE"}}
    app = make_app(**options)
    store = state_of(app).store
    assert store.transaction(isolation) == "READ-COMMITTED"
    with store.host_engine.connect() as connection:
        assert isolation(connection) == "SERIALIZABLE"


@pytest.mark.parametrize(
    "sql_mode",
    ["''", "'STRICT_ALL_TABLES,ANSI_QUOTES,PIPES_AS_CONCAT'", "'NO_BACKSLASH_ESCAPES,ANSI'"],
)
def test_session_variables_of_host_have_no_effect(make_app: MakeApp, sql_mode: str) -> None:
    """A job runs with any SQL mode, time zone and character set of the host's sessions."""
    config = session_config(sql_mode=sql_mode, time_zone="'+05:00'")
    config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]["charset"] = "latin1"
    app = make_app(**config)
    with app.app_context():
        job = run_background_job("tests.jobs.echo", parameters=[OWLS], retry_delay=3_600)
        state = state_of(app)
        worker = register(state, OWLS)
        (spec,) = state.store.claim(worker, 1)
        assert spec.parameters == [OWLS]
        assert abs(spec.claimed_at - dt.datetime.now(dt.UTC).replace(tzinfo=None)).seconds < 60
        report = Report(meta_json='{"a":1}', progress_note=OWLS, lines=(OWLS,))
        failed = Outcome(
            spec.id,
            1,
            OutcomeKind.FAILED,
            error_type="E",
            error=OWLS,
            traceback=OWLS,
            report=report,
        )
        state.store.settle(worker, OWLS, [(spec, failed)])
        found = stored(app, job)
        assert (found.status, found.error, found.progress_note) == ("retrying", OWLS, OWLS)
        left = (found.run_at - state.store.clock()).total_seconds()
        assert 3_600 - DEADLINE_SECONDS < left <= 3_600


def test_longest_texts_are_stored(app: Flask, state: AppState) -> None:
    """The longest texts of a job are stored completely, also with characters of 4 bytes."""
    delays = [86_400.125] * 100
    options = {"tags": ["🦉" * 64] * 20, "owner": "🦉" * 255, "unique_key": "🦉" * 255}
    job = run_background_job("tests.jobs.echo", retries=1, retry_delay=delays, **options)
    worker = register(state, "one", queues=[f"{'q' * 60}{n}" for n in range(1_500)])
    (spec,) = state.store.claim(worker, 1)
    assert spec.retry_policy.delays == tuple(delays)
    longest, line = storable("🦉" * 100_000), storable("🦉" * 100_000)
    outcome = Outcome(
        spec.id,
        1,
        OutcomeKind.FAILED,
        error=longest,
        traceback="🦉" * 65_536,
        report=Report(lines=(line,)),
    )
    state.store.settle(worker, "one", [(spec, outcome)])
    found = stored(app, job)
    assert (found.error, found.tags, found.owner) == (longest, options["tags"], options["owner"])


def test_parameters_larger_than_a_packet_are_refused(make_app: MakeApp) -> None:
    """An enqueue larger than the server's packet limit is refused, and the host's transaction and
    connection stay usable."""
    app = make_app(BGJOBS_MAX_PAYLOAD=100_000_000)
    with app.app_context():
        db = state_of(app).db
        db.session.execute(sa.text("CREATE TABLE note (text VARCHAR(9))"))
        db.session.execute(sa.text("INSERT INTO note VALUES ('kept')"))
        for text in ('"' * 5_000_000, "x" * 18_000_000):
            with pytest.raises(InvalidJob, match=r"16,777,216 bytes"):
                run_background_job("tests.jobs.echo", parameters=[text])
        db.session.commit()
        assert db.session.scalar(sa.text("SELECT text FROM note")) == "kept"
        with pytest.raises(InvalidJob):
            run_background_job("tests.jobs.echo", parameters=["x" * 18_000_000])
        assert count_jobs(app) == 0


@pytest.mark.parametrize("step", [1, 3])
def test_each_job_of_many_has_its_own_id(make_app: MakeApp, step: int) -> None:
    """Jobs enqueued together have their own ids and times, at any number and size."""
    app = make_app(**session_config(auto_increment_increment=step))
    with app.app_context():
        state = state_of(app)
        sizes = [10, 500_000, 100] * 3 + [2_000] * 600 + [1_000_000] * 2
        sets = [[f"{n}:" + "\\" * (size // 4)] for n, size in enumerate(sizes)]
        jobs = enqueue(state, "tests.jobs.echo", None, sets, JobOptions(delay=60.000001))
        assert len({job.id for job in jobs}) == len(jobs) == count_jobs(app)
        found = {job.id: job for job in state.store.get_many([job.id for job in jobs])}
        for job, parameters in zip(jobs, sets, strict=True):
            assert found[job.id].parameters == parameters
            assert (found[job.id].created_at, found[job.id].run_at) == (job.created_at, job.run_at)
            assert job.run_at - job.created_at == dt.timedelta(seconds=60, microseconds=1)


class TestUniqueKeys:
    """Unique keys in a host's transaction, which is REPEATABLE READ by default."""

    def test_holder_after_the_snapshot_is_found(self, app: Flask, state: AppState) -> None:
        """A joined job finds a holder of its key that was committed after the host's first read."""
        session = state.db.session
        session.execute(sa.text("SELECT count(*) FROM bgjobs_job")).scalar()
        holder = run_background_job("tests.jobs.echo", unique_key="k", session=None)
        joined = run_background_job("tests.jobs.echo", unique_key="k", session=session)
        assert (joined.id, joined.deduplicated) == (holder.id, True)
        session.commit()
        assert count_jobs(app) == 1

    def test_taken_key_keeps_writes_of_the_host(self, app: Flask, state: AppState) -> None:
        """The host's writes before and after a taken key are committed."""
        run_background_job("tests.jobs.echo", unique_key="k")
        session = state.db.session
        before = run_background_job("tests.jobs.echo", session=session)
        taken = run_background_job("tests.jobs.echo", unique_key="k", session=session)
        after = run_background_job("tests.jobs.echo", session=session)
        assert taken.deduplicated
        session.commit()
        assert [stored(app, job).status for job in (before, after)] == ["pending", "pending"]
        assert after.refresh().committed

    def test_other_conflicts_are_raised(self, app: Flask, state: AppState) -> None:
        """A conflict on another unique index is raised."""
        with state.store.engine.begin() as connection:
            connection.exec_driver_sql("CREATE UNIQUE INDEX one_owner ON bgjobs_job (owner)")
        run_background_job("tests.jobs.echo", unique_key="a", owner="x")
        with pytest.raises(sa.exc.IntegrityError, match="one_owner"):
            run_background_job("tests.jobs.echo", unique_key="b", owner="x")


class TestConnections:
    def test_lost_connection_is_replaced(self, state: AppState) -> None:
        """A connection that was killed, cut or closed is recognized as lost, and the next use opens
        a new one."""
        for lose in (self._kill, self._cut, self._close):
            with state.store.read() as connection:
                lose(state, connection)
                with pytest.raises(sa.exc.DBAPIError) as caught:
                    connection.execute(sa.select(state.store.now))
            assert caught.value.connection_invalidated, lose
            assert state.store.clock()

    def _kill(self, state: AppState, connection: sa.Connection) -> None:
        number = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar()
        with state.store.host_engine.connect() as other:
            other.exec_driver_sql(f"KILL {number}")

    def _cut(self, state: AppState, connection: sa.Connection) -> None:
        state.store.sever(connection.connection.driver_connection)

    def _close(self, _state: AppState, connection: sa.Connection) -> None:
        driver_connection: Any = connection.connection.driver_connection
        driver_connection._force_close()

    @pytest.mark.parametrize("number", [1053, 2006, 2013, 4031])
    def test_error_numbers_of_lost_connections(self, state: AppState, number: int) -> None:
        """The error numbers of a lost connection invalidate it."""
        sa.event.listen(state.store.engine, "before_cursor_execute", _raiser(number))
        with (
            state.store.read() as connection,
            pytest.raises(sa.exc.OperationalError) as caught,
        ):
            connection.execute(sa.select(state.store.now))
        assert caught.value.connection_invalidated

    def test_silent_server_times_out(
        self, database_kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection attempt to a server that sends no greeting times out."""
        monkeypatch.setattr("flask_bgjobs.store.dialects.mysql._CONNECT_SECONDS", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"mysql+pymysql://root@127.0.0.1:{silent.getsockname()[1]}/none"
            app = build_app(url)
            with app.app_context(), pytest.raises(sa.exc.OperationalError, match="timed out"):
                state_of(app).store.clock()

    @pytest.mark.parametrize("hosts", [None, 77])
    def test_statements_have_no_driver_timeout(self, make_app: MakeApp, hosts: int | None) -> None:
        """After the connect, only the host's own read timeout applies to a connection."""
        arguments = {} if hosts is None else {"read_timeout": hosts}
        app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"connect_args": arguments})
        store = state_of(app).store
        with store.read() as ours, store.host_engine.connect() as host:
            for connection in (ours, host):
                driver_connection: Any = connection.connection.driver_connection
                assert driver_connection._read_timeout == hosts
                assert driver_connection._write_timeout is None


def _raiser(number: int) -> Callable[..., None]:
    def fail(conn: Any, cursor: Any, *_: object) -> None:
        def execute(*_: object) -> None:
            raise pymysql.err.OperationalError(number, "gone")

        cursor.execute = execute

    return fail


class TestServers:
    @pytest.mark.parametrize(
        ("is_mariadb", "version", "message"),
        [
            (False, (5, 7, 44), "MySQL has since 8.0.1, but this server is MySQL 5.7.44"),
            (False, (8, 0, 0), "8.0.1"),
            (True, (10, 5, 29, "MariaDB"), "MariaDB has since 10.6.0, but this server is MariaDB"),
        ],
    )
    def test_old_server_is_refused(
        self,
        app: Flask,
        state: AppState,
        monkeypatch: pytest.MonkeyPatch,
        is_mariadb: bool,
        version: tuple[Any, ...],
        message: str,
    ) -> None:
        """For a server without SKIP LOCKED, the first statement and the start of a worker raise an
        error with its version and the required one."""
        dialect: Any = state.store.engine.dialect
        state.store.clock()
        monkeypatch.setattr(dialect, "is_mariadb", is_mariadb)
        monkeypatch.setattr(dialect, "server_version_info", version)
        state.store.engine.dispose()
        for use in (state.store.clock, lambda: Worker(state, WorkerOptions())):
            with pytest.raises(DatabaseNotSupported, match=message):
                use()

    def test_current_server_is_accepted(self, state: AppState) -> None:
        """The server of the tests is new enough."""
        state.store.clock()
        require_skip_locked(state.store.engine.dialect)
