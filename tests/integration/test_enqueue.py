"""Enqueueing by name and by decorator: which values are stored, and which are refused."""

from __future__ import annotations

import datetime as dt
import decimal
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, current_app

from flask_bgjobs import (
    BgJobs,
    DatabaseUnusable,
    InvalidJob,
    Job,
    JobNotAllowed,
    UniqueKeyTaken,
    WaitTimeout,
    run_background_job,
)
from flask_bgjobs.enqueue.enqueue import enqueue
from flask_bgjobs.errors import BgJobsError, ConfigError
from flask_bgjobs.job.turns import claim_rank
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState, state_of
from tests.apps import build_app
from tests.conftest import count_jobs, stored

UTC = dt.UTC


def test_positional_arguments(app: Flask) -> None:
    """``run_background_job`` accepts class, method, parameters and retries as positional arguments,
    and returns the job as it is stored."""
    job = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"], 3)
    assert isinstance(job, Job)
    assert (job.target, job.method, job.parameters) == (
        "tests.jobs.SampleJob",
        "execute",
        ["Hello"],
    )
    assert (job.status, job.retries, job.priority, job.queue) == ("pending", 3, 0, "default")
    found = stored(app, job)
    for column in Job.__mapper__.column_attrs:
        assert getattr(found, column.key) == getattr(job, column.key), column.key


def test_enqueue_is_one_statement(app: Flask, state: AppState) -> None:
    """A job in its own transaction takes a single statement and no further round trip."""
    run_background_job("tests.jobs.echo")
    statements = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    sa.event.listen(state.store.engine, "before_cursor_execute", note)
    run_background_job("tests.jobs.echo")
    sa.event.remove(state.store.engine, "before_cursor_execute", note)
    assert [statement.split()[0] for statement in statements] == ["INSERT"]


@pytest.mark.parametrize("joins", [True, False])
def test_enqueue_without_tables_names_the_command(empty_database_url: str, joins: bool) -> None:
    """Without tables, the error names the command to create them in one sentence, with and without
    a joined session."""
    app = build_app(empty_database_url)
    with app.app_context():
        session = app.extensions["sqlalchemy"].session
        with pytest.raises(DatabaseUnusable, match="`flask bgjobs init-db`") as refusal:
            run_background_job("tests.jobs.echo", session=session if joins else None)
        session.remove()
        state_of(app).store.dispose()
        app.extensions["sqlalchemy"].engine.dispose()
    assert "\n" not in str(refusal.value)


def test_every_option_is_stored(app: Flask) -> None:
    """Each option of the call is stored in the row."""
    job = run_background_job(
        "tests.jobs.echo",
        parameters={"value": 7},
        retries=5,
        retry_delay=[1, dt.timedelta(seconds=2)],
        backoff="exponential",
        max_retry_delay=3600,
        jitter=0.1,
        priority="high",
        queue="mail",
        delay=60,
        timeout=dt.timedelta(minutes=1),
        unique_key="receipt-7",
        tags=["mail", "vip"],
        owner="42",
    )
    job = stored(app, job)
    assert job.parameters == {"value": 7}
    assert (job.retries, job.retry_delay, job.backoff) == (5, "[1.0, 2.0]", "exponential")
    assert (job.max_retry_delay, job.jitter, job.timeout) == (3600.0, 0.1, 60.0)
    assert (job.priority, job.claim_rank, job.queue) == (3, claim_rank(3), "mail")
    assert (job.unique_key, job.tags, job.owner) == ("receipt-7", ["mail", "vip"], "42")
    assert job.status == "scheduled"
    assert job.run_at - job.created_at == pytest.approx(dt.timedelta(seconds=60), abs=TICK)


TICK = dt.timedelta(milliseconds=5)


def test_run_at_is_stored_in_utc(app: Flask) -> None:
    """A time with a time zone is stored as the same moment in UTC."""
    zone = dt.timezone(dt.timedelta(hours=2))
    moment = dt.datetime.now(zone).replace(microsecond=123456) + dt.timedelta(hours=1)
    job = stored(app, run_background_job("tests.jobs.echo", run_at=moment))
    assert job.run_at == moment.astimezone(UTC).replace(tzinfo=None)


def test_parameters_round_trip(app: Flask) -> None:
    """Values that JSON cannot represent are read back from the database unchanged."""
    value = {
        "at": dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        "day": dt.date(2026, 1, 2),
        "price": decimal.Decimal("9.90"),
        "id": uuid.uuid4(),
        "raw": b"\x00\xff",
        "pair": (1, 2),
        "words": {"a", "b"},
        "text": "Zoë \U0001f600 'quote' \"double\" \x00",
        "looks like a tag": {"__bgjobs__": "uuid", "v": "no"},
        "large": 2**70,
    }
    job = stored(app, run_background_job("tests.jobs.echo", parameters=[value]))
    assert job.parameters == [value]


