"""What goes into an attempt and what comes out: plain data that may cross a pipe.

Named tuples where one is made for every job: they cost a third of a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import Any, NamedTuple

from . import serialize
from .retry import RetryPolicy
from .statuses import JobStatus, OutcomeKind, Settlement, settlement

MAX_LINES = 1_000
"""Log lines of an attempt that are kept until they are written."""
MAX_ID = 2**63 - 1
"""The largest number that a column of ids holds."""
MAX_INTEGER = 2**31 - 1
"""Priorities and counts are 32-bit integers in the database."""
MAX_ATTEMPT = MAX_INTEGER
"""A claim does not raise the attempt above it; a row that has reached it is failed."""
UNREADABLE_TIME = dt.datetime(1970, 1, 1)
"""Stands for a time in a row that Python cannot express, such as PostgreSQL's ``infinity``. Compare
it with ``is``."""


Key = tuple[int, int]
"""Job id and attempt: what tells one run of a job from every other."""


class JobSpec(NamedTuple):
    """A claimed job, as far as running and settling it needs."""

    id: int
    target: str
    method: str | None
    parameters_json: str
    queue: str
    priority: int
    attempt: int
    worker_id: int
    """Who claimed it."""
    retry_count: int
    retries: int
    retry_delay: str
    backoff: str
    max_retry_delay: float | None
    jitter: float
    timeout: float | None
    suspect: bool
    crash_count: int
    meta_json: str | None
    run_at: dt.datetime
    """When it was due."""
    claimed_at: dt.datetime
    """By the database's clock."""
    started_at: dt.datetime | None
    """Only of a job taken from a dead worker: set when its start had been committed."""

    @property
    def key(self) -> Key:
        """Job id and attempt."""
        return self.id, self.attempt

    @property
    def parameters(self) -> Any:
        """The parameters as they were given."""
        return serialize.loads(self.parameters_json)

    @property
    def retry_policy(self) -> RetryPolicy:
        """The waits between the job's attempts."""
        delays = tuple(json.loads(self.retry_delay))
        return RetryPolicy(delays, self.backoff, self.max_retry_delay, self.jitter)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What running code told since the last time it was asked."""

    progress: float | None = None
    progress_note: str | None = None
    meta_json: str | None = None
    lines: tuple[str, ...] = ()

    def followed_by(self, later: Report | None) -> Report:
        """This report and ``later`` as one, with its newest lines."""
        if later is None:
            return self
        return Report(
            self.progress if later.progress is None else later.progress,
            self.progress_note if later.progress_note is None else later.progress_note,
            self.meta_json if later.meta_json is None else later.meta_json,
            (self.lines + later.lines)[-MAX_LINES:],
        )


class Outcome(NamedTuple):
    """How an attempt ended."""

    job_id: int
    attempt: int
    kind: OutcomeKind
    result_json: str | None = None
    error_type: str | None = None
    error: str | None = None
    traceback: str | None = None
    delay_seconds: float | None = None
    """Until the next attempt: asked for by the code with ``Retry`` or ``Snooze``, or decided when
    the failure was reported. ``None``: the job's own retry delay."""
    wait_seconds: float | None = None
    """Between the claim and the start of the code; ``None``: it never started."""
    run_seconds: float = 0.0
    report: Report | None = None
    parameter_names: tuple[str, ...] | None = None
    """Of the positional parameters, with ``*rest`` last, by which secrets are masked in the log.
    ``None``: there are none, or they are not known."""
    is_reported: bool = False
    """Whether the process where it ran has logged the failure and called the host's functions."""


def settlement_of(
    spec: JobSpec, outcome: Outcome, *, max_crashes: int, cancel_requested: bool = False
) -> Settlement:
    """What ``outcome`` makes of its job.

    :param max_crashes: proved crashes at which a job is failed.
    :param cancel_requested: while the attempt ran.
    """
    return settlement(
        outcome.kind,
        retry_count=spec.retry_count,
        retries=spec.retries,
        crash_count=spec.crash_count,
        max_crashes=max_crashes,
        suspect=spec.suspect,
        cancel_requested=cancel_requested,
        retry_delay=lambda retry: spec.retry_policy.delay(retry),
        delay_seconds=outcome.delay_seconds,
    )


def lost_outcome(spec: JobSpec, kind: OutcomeKind, what_happened: str) -> Outcome:
    """The outcome of a job whose worker, or whose pool's processes, died with it.

    :param kind: from :func:`flask_bgjobs.job.statuses.lost_kind`.
    :param what_happened: a clause, such as ``worker w1 died``.
    """
    if kind is OutcomeKind.CRASHED:
        error_type, reason = "Crashed", f"{what_happened} while this was its only suspect"
    else:
        error_type, reason = "WorkerLost", what_happened
    error = f"{error_type}: {reason}"
    return Outcome(spec.id, spec.attempt, kind, error_type=error_type, error=error)


class Settled(NamedTuple):
    """What was recorded of an attempt."""

    spec: JobSpec
    outcome: Outcome
    status: JobStatus | None
    """The job's new status; ``None`` when the lease was lost and nothing was recorded."""
    retry_count: int = 0
    delay_seconds: float | None = None
    """Until the job is due again."""

    @property
    def job_id(self) -> int:
        """The id of the job."""
        return self.spec.id

    @property
    def error(self) -> str | None:
        """Type and message of what was raised."""
        return self.outcome.error

    @property
    def result(self) -> Any:
        """What the code returned."""
        text = self.outcome.result_json
        return None if text is None else serialize.loads(text)
