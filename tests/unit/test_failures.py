"""Failed attempts are logged and passed to ``on_failure`` functions where they run."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, current_app

from flask_bgjobs import (
    AttemptFailed,
    BgJobs,
    ConfigError,
    Fail,
    JobCancelled,
    JobTimeout,
    Retry,
    Snooze,
)
from flask_bgjobs.execution.current import CurrentJob
from flask_bgjobs.execution.execute import execute
from flask_bgjobs.execution.interrupt import InterruptScope
from flask_bgjobs.job.records import JobSpec, Outcome, Settled
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.observability.failures import CallThread, report_lost
from flask_bgjobs.registry import Registry
from flask_bgjobs.signals import emit_settled
from flask_bgjobs.state import AppState
from tests.unit.helpers import make_spec

Attempt = Callable[..., Outcome]
Call = tuple[JobSpec, BaseException, bool]


@pytest.fixture
def calls(bgjobs: BgJobs) -> list[Call]:
    """The arguments of all calls to an ``on_failure`` function."""
    calls: list[Call] = []

    @bgjobs.on_failure
    def on_failure(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        calls.append((job, exception, final))

    return calls


def raising(error: BaseException) -> Callable[..., None]:
    def job(*_: Any) -> None:
        raise error

    return job


def run(state: AppState, spec: JobSpec, scope: InterruptScope) -> Outcome:
    job = CurrentJob(spec)
    outcome = execute(state, spec, job, scope, time.monotonic())
    job.report_failure()
    return outcome


def warning_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("error", "options", "final"),
    [
        (ValueError("no"), {}, False),
        (ValueError("no"), {"retries": 0}, True),
        (ValueError("no"), {"retry_count": 3}, True),
        (Fail("never"), {}, True),
        (Retry("busy"), {}, False),
        (Retry("busy"), {"retries": 0}, True),
        (SystemExit(3), {"retries": 0}, True),
        (KeyboardInterrupt(), {"retries": 0}, True),
        (JobTimeout(), {}, False),
    ],
    ids=repr,
)
def test_failed_attempt_writes_one_record(
    error: BaseException,
    options: dict[str, Any],
    final: bool,
    attempt: Attempt,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A failed attempt writes one record with the exception.

    The ``on_failure`` function receives the same exception.
    """
    outcome = attempt(raising(error), **options)
    (record,) = warning_records(caplog)
    assert record.levelno == (logging.ERROR if final else logging.WARNING)
    assert record.getMessage().startswith(
        "Job failed |" if final else "Job failed and will retry |"
    )
    assert record.exc_info is not None
    assert record.exc_info[:2] == (type(error), error)
    assert [frame.name for frame in traceback.extract_tb(record.exc_info[2])] == ["job"]
    fields = vars(record)
    logged = [fields[f"bgjobs_{name}"] for name in ("job", "class", "queue", "attempt")]
    assert logged == [42, fields["bgjobs_class"], "default", 1]
    ((job, exception, is_final),) = calls
    assert (job.id, exception, is_final) == (42, error, final)
    assert outcome.is_reported