BAD_PARAMETERS = {
    "text": ("hello", "must be a list"),
    "a set": ({1}, "must be a list"),
    "a number": (3, "must be a list"),
    "NaN": ([float("nan")], r"parameters\[0\]"),
    "infinity": ([{"a": [float("inf")]}], r"parameters\[0\].a\[0\]"),
    "a key that is no str": ([{1: 2}], "key 1"),
    "a lone surrogate": (["\ud800"], "lone surrogate"),
    "a surrogate key": ([{"\udfff": 1}], "lone surrogate"),
    "an object": ([object()], "object cannot be stored"),
    "too large": (["x" * 2_000_000], "BGJOBS_MAX_PAYLOAD"),
    "a missing one": ({"other": 1}, "do not fit"),
    "one too many": ([1, 2, 3], "do not fit"),
}


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameters_are_refused(app: Flask, parameters: Any, message: str) -> None:
    """Parameters that cannot be stored, or do not fit the function, are refused and leave no
    row."""
    with pytest.raises(InvalidJob, match=message):
        run_background_job("tests.jobs.echo", parameters=parameters)
    assert count_jobs(app) == 0


def test_deep_and_self_containing_parameters_are_refused(app: Flask) -> None:
    """A value 100,000 levels deep and a list that contains itself are refused without a crash."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidJob, match="levels deep"):
        run_background_job("tests.jobs.echo", parameters=[deep])
    with pytest.raises(InvalidJob, match="contains itself"):
        run_background_job("tests.jobs.echo", parameters=[loop])
    while deep:
        # Free it level by level: the interpreter would recurse.
        deep = deep.pop()
    assert count_jobs(app) == 0


BAD_OPTIONS: list[dict[str, Any]] = [
    *({"delay": value} for value in (-1, float("nan"), float("inf"), True, 1e300, "5", 10**400)),
    *({"priority": value} for value in (True, 1.5, "urgent", 2**31, -(2**40))),
    *({"retries": value} for value in (-1, True, 1.0, "3", 10**9)),
    *({"retry_delay": value} for value in (-1, [], "5", [1, None], float("inf"))),
    *({"timeout": value} for value in (0, -1, float("nan"), "1")),
    *({"jitter": value} for value in (-0.1, 1.1, True, "x")),
    *({"queue": value} for value in ("", "Mail", "a b", "x" * 65, 7, "-x", "mail\n")),
    *({"tags": value} for value in ("mail", [""], ["x" * 65], [1], ["a"] * 21, ["\x00"])),
    *({"owner": value} for value in ("", 42, "x" * 256)),
    *({"unique_key": value} for value in ("", "x" * 256, 7, "\ud800")),
    {"backoff": "quadratic"},
    {"max_retry_delay": -1},
    {"run_at": dt.datetime(2030, 1, 1)},
    {"run_at": dt.datetime(9999, 12, 31, tzinfo=UTC)},
    {"run_at": dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=14)))},
    {"run_at": "2030-01-01"},
    {"run_at": dt.datetime(2030, 1, 1, tzinfo=UTC), "delay": 5},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused(app: Flask, options: dict[str, Any]) -> None:
    """An invalid option is refused with ``InvalidJob`` and leaves no row."""
    with pytest.raises(InvalidJob):
        run_background_job("tests.jobs.echo", **options)
    assert count_jobs(app) == 0


def test_negative_priority_is_accepted(app: Flask) -> None:
    """A negative priority is below the default."""
    assert stored(app, run_background_job("tests.jobs.echo", priority=-5)).claim_rank == claim_rank(
        -5
    )


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ("tests.jobs", None),
        ("tests.jobs.SampleJob.execute", None),
        (" tests.jobs.SampleJob", "execute"),
        ("tests.jobs.SampleJob", "_private"),
        ("tests.jobs.SampleJob", "__init__"),
        ("tests.jobs.SampleJob", "mro"),
        ("tests.jobs.SampleJob", "execute "),
        ("os.system", None),
        ("tests.jobs:echo", None),
        (None, None),
    ],
)
def test_target_outside_allow_list_is_refused_and_logged(
    app: Flask, caplog: pytest.LogCaptureFixture, target: Any, method: Any
) -> None:
    """A target outside the allow-list raises, is logged, and leaves no row."""
    with pytest.raises(JobNotAllowed):
        run_background_job(target, method)
    assert "Unauthorized or invalid job class/method | Class:" in caplog.text
    assert count_jobs(app) == 0


def test_taken_unique_key_returns_the_holder(app: Flask) -> None:
    """While an unfinished job holds the key, another enqueue returns that job and inserts
    nothing."""
    first = run_background_job("tests.jobs.echo", unique_key="k", delay=60)
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert (second.id, second.deduplicated, first.deduplicated) == (first.id, True, False)
    assert count_jobs(app) == 1


def test_finished_job_releases_its_unique_key(app: Flask, state: AppState) -> None:
    """A finished job keeps its ``unique_key`` for reading, and another job can take it."""
    first = run_background_job("tests.jobs.echo", unique_key="k")
    state.store.cancel([first.id])
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert second.id != first.id
    assert stored(app, first).unique_key == "k"


def test_manual_retry_needs_the_unique_key(app: Flask, state: AppState) -> None:
    """A manual retry is refused while another job holds the key, and takes the key again when it is
    free."""
    first = run_background_job("tests.jobs.echo", unique_key="k")
    state.store.cancel([first.id])
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert state.store.retry([first.id]).skipped == {first.id: "another job holds its unique_key"}
    state.store.cancel([second.id])
    assert state.store.retry([first.id]).done == [first.id]
    assert run_background_job("tests.jobs.echo", unique_key="k").id == first.id


def test_concurrent_enqueues_with_one_key_create_one_job(app: Flask) -> None:
    """Twenty threads that enqueue with the same key create one job."""
    ids: list[int] = []

    def enqueue() -> None:
        with app.app_context():
            ids.append(run_background_job("tests.jobs.echo", unique_key="k").id)

    threads = [threading.Thread(target=enqueue) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 20
    assert len(set(ids)) == 1
    assert count_jobs(app) == 1


def test_wait_timeout_names_the_queue(app: Flask) -> None:
    """When ``wait`` times out, the error names the queue to check."""
    job = run_background_job("tests.jobs.echo", queue="mail")
    with pytest.raises(WaitTimeout, match="'mail'"):
        job.wait(timeout=0.05)


def test_large_jobs_are_inserted_in_statements_of_limited_size(state: AppState) -> None:
    """Many large jobs are inserted in several statements, in order."""
    sizes = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.lstrip().startswith("INSERT"):
            sizes.append(len(repr(parameters)))

    sa.event.listen(state.store.engine, "before_cursor_execute", note)
    letters = [chr(ord("a") + n) for n in range(12)]
    sets = [[letter * 700_000] for letter in letters]
    jobs = enqueue(state, "tests.jobs.echo", None, sets, JobOptions())
    assert [job.parameters[0][0] for job in jobs] == letters
    assert [job.id for job in jobs] == sorted({job.id for job in jobs})
    assert len(sizes) > 1
    assert max(sizes) < 4 * 1024 * 1024


class TestDecorator:
    @pytest.fixture
    def shop(self, database_url: str) -> Any:
        from flask_sqlalchemy import SQLAlchemy

        app = Flask("decorated")
        app.config.update(SQLALCHEMY_DATABASE_URI=database_url)
        db, bgjobs = SQLAlchemy(), BgJobs()
        db.init_app(app)
        bgjobs.init_app(app)
        with app.app_context():
            db.create_all()
            yield bgjobs
            db.session.remove()
            app.extensions["bgjobs"].store.dispose()
            db.engine.dispose()

    def test_decorated_function_can_be_called_and_enqueued(self, shop: BgJobs) -> None:
        """Calling the decorated function runs it; ``enqueue`` creates a job."""

        @shop.job(name="double", queue="mail", retries=5, timeout=30)
        def double(number: int, *, by: int = 2) -> int:
            """Twice."""
            return number * by

        assert double(4) == 8
        assert double.__doc__ == "Twice."
        job = double.enqueue(7)
        assert (job.target, job.method, job.parameters) == ("double", None, [7])
        assert (job.queue, job.retries, job.timeout) == ("mail", 5, 30.0)
        assert double.enqueue(number=7).parameters == {"number": 7}
        assert double.enqueue(7, by=3).parameters == {"number": 7, "by": 3}

    def test_using_overrides_decorator_options(self, shop: BgJobs) -> None:
        """``using`` overrides the given options; ``None`` keeps the decorator's value."""

        @shop.job(name="one", queue="mail", delay=60, priority="high")
        def one(number: int) -> None: ...

        job = one.using(delay=0, priority=9, queue=None).enqueue(1)
        assert (job.queue, job.priority, job.status) == ("mail", 9, "pending")
        later = dt.datetime.now(UTC) + dt.timedelta(hours=1)
        assert one.using(run_at=later).enqueue(1).status == "scheduled"

    def test_enqueue_many_takes_a_session(self, shop: BgJobs) -> None:
        """``session=`` of ``enqueue_many`` joins that session, and overrides
        ``using(session=…)``."""

        @shop.job(name="shop.joined")
        def joined(value: int) -> int:
            return value

        session = current_app.extensions["sqlalchemy"].session
        for job in (joined, joined.using(session=None)):
            enqueued = shop.enqueue_many(job, [(1,), (2,)], session=session)
            assert [each.id for each in enqueued] != []
            session.rollback()
        assert count_jobs(current_app) == 0

    def test_option_passed_as_parameter_is_explained(self, shop: BgJobs) -> None:
        """If an option is passed as a parameter, as in other job queues, the error says where to
        pass it."""

        @shop.job(name="shop.work")
        def work(number: int) -> None: ...

        for call in (lambda: work.enqueue(1, delay=5), lambda: work.enqueue(number=1, delay=5)):  # type: ignore[call-arg]  # the mistake
            with pytest.raises(InvalidJob, match=r"delay is an option of the job: using\(delay=…"):
                call()
        with pytest.raises(JobNotAllowed, match=r"did you mean parameters=\[1\]\?"):
            run_background_job("shop.work", [1])  # type: ignore[arg-type]  # the mistake

    @pytest.mark.parametrize("thing", [print, "shop.work", None], ids=repr)
    def test_enqueue_many_needs_a_decorated_function(self, shop: BgJobs, thing: Any) -> None:
        """For anything but a decorated function, the error of ``enqueue_many`` says that it needs
        one."""
        with pytest.raises(InvalidJob, match=r"needs a function decorated with @bgjobs\.job"):
            shop.enqueue_many(thing, [(1,)])

    def test_enqueue_many_is_one_transaction_in_order(self, shop: BgJobs) -> None:
        """``enqueue_many`` returns the jobs in order; if one is invalid, none is enqueued."""

        @shop.job(name="number")
        def number(value: int) -> None: ...

        jobs = shop.enqueue_many(number.using(priority=2), [(n,) for n in range(2_500)])
        assert [job.parameters for job in jobs] == [[n] for n in range(2_500)]
        assert [job.id for job in jobs] == sorted(job.id for job in jobs)
        assert {job.priority for job in jobs} == {2}
        with pytest.raises(InvalidJob):
            shop.enqueue_many(number, [(1,), (float("nan"),)])
        with pytest.raises(InvalidJob, match="one by one"):
            shop.enqueue_many(number.using(unique_key="k"), [(1,), (2,)])
        assert shop.enqueue_many(number, []) == []

    def test_enqueue_by_name_uses_decorator_options(self, shop: BgJobs) -> None:
        """``run_background_job`` with the name of a decorated function uses the decorator's
        options."""

        @shop.job(name="named", queue="mail")
        def named() -> None: ...

        assert run_background_job("named").queue == "mail"
        assert run_background_job("named", queue="other").queue == "other"

    def test_bad_arguments_are_refused_at_enqueue(self, shop: BgJobs) -> None:
        """Arguments that do not fit the function are refused when the job is enqueued."""

        @shop.job(name="strict")
        def strict(a: int, /, b: int = 0) -> None: ...

        for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"c": 2}), ((1,), {"b": 2})]:
            with pytest.raises(InvalidJob):
                strict.enqueue(*args, **kwargs)  # type: ignore[arg-type]  # wrong on purpose

    def test_nested_function_needs_a_unique_name(self, shop: BgJobs) -> None:
        """A function inside another function needs ``name=``, and a name can be used only once."""
        with pytest.raises(ConfigError, match="name="):

            @shop.job
            def inner() -> None: ...

        shop.job(name="taken")(lambda: None)
        with pytest.raises(ConfigError, match="already"):
            shop.job(name="taken")(lambda: None)

    def test_unknown_option_raises(self, shop: BgJobs) -> None:
        """A misspelt option raises instead of being ignored."""
        with pytest.raises(TypeError, match="retires"):
            shop.job(name="x", retires=3)  # type: ignore[call-overload]  # wrong on purpose


def test_errors_are_bgjobs_errors() -> None:
    """``except BgJobsError`` catches all these errors."""
    for error in (InvalidJob, JobNotAllowed, UniqueKeyTaken, WaitTimeout, ConfigError):
        assert issubclass(error, BgJobsError)


def test_forked_child_opens_its_own_connections(app: Flask) -> None:
    """A child process forked after the parent enqueued a job uses its own connections."""
    parent_job = run_background_job("tests.jobs.echo")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with app.app_context():
            engine = app.extensions["bgjobs"].store.engine
            job = run_background_job("tests.jobs.echo")
            os.write(writer, f"{job.id} {id(engine)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    job_id, engine_id = map(int, os.read(reader, 100).split())
    os.close(reader)
    os.close(writer)
    assert engine_id != id(app.extensions["bgjobs"].store.engine)
    assert job_id == parent_job.id + 1
    assert stored(app, job_id).status == "pending"


def test_enqueue_outside_app_context_raises_flask_error(make_app: Callable[..., Flask]) -> None:
    """Without an application context, Flask's own error is raised."""
    make_app()
    with pytest.raises(RuntimeError, match="application context"):
        run_background_job("tests.jobs.echo")
