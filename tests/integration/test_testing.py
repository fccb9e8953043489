"""``flask_bgjobs.testing``: jobs in the tests of host apps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, globals, has_app_context
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from flask_bgjobs import BgJobsError, ConfigError, run_background_job
from flask_bgjobs.state import state_of
from flask_bgjobs.testing import drain, inline
from flask_bgjobs.worker.worker import Worker
from tests.apps import build_app
from tests.conftest import count_jobs, stored


@pytest.fixture(params=["file", "memory"])
def app(request: pytest.FixtureRequest, make_app: Callable[..., Flask]) -> Flask:
    """An app on SQLite, with a file and in memory."""
    return make_app() if request.param == "file" else make_app(database_url="sqlite://")


def _commit(app: Flask) -> None:
    app.extensions["sqlalchemy"].session.commit()


class TestDrain:
    def test_runs_due_jobs_and_returns_outcomes(self, app: Flask) -> None:
        """``drain`` runs all due jobs in this thread by priority; delayed jobs wait."""
        low = run_background_job("tests.jobs.echo", parameters=["low"])
        high = run_background_job("tests.jobs.echo", parameters=["high"], priority="high")
        later = run_background_job("tests.jobs.echo", delay=60)
        bad = run_background_job("tests.jobs.fail", priority=-1, retries=0)
        _commit(app)
        outcomes = drain(app)
        assert [(o.job_id, o.status) for o in outcomes] == [
            (high.id, "completed"),
            (low.id, "completed"),
            (bad.id, "failed"),
        ]
        assert [o.result for o in outcomes[:2]] == ["high", "low"]
        assert outcomes[2].error == "ValueError: no"
        assert stored(app, later).status == "scheduled"

    def test_only_some_queues(self, app: Flask) -> None:
        """``queues`` limits the jobs that run."""
        run_background_job("tests.jobs.echo")
        mail = run_background_job("tests.jobs.echo", queue="mail")
        _commit(app)
        assert [o.job_id for o in drain(app, queues=["mail"])] == [mail.id]

    def test_due_retries_run(self, app: Flask) -> None:
        """A retry without a delay runs in the same drain."""
        run_background_job("tests.jobs.fail_times", parameters=[1], retries=1, retry_delay=0)
        _commit(app)
        assert [o.status for o in drain(app)][-1:] == ["completed"]

    def test_jobs_enqueued_by_jobs_run(self, app: Flask) -> None:
        """A job enqueued by a job without a commit runs in the same drain, as it would in a
        worker."""
        run_background_job("tests.jobs.enqueue_another", parameters=[5])
        _commit(app)
        assert [o.result for o in drain(app)][-1:] == [5]

    def test_no_jobs(self, app: Flask) -> None:
        """Without jobs, there are no outcomes."""
        assert drain(app) == []


def test_drain_refuses_uncommitted_changes_in_memory(make_app: Callable[..., Flask]) -> None:
    """In memory, ``drain`` refuses uncommitted changes, because its commit would include them."""
    app = make_app(database_url="sqlite://")
    with app.app_context():
        run_background_job("tests.jobs.echo")
        with pytest.raises(BgJobsError, match="commit before drain"):
            drain(app)


class TestInline:
    def test_job_has_run_when_enqueue_returns(self, app: Flask) -> None:
        """Inside ``inline``, enqueue runs the job and returns it finished."""
        with inline(app):
            job = run_background_job("tests.jobs.SampleJob", "execute", ["x"], delay=60)
        assert (job.status, job.result) == ("completed", "executed: x")

    def test_failed_job_does_not_raise(self, app: Flask) -> None:
        """A job that fails does not raise in the test."""
        with inline(app):
            job = run_background_job("tests.jobs.fail", retries=1)
        assert (job.status, job.error) == ("retrying", "ValueError: no")

    def test_jobs_wait_again_after_the_block(self, app: Flask) -> None:
        """After the block, jobs wait for a worker again."""
        with inline(app):
            pass
        job = run_background_job("tests.jobs.echo")
        _commit(app)
        assert stored(app, job).status == "pending"

    def test_joined_job_runs_at_the_commit(self, app: Flask) -> None:
        """A joined job runs when its transaction is committed, and not after a rollback."""
        session = app.extensions["sqlalchemy"].session
        session.execute(sa.text("CREATE TABLE thing (id INTEGER)"))
        session.commit()
        with inline(app):
            session.execute(sa.text("INSERT INTO thing VALUES (1)"))
            job = run_background_job("tests.jobs.echo", parameters=[1])
            assert job.status == "pending"
            session.commit()
            assert job.status == "completed"
            session.execute(sa.text("INSERT INTO thing VALUES (2)"))
            lost = run_background_job("tests.jobs.echo", parameters=[2])
            session.rollback()
            assert lost.status == "pending"
        assert state_of(app).store.get(lost.id) is None
        assert session.execute(sa.text("SELECT count(*) FROM thing")).scalar() == 1

    def test_job_of_given_session_runs_at_its_commit(self, app: Flask) -> None:
        """With ``session=``, the job runs when that session is committed, and is lost with its
        rollback."""
        session = app.extensions["sqlalchemy"].session
        with inline(app):
            lost = run_background_job("tests.jobs.echo", session=session)
            assert lost.status == "pending"
            session.rollback()
            job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
            session.commit()
        assert job.status == "completed"
        # On SQLite, the next job has the id of the lost one.
        assert count_jobs(app) == 1


def test_drain_needs_no_app_context(make_app: Callable[..., Flask]) -> None:
    """``drain(app)`` pushes an app context, also in memory."""
    app = make_app(database_url="sqlite://")
    with app.app_context():
        run_background_job("tests.jobs.echo")
        _commit(app)
    # pytest-flask pushes a context for the test.
    context = globals.app_ctx._get_current_object() if has_app_context() else None
    assert context is None or context.app is not app
    assert [o.status for o in drain(app)] == ["completed"]


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("url", [None, "sqlite://"], ids=["file", "memory"])
def test_uncommitted_changes_on_sqlite_are_refused(
    make_app: Callable[..., Flask], url: str | None
) -> None:
    """``drain`` and ``inline`` refuse uncommitted changes on SQLite, and leaving ``inline`` with
    such changes does not commit them."""
    app = make_app() if url is None else make_app(database_url=url)
    with app.app_context():
        session = app.extensions["sqlalchemy"].session
        session.execute(sa.text("CREATE TABLE thing (id INTEGER)"))
        session.commit()
        insert = sa.text("INSERT INTO thing VALUES (1)")
        session.execute(insert)
        with pytest.raises(BgJobsError, match="commit before drain"):
            drain(app)
        with pytest.raises(BgJobsError, match="commit before inline"), inline(app):
            pass
        session.rollback()
        with inline(app):
            session.execute(insert)
        session.rollback()
        assert session.execute(sa.text("SELECT count(*) FROM thing")).scalar() == 0


def _bind_engines(app: Flask, connection: sa.Connection) -> None:
    """Bind the engine, as Flask-SQLAlchemy's own tests do."""
    app.extensions["sqlalchemy"].engines[None] = connection


