"""Calls: jobs that are not enqueued yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, current_app

from flask_bgjobs import BgJobs, Call, InvalidJob, Job, JobNotAllowed, Limit, UniqueKeyTaken
from flask_bgjobs.enqueue.decorator import JobFunction
from flask_bgjobs.signals import job_enqueued, job_refused
from flask_bgjobs.state import AppState
from flask_bgjobs.testing import drain
from tests.conftest import count_jobs, stored

ECHO = "tests.jobs.echo"


@pytest.fixture
def bgjobs(app: Flask) -> BgJobs:
    """The extension of the app."""
    return BgJobs()


@pytest.fixture
def statements(state: AppState) -> Iterator[list[str]]:
    """The statements of our own connections that insert jobs."""
    inserts: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("INSERT INTO bgjobs_job"):
            inserts.append(statement)

    engine = state.store.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    yield inserts
    sa.event.remove(engine, "before_cursor_execute", note)


@pytest.fixture
def refused() -> Iterator[list[str]]:
    """The targets of refused jobs."""
    targets: list[str] = []

    def note(_sender: Any, target: str, **_rest: Any) -> None:
        targets.append(target)

    job_refused.connect(note)
    yield targets
    job_refused.disconnect(note)


def echo(name: str = ECHO) -> JobFunction[[Any], Any]:
    """A job function with the name of an allowed one."""

    def function(value: Any) -> Any:
        return value

    return JobFunction(function, name)


class TestCall:
    def test_nothing_is_enqueued(self, app: Flask) -> None:
        """A call holds the name, the parameters and the options of a job, and enqueues nothing."""
        call = echo().using(queue="mail").call(7)
        assert (call.name, call.parameters, call.options.queue) == (ECHO, [7], "mail")
        assert repr(call) == "<Call tests.jobs.echo>"
        assert count_jobs(app) == 0

    def test_enqueue(self, app: Flask, bgjobs: BgJobs) -> None:
        """A call can be enqueued, as often as you like."""
        call = bgjobs.call("tests.jobs.SampleJob", "execute", ["Hello"], priority=5)
        first, second = call.enqueue(), call.enqueue(session=None)
        assert (first.name, first.parameters, first.priority) == (
            "tests.jobs.SampleJob.execute",
            ["Hello"],
            5,
        )
        assert second.id != first.id
        assert stored(app, second).parameters == ["Hello"]

    def test_keyword_parameters(self, app: Flask) -> None:
        """Keyword parameters are stored as a dict."""
        assert echo().call(value=7).enqueue().parameters == {"value": 7}

    def test_errors_come_with_the_enqueue(self, bgjobs: BgJobs, refused: list[str]) -> None:
        """What a call may not do is found when it is enqueued."""
        for call, error in (
            (bgjobs.call("os.remove"), JobNotAllowed),
            (echo().call(object()), InvalidJob),
            (bgjobs.call(ECHO, None, [1], queue="No"), InvalidJob),
        ):
            with pytest.raises(error):
                call.enqueue()
        assert refused == ["os.remove", ECHO, ECHO]

    def test_unknown_option(self, bgjobs: BgJobs) -> None:
        """An option that does not exist is a ``TypeError`` at once."""
        options: dict[str, Any] = {"quene": "mail"}
        with pytest.raises(TypeError, match="quene"):
            bgjobs.call(ECHO, **options)

    def test_session_is_chosen_later(self) -> None:
        """A call of a function with a session is refused, because a call has none."""
        with pytest.raises(InvalidJob, match=r"call\(…\)\.enqueue\(session=…\)"):
            echo().using(session=None).call(7)

    def test_names_of_other_queues(self) -> None:
        """The names that Celery uses are answered with ours."""
        for name in ("s", "si", "signature"):
            with pytest.raises(AttributeError, match=r"did you mean call\(…\)"):
                getattr(echo(), name)


class TestEnqueueMany:
    def test_order(self, app: Flask, bgjobs: BgJobs) -> None:
        """Calls of different functions become jobs in one transaction, in their order."""
        calls = [
            echo().call(1),
            bgjobs.call("tests.jobs.SampleJob", "execute", ["a"]),
            echo().using(queue="mail").call(2),
            echo().call(3),
        ]
        jobs = bgjobs.enqueue_many(calls)
        assert [job.parameters for job in jobs] == [[1], ["a"], [2], [3]]
        assert [job.queue for job in jobs] == ["default", "default", "mail", "default"]
        assert count_jobs(app) == 4
        drain(app)
        assert {stored(app, job).status for job in jobs} == {"completed"}

    def test_all_or_none(self, app: Flask, bgjobs: BgJobs, refused: list[str]) -> None:
        """If one call is refused, none is enqueued."""
        with pytest.raises(JobNotAllowed):
            bgjobs.enqueue_many([echo().call(1), bgjobs.call("os.remove")])
        assert refused == ["os.remove"]
        unique = echo().using(unique_key="k", on_duplicate="raise")
        with pytest.raises(UniqueKeyTaken):
            bgjobs.enqueue_many([echo().call(1), unique.call(2), unique.call(3)])
        assert count_jobs(app) == 0

    def test_few_statements(self, bgjobs: BgJobs, statements: list[str]) -> None:
        """Calls of one function with equal options are inserted by one statement, also if calls of
        other functions are between them."""
        calls = [
            call
            for n in range(50)
            for call in (echo().call(n), echo("tests.jobs.fail").using(retries=0).call(str(n)))
        ]
        bgjobs.enqueue_many(calls)
        assert len(statements) == 2

    def test_options_decide(self, app: Flask, bgjobs: BgJobs) -> None:
        """Each call keeps its own options, among them limits, turns and unique keys."""
        one = Limit("one", concurrency=1, key="{value}")
        calls = [
            echo().using(limits=one, fair="{value}").call(1),
            echo().using(limits=one, fair="{value}").call(2),
            echo().using(unique=True).call(3),
            echo().using(unique=True).call(3),
            echo().using(unique_key="k").call(4),
            echo().using(unique_key="k").call(5),
            echo().using(delay=60).call(6),
        ]
        jobs = bgjobs.enqueue_many(calls)
        assert [job.fair_key for job in jobs[:2]] == ["1", "2"]
        assert jobs[0].limit_key_id != jobs[1].limit_key_id
        assert (jobs[3].id, jobs[3].deduplicated) == (jobs[2].id, True)
        assert (jobs[5].id, jobs[5].parameters) == (jobs[4].id, [4])
        assert jobs[6].status == "scheduled"
        assert count_jobs(app) == 5

    def test_calls_join_the_transaction(self, app: Flask, bgjobs: BgJobs) -> None:
        """Calls join the transaction of a session that holds writes, or of the given session."""
        db = current_app.extensions["sqlalchemy"]
        calls = [echo().call(1), echo("tests.jobs.fail").call("no")]
        jobs = bgjobs.enqueue_many(calls, session=db.session)
        assert not any(job.committed for job in jobs)
        db.session.rollback()
        assert count_jobs(app) == 0
        bgjobs.enqueue_many(iter(calls), session=db.session)
        db.session.commit()
        assert count_jobs(app) == 2

    def test_what_joined_before_an_error_is_announced(self, app: Flask, bgjobs: BgJobs) -> None:
        """If a key is taken, and the caller commits nevertheless, the jobs of earlier calls are
        stored and announced."""
        db = current_app.extensions["sqlalchemy"]
        unique = echo().using(unique_key="k", on_duplicate="raise")
        unique.call(1).enqueue()
        announced: list[Any] = []

        def note(_sender: Any, job: Job) -> None:
            announced.append(job.parameters)

        with job_enqueued.connected_to(note), pytest.raises(UniqueKeyTaken):
            bgjobs.enqueue_many([echo().call(2), unique.call(3)], session=db.session)
        with job_enqueued.connected_to(note):
            db.session.commit()
        assert announced == [[2]]
        assert count_jobs(app) == 2

    def test_no_calls(self, bgjobs: BgJobs) -> None:
        """Without calls, nothing is enqueued."""
        assert bgjobs.enqueue_many([]) == []

    @pytest.mark.parametrize("thing", [7, None, echo()])
    def test_neither_function_nor_calls(self, bgjobs: BgJobs, thing: Any) -> None:
        """The error says what ``enqueue_many`` needs."""
        with pytest.raises(InvalidJob, match="sets of parameters, or a list of calls"):
            bgjobs.enqueue_many(thing)

    @pytest.mark.parametrize("thing", [Job(), "send", (1,)])
    def test_other_things_among_calls(self, bgjobs: BgJobs, thing: Any) -> None:
        """Only calls can be among the calls."""
        with pytest.raises(InvalidJob, match=r"a call is the result of job\.call\(…\)"):
            bgjobs.enqueue_many([echo().call(1), thing])


def test_the_name_is_public() -> None:
    """Annotations can use the class."""
    assert isinstance(echo().call(1), Call)
