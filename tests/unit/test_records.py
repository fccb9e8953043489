"""The records of a job, its outcome and its settlement."""

from __future__ import annotations

import datetime as dt
import pickle

import pytest

from flask_bgjobs.job import serialize
from flask_bgjobs.job.records import Outcome, Settled
from flask_bgjobs.job.retry import RetryPolicy
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from tests.unit.helpers import make_spec


def test_spec_parameters() -> None:
    """``JobSpec.parameters`` returns the parameters with their types."""
    parameters = {"when": dt.date(2026, 1, 2), "ids": (1, 2)}
    assert make_spec(parameters=parameters).parameters == parameters


def test_spec_retry_policy() -> None:
    """``JobSpec.retry_policy`` is built from the job's columns."""
    spec = make_spec(retry_delay="[1.0, 2.0]", backoff="linear", max_retry_delay=9.0, jitter=0.5)
    assert spec.retry_policy == RetryPolicy((1.0, 2.0), "linear", 9.0, 0.5)


def test_settled_properties() -> None:
    """``Settled`` has the job's id, error and result."""
    spec = make_spec()
    outcome = Outcome(42, 1, OutcomeKind.COMPLETED, result_json=serialize.dumps((1, 2)))
    settled = Settled(spec, outcome, JobStatus.COMPLETED)
    assert (settled.job_id, settled.result, settled.error) == (42, (1, 2), None)
    failed = Settled(spec, Outcome(42, 1, OutcomeKind.FAILED, error="E: no"), JobStatus.FAILED)
    assert (failed.result, failed.error) == (None, "E: no")


def test_records_are_immutable_and_picklable() -> None:
    """Spec and outcome are immutable and can be pickled."""
    spec, outcome = make_spec(), Outcome(42, 1, OutcomeKind.FAILED, error="E: no")
    assert pickle.loads(pickle.dumps((spec, outcome))) == (spec, outcome)
    with pytest.raises(AttributeError):
        spec.attempt = 2  # type: ignore[misc]
