"""Enqueueing by name and by decorator: what is stored, and what is refused."""

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
from flask_bgjobs.options import JobOptions
from flask_bgjobs.state import AppState, state_of
from tests.apps import build_app
from tests.conftest import count_jobs, stored

UTC = dt.UTC


def test_the_call_of_the_model(app: Flask) -> None:
    """The model's call enqueues: class, method, list of parameters, retries."""
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


def test_an_enqueue_is_one_statement(app: Flask, state: AppState) -> None:
    """A job of its own is one statement, which is its transaction: no round trip beside it."""
    run_background_job("tests.jobs.echo")
    statements = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    sa.event.listen(state.store.engine, "before_cursor_execute", note)
    run_background_job("tests.jobs.echo")
    sa.event.remove(state.store.engine, "before_cursor_execute", note)
    assert [statement.split()[0] for statement in statements] == ["INSERT"]


@pytest.mark.parametrize("joins", [True, False])
def test_an_enqueue_without_tables_says_how_to_make_them(
    empty_database_url: str, joins: bool
) -> None:
    """In one sentence, whether the job would join the session or not."""
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
    """Each option of the call is found in the row."""
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
    assert (job.priority, job.claim_rank, job.queue) == (3, -3, "mail")
    assert (job.unique_key, job.tags, job.owner) == ("receipt-7", ["mail", "vip"], "42")
    assert job.status == "scheduled"
    assert job.run_at - job.created_at == pytest.approx(dt.timedelta(seconds=60), abs=TICK)


TICK = dt.timedelta(milliseconds=5)


def test_run_at_is_stored_in_utc(app: Flask) -> None:
    """A time with a zone is stored as that moment in UTC."""
    zone = dt.timezone(dt.timedelta(hours=2))
    moment = dt.datetime.now(zone).replace(microsecond=123456) + dt.timedelta(hours=1)
    job = stored(app, run_background_job("tests.jobs.echo", run_at=moment))
    assert job.run_at == moment.astimezone(UTC).replace(tzinfo=None)


def test_parameters_round_trip(app: Flask) -> None:
    """What JSON cannot say by itself comes back from the database the same."""
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
    """Parameters that cannot be stored or do not fit are refused, and leave no row."""
    with pytest.raises(InvalidJob, match=message):
        run_background_job("tests.jobs.echo", parameters=parameters)
    assert count_jobs(app) == 0


def test_deep_and_self_containing_parameters_are_refused(app: Flask) -> None:
    """100,000 levels, or a list that holds itself, are refused and do not crash."""
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
        # Freed level by level: the interpreter would free it recursively.
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
    """An option that is not acceptable is refused with ``InvalidJob`` and leaves no row."""
    with pytest.raises(InvalidJob):
        run_background_job("tests.jobs.echo", **options)
    assert count_jobs(app) == 0


def test_negative_priority_is_fine(app: Flask) -> None:
    """A negative priority is a low one."""
    assert stored(app, run_background_job("tests.jobs.echo", priority=-5)).claim_rank == 5


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
def test_what_is_not_allowed_is_refused_and_logged(
    app: Flask, caplog: pytest.LogCaptureFixture, target: Any, method: Any
) -> None:
    """A refusal raises, writes the model's log line, and leaves no row."""
    with pytest.raises(JobNotAllowed):
        run_background_job(target, method)
    assert "Unauthorized or invalid job class/method | Class:" in caplog.text
    assert count_jobs(app) == 0


def test_a_taken_unique_key_gives_the_holder_back(app: Flask) -> None:
    """While a job with the key is not finished, another enqueue inserts nothing."""
    first = run_background_job("tests.jobs.echo", unique_key="k", delay=60)
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert (second.id, second.deduplicated, first.deduplicated) == (first.id, True, False)
    assert count_jobs(app) == 1


def test_a_finished_job_frees_its_key(app: Flask, state: AppState) -> None:
    """A finished job keeps its ``unique_key`` to be read, and lets another one have it."""
    first = run_background_job("tests.jobs.echo", unique_key="k")
    state.store.cancel([first.id])
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert second.id != first.id
    assert stored(app, first).unique_key == "k"


def test_a_retry_takes_the_key_again_or_is_refused(app: Flask, state: AppState) -> None:
    """A retry by hand is refused while another job holds the key, and takes it afterwards."""
    first = run_background_job("tests.jobs.echo", unique_key="k")
    state.store.cancel([first.id])
    second = run_background_job("tests.jobs.echo", unique_key="k")
    assert state.store.retry([first.id]).skipped == {first.id: "another job holds its unique_key"}
    state.store.cancel([second.id])
    assert state.store.retry([first.id]).done == [first.id]
    assert run_background_job("tests.jobs.echo", unique_key="k").id == first.id


def test_racing_enqueues_with_one_key_make_one_job(app: Flask) -> None:
    """Twenty threads with the same key make one job between them."""
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


def test_wait_says_what_to_look_at(app: Flask) -> None:
    """``wait`` gives up after its time-out and says where to look."""
    job = run_background_job("tests.jobs.echo", queue="mail")
    with pytest.raises(WaitTimeout, match="'mail'"):
        job.wait(timeout=0.05)


