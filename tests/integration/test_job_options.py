"""The options ``retry_on``, ``fail_on``, ``expires`` and ``retention`` on each database."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import (
    Fail,
    InvalidJob,
    Job,
    JobStatus,
    Retry,
    Snooze,
    job_cancelled,
    run_background_job,
)
from flask_bgjobs.errors import ConfigError
from flask_bgjobs.job.failure_rules import is_final, rules_json
from flask_bgjobs.job.statuses import FINAL, OutcomeKind
from flask_bgjobs.options import NO_OPTIONS, options_from
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.state import AppState
from flask_bgjobs.testing import drain
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.worker import Worker
from tests.conftest import count_jobs, stored, wait_until
from tests.integration.test_unique import claim, pass_time, settle

KEPT_FOR_EVER = dict.fromkeys(FINAL)


class Network(ConnectionError):
    """A subclass."""


def run_raising(state: AppState, error: type[Exception], **options: Any) -> Job:
    """Run a job whose code raises ``error``; returns it after its first attempt."""

    def raise_it() -> None:
        raise error("no")

    registry = Registry(state.config.allowed_jobs, {"f": Decorated(raise_it, NO_OPTIONS)})
    state.registry = registry
    job = run_background_job("f", retry_delay=3600, **options)
    drain(state.app)
    return job.refresh()


class TestFailures:
    @pytest.mark.parametrize(
        ("options", "error", "status"),
        [
            ({}, ValueError, JobStatus.RETRYING),
            ({"retry_on": ConnectionError}, ConnectionError, JobStatus.RETRYING),
            ({"retry_on": (ConnectionError, OSError)}, Network, JobStatus.RETRYING),
            ({"retry_on": (ConnectionError,)}, ValueError, JobStatus.FAILED),
            ({"retry_on": ["ConnectionError"]}, Network, JobStatus.RETRYING),
            ({"retry_on": ["requests.exceptions.Timeout"]}, Network, JobStatus.FAILED),
            ({"fail_on": (ValueError,)}, ValueError, JobStatus.FAILED),
            ({"fail_on": (ValueError,)}, UnicodeError, JobStatus.FAILED),
            ({"fail_on": (ValueError,)}, KeyError, JobStatus.RETRYING),
            ({"retry_on": OSError, "fail_on": Network}, Network, JobStatus.FAILED),
            ({"retry_on": OSError, "fail_on": Network}, OSError, JobStatus.RETRYING),
        ],
        ids=str,
    )
    @pytest.mark.on("sqlite")
    def test_classes(
        self, app: Flask, state: AppState, options: Any, error: type[Exception], status: JobStatus
    ) -> None:
        """Only the exceptions of ``retry_on`` are retried, and those of ``fail_on`` never are.
        Subclasses count."""
        assert run_raising(state, error, **options).status == status

    def test_stored_with_the_job(self, app: Flask, state: AppState) -> None:
        """The rules are those of the enqueue, on each database."""
        job = run_raising(state, KeyError, retry_on=ConnectionError)
        assert (job.status, job.retry_count) == (JobStatus.FAILED, 0)

    @pytest.mark.on("sqlite")
    @pytest.mark.parametrize(
        ("error", "status"), [(Network, JobStatus.RETRYING), (KeyError, JobStatus.FAILED)]
    )
    def test_default_of_the_app(
        self, make_app: Callable[..., Flask], error: type[Exception], status: JobStatus
    ) -> None:
        """``BGJOBS_RETRY_ON`` and ``BGJOBS_FAIL_ON`` are the defaults of all jobs."""
        app = make_app(BGJOBS_RETRY_ON=["ConnectionError"], BGJOBS_FAIL_ON=[KeyError])
        with app.app_context():
            state: AppState = app.extensions["bgjobs"]
            assert run_raising(state, error).status == status
            assert run_raising(state, KeyError, retry_on=KeyError).status == JobStatus.FAILED

    @pytest.mark.on("sqlite")
    @pytest.mark.parametrize("error", [Retry, Snooze, Fail])
    def test_own_exceptions_are_not_affected(
        self, app: Flask, state: AppState, error: type[Exception]
    ) -> None:
        """``Retry``, ``Snooze`` and ``Fail`` mean what they say."""

        def raise_it() -> None:
            raise Snooze(3600) if error is Snooze else error("no")

        decorated = {"f": Decorated(raise_it, options_from({"retry_on": KeyError}))}
        state.registry = Registry({}, decorated)
        job = run_background_job("f", retry_delay=3600)
        drain(app)
        expected = {
            Retry: JobStatus.RETRYING,
            Snooze: JobStatus.SCHEDULED,
            Fail: JobStatus.FAILED,
        }
        assert job.refresh().status == expected[error]

    @pytest.mark.parametrize(
        "rules", ["{", "[]", '{"retry_on": 5}', '{"fail_on": null}', "null", "[" * 5_000]
    )
    def test_invalid_rules_in_a_row(self, rules: str) -> None:
        """Nonsense in the row counts as no rules."""
        assert is_final(rules, ValueError()) is False

    def test_rules_are_not_stored_without_options(self) -> None:
        """A job without these options has no rules."""
        assert rules_json(None, None) is None


class TestExpires:
    def test_job_that_starts_in_time_is_run(self, app: Flask, state: AppState) -> None:
        """A job that starts before it expires runs, and then does not expire."""
        job = run_background_job("tests.jobs.echo", parameters=[1], expires=3600)
        pass_time(state, 3000)
        (spec,) = claim(state)
        pass_time(state, 3000)
        assert state.store.expire(10) == []
        settle(state, spec, OutcomeKind.COMPLETED)
        assert stored(app, job).status == JobStatus.COMPLETED
        assert stored(app, job).deadline_at is None

    def test_job_that_is_claimed_too_late(self, app: Flask, state: AppState) -> None:
        """A job that is claimed after it has expired is cancelled, and its code does not run."""
        job = run_background_job("tests.jobs.fail", expires=3600)
        pass_time(state, 3700)
        cancelled: list[int] = []

        def on_cancelled(_app: Flask, job: Any, **_values: Any) -> None:
            cancelled.append(job.id)

        with job_cancelled.connected_to(on_cancelled, app):
            (outcome,) = drain(app)
        job.refresh()
        assert (outcome.status, job.status) == (JobStatus.CANCELLED, JobStatus.CANCELLED)
        assert job.error is not None
        assert job.error.startswith("Expired: it had not started by 2")
        assert cancelled == [job.id]

    @pytest.mark.parametrize("options", [{}, {"delay": 3000}], ids=str)
    def test_job_that_nobody_claims(self, app: Flask, state: AppState, options: Any) -> None:
        """A worker cancels expired jobs, also in a queue that it does not serve."""
        job = run_background_job("tests.jobs.echo", expires=3600, queue="other", **options)
        kept = run_background_job("tests.jobs.echo", expires=7200, queue="other")
        pass_time(state, 3700)
        worker = Worker(state, WorkerOptions(queues=["mail"]))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            wait_until(lambda: stored(app, job).status == JobStatus.CANCELLED, "the end")
        finally:
            worker.stop()
            thread.join()
        assert stored(app, job).error == "Expired: no worker started it in time"
        assert stored(app, kept).status == JobStatus.PENDING

    def test_retries_do_not_expire(self, app: Flask, state: AppState) -> None:
        """A job that has started is retried, however late."""
        job = run_background_job("tests.jobs.echo", expires=3600, retry_delay=5000)
        settle(state, *claim(state), OutcomeKind.FAILED)
        pass_time(state, 6000)
        assert state.store.expire(10) == []
        assert [spec.id for spec in claim(state)] == [job.id]

    def test_released_job_still_expires(self, app: Flask, state: AppState) -> None:
        """A job that was claimed and released before it started still expires."""
        job = run_background_job("tests.jobs.echo", expires=3600)
        settle(state, *claim(state), OutcomeKind.GIVEN_BACK)
        pass_time(state, 3700)
        assert state.store.expire(10) == [job.id]

    def test_retry_by_hand(self, app: Flask, state: AppState) -> None:
        """An expired job that a person retries runs."""
        job = run_background_job("tests.jobs.echo", parameters=[1], expires=3600)
        pass_time(state, 3700)
        state.store.expire(10)
        assert state.store.retry([job.id]).done == [job.id]
        assert [outcome.result for outcome in drain(app)] == [1]

    def test_absolute_time(self, app: Flask, state: AppState) -> None:
        """An aware datetime is a time by the database's clock."""
        tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        job = run_background_job("tests.jobs.echo", expires=tomorrow)
        assert stored(app, job).deadline_at == tomorrow.replace(tzinfo=None)
        past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
        run_background_job("tests.jobs.fail", expires=past)
        assert [outcome.status for outcome in drain(app)] == [
            JobStatus.COMPLETED,
            JobStatus.CANCELLED,
        ]


