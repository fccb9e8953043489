"""The exceptions of flask-bgjobs."""

from __future__ import annotations

import datetime as dt
import inspect

import pytest

import flask_bgjobs
from flask_bgjobs import errors

ERRORS = [
    error
    for error in vars(errors).values()
    if inspect.isclass(error) and issubclass(error, errors.BgJobsError)
]


@pytest.mark.parametrize("error", ERRORS)
def test_default_message(error: type[errors.BgJobsError]) -> None:
    """The default message of an error is its class's docstring."""
    assert str(error()) == error.__doc__
    assert str(error("order 7 is gone")) == "order 7 is gone"


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (errors.InvalidJob, ValueError),
        (errors.JobNotFound, LookupError),
        (errors.QueueNotFound, LookupError),
        (errors.WaitTimeout, TimeoutError),
    ],
)
def test_standard_base_classes(error: type[Exception], base: type[Exception]) -> None:
    """Errors are also subclasses of the matching standard exceptions."""
    assert issubclass(error, base)


@pytest.mark.parametrize("error", [errors.JobCancelled, errors.JobTimeout])
def test_interruptions_are_not_exceptions(error: type[BaseException]) -> None:
    """``JobCancelled`` and ``JobTimeout`` are not subclasses of ``Exception``."""
    assert issubclass(error, BaseException)
    assert not issubclass(error, Exception)


def test_retry_snooze_and_fail() -> None:
    """``Retry`` and ``Snooze`` keep their delay, and all three have a readable message."""
    assert errors.Retry().delay is None
    assert errors.Retry(delay=5).delay == 5
    assert str(errors.Retry("busy")) == "busy"
    assert errors.Snooze(dt.timedelta(minutes=1)).delay == dt.timedelta(minutes=1)
    assert "60" in str(errors.Snooze(60))
    assert str(errors.Fail("no such order")) == "no such order"


def test_public_names_are_exported() -> None:
    """All errors, job exceptions and signals are exported."""
    names = {
        *("BgJobs", "run_background_job", "current_job", "Job", "JobStatus"),
        *("Retry", "Snooze", "Fail", "JobCancelled", "JobTimeout"),
        *("job_enqueued", "job_started", "job_completed", "job_retrying", "job_failed"),
        *("job_cancelled", "job_rescued", "worker_started", "worker_stopped"),
        *(error.__name__ for error in ERRORS),
    }
    assert names <= set(flask_bgjobs.__all__)
    assert all(hasattr(flask_bgjobs, name) for name in flask_bgjobs.__all__)
