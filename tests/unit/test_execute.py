"""One attempt, from the stored job to its outcome."""

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
INVALID_DURATIONS = [-1, math.nan, math.inf, True, "soon", 10**400, [5], object()]


def run_spec(state: AppState, spec: JobSpec) -> Outcome:
    return execute(state, spec, CurrentJob(spec), InterruptScope(), time.monotonic())


def allow(state: AppState, *names: str) -> None:
    allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": list(names)}).allowed_jobs
    state.registry = Registry(allowed, {})


def raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_completed_job(attempt: Attempt) -> None:
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
def test_forked_child_exits_with_job_code(
    attempt: Attempt, error: BaseException | None, code: int
) -> None:
    """A child forked by a job exits with the job's code, like a program.

    The outcome is that of the process that forked.
    """

    def job() -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if error is not None:
            raise error
        return 5

    test_pid = os.getpid()
    outcome = attempt(job)
    if os.getpid() != test_pid:
        # Otherwise the child would continue with the remaining tests.
        os._exit(99)
    assert (outcome.kind, outcome.result_json) == (OutcomeKind.COMPLETED, str(code))


def test_job_without_result(attempt: Attempt) -> None:
    """A job that returns ``None`` has the result ``null``."""
    assert attempt(lambda: None).result_json == "null"


def test_class_job(make_module: Callable[[str], str], state: AppState) -> None:
    """For a class, the worker creates an instance and calls the method."""
    module = make_module("class Job:\n    def execute(self, word): return 'executed ' + word")
    allow(state, f"{module}.Job")
    spec = make_spec(target=f"{module}.Job", method="execute", parameters=["Hello"])
    assert run_spec(state, spec).result_json == '"executed Hello"'


def test_outcome_durations(attempt: Attempt) -> None:
    """The outcome records how long the job waited to start and how long it ran."""
    outcome = attempt(lambda: time.sleep(0.02))
    assert outcome.wait_seconds is not None
    assert outcome.wait_seconds >= 0
    assert 0.02 <= outcome.run_seconds < 30


def test_failed_job(attempt: Attempt) -> None:
    """An exception fails the attempt; the outcome has its type, message and traceback."""
    outcome = attempt(raising(ValueError("no such order")))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == "ValueError"
    assert outcome.error == "ValueError: no such order"
    assert outcome.traceback is not None
    assert outcome.traceback.endswith("ValueError: no such order\n")
    assert (outcome.result_json, outcome.delay_seconds) == (None, 5.0)


def test_exception_without_message(attempt: Attempt) -> None:
    """The error of an exception without a message is its type."""
    assert attempt(raising(KeyError())).error == "KeyError"


