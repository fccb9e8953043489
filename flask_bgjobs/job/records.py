"""Records of attempts and their outcomes: plain data that can be sent through a pipe.

Records that are created for every job are named tuples, which cost a third of a frozen dataclass.
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
"""Maximum number of unwritten log lines that are kept for an attempt."""
MAX_ID = 2**63 - 1
"""The largest id that the database can store."""
MAX_INTEGER = 2**31 - 1
"""The largest priority or count, which are 32-bit integers in the database."""
MAX_ATTEMPT = MAX_INTEGER
"""The largest attempt number. A claim does not exceed it, and a job that reaches it fails."""
UNREADABLE_TIME = dt.datetime(1970, 1, 1)
"""Stands for a time in a row that Python cannot represent, such as PostgreSQL's ``infinity``.
Compare with ``is``."""


Key = tuple[int, int]
"""Job id and attempt number, which identify one run of a job."""


class JobSpec(NamedTuple):
    """The data of a claimed job that is needed to run and settle it."""

    id: int
    target: str
    method: str | None
    parameters_json: str
    queue: str
    priority: int
    attempt: int
    worker_id: int
    """Id of the worker that claimed the job."""
    retry_count: int
    retries: int
    retry_delay: str
    backoff: str
    max_retry_delay: float | None
    jitter: float
    timeout: float | None
    failure_rules: str | None
    suspect: bool
    crash_count: int
    meta_json: str | None
    run_at: dt.datetime
    """When the job was due."""
    claimed_at: dt.datetime
    """Time of the claim, by the database's clock."""
    started_at: dt.datetime | None
    """The start of the code. Set only for a job of a dead worker, and only if the start was
    committed."""
    deadline_at: dt.datetime | None
    """When the job expires; ``None``: never, or it has been started before."""
    waiting_since: dt.datetime | None
    """When a worker first found that it does not have the job's code; ``None`` if the code has
    started since, or no worker has found that."""
    limits_json: str | None
    """Its limits, as in :func:`flask_bgjobs.job.limits.uses_to_json`; ``None``: it has none."""

    @property
    def key(self) -> Key:
        """Job id and attempt."""
        return self.id, self.attempt

    @property
    def parameters(self) -> Any:
        """The parameters of the enqueue."""
        return serialize.loads(self.parameters_json)

    @property
    def retry_policy(self) -> RetryPolicy:
        """The retry policy of the job."""
        delays = tuple(json.loads(self.retry_delay))
        return RetryPolicy(delays, self.backoff, self.max_retry_delay, self.jitter)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Progress, metadata and log lines that running code reported since the previous report."""

    progress: float | None = None
    progress_note: str | None = None
    meta_json: str | None = None
    lines: tuple[str, ...] = ()

    def followed_by(self, later: Report | None) -> Report:
        """Merge a later report into this one. Only the newest log lines are kept."""
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
    """Seconds until the next attempt: set by the code with ``Retry`` or ``Snooze``, or decided when
    the failure was reported. ``None``: the job's own retry delay."""
    wait_seconds: float | None = None
    """Seconds from the claim to the start of the code; ``None`` if the code never started."""
    run_seconds: float = 0.0
    """Seconds for which the code ran."""
    report: Report | None = None
    parameter_names: tuple[str, ...] | None = None
    """Names of the positional parameters, with ``*rest`` last, used to mask secrets in the log.
    ``None`` if there are none, or they are unknown."""
    is_reported: bool = False
    """Whether the process that ran the attempt has logged the failure and called the host's
    functions."""


def settlement_of(
    spec: JobSpec, outcome: Outcome, *, max_crashes: int, cancel_requested: bool = False
) -> Settlement:
    """Decide what happens to a job after an outcome.

    :param max_crashes: number of proved crashes at which a job fails.
    :param cancel_requested: whether a cancel was requested while the attempt ran.
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


def expired_outcome(spec: JobSpec) -> Outcome | None:
    """The outcome of a job that was claimed too late; ``None`` if it was not."""
    deadline = spec.deadline_at
    if deadline is None or deadline is UNREADABLE_TIME or spec.claimed_at < deadline:
        return None
    error = f"Expired: it had not started by {deadline:%Y-%m-%d %H:%M:%S} UTC"
    kind = OutcomeKind.EXPIRED
    return Outcome(spec.id, spec.attempt, kind, error_type="Expired", error=error)


def waited_seconds(spec: JobSpec) -> float:
    """Seconds for which the job has waited for code when it was claimed."""
    since = spec.waiting_since
    return 0.0 if since is None else (spec.claimed_at - since).total_seconds()


def lost_outcome(spec: JobSpec, kind: OutcomeKind, what_happened: str) -> Outcome:
    """The outcome of an attempt whose worker, or whose pool's processes, died while it ran.

    :param kind: from :func:`flask_bgjobs.job.statuses.lost_kind`.
    :param what_happened: a clause for the error message, such as ``worker w1 died``.
    """
    if kind is OutcomeKind.CRASHED:
        error_type, reason = "Crashed", f"{what_happened} while this was its only suspect"
    else:
        error_type, reason = "WorkerLost", what_happened
    error = f"{error_type}: {reason}"
    return Outcome(spec.id, spec.attempt, kind, error_type=error_type, error=error)


def code_name(spec: JobSpec) -> str:
    """The name of the code that the job waits for, as stored: ``target`` or ``target:method``."""
    return spec.target if spec.method is None else f"{spec.target}:{spec.method}"


def split_code_name(name: str) -> tuple[str, str | None]:
    """The target and the method of a :func:`code_name`."""
    target, _, method = name.partition(":")
    return target, method or None


class Settled(NamedTuple):
    """The recorded result of an attempt."""

    spec: JobSpec
    outcome: Outcome
    status: JobStatus | None
    """The job's new status; ``None`` when the lease was lost and nothing was recorded."""
    retry_count: int = 0
    delay_seconds: float | None = None
    """Seconds until the job is due again."""

    @property
    def job_id(self) -> int:
        """The id of the job."""
        return self.spec.id

    @property
    def error(self) -> str | None:
        """Type and message of the error."""
        return self.outcome.error

    @property
    def result(self) -> Any:
        """The return value of the code."""
        text = self.outcome.result_json
        return None if text is None else serialize.loads(text)
