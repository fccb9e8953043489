"""What flask-bgjobs raises."""

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
    """An error without a message says what its class means."""
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
def test_standard_bases(error: type[Exception], base: type[Exception]) -> None:
    """Where Python has a class for it, ours can be caught as that."""
    assert issubclass(error, base)


@pytest.mark.parametrize("error", [errors.JobCancelled, errors.JobTimeout])
def test_stops_are_no_exceptions(error: type[BaseException]) -> None:
    """A stop from outside is no ``Exception``, nor an error of the library."""
    assert issubclass(error, BaseException)
    assert not issubclass(error, Exception)


def test_words_of_a_job() -> None:
    """``Retry`` and ``Snooze`` carry the delay they were given, and read well as errors."""
    assert errors.Retry().delay is None
    assert errors.Retry(delay=5).delay == 5
    assert str(errors.Retry("busy")) == "busy"
    assert errors.Snooze(dt.timedelta(minutes=1)).delay == dt.timedelta(minutes=1)
    assert "60" in str(errors.Snooze(60))
    assert str(errors.Fail("no such order")) == "no such order"


def test_public_names() -> None:
    """Every error, every word of a job and every signal of the contract is exported."""
    names = {
        *("BgJobs", "run_background_job", "current_job", "Job", "JobStatus"),
        *("Retry", "Snooze", "Fail", "JobCancelled", "JobTimeout"),
        *("job_enqueued", "job_started", "job_completed", "job_retrying", "job_failed"),
        *("job_cancelled", "job_rescued", "worker_started", "worker_stopped"),
        *(error.__name__ for error in ERRORS),
    }
    assert names <= set(flask_bgjobs.__all__)
    assert all(hasattr(flask_bgjobs, name) for name in flask_bgjobs.__all__)