def test_large_jobs_are_inserted_in_statements_of_limited_size(state: AppState) -> None:
    """Many large jobs go into several statements of one transaction, in order."""
    sizes = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.lstrip().startswith("INSERT"):
            sizes.append(len(repr(parameters)))

    sa.event.listen(state.store.engine, "before_cursor_execute", note)
    letters = [chr(ord("a") + n) for n in range(12)]
    sets = [[letter * 700_000] for letter in letters]
    made = enqueue(state, "tests.jobs.echo", None, sets, JobOptions())
    assert [job.parameters[0][0] for job in made] == letters
    assert [job.id for job in made] == sorted({job.id for job in made})
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

    def test_a_call_runs_here_and_enqueue_in_the_background(self, shop: BgJobs) -> None:
        """The decorated function is still that function; ``enqueue`` makes a job of it."""

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

    def test_using_overrides_and_keeps_the_rest(self, shop: BgJobs) -> None:
        """``using`` changes what it names; ``None`` means the decorator's value."""

        @shop.job(name="one", queue="mail", delay=60, priority="high")
        def one(number: int) -> None: ...

        job = one.using(delay=0, priority=9, queue=None).enqueue(1)
        assert (job.queue, job.priority, job.status) == ("mail", 9, "pending")
        later = dt.datetime.now(UTC) + dt.timedelta(hours=1)
        assert one.using(run_at=later).enqueue(1).status == "scheduled"

    def test_enqueue_many_takes_a_session(self, shop: BgJobs) -> None:
        """As ``using(session=…)`` does, which it goes before."""

        @shop.job(name="shop.joined")
        def joined(value: int) -> int:
            return value

        session = current_app.extensions["sqlalchemy"].session
        for job in (joined, joined.using(session=None)):
            made = shop.enqueue_many(job, [(1,), (2,)], session=session)
            assert [each.id for each in made] != []
            session.rollback()
        assert count_jobs(current_app) == 0

    def test_an_option_among_the_parameters_is_explained(self, shop: BgJobs) -> None:
        """Where other queues take options, ours take parameters."""

        @shop.job(name="shop.work")
        def work(number: int) -> None: ...

        for call in (lambda: work.enqueue(1, delay=5), lambda: work.enqueue(number=1, delay=5)):  # type: ignore[call-arg]  # the mistake
            with pytest.raises(InvalidJob, match=r"delay is an option of the job: using\(delay=…"):
                call()
        with pytest.raises(JobNotAllowed, match=r"did you mean parameters=\[1\]\?"):
            run_background_job("shop.work", [1])  # type: ignore[arg-type]  # the mistake

    @pytest.mark.parametrize("thing", [print, "shop.work", None], ids=repr)
    def test_enqueue_many_of_anything_else_is_refused(self, shop: BgJobs, thing: Any) -> None:
        """It says what it needs."""
        with pytest.raises(InvalidJob, match=r"needs a function decorated with @bgjobs\.job"):
            shop.enqueue_many(thing, [(1,)])

    def test_enqueue_many_is_one_transaction_in_order(self, shop: BgJobs) -> None:
        """Many jobs come back in order; when one is bad, none is enqueued."""

        @shop.job(name="number")
        def number(value: int) -> None: ...

        made = shop.enqueue_many(number.using(priority=2), [(n,) for n in range(2_500)])
        assert [job.parameters for job in made] == [[n] for n in range(2_500)]
        assert [job.id for job in made] == sorted(job.id for job in made)
        assert {job.priority for job in made} == {2}
        with pytest.raises(InvalidJob):
            shop.enqueue_many(number, [(1,), (float("nan"),)])
        with pytest.raises(InvalidJob, match="one by one"):
            shop.enqueue_many(number.using(unique_key="k"), [(1,), (2,)])
        assert shop.enqueue_many(number, []) == []

    def test_by_name_uses_the_decorators_options(self, shop: BgJobs) -> None:
        """``run_background_job`` with a decorated name takes the decorator's options."""

        @shop.job(name="named", queue="mail")
        def named() -> None: ...

        assert run_background_job("named").queue == "mail"
        assert run_background_job("named", queue="other").queue == "other"

    def test_bad_arguments_are_refused_at_enqueue(self, shop: BgJobs) -> None:
        """A call that does not fit the function is refused when it is enqueued."""

        @shop.job(name="strict")
        def strict(a: int, /, b: int = 0) -> None: ...

        for args, kwargs in [((), {}), ((1, 2, 3), {}), ((1,), {"c": 2}), ((1,), {"b": 2})]:
            with pytest.raises(InvalidJob):
                strict.enqueue(*args, **kwargs)  # type: ignore[arg-type]  # wrong on purpose

    def test_names_that_no_worker_could_find_need_name(self, shop: BgJobs) -> None:
        """A function inside another one needs ``name=``, and no name is given twice."""
        with pytest.raises(ConfigError, match="name="):

            @shop.job
            def inner() -> None: ...

        shop.job(name="taken")(lambda: None)
        with pytest.raises(ConfigError, match="already"):
            shop.job(name="taken")(lambda: None)

    def test_an_unknown_option_is_an_error(self, shop: BgJobs) -> None:
        """A misspelt option is an error and not ignored."""
        with pytest.raises(TypeError, match="retires"):
            shop.job(name="x", retires=3)  # type: ignore[call-overload]  # wrong on purpose


def test_errors_are_bgjobs_errors() -> None:
    """One ``except BgJobsError`` catches every refusal."""
    for error in (InvalidJob, JobNotAllowed, UniqueKeyTaken, WaitTimeout, ConfigError):
        assert issubclass(error, BgJobsError)


def test_a_fork_does_not_share_connections(app: Flask) -> None:
    """A child that was forked after the parent enqueued opens connections of its own."""
    parents = run_background_job("tests.jobs.echo")
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
    assert job_id == parents.id + 1
    assert stored(app, job_id).status == "pending"


def test_outside_an_app_context_flask_says_so(make_app: Callable[..., Flask]) -> None:
    """Without an application context the error is Flask's own."""
    make_app()
    with pytest.raises(RuntimeError, match="application context"):
        run_background_job("tests.jobs.echo")
