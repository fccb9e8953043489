"""One attempt, from the name to the outcome."""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import decimal
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import Fail, JobCancelled, JobTimeout, Retry, Snooze, current_job, job_started
from flask_bgjobs.config import Config
from flask_bgjobs.execution.current import CurrentJob
from flask_bgjobs.execution.execute import execute
from flask_bgjobs.execution.interrupt import InterruptScope
from flask_bgjobs.job.records import JobSpec, Outcome, Report
from flask_bgjobs.job.serialize import loads
from flask_bgjobs.job.statuses import OutcomeKind
from flask_bgjobs.registry import Registry
from flask_bgjobs.state import AppState
from tests.unit.helpers import make_spec, wait_until

Attempt = Callable[..., Outcome]
NO_DURATIONS = [-1, math.nan, math.inf, True, "soon", 10**400, [5], object()]


def run_spec(state: AppState, spec: JobSpec) -> Outcome:
    return execute(state, spec, CurrentJob(spec), InterruptScope(), time.monotonic())


def allow(state: AppState, *names: str) -> None:
    allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": list(names)}).allowed_jobs
    state.registry = Registry(allowed, {})


def raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_completed(attempt: Attempt) -> None:
    """A job that returns is completed, with its result as JSON and no error."""
    outcome = attempt(lambda a, b: (a, b), [1, dt.date(2026, 1, 2)])
    assert outcome.kind is OutcomeKind.COMPLETED
    assert loads(outcome.result_json or "") == (1, dt.date(2026, 1, 2))
    assert (outcome.error, outcome.error_type, outcome.traceback) == (None, None, None)
    assert (outcome.job_id, outcome.attempt) == (42, 1)


def test_keyword_parameters(attempt: Attempt) -> None:
    """A dict of parameters is passed by keyword."""
    outcome = attempt(lambda *, a, b=2: [a, b], {"a": 1})
    assert outcome.result_json == "[1,2]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(7), 7),
        (SystemExit("why"), 1),
        (ValueError("why"), 1),
        (KeyboardInterrupt(), 1),
    ],
    ids=repr,
)
def test_a_copy_ends_with_the_jobs_code(
    attempt: Attempt, error: BaseException | None, code: int
) -> None:
    """A copy that a job forks ends where the job's code ends in it, as a program would; the
    outcome is that of the process that forked."""

    def job() -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if error is not None:
            raise error
        return 5

    me = os.getpid()
    outcome = attempt(job)
    if os.getpid() != me:
        # Or the copy would go on with the tests.
        os._exit(99)
    assert (outcome.kind, outcome.result_json) == (OutcomeKind.COMPLETED, str(code))


def test_no_result(attempt: Attempt) -> None:
    """A job that returns nothing has ``null`` as its result."""
    assert attempt(lambda: None).result_json == "null"


def test_class(make_module: Callable[[str], str], state: AppState) -> None:
    """A class is instantiated and its method called."""
    module = make_module("class Job:\n    def execute(self, word): return 'executed ' + word")
    allow(state, f"{module}.Job")
    spec = make_spec(target=f"{module}.Job", method="execute", parameters=["Hello"])
    assert run_spec(state, spec).result_json == '"executed Hello"'


def test_times(attempt: Attempt) -> None:
    """An outcome tells how long the job waited for its start, and how long it ran."""
    outcome = attempt(lambda: time.sleep(0.02))
    assert outcome.wait_seconds is not None
    assert outcome.wait_seconds >= 0
    assert 0.02 <= outcome.run_seconds < 30


def test_failed(attempt: Attempt) -> None:
    """An exception fails the attempt, with its type, its message and its traceback."""
    outcome = attempt(raising(ValueError("no such order")))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == "ValueError"
    assert outcome.error == "ValueError: no such order"
    assert outcome.traceback is not None
    assert outcome.traceback.endswith("ValueError: no such order\n")
    assert (outcome.result_json, outcome.delay_seconds) == (None, 5.0)