class TestRetention:
    def test_shorter_and_longer_than_the_default(self, app: Flask, state: AppState) -> None:
        """A job's own retention counts from its end, whatever the default."""
        short = run_background_job("tests.jobs.echo", retention=3600)
        usual = run_background_job("tests.jobs.echo")
        long = run_background_job("tests.jobs.echo", retention=dt.timedelta(days=30))
        drain(app)
        week = dict.fromkeys(FINAL, 7 * 86_400.0)
        assert state.store.prune(week, 10).deleted == 0
        pass_time(state, 3700)
        assert state.store.count_prunable(week) == 1
        assert state.store.prune(week, 10).deleted == 1
        assert state.store.get(short.id) is None
        pass_time(state, 8 * 86_400)
        assert state.store.prune(week, 10).deleted == 1
        assert state.store.get(usual.id) is None
        assert state.store.prune(week, 10).deleted == 0
        pass_time(state, 30 * 86_400)
        assert state.store.prune(KEPT_FOR_EVER, 10).deleted == 1
        assert state.store.get(long.id) is None

    @pytest.mark.parametrize("status", sorted(FINAL))
    def test_each_end(self, app: Flask, state: AppState, status: JobStatus) -> None:
        """It applies to completed, failed and cancelled jobs."""
        job = run_background_job("tests.jobs.echo", retention=0, retries=0)
        if status is JobStatus.CANCELLED:
            job.cancel()
        else:
            kind = OutcomeKind.COMPLETED if status is JobStatus.COMPLETED else OutcomeKind.FAILED
            settle(state, *claim(state), kind)
        assert stored(app, job).status == status
        assert state.store.prune(KEPT_FOR_EVER, 10).deleted == 1

    def test_batches(self, app: Flask, state: AppState) -> None:
        """Many jobs are deleted in several batches."""
        for _ in range(5):
            run_background_job("tests.jobs.echo", retention=0)
        drain(app)
        deleted, cursor = [], None
        while True:
            pruned = state.store.prune(KEPT_FOR_EVER, 2, cursor)
            deleted.append(pruned.deleted)
            if (cursor := pruned.cursor) is None:
                break
        assert deleted == [2, 2, 1]


