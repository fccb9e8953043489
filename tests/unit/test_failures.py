"""Failed attempts, reported where they ran."""

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
    """What a function for failed attempts was called with."""
    calls: list[Call] = []

    @bgjobs.on_failure
    def note(job: JobSpec, exception: BaseException, *, final: bool) -> None:
        calls.append((job, exception, final))

    return calls


def raising(error: BaseException) -> Callable[..., None]:
    def job(*_: Any) -> None:
        raise error

    return job


def run(state: AppState, spec: JobSpec, window: InterruptScope) -> Outcome:
    job = CurrentJob(spec)
    outcome = execute(state, spec, job, window, time.monotonic())
    job.report_failure()
    return outcome


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
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
def test_a_failed_attempt_is_one_record_with_its_exception(
    error: BaseException,
    options: dict[str, Any],
    final: bool,
    attempt: Attempt,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The record has the exception and what it belongs to, and the function gets the same."""
    outcome = attempt(raising(error), **options)
    (record,) = failures(caplog)
    assert record.levelno == (logging.ERROR if final else logging.WARNING)
    assert record.getMessage().startswith(
        "Job failed |" if final else "Job failed and will retry |"
    )
    assert record.exc_info is not None
    assert record.exc_info[:2] == (type(error), error)
    assert [frame.name for frame in traceback.extract_tb(record.exc_info[2])] == ["job"]
    fields = vars(record)
    told = [fields[f"bgjobs_{name}"] for name in ("job", "class", "queue", "attempt")]
    assert told == [42, fields["bgjobs_class"], "default", 1]
    ((job, exception, is_final),) = calls
    assert (job.id, exception, is_final) == (42, error, final)
    assert outcome.is_reported


@pytest.mark.parametrize("ending", [None, Snooze(1), JobCancelled()], ids=repr)
def test_what_has_not_failed_is_not_reported(
    ending: BaseException | None,
    attempt: Attempt,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither a job that completes, nor one that is snoozed or cancelled."""
    outcome = attempt(raising(ending) if ending else lambda: None)
    assert (calls, failures(caplog), outcome.is_reported) == ([], [], False)


def test_what_a_cancel_made_a_job_raise_is_not_reported(
    state: AppState, calls: list[Call], attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that raises something else when it is cancelled or given back has not failed."""
    spec = make_spec(target="nobody.knows")
    window = InterruptScope()
    window.interrupt(JobCancelled)
    outcome = run(state, spec, window)
    assert outcome.kind is OutcomeKind.REFUSED
    assert (calls, failures(caplog)) == ([], [])


def test_a_refused_name_is_reported(
    state: AppState, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """A name that the worker's allow-list does not hold keeps its own stage."""
    state.registry = Registry((), {})
    spec = make_spec(target="os.system")
    run(state, spec, InterruptScope())
    (record,) = failures(caplog)
    assert record.getMessage().startswith("Unauthorized or invalid job class/method |")
    assert [final for _, _, final in calls] == [True]


def test_the_traceback_in_the_log_is_masked(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """Formatters print the masked text, with control characters as escapes."""

    def login(user: str, password: str) -> None:
        raise ValueError(f"{user} cannot log in with {password}\x1b[31m")

    attempt(login, ["ann", "hunter2-and-more"])
    (record,) = failures(caplog)
    text = logging.Formatter("%(message)s").format(record)
    assert "in login" in text
    assert "ann cannot log in with ***\\x1b[31m" in text
    assert "hunter2" not in text


def test_a_message_forges_no_line(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    """Each line of a traceback is indented, whatever the exception says."""
    attempt(raising(ValueError("no\nERROR Job failed | forged\r\n\nINFO forged\u2028INFO forged")))
    (record,) = failures(caplog)
    line, *others = logging.Formatter("%(levelname)s %(message)s").format(record).splitlines()
    assert line.startswith("WARNING Job failed and will retry | ")
    assert others
    assert all(other.startswith("  ") for other in others)


def test_all_records_of_a_stage_have_one_message(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools that collect errors group records by the message without its arguments."""
    for text in ("one", "100 % of it"):
        attempt(raising(ValueError(text)))
    first, second = failures(caplog)
    assert first.msg == second.msg
    assert first.msg.startswith("Job failed and will retry | Class: %s | Method: %s | ")
    assert "100 % of it" in second.getMessage()


def test_the_delay_that_the_line_names_is_recorded(
    attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """Jitter is drawn once."""
    outcomes = [attempt(raising(ValueError("no")), jitter=1.0) for _ in range(9)]
    assert len({outcome.delay_seconds for outcome in outcomes}) > 1


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(1), asyncio.CancelledError(), BaseException()], ids=repr
)
def test_a_function_that_raises_harms_nobody(
    error: BaseException,
    bgjobs: BgJobs,
    calls: list[Call],
    attempt: Attempt,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, the others are called, and the outcome is the same."""
    order: list[str] = []

    @bgjobs.on_failure
    def broken(*_: Any, final: bool) -> None:
        order.append("broken")
        raise error

    @bgjobs.on_failure
    def last(*_: Any, final: bool) -> None:
        order.append(current_app.name)

    outcome = attempt(raising(ValueError("no")))
    assert order == ["broken", "shop"]
    assert (outcome.kind, outcome.error) == (OutcomeKind.FAILED, "ValueError: no")
    assert any("broken raised" in record.getMessage() for record in failures(caplog))


@pytest.mark.parametrize("kind", [OutcomeKind.CRASHED, OutcomeKind.TIMEOUT])
def test_a_failure_without_an_exception_is_reported_when_it_is_recorded(
    kind: OutcomeKind,
    state: AppState,
    calls: list[Call],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The process that ran it is gone, so the worker that records it reports it."""
    outcome = Outcome(42, 1, kind, error_type="X", error="X: the child process died")
    settled = Settled(make_spec(), outcome, JobStatus.FAILED)
    emit_settled(state.app, settled)
    report_lost(state, settled)
    ((_, exception, final),) = calls
    assert isinstance(exception, JobTimeout if kind is OutcomeKind.TIMEOUT else AttemptFailed)
    assert (str(exception), final) == ("X: the child process died", True)
    assert any(record.getMessage().startswith("Job failed |") for record in failures(caplog))


def test_what_was_reported_is_not_reported_again(
    state: AppState, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker that records it writes no second line."""
    outcome = Outcome(42, 1, OutcomeKind.FAILED, error="ValueError: no", is_reported=True)
    settled = Settled(make_spec(), outcome, JobStatus.FAILED)
    emit_settled(state.app, settled)
    report_lost(state, settled)
    assert (calls, failures(caplog)) == ([], [])


async def is_async(job: JobSpec, exception: BaseException, *, final: bool) -> None:
    """Nobody would await it."""


@pytest.mark.parametrize(
    "function", [is_async, lambda job, exception: None, lambda: None, AttemptFailed, None]
)
def test_a_function_that_cannot_be_called_is_refused(bgjobs: BgJobs, function: Any) -> None:
    """When it is registered, with what is wrong."""
    with pytest.raises(ConfigError, match="on_failure"):
        bgjobs.on_failure(function)


def test_it_works_for_an_app_that_is_set_up_later(host: Flask) -> None:
    """Functions may be registered before ``init_app``, as in a module of their own."""
    bgjobs, seen = BgJobs(), []

    @bgjobs.on_failure
    def note(job: JobSpec, exception: BaseException, final: bool) -> None:
        seen.append(final)

    bgjobs.init_app(host)
    state: AppState = host.extensions["bgjobs"]
    spec = make_spec(target="nobody.knows")
    run(state, spec, InterruptScope())
    assert seen == [True]


def test_handlers_that_format_the_exception_see_no_secret(
    attempt: Attempt, calls: list[Call], caplog: pytest.LogCaptureFixture
) -> None:
    """As those that write JSON do: they get a stand-in of the same name and place, which tools
    group with the others; the host's function gets the exception itself."""

    def login(user: str, password: str) -> None:
        raise PermissionError(f"{user} cannot log in with {password}") from KeyError(password)

    attempt(login, ["ann", "hunter2-and-more"])
    (record,) = failures(caplog)
    assert record.exc_info is not None
    text = logging.Formatter().formatException(record.exc_info)
    assert text.splitlines()[-1] == "PermissionError: ann cannot log in with ***"
    assert "in login" in text
    assert "hunter2" not in text
    ((_, exception, _),) = calls
    assert type(exception) is PermissionError
    assert "hunter2" in str(exception)


def test_a_function_in_a_factory_is_called_once(bgjobs: BgJobs, attempt: Attempt) -> None:
    """The one of the newest call, as with jobs."""
    called: list[str] = []

    def create_app(name: str) -> None:
        app = Flask(name)

        @bgjobs.on_failure
        def note(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(app.name)

    for name in ("first", "second"):
        create_app(name)
    attempt(raising(ValueError("no")))
    assert called == ["second"]


def test_a_function_in_a_factory_may_refer_to_anything(bgjobs: BgJobs, attempt: Attempt) -> None:
    """To itself, and to what is assigned after it."""
    called: list[str] = []

    def create_app(name: str) -> None:
        @bgjobs.on_failure
        def note(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(f"{note.__name__} {later}")

        later = "later"

        def twice(job: JobSpec, exception: BaseException, final: bool) -> None:
            called.append(twice.__name__)

        bgjobs.on_failure(twice)

    for name in ("first", "second"):
        create_app(name)
    attempt(raising(ValueError("no")))
    assert called == ["note later", "twice"]


def _notes(what: str, notes: list[str]) -> Callable[..., None]:
    def note(job: JobSpec, exception: BaseException, final: bool) -> None:
        notes.append(what)

    return note


def _notes_default(what: str, notes: list[str]) -> Callable[..., None]:
    def note(job: JobSpec, exception: BaseException, final: bool, channel: str = what) -> None:
        notes.append(channel)

    return note


def _notes_into(what: str, notes: list[str]) -> Callable[..., None]:
    own = [what]

    def note(job: JobSpec, exception: BaseException, final: bool) -> None:
        notes.extend(own)

    return note


def _passes_on(function: Callable[..., None]) -> Callable[..., None]:
    def call(job: JobSpec, exception: BaseException, final: bool) -> None:
        function(job, exception, final)

    return call


class _Notes:
    def __init__(self, what: str, notes: list[str]) -> None:
        self.what, self.notes = what, notes

    def note(self, job: JobSpec, exception: BaseException, final: bool) -> None:
        self.notes.append(self.what)


@pytest.mark.parametrize(
    "make",
    [
        _notes,
        _notes_default,
        _notes_into,
        lambda what, notes: _passes_on(_notes(what, notes)),
        lambda what, notes: _Notes(what, notes).note,
        lambda what, notes: functools.partial(_notes(what, notes)),
    ],
    ids=["closures", "defaults", "lists", "decorated", "methods", "partials"],
)
def test_functions_of_the_same_lines_are_all_called(
    bgjobs: BgJobs, attempt: Attempt, make: Callable[..., Any]
) -> None:
    """Where they are not the same function: they were made for different things."""
    notes: list[str] = []
    for what in ("mail", "chat"):
        bgjobs.on_failure(make(what, notes))
    attempt(raising(ValueError("no")))
    assert notes == ["mail", "chat"]


def test_slow_functions_hold_nothing_up(
    state: AppState, bgjobs: BgJobs, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker calls them in a thread of its own, and does not wait for them for ever."""
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
    assert called[3:] == [threading.current_thread().name], "not lost, though it came late"


def test_calls_that_wait_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    """Each keeps an exception in memory: those beyond a thousand are left out, and that is said."""
    gate, made = threading.Event(), []
    calls = CallThread()
    calls(gate.wait)
    for number in range(1_500):
        calls(lambda number=number: made.append(number))  # type: ignore[misc]
    gate.set()
    calls.finish(30)
    # The first one waits as well until the thread has taken it.
    assert len(made) in (999, 1_000)
    assert caplog.text.count("on_failure call dropped") == 1_500 - len(made)


def test_an_end_with_too_many_calls_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Also where there is no room any more to ask the thread to end."""
    calls = CallThread()
    gate = threading.Event()
    calls(gate.wait)
    for _ in range(1_100):
        calls(gate.wait)
    began = time.monotonic()
    calls.finish(0.1)
    assert time.monotonic() - began < 5
    assert "on_failure still running at the end | Waited: 0.1 s | Calls not" in caplog.text
    gate.set()
