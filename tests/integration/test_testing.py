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
    """Both kinds of SQLite: a file, and in memory."""
    return make_app() if request.param == "file" else make_app(database_url="sqlite://")


def _commit(app: Flask) -> None:
    app.extensions["sqlalchemy"].session.commit()


class TestDrain:
    def test_runs_what_is_due_and_returns_outcomes(self, app: Flask) -> None:
        """Everything due runs in this thread, best first; delayed jobs stay."""
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
        """``queues`` limits what runs."""
        run_background_job("tests.jobs.echo")
        mail = run_background_job("tests.jobs.echo", queue="mail")
        _commit(app)
        assert [o.job_id for o in drain(app, queues=["mail"])] == [mail.id]

    def test_retries_that_are_due_run_too(self, app: Flask) -> None:
        """A retry without a delay runs in the same drain."""
        run_background_job("tests.jobs.fail_times", parameters=[1], retries=1, retry_delay=0)
        _commit(app)
        assert [o.status for o in drain(app)][-1:] == ["completed"]

    def test_jobs_that_jobs_enqueue_run_too(self, app: Flask) -> None:
        """What a job enqueues without a commit runs in the same drain, as with a worker."""
        run_background_job("tests.jobs.enqueue_another", parameters=[5])
        _commit(app)
        assert [o.result for o in drain(app)][-1:] == [5]

    def test_nothing_to_do(self, app: Flask) -> None:
        """Without jobs there are no outcomes."""
        assert drain(app) == []


def test_drain_refuses_uncommitted_changes_in_memory(make_app: Callable[..., Flask]) -> None:
    """On one connection a commit of ours would be yours: drain says to commit first."""
    app = make_app(database_url="sqlite://")
    with app.app_context():
        run_background_job("tests.jobs.echo")
        with pytest.raises(BgJobsError, match="commit before drain"):
            drain(app)


class TestInline:
    def test_a_job_has_run_when_enqueue_returns(self, app: Flask) -> None:
        """Inside ``inline`` an enqueue runs the job and gives it back finished."""
        with inline(app):
            job = run_background_job("tests.jobs.SampleJob", "execute", ["x"], delay=60)
        assert (job.status, job.result) == ("completed", "executed: x")

    def test_a_failure_is_a_status_and_no_exception(self, app: Flask) -> None:
        """A job that fails does not raise into the test."""
        with inline(app):
            job = run_background_job("tests.jobs.fail", retries=1)
        assert (job.status, job.error) == ("retrying", "ValueError: no")

    def test_afterwards_jobs_wait_again(self, app: Flask) -> None:
        """The block's end restores the usual way."""
        with inline(app):
            pass
        job = run_background_job("tests.jobs.echo")
        _commit(app)
        assert stored(app, job).status == "pending"

    def test_a_joined_job_runs_at_the_commit(self, app: Flask) -> None:
        """With uncommitted changes the job runs when they commit, and not if they do not."""
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

    def test_a_named_session_is_the_callers_to_commit(self, app: Flask) -> None:
        """With ``session=`` the job runs when that session commits, and goes with its rollback."""
        session = app.extensions["sqlalchemy"].session
        with inline(app):
            lost = run_background_job("tests.jobs.echo", session=session)
            assert lost.status == "pending"
            session.rollback()
            job = run_background_job("tests.jobs.echo", parameters=[1], session=session)
            session.commit()
        assert job.status == "completed"
        # SQLite gives the id of a job that never was to the next one.
        assert count_jobs(app) == 1


def test_drain_needs_no_app_context(make_app: Callable[..., Flask]) -> None:
    """``drain(app)`` pushes the context that it needs, also in memory."""
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
    """Beside uncommitted changes SQLite can write nothing: both helpers say to commit first.

    Leaving ``inline`` with such changes commits none of them.
    """
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
    """As Flask-SQLAlchemy's own tests do."""
    app.extensions["sqlalchemy"].engines[None] = connection


def _bind_sessions(app: Flask, connection: sa.Connection) -> None:
    """As SQLAlchemy's documentation does."""
    maker = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
    app.extensions["sqlalchemy"].session = scoped_session(maker)


def _bind_one_session(app: Flask, connection: sa.Connection) -> None:
    session = Session(bind=connection, join_transaction_mode="create_savepoint")
    app.extensions["sqlalchemy"].session = scoped_session(lambda: session)
    app.extensions["sqlalchemy"].session()


@pytest.fixture(params=[_bind_engines, _bind_sessions, _bind_one_session])
def bound(request: pytest.FixtureRequest, database_url: str) -> Iterator[Flask]:
    """An app whose tests roll back a transaction around them."""
    app = build_app(database_url)
    with app.app_context():
        db = app.extensions["sqlalchemy"]
        engine, session = db.engine, db.session
        if engine.name == "sqlite":
            # As SQLAlchemy's documentation does, for savepoints to work.
            sa.event.listen(engine, "connect", _leave_transactions_alone)
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


def _leave_transactions_alone(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _add(app: Flask) -> Any:
    session = app.extensions["sqlalchemy"].session
    session.execute(sa.text("INSERT INTO thing VALUES (1)"))
    return session


class TestInATransactionThatIsRolledBack:
    """The tests of a host bind ``db.session`` to a connection, and roll its transaction back."""

    def test_inline_runs_jobs(self, bound: Flask) -> None:
        """``inline`` runs what was committed, on the connection of the test."""
        with inline(bound):
            alone = run_background_job("tests.jobs.echo", parameters=[1])
            assert (alone.status, alone.result) == ("completed", 1)
            session = _add(bound)
            joined = run_background_job("tests.jobs.echo", parameters=[2])
            assert joined.status == "pending"
            session.commit()
            assert (joined.status, joined.result) == ("completed", 2)

    def test_drain_runs_jobs(self, bound: Flask) -> None:
        """``drain`` finds the jobs of the test's transaction, and says to commit first."""
        session = _add(bound)
        run_background_job("tests.jobs.echo", parameters=[1])
        with pytest.raises(BgJobsError, match="commit before drain"):
            drain(bound)
        session.commit()
        run_background_job("tests.jobs.echo", parameters=[2], session=None)
        session.commit()
        assert [o.result for o in drain(bound)] == [1, 2]

    def test_what_is_asked_of_a_job(self, bound: Flask) -> None:
        """``refresh``, ``wait`` and ``cancel`` see the job, and so do the queries of pages."""
        session = _add(bound)
        job = run_background_job("tests.jobs.echo")
        session.commit()
        assert job.refresh().status == "pending"
        assert job.cancel().status == "cancelled"
        assert job.wait(timeout=60).status == "cancelled"
        with state_of(bound).store.reading(60), state_of(bound).store.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM bgjobs_job").scalar() == 1

    def test_a_worker_says_what_to_use_instead(self, bound: Flask) -> None:
        """A worker needs several connections, and is refused."""
        with pytest.raises(ConfigError, match=r"use flask_bgjobs\.testing"):
            Worker(state_of(bound))