@pytest.mark.parametrize("ending", [None, Snooze(1), JobCancelled()], ids=repr)
def test_other_outcomes_are_not_reported(
    ending: BaseException | None,
    attempt: Attempt,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Completed, snoozed and cancelled jobs are not reported as failures."""
    outcome = attempt(raising(ending) if ending else lambda: None)
    assert (calls, warning_records(caplog), outcome.is_reported) == ([], [], False)


def test_exception_after_interrupt_is_not_reported(
    state: AppState, calls: list[Call], attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception raised after an interruption is not reported as a failure."""
    spec = make_spec(target="unknown._job")
    scope = InterruptScope()
    scope.interrupt(JobCancelled)
    outcome = run(state, spec, scope)
    assert outcome.kind is OutcomeKind.REFUSED
    assert (calls, warning_records(caplog)) == ([], [])


def test_refused_name_is_reported(
    state: AppState, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """A name that is not in the worker's allow-list is logged with its own message."""
    state.registry = Registry((), {})
    spec = make_spec(target="os._exit")
    run(state, spec, InterruptScope())
    (record,) = warning_records(caplog)
    assert record.getMessage().startswith("Unauthorized or invalid job class/method |")
    assert [final for _, _, final in calls] == [True]


def test_logged_traceback_is_masked(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    """The formatted traceback is masked, and its control characters are escaped."""

    def login(user: str, password: str) -> None:
        raise ValueError(f"{user} cannot log in with {password}\x1b[31m")

    attempt(login, ["ann", "hunter2-and-more"])
    (record,) = warning_records(caplog)
    text = logging.Formatter("%(message)s").format(record)
    assert "in login" in text
    assert "ann cannot log in with ***\\x1b[31m" in text
    assert "hunter2" not in text


def test_exception_cannot_forge_log_line(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """Each line of a logged traceback is indented, so an exception cannot forge a log line."""
    attempt(raising(ValueError("no\nERROR Job failed | forged\r\n\nINFO forged\u2028INFO forged")))
    (record,) = warning_records(caplog)
    line, *others = logging.Formatter("%(levelname)s %(message)s").format(record).splitlines()
    assert line.startswith("WARNING Job failed and will retry | ")
    assert others
    assert all(other.startswith("  ") for other in others)


def test_records_of_a_stage_share_message_template(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """All records of a stage have the same ``msg``, by which error trackers group them."""
    for text in ("one", "100 % of it"):
        attempt(raising(ValueError(text)))
    first, second = warning_records(caplog)
    assert first.msg == second.msg
    assert first.msg.startswith("Job failed and will retry | Class: %s | Method: %s | ")
    assert "100 % of it" in second.getMessage()


def test_jitter_varies_recorded_delay(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    """With jitter, the recorded delays differ between attempts."""
    outcomes = [attempt(raising(ValueError("no")), jitter=1.0) for _ in range(9)]
    assert len({outcome.delay_seconds for outcome in outcomes}) > 1


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(1), asyncio.CancelledError(), BaseException()], ids=repr
)
def test_failing_function_is_logged(
    error: BaseException,
    bgjobs: BgJobs,
    calls: list[Call],
    attempt: Attempt,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An ``on_failure`` function that raises is logged.

    The other functions are still called, and the outcome is the same.
    """
    order: list[str] = []

    @bgjobs.on_failure
    def failing(*_: Any, final: bool) -> None:
        order.append("failing")
        raise error

    @bgjobs.on_failure
    def last(*_: Any, final: bool) -> None:
        order.append(current_app.name)

    outcome = attempt(raising(ValueError("no")))
    assert order == ["failing", "shop"]
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, "ValueError: no")
    assert any("failing raised" in record.getMessage() for record in warning_records(caplog))


@pytest.mark.parametrize("kind", [OutcomeKind.CRASHED, OutcomeKind.TIMEOUT])
def test_lost_process_is_reported_by_worker(
    kind: OutcomeKind,
    state: AppState,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the process of a job is gone, the worker that records the failure reports it."""
    outcome = Outcome(42, 1, kind, error_type="X", error="X: the child process died")
    settled = Settled(make_spec(), outcome, JobStatus.FAILED)
    emit_settled(state.app, settled)
    report_lost(state, settled)
    ((_, exception, final),) = calls
    assert isinstance(exception, JobTimeout if kind is OutcomeKind.TIMEOUT else AttemptFailed)
    assert (str(exception), final) == ("X: the child process died", True)
    assert any(record.getMessage().startswith("Job failed |") for record in warning_records(caplog))


def test_reported_failure_is_not_reported_again(
    state: AppState, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker does not report a failure that the job's process has already reported."""
    outcome = Outcome(42, 1, OutcomeKind.FAILED, error="ValueError: no", is_reported=True)
    settled = Settled(make_spec(), outcome, JobStatus.FAILED)
    emit_settled(state.app, settled)
    report_lost(state, settled)
    assert (calls, warning_records(caplog)) == ([], [])


async def async_on_failure(job: JobSpec, exception: BaseException, *, final: bool) -> None:
    """An invalid function: the library would not await it."""


@pytest.mark.parametrize(
    "function", [async_on_failure, lambda job, exception: None, lambda: None, AttemptFailed, None]
)
def test_invalid_function_is_refused(bgjobs: BgJobs, function: Any) -> None:
    """``on_failure`` refuses a function that it cannot call."""
    with pytest.raises(ConfigError, match="on_failure"):
        bgjobs.on_failure(function)


def test_function_registered_before_init_app(host: Flask) -> None:
    """A function registered before ``init_app`` is called."""
    bgjobs, seen = BgJobs(), []

    @bgjobs.on_failure
    def on_failure(job: JobSpec, exception: BaseException, final: bool) -> None:
        seen.append(final)

    bgjobs.init_app(host)
    state: AppState = host.extensions["bgjobs"]
    spec = make_spec(target="unknown._job")
    run(state, spec, InterruptScope())
    assert seen == [True]


def test_exception_in_record_is_masked(
    attempt: Attempt, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """A log handler that formats the exception itself sees no secret.

    It gets a masked stand-in with the same class and traceback. The host's function gets the
    original exception.
    """

    def login(user: str, password: str) -> None:
        raise PermissionError(f"{user} cannot log in with {password}") from KeyError(password)

    attempt(login, ["ann", "hunter2-and-more"])
    (record,) = warning_records(caplog)
    assert record.exc_info is not None
    text = logging.Formatter().formatException(record.exc_info)
    assert text.splitlines()[-1] == "PermissionError: ann cannot log in with ***"
    assert "in login" in text
    assert "hunter2" not in text
    ((_, exception, _),) = calls
    assert type(exception) is PermissionError
    assert "hunter2" in str(exception)


def test_function_in_factory_is_called_once(bgjobs: BgJobs, attempt: Attempt) -> None:
    """If a factory registers a function twice, only the newest function is called."""
    called: list[str] = []

    def create_app(name: str) -> None:
        app = Flask(name)

        @bgjobs.on_failure
        def on_failure(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(app.name)

    for name in ("first", "second"):
        create_app(name)
    attempt(raising(ValueError("no")))
    assert called == ["second"]


def test_function_in_factory_refers_to_itself(bgjobs: BgJobs, attempt: Attempt) -> None:
    """A function in a factory may refer to itself and to variables assigned after it."""
    called: list[str] = []

    def create_app(name: str) -> None:
        @bgjobs.on_failure
        def on_failure(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(f"{on_failure.__name__} {later}")

        later = "later"

        def record_name(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(record_name.__name__)

        bgjobs.on_failure(record_name)

    for name in ("first", "second"):
        create_app(name)
    attempt(raising(ValueError("no")))
    assert called == ["on_failure later", "record_name"]


def _closure(channel: str, notes: list[str]) -> Callable[..., None]:
    def on_failure(job: JobSpec, exception: BaseException, final: bool) -> None:
        notes.append(channel)

    return on_failure


def _with_default(channel: str, notes: list[str]) -> Callable[..., None]:
    def on_failure(
        job: JobSpec, exception: BaseException, final: bool, target: str = channel
    ) -> None:
        notes.append(target)

    return on_failure


def _with_list(channel: str, notes: list[str]) -> Callable[..., None]:
    own = [channel]

    def on_failure(job: JobSpec, exception: BaseException, final: bool) -> None:
        notes.extend(own)

    return on_failure


def _decorated(function: Callable[..., None]) -> Callable[..., None]:
    def call(job: JobSpec, exception: BaseException, final: bool) -> None:
        function(job, exception, final)

    return call


class _Notifier:
    def __init__(self, channel: str, notes: list[str]) -> None:
        self.channel, self.notes = channel, notes

    def on_failure(self, job: JobSpec, exception: BaseException, final: bool) -> None:
        self.notes.append(self.channel)


@pytest.mark.parametrize(
    "make",
    [
        _closure,
        _with_default,
        _with_list,
        lambda channel, notes: _decorated(_closure(channel, notes)),
        lambda channel, notes: _Notifier(channel, notes).on_failure,
        lambda channel, notes: functools.partial(_closure(channel, notes)),
    ],
    ids=["closures", "defaults", "lists", "decorated", "methods", "partials"],
)
def test_functions_with_same_code_are_all_called(
    bgjobs: BgJobs, attempt: Attempt, make: Callable[..., Any]
) -> None:
    """Different functions made by the same lines of code are all called."""
    notes: list[str] = []
    for channel in ("mail", "chat"):
        bgjobs.on_failure(make(channel, notes))
    attempt(raising(ValueError("no")))
    assert notes == ["mail", "chat"]


def test_slow_function_does_not_block_jobs(
    state: AppState, bgjobs: BgJobs, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker calls the functions in a separate thread, and waits only for a limited time."""
    gate, called = threading.Event(), []

    @bgjobs.on_failure
    def slow(job: JobSpec, exception: BaseException, final: bool) -> None:
        gate.wait()
        called.append(threading.current_thread().name)

    state.call_soon = calls = CallThread()
    for _ in range(3):
        attempt(raising(ValueError("no")))
    calls.finish(0.05)
    assert called == []
    assert "on_failure still running at the end | Waited: 0.05 s | Calls not made: 3" in caplog.text
    gate.set()
    calls.finish(30)
    assert called == ["bgjobs-failures"] * 3
    attempt(raising(ValueError("no")))
    assert called[3:] == [threading.current_thread().name], "a later call runs in the caller"


def test_waiting_calls_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    """At most a thousand calls wait; further calls are dropped and logged."""
    gate, numbers = threading.Event(), []
    calls = CallThread()
    calls(gate.wait)
    for number in range(1_500):
        calls(lambda number=number: numbers.append(number))  # type: ignore[misc]
    gate.set()
    calls.finish(30)
    # The first call takes one of the thousand places until the thread has taken it.
    assert len(numbers) in (999, 1_000)
    assert caplog.text.count("on_failure call dropped") == 1_500 - len(numbers)


def test_finish_with_full_queue_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """``finish`` returns at its deadline and logs it, even if the queue is full."""
    calls = CallThread()
    gate = threading.Event()
    calls(gate.wait)
    for _ in range(1_100):
        calls(gate.wait)
    started = time.monotonic()
    calls.finish(0.1)
    assert time.monotonic() - started < 30
    assert "on_failure still running at the end | Waited: 0.1 s | Calls not" in caplog.text
    gate.set()