def _bind_sessions(app: Flask, connection: sa.Connection) -> None:
    """Bind all sessions, as the SQLAlchemy documentation does."""
    maker = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
    app.extensions["sqlalchemy"].session = scoped_session(maker)


def _bind_one_session(app: Flask, connection: sa.Connection) -> None:
    session = Session(bind=connection, join_transaction_mode="create_savepoint")
    app.extensions["sqlalchemy"].session = scoped_session(lambda: session)
    app.extensions["sqlalchemy"].session()


@pytest.fixture(params=[_bind_engines, _bind_sessions, _bind_one_session])
def bound(request: pytest.FixtureRequest, database_url: str) -> Iterator[Flask]:
    """An app whose ``db.session`` is bound to a connection with a transaction that is rolled
    back."""
    app = build_app(database_url)
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        engine, session = db.engine, db.session
        if engine.name == "sqlite":
            # The SQLAlchemy documentation recommends this for savepoints.
            sa.event.listen(engine, "connect", _disable_implicit_transactions)
            sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
        db.create_all()
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE thing (id INTEGER)")
        with engine.connect() as connection:
            transaction = connection.begin()
            request.param(app, connection)
            yield app
            db.session.remove()
            db.engines[None], db.session = engine, session
            if transaction.is_active:
                transaction.rollback()
        assert state_of(app).store.outer_connection is None
        assert count_jobs(app) == 0
        with state_of(app).store.read() as connection:
            for table in ("thing", "bgjobs_worker"):
                assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0
        engine.dispose()
        state_of(app).store.dispose()


def _disable_implicit_transactions(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _add(app: Flask) -> Any:
    session = app.extensions["sqlalchemy"].session
    session.execute(sa.text("INSERT INTO thing VALUES (1)"))
    return session


class TestInRolledBackTransaction:
    """Tests of a host that bind ``db.session`` to a connection and roll back its transaction."""

    def test_inline_runs_jobs(self, bound: Flask) -> None:
        """``inline`` runs committed jobs on the connection of the test."""
        with inline(bound):
            alone = run_background_job("tests.jobs.echo", parameters=[1])
            assert (alone.status, alone.result) == ("completed", 1)
            session = _add(bound)
            joined = run_background_job("tests.jobs.echo", parameters=[2])
            assert joined.status == "pending"
            session.commit()
            assert (joined.status, joined.result) == ("completed", 2)

    def test_drain_runs_jobs(self, bound: Flask) -> None:
        """``drain`` finds the jobs of the test's transaction, and refuses uncommitted changes."""
        session = _add(bound)
        run_background_job("tests.jobs.echo", parameters=[1])
        with pytest.raises(BgJobsError, match="commit before drain"):
            drain(bound)
        session.commit()
        run_background_job("tests.jobs.echo", parameters=[2], session=None)
        session.commit()
        assert [o.result for o in drain(bound)] == [1, 2]

    def test_methods_of_a_job(self, bound: Flask) -> None:
        """``refresh``, ``wait``, ``cancel`` and the queries of pages find the job."""
        session = _add(bound)
        job = run_background_job("tests.jobs.echo")
        session.commit()
        assert job.refresh().status == "pending"
        assert job.cancel().status == "cancelled"
        assert job.wait(timeout=60).status == "cancelled"
        with state_of(bound).store.reading(60), state_of(bound).store.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM bgjobs_job").scalar() == 1

    def test_worker_is_refused(self, bound: Flask) -> None:
        """A worker needs several connections, so it is refused, and the error names
        ``flask_bgjobs.testing``."""
        with pytest.raises(ConfigError, match=r"use flask_bgjobs\.testing"):
            Worker(state_of(bound))
