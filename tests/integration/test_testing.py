"""``flask_bgjobs.testing``: jobs in the tests of host apps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import BgJobsError, run_background_job
from flask_bgjobs.app_state import state_of
from flask_bgjobs.testing import drain, inline
from tests.conftest import stored


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
