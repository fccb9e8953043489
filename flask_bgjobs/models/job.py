"""The table of jobs, and conditions and index hints for statements on it."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from ..errors import JobNotCommitted, JobNotFound, WaitTimeout
from ..job import serialize
from ..job.records import MAX_ID
from ..job.statuses import FINAL, JobStatus, WaitsFor
from ..job.text import shown
from .base import NUMBERED_TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index

IS_OF_ANY_QUEUE = "attempt >= 0"
"""A condition that is true for every job. On PostgreSQL, only statements with this condition can
use the index for claims from all queues. A claim from certain queues leaves it out, or the planner
could use that index and skip the jobs of all other queues one by one."""
_IS_PENDING = "status = 'pending'"
# OR instead of IN: SQLite would use a partial index with IN only for statements with the same list.
_IS_DELAYED = "status = 'scheduled' OR status = 'retrying'"
_IS_WAITING = "status = 'waiting'"
_WAITS_FOR_OTHERS = "waits_for = 'code' OR waits_for = 'queue'"
_IS_FINISHED = "finished_at IS NOT NULL"

_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.01, 0.25


class Job(Base):
    """A background job: its target, its options, its status and its result.

    The object is detached from any session. Reading an attribute never queries the database;
    :meth:`refresh` does.
    """

    __tablename__ = "bgjobs_job"
    __table_args__ = (
        index(
            "ix_bgjobs_job_claim",
            *("status", "claim_rank", "run_at", "id"),
            where=_IS_PENDING,
            postgresql_where=f"{_IS_PENDING} AND {IS_OF_ANY_QUEUE}",
        ),
        index(
            "ix_bgjobs_job_claim_queue",
            *("status", "queue", "claim_rank", "run_at", "id"),
            where=f"{_IS_PENDING} OR {_IS_DELAYED} OR {_IS_WAITING}",
        ),
        index("ix_bgjobs_job_due", "status", "run_at", "id", where=_IS_DELAYED),
        index("ix_bgjobs_job_list", "status", "id"),
        index("ix_bgjobs_job_finished", "status", "finished_at", "id", where=_IS_FINISHED),
        index("uq_bgjobs_job_unique_hash", "unique_hash", unique=True),
        index("ix_bgjobs_job_deadline", "deadline_at", "id", where="deadline_at IS NOT NULL"),
        index(
            "ix_bgjobs_job_waits",
            *("waits_for", "queue", "waiting_on", "waiting_since", "id"),
            where=_WAITS_FOR_OTHERS,
        ),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    """Id of the job. A committed id is never used again, even after the job is deleted."""
    target: Mapped[str] = mapped_column(sa.String(255))
    """Dotted name of the class or function."""
    method: Mapped[str | None] = mapped_column(sa.String(255))
    """The method of a class; ``None`` for a function."""
    parameters_json: Mapped[str] = mapped_column("parameters", LongText)
    """JSON of a list of positional or a dict of keyword parameters, written by ``serialize``."""
    queue: Mapped[str] = mapped_column(sa.String(64))
    priority: Mapped[int] = mapped_column(sa.Integer)
    """Higher runs first."""
    claim_rank: Mapped[int] = mapped_column(sa.BigInteger)
    """The order of claims by priority and turn, from :func:`~flask_bgjobs.job.turns.claim_rank`."""
    status: Mapped[str] = mapped_column(sa.String(16))
    """One of :class:`~flask_bgjobs.JobStatus`."""
    waits_for: Mapped[str | None] = mapped_column(sa.String(16))
    """What a ``waiting`` job waits for, one of :class:`~flask_bgjobs.job.statuses.WaitsFor`."""
    waiting_on: Mapped[str | None] = mapped_column(sa.String(511))
    """The name of the code that a ``waiting`` job waits for: ``target`` or ``target:method``."""
    waiting_since: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When a worker first found that the job has to wait. Kept until its code starts."""
    run_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When the job is or was due."""
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)

    attempt: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Number of claims. It never decreases. With ``worker_id``, it is the fence of every settle."""
    retry_count: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Retries used so far, 0 to ``retries``."""
    retries: Mapped[int] = mapped_column(sa.Integer)
    """Retries allowed after the first attempt."""
    retry_delay: Mapped[str] = mapped_column(sa.Text)
    """JSON list of the seconds before each retry. The last value applies to all later retries."""
    backoff: Mapped[str] = mapped_column(sa.String(16))
    """How a single ``retry_delay`` grows: ``fixed``, ``linear`` or ``exponential``."""
    max_retry_delay: Mapped[float | None] = mapped_column(sa.Double)
    """Maximum seconds before a retry."""
    jitter: Mapped[float] = mapped_column(sa.Double)
    """Maximum random change of a retry delay, as a fraction of it, 0 to 1."""
    timeout: Mapped[float | None] = mapped_column(sa.Double)
    """Maximum seconds for one attempt."""
    failure_rules: Mapped[str | None] = mapped_column(sa.Text)
    """JSON of ``retry_on`` and ``fail_on``, as names of exception classes."""
    deadline_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When it expires, until it has started (``expires``); after its end, when it is deleted
    (``retention``)."""
    retention_seconds: Mapped[float | None] = mapped_column(sa.Double)
    """Seconds for which it is kept after its end; ``None``: as ``BGJOBS_RETENTION`` says."""

    worker_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Id of the worker that claimed the job last; kept after the job ends."""
    claimed_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    started_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When the code of the newest attempt started; ``None`` while the job is only claimed."""
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    cancel_requested_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When a cancel of the running job was requested; kept after the job ends."""
    suspect: Mapped[bool] = mapped_column(sa.Boolean, default=False)
    """Whether the job's last worker or child process died while it held the job. A worker runs one
    suspect at a time, and commits its start before its code runs."""
    crash_count: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Number of times that the job is proved to have crashed its worker or child process."""

    result_json: Mapped[str | None] = mapped_column("result", LongText)
    error_type: Mapped[str | None] = mapped_column(sa.String(255))
    """Name of the last attempt's exception class."""
    error: Mapped[str | None] = mapped_column(sa.Text)
    """Message of the last attempt's exception, type first."""
    progress: Mapped[float | None] = mapped_column(sa.Double)
    """Progress reported by the code, 0 to 1."""
    progress_note: Mapped[str | None] = mapped_column(sa.String(255))
    meta_json: Mapped[str | None] = mapped_column("meta", LongText)
    tags_json: Mapped[str | None] = mapped_column("tags", sa.Text)
    owner: Mapped[str | None] = mapped_column(sa.String(255))
    unique_key: Mapped[str | None] = mapped_column(sa.String(255))
    unique_hash: Mapped[str | None] = mapped_column(sa.String(64))
    """SHA-256 of ``unique_key`` while the job holds it, so that a second job conflicts."""
    unique_until_start: Mapped[bool | None] = mapped_column(sa.Boolean)
    """Whether it gives its key up when it is claimed; otherwise when it ends."""
    unique_expires_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """Until when it holds its key at least, even after its end."""
    limits_json: Mapped[str | None] = mapped_column("limits", sa.Text)
    """JSON of its limits with their keys, in the order in which it takes them."""
    limit_key_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Id of the key of its first limit; ``None`` if it has no limits."""
    fair_key: Mapped[str | None] = mapped_column(sa.String(255))
    """Its key if it takes turns with the jobs of other keys (``fair``)."""
    debounce_until: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """The latest time to which further enqueues move it."""

    deduplicated = False
    """``True`` if an enqueue returned this job because it already held the key."""
    committed = True
    """``False`` while the transaction that the job joined has not committed."""

    @property
    def parameters(self) -> Any:
        """The parameters of the enqueue: a list of positional or a dict of keyword parameters."""
        return serialize.loads(self.parameters_json)

    @property
    def result(self) -> Any:
        """The return value of the code; ``None`` until the job is completed."""
        return None if self.result_json is None else serialize.loads(self.result_json)

    @property
    def meta(self) -> dict[str, Any]:
        """The data that the code stored with ``current_job.meta``."""
        return {} if self.meta_json is None else serialize.loads(self.meta_json)

    @property
    def tags(self) -> list[str]:
        """The tags of the enqueue."""
        return [] if self.tags_json is None else json.loads(self.tags_json)

    @property
    def _needed_from_worker(self) -> str:
        """What a worker must do to run it, for an error message."""
        serves = f"serve the queue {self.queue!r}"
        if self.waits_for == WaitsFor.CODE:
            return f"with {self.name} in its code {serves}"
        return serves

    @hybrid_property
    def is_finished(self) -> bool:
        """``True`` if the job is completed, failed or cancelled."""
        return JobStatus(self.status).is_final

    @is_finished.inplace.expression
    @classmethod
    def _is_finished_in_sql(cls) -> sa.ColumnElement[bool]:
        return cls.status.in_(status.value for status in FINAL)

    @hybrid_property
    def is_cancelling(self) -> bool:
        """``True`` while a cancel waits for the job's running code to stop."""
        return self.status == JobStatus.RUNNING and self.cancel_requested_at is not None

    @is_cancelling.inplace.expression
    @classmethod
    def _is_cancelling_in_sql(cls) -> sa.ColumnElement[bool]:
        return sa.and_(has_status(JobStatus.RUNNING), cls.cancel_requested_at.is_not(None))

    @hybrid_property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    @name.inplace.expression
    @classmethod
    def _name_in_sql(cls) -> sa.ColumnElement[str]:
        return sa.func.coalesce(cls.target + "." + cls.method, cls.target)

    @classmethod
    def get(cls, job_id: int) -> Job | None:
        """Read a job from the database, outside your session. Needs an application context.

        :returns: the job; ``None`` if it does not exist.
        :raises TypeError: when the id is not an ``int``, such as a string from a request.
        """
        if not isinstance(job_id, int) or isinstance(job_id, bool):
            raise TypeError(f"the id of a job is an int, not {shown(job_id)}")
        if not 0 < job_id <= MAX_ID:
            return None
        return _find_actions().find_job(job_id)

    def refresh(self) -> Job:
        """Read the job again from the database, outside your session, and return it.

        Needs an application context.

        :raises JobNotCommitted: when the transaction that the job joined has not committed.
        :raises JobNotFound: when the job was deleted.
        """
        if not self.committed:
            raise JobNotCommitted(
                f"job {self.id} joined a transaction that has not committed: commit it first"
            )
        fresh = self.get(self.id)
        if fresh is None:
            raise JobNotFound(f"job {self.id} does not exist (any more)")
        for column in sa.inspect(Job).column_attrs:
            set_committed_value(self, column.key, getattr(fresh, column.key))
        return self

    def cancel(self) -> Job:
        """Cancel the job, and return it refreshed. A finished job stays as it is.

        A waiting job is ``cancelled`` at once. The code of a running job is asked to stop;
        :attr:`is_cancelling` is true until the code has stopped. Needs an application context.

        :raises JobNotCommitted: when the transaction that the job joined has not committed.
        :raises JobNotFound: when the job was deleted.
        """
        self.refresh()
        _find_actions().cancel([self.id])
        return self.refresh()

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job is finished, and return it refreshed.

        Needs an application context.

        :param timeout: seconds to wait; no limit by default.
        :raises JobNotCommitted: when the transaction that the job joined has not committed. No
            worker can see the job, so waiting would never end.
        :raises JobNotFound: when the job was deleted.
        :raises WaitTimeout: when the job is not finished within ``timeout``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_WAIT_SECONDS
        while not self.refresh().is_finished:
            left = _LAST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(
                    f"job {self.id} is still {self.status} after {timeout:g} s; does a worker "
                    f"{self._needed_from_worker}?"
                )
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LAST_WAIT_SECONDS)
        return self

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.name} {self.status}>"