@pytest.mark.on("sqlite")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retry_on": ()}, "retry_on must be 1 to 50 exception classes"),
        ({"retry_on": BaseException}, "subclasses of Exception"),
        ({"fail_on": ["not a name"]}, "dotted names of them"),
        ({"fail_on": [5]}, "fail_on must be subclasses of Exception"),
        ({"expires": 0}, "expires must be more than 0 s"),
        ({"expires": "soon"}, "expires must be seconds"),
        ({"expires": 60, "delay": 60}, "expires must be longer than delay"),
        ({"expires": dt.datetime(2027, 1, 1)}, "expires must be a datetime with a time zone"),
        (
            {
                "expires": dt.datetime(2027, 1, 1, tzinfo=dt.UTC),
                "run_at": dt.datetime(2027, 1, 2, tzinfo=dt.UTC),
            },
            "expires must be later than run_at",
        ),
        ({"retention": -1}, "retention must be at least 0 s"),
    ],
    ids=range(10),
)
def test_invalid_options(app: Flask, options: Any, message: str) -> None:
    """Values that are not valid are refused with what is allowed."""
    with pytest.raises(InvalidJob) as refusal:
        run_background_job("tests.jobs.echo", **options)
    assert message in str(refusal.value)
    assert count_jobs(app) == 0


@pytest.mark.on("sqlite")
@pytest.mark.parametrize("key", ["BGJOBS_RETRY_ON", "BGJOBS_FAIL_ON"])
@pytest.mark.parametrize("value", [[], 5, "no name", [BaseException]])
def test_invalid_defaults(make_app: Callable[..., Flask], key: str, value: Any) -> None:
    """An invalid default stops ``init_app``."""
    with pytest.raises(ConfigError, match=key):
        make_app(**{key: value})