class CustomBaseException(BaseException):
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
        CustomBaseException("custom"),
        BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError()]),
        MemoryError(),
        RecursionError(),
        StopIteration(5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_base_exception(error: BaseException, attempt: Attempt) -> None:
    """Any ``BaseException`` of a job fails only that job, which may be retried."""
    outcome = attempt(raising(error))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == type(error).__name__


@pytest.mark.parametrize(
    ("stop", "kind"),
    [(JobCancelled, OutcomeKind.CANCELLED), (JobTimeout, OutcomeKind.TIMEOUT)],
)
def test_interrupted_job(stop: Any, kind: OutcomeKind, attempt: Attempt) -> None:
    """A job interrupted while it runs ends as cancelled or timed out."""
    scope, started = InterruptScope(), threading.Event()

    def spin() -> None:
        started.set()
        while True:
            pass

    def interrupt() -> None:
        if started.wait(30):
            scope.interrupt(stop)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    outcome = attempt(spin, scope=scope)
    thread.join(30)
    assert outcome.kind is kind
    assert outcome.error_type == stop.__name__


def test_cancelled_before_start(attempt: Attempt) -> None:
    """A job cancelled between claim and start does not run."""
    scope, ran = InterruptScope(), []  # type: ignore[var-annotated]
    scope.interrupt(JobCancelled)
    assert attempt(lambda: ran.append(1), scope=scope).kind is OutcomeKind.CANCELLED
    assert ran == []


def test_job_catches_cancel_and_finishes(attempt: Attempt) -> None:
    """A job that catches the cancel and returns is completed, with its result."""

    def job() -> str:
        try:
            scope.interrupt(JobCancelled)
            while True:
                pass
        except JobCancelled:
            return "finished"

    scope = InterruptScope()
    outcome = attempt(job, scope=scope)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.result_json == '"finished"'


def test_raise_if_cancelled(attempt: Attempt) -> None:
    """A job that calls ``raise_if_cancelled`` after a cancel request ends as cancelled."""

    def job() -> None:
        current_job.request_cancel()
        current_job.raise_if_cancelled()

    assert attempt(job).kind is OutcomeKind.CANCELLED


# Names and parameters


def test_name_outside_allow_list_is_refused(
    state: AppState, make_module: Any, was_imported: Any
) -> None:
    """A name that is not in the worker's allow-list is refused without an import."""
    module = make_module("class Job:\n    def execute(self): raise AssertionError")
    allow(state, f"{module}.Job.Inner")
    for target, method in ((f"{module}.Job", "_execute"), (f"{module}.Job.Inner.more", None)):
        outcome = run_spec(state, make_spec(target=target, method=method))
        assert outcome.kind is OutcomeKind.REFUSED
        assert outcome.error_type == "JobNotAllowed"
        assert module in (outcome.error or "")
        assert outcome.wait_seconds is None
    assert not was_imported(module)


def test_refused_job_sends_no_signal(state: AppState) -> None:
    """``job_started`` is not sent for a job whose name is not allowed."""
    received: list[object] = []

    def receive(app: Flask, job: JobSpec) -> None:
        received.append(job)

    with job_started.connected_to(receive):
        run_spec(state, make_spec(target="os.system", parameters=["true"]))
        run_spec(state, make_spec(target="os._exit", parameters=["true"]))
    assert received == []


@pytest.mark.parametrize("source", ["def fail(:", "raise ValueError", "raise SystemExit(3)"])
def test_unimportable_name_fails_without_retry(
    state: AppState, make_module: Any, source: str
) -> None:
    """An allowed name that cannot be imported fails the job without a retry."""
    module = make_module(source)
    allow(state, f"{module}.job")
    outcome = run_spec(state, make_spec(target=f"{module}.job"))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.error_type == "InvalidJob"


@pytest.mark.parametrize(
    "text",
    ["", "{", "nope", '[{"__bgjobs__":"pickle","v":""}]', '[{"__bgjobs__":"uuid","v":5}]'],
)
def test_unreadable_parameters_fail_without_retry(text: str, state: AppState, bgjobs: Any) -> None:
    """Corrupt parameters in the database fail the job without a retry."""
    bgjobs.job(name="unit.any")(lambda *args: None)
    outcome = run_spec(state, make_spec(target="unit.any", parameters_json=text))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.wait_seconds is None


@pytest.mark.parametrize("parameters", [[], [1, 2], {"b": 1}])
def test_parameters_that_do_not_match_signature(parameters: Any, attempt: Attempt) -> None:
    """Parameters that do not match the signature fail the attempt like any exception."""
    outcome = attempt(lambda a: a, parameters)
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.error_type == "TypeError"


# Exceptions


class FailingStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class ExitingStr(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NonStringStr(Exception):
    def __str__(self) -> Any:
        return 5


class TwoArguments(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


@pytest.mark.parametrize("error", [FailingStr(), ExitingStr(), NonStringStr()])
def test_unreadable_message(error: Exception, attempt: Attempt) -> None:
    """If ``__str__`` fails, the error has the exception's type and why it has no message."""
    outcome = attempt(raising(error))
    assert outcome.kind is OutcomeKind.FAILED
    assert (outcome.error or "").startswith(
        f"{type(error).__name__}: (its message cannot be read: "
    )
    assert type(error).__name__ in (outcome.traceback or "")


def test_unstorable_characters_are_replaced(attempt: Attempt) -> None:
    """NUL and lone surrogates in an error or traceback are replaced."""
    outcome = attempt(raising(ValueError("a\0b\ud800c")))
    assert outcome.error == "ValueError: a\ufffdb\ufffdc"
    for text in (outcome.error, outcome.traceback or ""):
        text.encode()
        assert "\0" not in text


def test_unstorable_class_name(attempt: Attempt) -> None:
    """An exception's class name is shortened, and characters that cannot be stored are replaced."""
    unusual = type("Odd", (Exception,), {})
    unusual.__qualname__ = "Odd\0" + "x" * 1_000
    outcome = attempt(raising(unusual("no")))
    assert outcome.error_type is not None
    assert outcome.error_type.startswith("Odd\ufffdxxx")
    assert len(outcome.error_type) <= 255
    assert outcome.kind is OutcomeKind.FAILED


def test_huge_message(attempt: Attempt) -> None:
    """A message of 50 MB is shortened in linear time, and its head and tail are kept."""
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


def test_exception_with_two_arguments(attempt: Attempt) -> None:
    """An exception whose ``__init__`` needs more than a message can be recorded."""
    outcome = attempt(raising(TwoArguments(5, "no")))
    assert outcome.error == "TwoArguments: (5, 'no')"


@pytest.mark.parametrize("length", [3, 700])
def test_exception_chain_is_shortened(length: int, attempt: Attempt) -> None:
    """A chain of hundreds of exceptions is shortened in linear time."""

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


def test_implicit_exception_chain_is_shortened(attempt: Attempt) -> None:
    """A long chain of implicit contexts (without ``from``) is shortened too."""

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


def test_circular_exception_chain(attempt: Attempt) -> None:
    """A circular chain of causes is recorded without an endless loop."""

    def job() -> None:
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    assert attempt(job).error == "ValueError: first"


def test_chain_of_immutable_exceptions(attempt: Attempt) -> None:
    """A long chain of exceptions that reject attribute changes is recorded like any other."""

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
    """A job with endless recursion fails, and its traceback has a limited length."""

    def job() -> None:
        job()

    outcome = attempt(job)
    assert outcome.error_type == "RecursionError"
    assert len(outcome.traceback or "") < 70_000


def frame_lines(outcome: Outcome) -> list[str]:
    return [line for line in (outcome.traceback or "").splitlines() if line.startswith("  File")]


def test_traceback_starts_in_job_code(attempt: Attempt) -> None:
    """A traceback starts in the job's code, without frames of the library."""

    def helper() -> None:
        raise ValueError("no")

    def job() -> None:
        helper()

    lines = frame_lines(attempt(job))
    assert [line.rpartition(" in ")[2] for line in lines] == ["job", "helper"]


def test_coroutine_traceback_starts_in_job_code(attempt: Attempt) -> None:
    """The traceback of an ``async def`` job has no frames of asyncio or the library."""

    async def helper() -> None:
        raise ValueError("no")

    async def job() -> None:
        await helper()

    lines = frame_lines(attempt(job))
    assert [line.rpartition(" in ")[2] for line in lines] == ["job", "helper"]


# Results


@pytest.mark.parametrize(
    ("result", "message"),
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
def test_unstorable_result(result: object, message: str, attempt: Attempt) -> None:
    """An unstorable result fails the job without a retry; the error has the path of the value."""
    outcome = attempt(lambda: result)
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert message in (outcome.error or "")
    assert outcome.result_json is None


def test_unstorable_meta(attempt: Attempt) -> None:
    """``meta`` that cannot be stored fails the job without a retry."""

    def job() -> None:
        current_job.meta["bad"] = math.nan

    outcome = attempt(job)
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert "current_job.meta.bad: nan" in (outcome.error or "")


# Retry, Snooze and Fail


@pytest.mark.parametrize(
    ("delay", "seconds"), [(None, 5.0), (0, 0.0), (7, 7.0), (dt.timedelta(minutes=1), 60.0)]
)
def test_retry(delay: Any, seconds: float, attempt: Attempt) -> None:
    """``Retry`` retries the job after its own delay, or after the job's retry delay."""
    outcome = attempt(raising(Retry("busy", delay=delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.RETRY, seconds)
    assert outcome.error == "Retry: busy"


@pytest.mark.parametrize("delay", [0, 7.5, dt.timedelta(minutes=1)])
def test_snooze(delay: Any, attempt: Attempt) -> None:
    """``Snooze`` runs the job again after the given delay."""
    outcome = attempt(raising(Snooze(delay)))
    seconds = delay.total_seconds() if isinstance(delay, dt.timedelta) else delay
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.SNOOZED, seconds)


@pytest.mark.parametrize("delay", INVALID_DURATIONS, ids=lambda delay: type(delay).__name__)
def test_retry_ignores_invalid_delay(delay: Any, attempt: Attempt) -> None:
    """``Retry`` with an invalid delay uses the job's retry delay."""
    outcome = attempt(raising(Retry("busy", delay=delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.RETRY, 5.0)


@pytest.mark.parametrize("delay", INVALID_DURATIONS, ids=lambda delay: type(delay).__name__)
def test_snooze_with_invalid_delay(delay: Any, attempt: Attempt) -> None:
    """``Snooze`` with an invalid delay makes the job due at once, and uses no retry."""
    outcome = attempt(raising(Snooze(delay)))
    assert (outcome.kind, outcome.delay_seconds) == (OutcomeKind.SNOOZED, 0.0)


def test_fail_ignores_retries(attempt: Attempt) -> None:
    """``Fail`` fails the job even if retries are left."""
    outcome = attempt(raising(Fail("no such order")))
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED_FINALLY, "Fail: no such order")


class Busy(Retry):
    def __init__(self) -> None:  # does not set the attributes of Retry
        Exception.__init__(self, "busy")


class OrderMissing(Fail):
    pass


def test_subclasses_of_retry_and_fail(attempt: Attempt) -> None:
    """Subclasses work like their base class, even if they do not call its ``__init__``."""
    assert attempt(raising(OrderMissing("no"))).kind is OutcomeKind.FAILED_FINALLY
    assert attempt(raising(Busy())).kind in (OutcomeKind.RETRY, OutcomeKind.FAILED)


# Coroutines


def test_async_job(attempt: Attempt) -> None:
    """An ``async def`` job is awaited inside the app context, with ``current_job`` set."""

    async def job(value: int) -> list[Any]:
        await asyncio.sleep(0)
        return [value, current_job.id, flask.current_app.name]

    assert attempt(job, [5]).result_json == '[5,42,"shop"]'


def test_exceptions_of_async_job(attempt: Attempt) -> None:
    """Exceptions of an ``async def`` job, including ``Snooze``, decide the outcome."""

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
def test_interrupted_async_job(stop: Any, kind: OutcomeKind, attempt: Attempt) -> None:
    """An ``async def`` job is interrupted where it awaits, and its cleanup may await."""
    scope, cleaned = InterruptScope(), []  # type: ignore[var-annotated]

    async def job() -> None:
        loop = asyncio.get_running_loop()
        interrupter = loop.run_in_executor(None, scope.interrupt, stop)
        try:
            await asyncio.sleep(60)
        finally:
            await interrupter
            cleaned.append(1)

    assert attempt(job, scope=scope).kind is kind
    assert cleaned == [1]


# App context, session, signals and threads


def test_own_app_context(attempt: Attempt, host: Flask) -> None:
    """Each attempt runs in its own app context, which is popped afterwards."""
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


def test_app_context_is_popped_after_failure(attempt: Attempt) -> None:
    """The app context is popped after any exception, including a ``BaseException``."""
    for error in (ValueError(), SystemExit(), JobTimeout()):
        attempt(raising(error))
        assert not flask.has_app_context()


def test_current_job_during_attempt(attempt: Attempt) -> None:
    """``current_job`` is set only while the code runs, even if the code fails."""
    assert attempt(lambda: [current_job.id, current_job.attempt], attempt=3).result_json == "[42,3]"
    assert not current_job
    attempt(raising(SystemExit()))
    assert not current_job


def test_report_of_failed_job(attempt: Attempt) -> None:
    """The outcome of a failed job has its progress, meta and log lines."""

    def job() -> None:
        current_job.progress(0.5, "half")
        current_job.log("line")
        current_job.meta["step"] = 1
        raise ValueError

    outcome = attempt(job)
    assert outcome.report == Report(0.5, "half", '{"step":1}', ("line",))


@pytest.fixture
def table(host: Flask, bgjobs: Any, database: SQLAlchemy) -> sa.Table:
    """A table of the host app in its in-memory database."""
    table = sa.Table("orders", database.metadata, sa.Column("id", sa.Integer, primary_key=True))
    with host.app_context():
        database.create_all()
    return table


def count_rows(table: sa.Table, host: Flask, database: SQLAlchemy) -> int:
    with host.app_context():
        return int(database.session.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def leave_transaction_open(database: SQLAlchemy, table: sa.Table) -> None:
    database.session.execute(table.insert())


def leave_transaction_failed(database: SQLAlchemy, table: sa.Table) -> None:
    database.session.execute(table.insert().values(id=1))
    database.session.execute(table.insert().values(id=1))


@pytest.mark.parametrize("leave_session", [leave_transaction_open, leave_transaction_failed])
def test_next_job_has_fresh_session(
    leave_session: Any, attempt: Attempt, table: sa.Table, host: Flask, database: SQLAlchemy
) -> None:
    """An open or failed transaction is rolled back, and the next job has a fresh session."""
    attempt(lambda: leave_session(database, table))
    assert not database.session.registry.registry
    assert count_rows(table, host, database) == 0

    def next_job() -> bool:
        clean = not database.session().in_transaction()
        database.session.execute(table.insert())
        database.session.commit()
        return clean

    assert attempt(next_job).result_json == "true"
    assert count_rows(table, host, database) == 1


def test_failing_teardown_is_logged(
    attempt: Attempt, host: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in the host's teardown function is logged and does not change the outcome."""

    @host.teardown_appcontext
    def fail(_error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    assert attempt(lambda: 5).result_json == "5"
    assert "Teardown after job 42 raised" in caplog.messages
    assert attempt(raising(ValueError("no"))).error == "ValueError: no"
    assert attempt(raising(Snooze(5))).kind is OutcomeKind.SNOOZED
    assert not flask.has_app_context()
    assert not current_job


def test_session_is_removed_after_failing_teardown(
    attempt: Attempt, table: sa.Table, host: Flask, database: SQLAlchemy
) -> None:
    """If the host's teardown function raises, the session is still removed."""

    @host.teardown_appcontext
    def fail(_error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    attempt(lambda: leave_transaction_open(database, table))
    assert not database.session.registry.registry


def test_job_started_signal(attempt: Attempt, host: Flask) -> None:
    """``job_started`` is sent once, before the code runs, with the app and the job's spec."""
    received: list[Any] = []

    def receive(app: Flask, job: JobSpec) -> None:
        received.append((app, job.id, current_job.id))

    with job_started.connected_to(receive):
        attempt(lambda: received.append("code"))
    assert received == [(host, 42, 42), "code"]


def test_failing_receiver_is_logged(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a receiver of ``job_started`` is logged and does not change the outcome."""

    def fail(app: Flask, job: JobSpec) -> None:
        raise RuntimeError("receiver")

    with job_started.connected_to(fail):
        assert attempt(lambda: 5).result_json == "5"
    assert "A receiver of bgjobs-job-started raised" in caplog.text


def test_teardown_cannot_be_interrupted(attempt: Attempt, host: Flask) -> None:
    """The host's teardown functions run outside the interrupt scope."""
    scope, answers = InterruptScope(), []  # type: ignore[var-annotated]

    @host.teardown_appcontext
    def interrupt(_error: BaseException | None) -> None:
        answers.append(scope.interrupt(JobCancelled))

    assert attempt(lambda: 5, scope=scope).kind is OutcomeKind.COMPLETED
    assert answers == [False]


def test_parallel_jobs_are_isolated(attempt: Attempt) -> None:
    """Jobs in parallel threads have their own ``g`` and ``current_job``."""
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


tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="default")


def test_context_variables_are_reset(attempt: Attempt) -> None:
    """A job sees the caller's context variables, but its changes end with the attempt."""
    seen = []

    def job() -> None:
        seen.append(tenant.get())
        tenant.set("the job's")
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
    assert seen == ["the caller's", "the job's", "the caller's", "the job's", "the job's"]
    assert decimal.getcontext().prec == precision


def test_alarm_and_signal_mask_are_reset(attempt: Attempt) -> None:
    """After an attempt, its alarm is off and its blocked signals are unblocked.

    An alarm set by the caller is kept.
    """

    def job() -> None:
        signal.setitimer(signal.ITIMER_REAL, 600)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        raise ValueError

    # pytest may have set an alarm to stop a test that hangs.
    previous = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        assert attempt(job).kind is OutcomeKind.FAILED
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.setitimer(signal.ITIMER_REAL, 600)
        attempt(lambda: None)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous)


SECRET = "".join(f"k{number:04}" for number in range(720))
"""3,600 characters in 720 different parts, so that any stored part can be found."""


def secret_parts(text: str | None) -> list[str]:
    return [part for part in re.findall("k[0-9]{4}", text or "") if part in SECRET]


def test_secrets_are_masked_before_shortening(attempt: Attempt) -> None:
    """Error, traceback, note and log lines contain no part of a secret.

    This is true even if the secret is longer than the stored text.
    """

    def job(user: str, private_key: str) -> None:
        current_job.progress(0.5, "n" * 240 + private_key)
        current_job.log(f"log of {user} {private_key}")
        try:
            raise ValueError("x" * 900 + private_key + "y" * 900)
        except ValueError:
            raise RuntimeError(f"{private_key!r} is not good") from None

    outcome = attempt(job, ["ann", SECRET])
    assert outcome.error == "RuntimeError: '***' is not good"
    assert secret_parts(outcome.traceback) == []
    assert outcome.report is not None
    assert outcome.report.lines == ("log of ann ***",)
    assert outcome.report.progress_note == "n" * 240 + "***"
    outcome = attempt(raising(ValueError("x" * 1_900 + SECRET)), {})
    # Without a parameter of that name, nothing marks this text as a secret.
    assert secret_parts(outcome.error)


def test_secret_across_shortened_part(attempt: Attempt) -> None:
    """No part of a secret is stored, wherever the error is shortened."""

    def job(token: str, before: int) -> None:
        raise ValueError("x" * before + token + "y" * 3_000)

    for before in range(0, 3_000, 97):
        outcome = attempt(job, [SECRET, before])
        assert secret_parts(outcome.error) == []
        assert secret_parts(outcome.traceback) == []


def test_failing_redactor_masks_everything(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If masking fails, the whole text is masked and the outcome stays the same."""

    def fail_to_mask(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flask_bgjobs.job.redact.Redactor.masker", fail_to_mask)

    def job(note: str) -> None:
        current_job.log(note)
        raise ValueError(note)

    outcome = attempt(job, ["hello"])
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, "***")
    assert outcome.report is not None
    assert outcome.report.lines == ("***",)


def test_alarm_of_other_thread_is_kept(attempt: Attempt) -> None:
    """An alarm that another thread sets while a job runs is kept.

    In a web process, a request may set one.
    """
    previous = signal.setitimer(signal.ITIMER_REAL, 0)
    started, alarm_set = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        assert alarm_set.wait(30)

    try:
        thread = threading.Thread(target=attempt, args=[job])
        thread.start()
        assert started.wait(30)
        signal.setitimer(signal.ITIMER_REAL, 600)
        alarm_set.set()
        thread.join()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous)


@pytest.mark.parametrize(
    "statement",
    [
        "raise KeyboardInterrupt",
        "raise SystemExit(3)",
        "raise GeneratorExit",
        "import no_module",
    ],
)
def test_import_raises_base_exception(
    make_module: Callable[[str], str], state: AppState, statement: str
) -> None:
    """Any exception during the import fails only that job."""
    module = make_module(f"{statement}\ndef job(): ...")
    allow(state, f"{module}.job")
    outcome = run_spec(state, make_spec(target=f"{module}.job"))
    assert outcome.kind is OutcomeKind.FAILED_FINALLY
    assert outcome.error


class FailingComparison:
    def __eq__(self, other: object) -> bool:
        raise LookupError("not comparable")


def test_meta_raises_on_comparison(attempt: Attempt) -> None:
    """A ``meta`` whose comparison raises fails only that job."""

    def job() -> None:
        current_job.meta = FailingComparison()  # type: ignore[assignment]

    error = attempt(job).error
    assert error is not None
    assert error.startswith("NotSerializable: current_job.meta: ")


def test_positional_parameter_names(attempt: Attempt) -> None:
    """The outcome has the names of positional parameters, which the log uses to mask secrets.

    Keyword parameters need no names.
    """

    def job(user: str, /, password: str = "", *token: str, note: str = "") -> None: ...

    assert attempt(job, ["ann"]).parameter_names == ("user", "password", "*token")
    assert attempt(lambda user: None, {"user": "ann"}).parameter_names is None
    assert attempt(max, [[1]]).parameter_names is None