class JobActions(Protocol):
    """Actions of the current app on jobs. Models cannot import the modules that implement them."""

    def find_job(self, job_id: int) -> Job | None:
        """The job as a detached :class:`Job`; ``None`` if it does not exist."""

    def cancel(self, ids: Sequence[int]) -> object:
        """Cancel waiting jobs, and ask running jobs to stop."""


def provide_actions(find: Callable[[], JobActions]) -> None:
    """Set the function with which jobs find the actions of the current app."""
    global _find_actions
    _find_actions = find


def _find_actions() -> JobActions:
    raise NotImplementedError("provide_actions() has not been called")


def by_index(statement: sa.Select[Any], name: str) -> sa.Select[Any]:
    """Make a query for jobs use a certain index on MySQL and MariaDB.

    Other databases have no such hints. They need none, because the conditions of the statement
    exclude other indexes there.
    """
    for dialect in ("mysql", "mariadb"):
        statement = statement.with_hint(Job.__table__, f"FORCE INDEX ({name})", dialect)
    return statement


def has_status(status: JobStatus) -> sa.ColumnElement[bool]:
    """The condition that a job has this status, written so that a partial index can be used.

    The status is a literal in the statement, because a planner does not know values of parameters.
    """
    return Job.status == sa.literal_column(f"'{status.value}'", sa.String)


def last_event() -> sa.ColumnElement[dt.datetime]:
    """The time of a job's last event: its end, else its newest claim, else its enqueue."""
    return sa.func.coalesce(Job.finished_at, Job.claimed_at, Job.created_at)


def detached_job(values: dict[str, Any]) -> Job:
    """Create a :class:`Job` as if it had been loaded from a row.

    :param values: the values of all columns, by attribute name.
    """
    # Set the values as SQLAlchemy does on load: the constructor would mark each one as changed.
    job: Job = Job.__mapper__.class_manager.new_instance()
    vars(job).update(values)
    instance_state(job).key = Job.__mapper__.identity_key_from_primary_key((values["id"],))
    return job