def test_failed_without_message(attempt: Attempt) -> None:
    """An exception without a message is told by its type."""
    assert attempt(raising(KeyError())).error == "KeyError"


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(0),
        SystemExit(3),
        SystemExit("bye"),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        Odd("odd"),
        BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError()]),
        MemoryError(),
        RecursionError(),
        StopIteration(5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_base_exception(error: BaseException, attempt: Attempt) -> None:
    """Whatever a job raises fails the job, and nothing but the job; it may be retried."""
    outcome = attempt(raising(error))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == type(error).__name__


@pytest.mark.parametrize(
    ("stop", "kind"),
    [(JobCancelled, OutcomeKind.CANCELLED), (JobTimeout, OutcomeKind.TIMEOUT)],
)
def test_stopped(stop: Any, kind: OutcomeKind, attempt: Attempt) -> None:
    """A job that is interrupted while it runs is cancelled or timed out."""
    window, started = InterruptScope(), threading.Event()

    def spin() -> None:
        started.set()
        while True:
            pass

    def interrupt() -> None:
        if started.wait(30):
            window.interrupt(stop)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    outcome = attempt(spin, window=window)
    thread.join(30)
    assert outcome.kind is kind
    assert outcome.error_type == stop.__name__


def test_cancelled_before_the_start(attempt: Attempt) -> None:
    """A job that is cancelled between claim and start does not run."""
    window, ran = InterruptScope(), []  # type: ignore[var-annotated]
    window.interrupt(JobCancelled)
    assert attempt(lambda: ran.append(1), window=window).kind is OutcomeKind.CANCELLED
    assert ran == []


def test_finished_in_spite_of_a_cancel(attempt: Attempt) -> None:
    """A job that catches the stop and finishes is completed, with its result."""

    def job() -> str:
        try:
            window.interrupt(JobCancelled)
            while True:
                pass
        except JobCancelled:
            return "finished"

    window = InterruptScope()
    outcome = attempt(job, window=window)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.result_json == '"finished"'


def test_raise_if_cancelled(attempt: Attempt) -> None:
    """A job that looks for the cancel by itself ends as cancelled."""

    def job() -> None:
        current_job.request_cancel()
        current_job.raise_if_cancelled()

    assert attempt(job).kind is OutcomeKind.CANCELLED


# Names and parameters


def test_refused(state: AppState, make_module: Any, was_imported: Any) -> None:
    """A name that the worker's allow-list does not hold is refused; nothing is imported."""
    module = make_module("class Job:\n    def execute(self): raise AssertionError")
    allow(state, "shop.jobs.SampleJob")
    for method in ("execute", None):
        outcome = run_spec(state, make_spec(target=f"{module}.Job", method=method))
        assert outcome.kind is OutcomeKind.REFUSED
        assert outcome.error_type == "JobNotAllowed"
        assert module in (outcome.error or "")
        assert outcome.wait_seconds is None
    assert not was_imported(module)


def test_refused_job_sends_no_signal(state: AppState) -> None:
    """A refused job has not started."""
    heard: list[object] = []

    def hear(app: Flask, job: JobSpec) -> None:
        heard.append(job)

    with job_started.connected_to(hear):
        run_spec(state, make_spec(target="os.system", parameters=["true"]))
    assert heard == []


@pytest.mark.parametrize("source", ["def broken(:", "raise ValueError", "raise SystemExit(3)", ""])
def test_name_that_cannot_be_imported(state: AppState, make_module: Any, source: str) -> None:
    """An allowed name that is gone or cannot be imported fails for good: a retry is no help."""
    module = make_module(source)
    allow(state, f"{module}.job")
    outcome = run_spec(state, make_spec(target=f"{module}.job"))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.error_type == "InvalidJob"


@pytest.mark.parametrize(
    "text",
    ["", "{", "nope", '[{"__bgjobs__":"pickle","v":""}]', '[{"__bgjobs__":"uuid","v":5}]'],
)
def test_parameters_that_cannot_be_read(text: str, state: AppState, bgjobs: Any) -> None:
    """Parameters that somebody broke in the database fail the job for good."""
    bgjobs.job(name="unit.any")(lambda *args: None)
    outcome = run_spec(state, make_spec(target="unit.any", parameters_json=text))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.wait_seconds is None


@pytest.mark.parametrize("parameters", [[], [1, 2], {"b": 1}])
def test_parameters_that_do_not_fit(parameters: Any, attempt: Attempt) -> None:
    """Parameters that do not fit the function are a failure like any other."""
    outcome = attempt(lambda a: a, parameters)
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == "TypeError"


# What an exception may hold


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class ExitsInText(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NoText(Exception):
    def __str__(self) -> Any:
        return 5


class TwoArguments(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


@pytest.mark.parametrize("error", [BrokenText(), ExitsInText(), NoText()])
def test_message_that_cannot_be_read(error: Exception, attempt: Attempt) -> None:
    """An exception whose ``__str__`` fails is told by its type, and says why it has no text."""
    outcome = attempt(raising(error))
    assert outcome.kind is OutcomeKind.FAILED
    assert (outcome.error or "").startswith(
        f"{type(error).__name__}: (its message cannot be read: "
    )
    assert type(error).__name__ in (outcome.traceback or "")


def test_message_with_text_that_no_database_takes(attempt: Attempt) -> None:
    """NUL and lone surrogates in an error or traceback are replaced."""
    outcome = attempt(raising(ValueError("a\0b\ud800c")))
    assert outcome.error == "ValueError: a\ufffdb\ufffdc"
    for text in (outcome.error, outcome.traceback or ""):
        text.encode()
        assert "\0" not in text


def test_name_of_a_class_that_no_database_takes(attempt: Attempt) -> None:
    """A class name of any length and content is cut and made storable as well."""
    strange = type("Odd", (Exception,), {})
    strange.__qualname__ = "Odd\0" + "x" * 1_000
    outcome = attempt(raising(strange("no")))
    assert outcome.error_type is not None
    assert outcome.error_type.startswith("Odd\ufffdxxx")
    assert len(outcome.error_type) <= 255
    assert outcome.kind is OutcomeKind.FAILED


def test_huge_message(attempt: Attempt) -> None:
    """A message of 50 MB is cut, head and tail kept, and takes no noticeable time."""
    error = ValueError("begin" + "x" * 50_000_000 + "the end")
    began = time.monotonic()
    outcome = attempt(raising(error))
    assert time.monotonic() - began < 10
    assert outcome.error is not None
    assert outcome.traceback is not None
    assert outcome.error.startswith("ValueError: beginxxx")
    assert outcome.error.endswith("xxxthe end")
    assert len(outcome.error) < 3_000
    assert len(outcome.traceback) < 70_000


def test_two_argument_init(attempt: Attempt) -> None:
    """An exception that could not be made again from its message is no trouble."""
    outcome = attempt(raising(TwoArguments(5, "no")))
    assert outcome.error == "TwoArguments: (5, 'no')"


@pytest.mark.parametrize("length", [3, 700])
def test_chain(length: int, attempt: Attempt) -> None:
    """A chain of hundreds of exceptions is cut, and takes no noticeable time."""

    def job() -> None:
        error: Exception = ValueError("first")
        for number in range(length):
            try:
                raise RuntimeError(f"link {number}") from error
            except RuntimeError as next_error:
                error = next_error
        raise KeyError("last") from error

    began = time.monotonic()
    outcome = attempt(job)
    assert time.monotonic() - began < 10
    assert outcome.error == "KeyError: 'last'"
    assert outcome.traceback is not None
    assert len(outcome.traceback) < 70_000
    assert f"link {length - 1}" in outcome.traceback
    assert ("ValueError: first" in outcome.traceback) is (length == 3)


def test_chain_of_contexts(attempt: Attempt) -> None:
    """A long chain that nobody wrote with ``from`` is cut as well."""

    def job() -> None:
        error: Exception = ValueError("first")
        for number in range(700):
            next_error = RuntimeError(f"link {number}")
            next_error.__context__ = error
            error = next_error
        raise error

    outcome = attempt(job)
    assert outcome.error == "RuntimeError: link 699"
    assert "link 698" in (outcome.traceback or "")
    assert "ValueError: first" not in (outcome.traceback or "")


def test_chain_that_is_a_ring(attempt: Attempt) -> None:
    """Exceptions that name each other as their cause end somewhere."""

    def job() -> None:
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    assert attempt(job).error == "ValueError: first"


def test_chain_of_frozen_exceptions(attempt: Attempt) -> None:
    """Exceptions that refuse to be changed, in a long chain, are told like others."""

    class Frozen(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    def job() -> None:
        error: BaseException = ValueError("first")
        for number in range(100):
            next_error = Frozen(number)
            BaseException.__dict__["__cause__"].__set__(next_error, error)
            error = next_error
        raise error

    outcome = attempt(job)
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type is not None
    assert outcome.error_type.endswith("Frozen")


def test_deep_recursion(attempt: Attempt) -> None:
    """A job that recurses without end fails, with a traceback of bounded length."""

    def job() -> None:
        job()

    outcome = attempt(job)
    assert outcome.error_type == "RecursionError"
    assert len(outcome.traceback or "") < 70_000


def frames(outcome: Outcome) -> list[str]:
    return [line for line in (outcome.traceback or "").splitlines() if line.startswith("  File")]


def test_traceback_starts_at_the_job(attempt: Attempt) -> None:
    """A traceback begins with the job's own code; our frames are not in it."""

    def helper() -> None:
        raise ValueError("no")

    def job() -> None:
        helper()

    shown = frames(attempt(job))
    assert [line.rpartition(" in ")[2] for line in shown] == ["job", "helper"]


def test_traceback_of_a_coroutine_starts_at_the_job(attempt: Attempt) -> None:
    """The frames of asyncio's and ours are not in the traceback of an ``async def`` job."""

    async def helper() -> None:
        raise ValueError("no")

    async def job() -> None:
        await helper()

    shown = frames(attempt(job))
    assert [line.rpartition(" in ")[2] for line in shown] == ["job", "helper"]


# Results


@pytest.mark.parametrize(
    ("result", "named"),
    [
        (object(), "result: object cannot be stored"),
        ({"order": {"total": math.nan}}, "result.order.total: nan"),
        ([1, math.inf], "result[1]: inf"),
        ({1: 2}, "result: the key 1"),
        ("\ud800", "result: the text holds a lone surrogate"),
        ("x" * 2_000_000, "result: 2,000,002 bytes of JSON; BGJOBS_MAX_PAYLOAD allows 1,048,576"),
        (10**5_000, "result"),
        (iter([]), "result: list_iterator"),
    ],
    ids=["object", "nan", "inf", "key", "surrogate", "large", "digits", "iterator"],
)
def test_result_that_cannot_be_stored(result: object, named: str, attempt: Attempt) -> None:
    """A result that is not JSON, not a number or too large fails for good, naming the value."""
    outcome = attempt(lambda: result)
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert named in (outcome.error or "")
    assert outcome.result_json is None


def test_meta_that_cannot_be_stored(attempt: Attempt) -> None:
    """Meta that cannot be stored fails the job for good as well."""

    def job() -> None:
        current_job.meta["bad"] = math.nan

    outcome = attempt(job)
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert "current_job.meta.bad: nan" in (outcome.error or "")


# The words of a job


@pytest.mark.parametrize(
    ("delay", "seconds"), [(None, 5.0), (0, 0.0), (7, 7.0), (dt.timedelta(minutes=1), 60.0)]
)
def test_retry(delay: Any, seconds: float, attempt: Attempt) -> None:
    """``Retry`` asks for another attempt, after its own delay or the job's."""
    outcome = attempt(raising(Retry("busy", delay=delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.RETRY, seconds)
    assert outcome.error == "Retry: busy"


@pytest.mark.parametrize("delay", [0, 7.5, dt.timedelta(minutes=1)])
def test_snooze(delay: Any, attempt: Attempt) -> None:
    """``Snooze`` asks for another attempt after its delay."""
    outcome = attempt(raising(Snooze(delay)))
    seconds = delay.total_seconds() if isinstance(delay, dt.timedelta) else delay
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.SNOOZED, seconds)


@pytest.mark.parametrize("delay", NO_DURATIONS, ids=lambda delay: type(delay).__name__)
def test_bad_delay_of_retry(delay: Any, attempt: Attempt) -> None:
    """A delay that is no duration counts as not given: the job's own delay holds."""
    outcome = attempt(raising(Retry("busy", delay=delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.RETRY, 5.0)


@pytest.mark.parametrize("delay", NO_DURATIONS, ids=lambda delay: type(delay).__name__)
def test_bad_delay_of_snooze(delay: Any, attempt: Attempt) -> None:
    """A snooze whose delay is no duration is due at once, and uses no retry either."""
    outcome = attempt(raising(Snooze(delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.SNOOZED, 0.0)


def test_fail(attempt: Attempt) -> None:
    """``Fail`` ends the job whatever retries are left."""
    outcome = attempt(raising(Fail("no such order")))
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED_FINALLY, "Fail: no such order")


class Busy(Retry):
    def __init__(self) -> None:  # leaves out what Retry sets
        Exception.__init__(self, "busy")


class NoOrder(Fail):
    pass


def test_subclasses_of_the_words(attempt: Attempt) -> None:
    """A subclass says the same, and one that forgot to call its base raises nothing out of us."""
    assert attempt(raising(NoOrder("no"))).kind is OutcomeKind.FAILED_FINALLY
    assert attempt(raising(Busy())).kind in (OutcomeKind.RETRY, OutcomeKind.FAILED)


# Coroutines


def test_coroutine(attempt: Attempt) -> None:
    """An ``async def`` job is awaited, inside the app context and with its current job."""

    async def job(value: int) -> list[Any]:
        await asyncio.sleep(0)
        return [value, current_job.id, flask.current_app.name]

    assert attempt(job, [5]).result_json == '[5,42,"shop"]'


def test_coroutine_that_raises(attempt: Attempt) -> None:
    """The exception of an ``async def`` job is the attempt's; so are its words."""

    async def fail() -> None:
        raise ValueError("no")

    async def snooze() -> None:
        await asyncio.sleep(0)
        raise Snooze(5)

    assert attempt(fail).error == "ValueError: no"
    assert attempt(snooze).kind is OutcomeKind.SNOOZED


@pytest.mark.parametrize(
    ("stop", "kind"),
    [(JobCancelled, OutcomeKind.CANCELLED), (JobTimeout, OutcomeKind.TIMEOUT)],
)
def test_coroutine_is_stopped(stop: Any, kind: OutcomeKind, attempt: Attempt) -> None:
    """An ``async def`` job is stopped where it awaits, and may await in its clean-up."""
    window, cleaned = InterruptScope(), []  # type: ignore[var-annotated]

    async def job() -> None:
        loop = asyncio.get_running_loop()
        interrupter = loop.run_in_executor(None, window.interrupt, stop)
        try:
            await asyncio.sleep(60)
        finally:
            await interrupter
            cleaned.append(1)

    assert attempt(job, window=window).kind is kind
    assert cleaned == [1]


# What surrounds the code


def test_app_context(attempt: Attempt, host: Flask) -> None:
    """Each attempt has an app context of its own, which is gone after it."""
    seen: list[Any] = []

    def job() -> None:
        seen.append(flask.g._get_current_object())
        flask.g.leftover = 1
        seen.append(flask.current_app._get_current_object())

    for _ in range(2):
        assert attempt(job).kind is OutcomeKind.COMPLETED
        assert not flask.has_app_context()
    assert seen[1] is host
    assert seen[0] is not seen[2]


def test_app_context_after_a_failure(attempt: Attempt) -> None:
    """The context is gone after a failure as well, also one that no ``Exception`` is."""
    for error in (ValueError(), SystemExit(), JobTimeout()):
        attempt(raising(error))
        assert not flask.has_app_context()


def test_current_job(attempt: Attempt) -> None:
    """``current_job`` is there inside the code, and not after, whatever happened."""
    assert attempt(lambda: [current_job.id, current_job.attempt], attempt=3).result_json == "[42,3]"
    assert not current_job
    attempt(raising(SystemExit()))
    assert not current_job


def test_report(attempt: Attempt) -> None:
    """The outcome carries what the code told, also when it failed."""

    def job() -> None:
        current_job.progress(0.5, "half")
        current_job.log("line")
        current_job.meta["step"] = 1
        raise ValueError

    outcome = attempt(job)
    assert outcome.report == Report(0.5, "half", '{"step":1}', ("line",))


@pytest.fixture
def table(host: Flask, bgjobs: Any, database: SQLAlchemy) -> sa.Table:
    """A table of the host's on its in-memory database."""
    table = sa.Table("orders", database.metadata, sa.Column("id", sa.Integer, primary_key=True))
    with host.app_context():
        database.create_all()
    return table


def count(table: sa.Table, host: Flask, database: SQLAlchemy) -> int:
    with host.app_context():
        return int(database.session.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def leave_open(database: SQLAlchemy, table: sa.Table) -> None:
    database.session.execute(table.insert())


def leave_broken(database: SQLAlchemy, table: sa.Table) -> None:
    database.session.execute(table.insert().values(id=1))
    database.session.execute(table.insert().values(id=1))


@pytest.mark.parametrize("leave", [leave_open, leave_broken])
def test_next_job_starts_clean(
    leave: Any, attempt: Attempt, table: sa.Table, host: Flask, database: SQLAlchemy
) -> None:
    """A transaction left open or broken is rolled back; the next job has a fresh session."""
    attempt(lambda: leave(database, table))
    assert not database.session.registry.registry
    assert count(table, host, database) == 0

    def next_job() -> bool:
        clean = not database.session().in_transaction()
        database.session.execute(table.insert())
        database.session.commit()
        return clean

    assert attempt(next_job).result_json == "true"
    assert count(table, host, database) == 1


def test_teardown_that_raises(
    attempt: Attempt, host: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """A teardown function of the host's that raises is logged and changes no outcome."""

    @host.teardown_appcontext
    def broken(_error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    assert attempt(lambda: 5).result_json == "5"
    assert "Teardown after job 42 raised" in caplog.messages
    assert attempt(raising(ValueError("no"))).error == "ValueError: no"
    assert attempt(raising(Snooze(5))).kind is OutcomeKind.SNOOZED
    assert not flask.has_app_context()
    assert not current_job


def test_session_is_removed_although_a_teardown_raises(
    attempt: Attempt, table: sa.Table, host: Flask, database: SQLAlchemy
) -> None:
    """A teardown of the host's that raises leaves no session for the next job."""

    @host.teardown_appcontext
    def broken(_error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    attempt(lambda: leave_open(database, table))
    assert not database.session.registry.registry


def test_started_signal(attempt: Attempt, host: Flask) -> None:
    """``job_started`` is sent once, before the code, with the app and the spec."""
    heard: list[Any] = []

    def hear(app: Flask, job: JobSpec) -> None:
        heard.append((app, job.id, current_job.id))

    with job_started.connected_to(hear):
        attempt(lambda: heard.append("code"))
    assert heard == [(host, 42, 42), "code"]


def test_receiver_that_raises(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    """A receiver of ``job_started`` that raises is logged and changes no outcome."""

    def broken(app: Flask, job: JobSpec) -> None:
        raise RuntimeError("receiver")

    with job_started.connected_to(broken):
        assert attempt(lambda: 5).result_json == "5"
    assert "A receiver of bgjobs-job-started raised" in caplog.text


def test_window_covers_the_code_alone(attempt: Attempt, host: Flask) -> None:
    """While the host's teardown and the end of the session run, nothing can be interrupted."""
    window, answers = InterruptScope(), []  # type: ignore[var-annotated]

    @host.teardown_appcontext
    def late(_error: BaseException | None) -> None:
        answers.append(window.interrupt(JobCancelled))

    assert attempt(lambda: 5, window=window).kind is OutcomeKind.COMPLETED
    assert answers == [False]


def test_in_several_threads_at_once(attempt: Attempt) -> None:
    """Jobs that run side by side see only themselves."""
    gate, outcomes = threading.Barrier(4), {}  # type: ignore[var-annotated]

    def job(number: int) -> list[int]:
        gate.wait(30)
        flask.g.number = number
        gate.wait(30)
        return [flask.g.number, current_job.id]

    def run(number: int) -> None:
        outcomes[number] = attempt(job, [number], id=number)

    threads = [threading.Thread(target=run, args=[n], daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(outcomes) == 4)
    assert {n: outcome.result_json for n, outcome in outcomes.items()} == {
        n: f"[{n},{n}]" for n in range(4)
    }


tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def test_context_variables_end_with_the_attempt(attempt: Attempt) -> None:
    """What a job sets in its context is seen by its own code only; what was set before is seen by
    the job as well."""
    seen = []

    def job() -> None:
        seen.append(tenant.get())
        tenant.set("somebody")
        decimal.getcontext().prec = 5
        seen.append(tenant.get())

    async def async_job() -> None:
        job()
        await asyncio.sleep(0)
        seen.append(tenant.get())

    precision = decimal.getcontext().prec
    token = tenant.set("the caller's")
    try:
        assert attempt(job).kind is OutcomeKind.COMPLETED
        assert attempt(async_job).kind is OutcomeKind.COMPLETED
        assert tenant.get() == "the caller's"
    finally:
        tenant.reset(token)
    assert seen == ["the caller's", "somebody", "the caller's", "somebody", "somebody"]
    assert decimal.getcontext().prec == precision


def test_alarm_and_blocked_signals_end_with_the_attempt(attempt: Attempt) -> None:
    """An alarm that the job has set is turned off, and signals that it has blocked are not blocked
    any more; an alarm of the caller stays."""

    def job() -> None:
        signal.setitimer(signal.ITIMER_REAL, 600)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        raise ValueError

    # There may be one by which the test itself would be ended.
    former = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        assert attempt(job).kind is OutcomeKind.FAILED
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.setitimer(signal.ITIMER_REAL, 600)
        attempt(lambda: None)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *former)


SECRET = "".join(f"k{number:04}" for number in range(720))
"""3,600 characters, each part of which can be told."""


def parts_of_secret(text: str | None) -> list[str]:
    return [part for part in re.findall("k[0-9]{4}", text or "") if part in SECRET]


def test_secrets_are_masked_before_they_are_cut(attempt: Attempt) -> None:
    """Neither error nor traceback, note or line that is stored holds a part of a secret, also where
    the secret is longer than what is kept of the text."""

    def job(user: str, private_key: str) -> None:
        current_job.progress(0.5, "n" * 240 + private_key)
        current_job.log(f"log of {user} {private_key}")
        try:
            raise ValueError("x" * 900 + private_key + "y" * 900)
        except ValueError:
            raise RuntimeError(f"{private_key!r} is not good") from None

    outcome = attempt(job, ["ann", SECRET])
    assert outcome.error == "RuntimeError: '***' is not good"
    assert parts_of_secret(outcome.traceback) == []
    assert outcome.report is not None
    assert outcome.report.lines == ("log of ann ***",)
    assert outcome.report.progress_note == "n" * 240 + "***"
    outcome = attempt(raising(ValueError("x" * 1_900 + SECRET)), {})
    # Nobody could know that this one is a secret.
    assert parts_of_secret(outcome.error)


def test_a_long_secret_on_the_cut_of_an_error(attempt: Attempt) -> None:
    """Wherever a secret stands in an error that is too long, no part of it is stored."""

    def job(token: str, before: int) -> None:
        raise ValueError("x" * before + token + "y" * 3_000)

    for before in range(0, 3_000, 97):
        outcome = attempt(job, [SECRET, before])
        assert parts_of_secret(outcome.error) == []
        assert parts_of_secret(outcome.traceback) == []


def test_what_cannot_be_masked_is_not_shown(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault while a text is masked costs the text and not the attempt."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flask_bgjobs.job.redact.Redactor.masker", fail)

    def job(note: str) -> None:
        current_job.log(note)
        raise ValueError(note)

    outcome = attempt(job, ["hello"])
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, "***")
    assert outcome.report is not None
    assert outcome.report.lines == ("***",)


def test_an_alarm_of_other_code_in_the_process_stays(attempt: Attempt) -> None:
    """Beside a worker inside a web process, a request may set an alarm while a job runs."""
    former = signal.setitimer(signal.ITIMER_REAL, 0)
    begun, alarm_set = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        assert alarm_set.wait(30)

    try:
        thread = threading.Thread(target=attempt, args=[job])
        thread.start()
        assert begun.wait(30)
        signal.setitimer(signal.ITIMER_REAL, 600)
        alarm_set.set()
        thread.join()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *former)


@pytest.mark.parametrize(
    "statement",
    [
        "raise KeyboardInterrupt",
        "raise SystemExit(3)",
        "raise GeneratorExit",
        "import no_module",
    ],
)
def test_whatever_an_import_raises(
    make_module: Callable[[str], str], state: AppState, statement: str
) -> None:
    """A module that raises anything when it is imported fails its job, and nothing else."""
    module = make_module(f"{statement}\ndef job(): ...")
    allow(state, f"{module}.job")
    outcome = run_spec(state, make_spec(target=f"{module}.job"))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.error


class Hostile:
    def __eq__(self, other: object) -> bool:
        raise LookupError("not comparable")


def test_meta_that_raises(attempt: Attempt) -> None:
    """A ``meta`` that raises when it is looked at fails its job, and nothing else."""

    def job() -> None:
        current_job.meta = Hostile()  # type: ignore[assignment]

    error = attempt(job).error
    assert error is not None
    assert error.startswith("NotSerializable: current_job.meta: ")


def test_names_of_positional_parameters(attempt: Attempt) -> None:
    """The outcome brings the names of positional parameters, by which a log masks secrets; of
    keyword parameters they are known."""

    def job(user: str, /, password: str = "", *token: str, note: str = "") -> None: ...

    assert attempt(job, ["ann"]).parameter_names == ("user", "password", "*token")
    assert attempt(lambda user: None, {"user": "ann"}).parameter_names is None
    assert attempt(max, [[1]]).parameter_names is None
