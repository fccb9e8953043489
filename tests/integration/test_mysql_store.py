"""What only MySQL and MariaDB can get wrong."""

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
from flask_bgjobs.worker.worker import Worker, WorkerOptions, register
from tests.apps import build_app
from tests.conftest import count_jobs, stored

pytestmark = pytest.mark.on("mysql")

MakeApp = Callable[..., Flask]
OWLS = "🦉'\\\"%s"
"""Letters of four bytes, and what has a meaning in SQL and in PyMySQL."""


def with_session(**variables: Any) -> dict[str, Any]:
    """Configuration of a host whose sessions have these variables."""
    assignments = ", ".join(f"SESSION {name} = {value}" for name, value in variables.items())
    return {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"init_command": f"SET {assignments}"}}}


def variable(connection: sa.Connection, name: str) -> Any:
    row = connection.exec_driver_sql(f"SHOW VARIABLES LIKE '{name}'").one()
    return row[1]


def isolation(connection: sa.Connection) -> Any:
    name = "tx_isolation" if connection.dialect.is_mariadb else "transaction_isolation"  # type: ignore[attr-defined]
    return variable(connection, name)


def test_our_transactions_read_what_is_committed(make_app: MakeApp) -> None:
    """Ours are READ COMMITTED whatever the host's are, which stay as they were."""
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
def test_the_hosts_session_does_not_matter(make_app: MakeApp, sql_mode: str) -> None:
    """A job goes its way whatever SQL mode, time zone and letters the host's sessions have."""
    config = with_session(sql_mode=sql_mode, time_zone="'+05:00'")
    config["SQLALCHEMY_ENGINE_OPTIONS"]["connect_args"]["charset"] = "latin1"
    app = make_app(**config)
    with app.app_context():
        job = run_background_job("tests.jobs.echo", parameters=[OWLS], retry_delay=60)
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
        assert 50 < (found.run_at - state.store.clock()).total_seconds() <= 60


def test_the_longest_texts_are_stored(app: Flask, state: AppState) -> None:
    """What may be written of a job fits, letter by letter, also where a letter takes 4 bytes."""
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
    """An enqueue over which the server would close the host's connection is refused, and the
    host's transaction goes on."""
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
    """Jobs enqueued together come back with their own ids and times, however many and large."""
    app = make_app(**with_session(auto_increment_increment=step))
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
    """In a host's transaction, which is REPEATABLE READ by default."""

    def test_a_holder_younger_than_the_snapshot_is_found(self, app: Flask, state: AppState) -> None:
        """A joined job meets a holder that was committed after the host's first read."""
        session = state.db.session
        session.execute(sa.text("SELECT count(*) FROM bgjobs_job")).scalar()
        holder = run_background_job("tests.jobs.echo", unique_key="k", session=None)
        joined = run_background_job("tests.jobs.echo", unique_key="k", session=session)
        assert (joined.id, joined.deduplicated) == (holder.id, True)
        session.commit()
        assert count_jobs(app) == 1

    def test_a_taken_key_undoes_nothing_of_the_hosts(self, app: Flask, state: AppState) -> None:
        """What the host wrote before and after a taken key is there after its commit."""
        run_background_job("tests.jobs.echo", unique_key="k")
        session = state.db.session
        before = run_background_job("tests.jobs.echo", session=session)
        taken = run_background_job("tests.jobs.echo", unique_key="k", session=session)
        after = run_background_job("tests.jobs.echo", session=session)
        assert taken.deduplicated
        session.commit()
        assert [stored(app, job).status for job in (before, after)] == ["pending", "pending"]
        assert after.refresh().committed

    def test_another_error_is_not_swallowed(self, app: Flask, state: AppState) -> None:
        """Only the conflict of the key counts as one."""
        with state.store.engine.begin() as connection:
            connection.exec_driver_sql("CREATE UNIQUE INDEX one_owner ON bgjobs_job (owner)")
        run_background_job("tests.jobs.echo", unique_key="a", owner="x")
        with pytest.raises(sa.exc.IntegrityError, match="one_owner"):
            run_background_job("tests.jobs.echo", unique_key="b", owner="x")


class TestConnections:
    def test_a_lost_connection_is_known_as_one(self, state: AppState) -> None:
        """Killed by the server, cut on the way or closed here: the next use opens a new one."""
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
    def test_numbers_of_lost_connections(self, state: AppState, number: int) -> None:
        """A server that shuts down or has closed the connection says so by a number."""
        sa.event.listen(state.store.engine, "before_cursor_execute", _raiser(number))
        with (
            state.store.read() as connection,
            pytest.raises(sa.exc.OperationalError) as caught,
        ):
            connection.execute(sa.select(state.store.now))
        assert caught.value.connection_invalidated

    def test_a_server_that_says_nothing_is_given_up(
        self, database_kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Our connections do not wait for ever for a greeting, and the host's are its own."""
        monkeypatch.setattr("flask_bgjobs.store.dialects.mysql._CONNECT_SECONDS", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"mysql+pymysql://root@127.0.0.1:{silent.getsockname()[1]}/none"
            app = build_app(url)
            with app.app_context(), pytest.raises(sa.exc.OperationalError, match="timed out"):
                state_of(app).store.clock()

    @pytest.mark.parametrize("hosts", [None, 77])
    def test_statements_may_take_their_time(self, make_app: MakeApp, hosts: int | None) -> None:
        """Once there is a connection, nothing but the host's own limit is left on it."""
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
        ("is_mariadb", "version", "said"),
        [
            (False, (5, 7, 44), "MySQL has since 8.0.1, but this server is MySQL 5.7.44"),
            (False, (8, 0, 0), "8.0.1"),
            (True, (10, 5, 29, "MariaDB"), "MariaDB has since 10.6.0, but this server is MariaDB"),
        ],
    )
    def test_an_old_server_is_refused(
        self,
        app: Flask,
        state: AppState,
        monkeypatch: pytest.MonkeyPatch,
        is_mariadb: bool,
        version: tuple[Any, ...],
        said: str,
    ) -> None:
        """A server without SKIP LOCKED is named with its version and the one that is needed, by the
        first statement of ours and by a worker that starts."""
        dialect: Any = state.store.engine.dialect
        state.store.clock()
        monkeypatch.setattr(dialect, "is_mariadb", is_mariadb)
        monkeypatch.setattr(dialect, "server_version_info", version)
        state.store.engine.dispose()
        for use in (state.store.clock, lambda: Worker(state, WorkerOptions())):
            with pytest.raises(DatabaseNotSupported, match=said):
                use()

    def test_a_new_server_is_not(self, state: AppState) -> None:
        """The server that the tests run on is new enough."""
        state.store.clock()
        require_skip_locked(state.store.engine.dialect)
