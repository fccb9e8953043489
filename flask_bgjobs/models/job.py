"""Jobs, and the conditions and hints that statements on them share."""

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
from ..job.statuses import FINAL, JobStatus
from ..job.text import shown
from .base import NUMBERED_TABLE_OPTIONS, Base, BigInt, LongText, UtcTime, index

IS_OF_ANY_QUEUE = "attempt >= 0"
"""True of every job. A claim has to say so to use the index of all queues on PostgreSQL: one that
serves some queues alone does not, or the planner might let it step over the jobs of all others."""
_IS_PENDING = "status = 'pending'"
# Not as a list: SQLite sees that a job is in it only where the statement has the same list.
_IS_DELAYED = "status = 'scheduled' OR status = 'retrying'"
_HAS_ENDED = "finished_at IS NOT NULL"

_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.01, 0.25


class Job(Base):
    """One background job: what to run, when, and how it went.

    Loaded and detached: reading an attribute never touches the database;
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
            where=f"{_IS_PENDING} OR {_IS_DELAYED}",
        ),
        index("ix_bgjobs_job_due", "status", "run_at", "id", where=_IS_DELAYED),
        index("ix_bgjobs_job_list", "status", "id"),
        index("ix_bgjobs_job_finished", "status", "finished_at", "id", where=_HAS_ENDED),
        index("uq_bgjobs_job_unique_hash", "unique_hash", unique=True),
        NUMBERED_TABLE_OPTIONS,
    )

    id: Mapped[int] = mapped_column(BigInt, primary_key=True)
    """Once committed, an id is never given to another job, even if the job is deleted."""
    target: Mapped[str] = mapped_column(sa.String(255))
    """Dotted name of the class or function."""
    method: Mapped[str | None] = mapped_column(sa.String(255))
    """The method of a class; ``None`` for a function."""
    parameters_json: Mapped[str] = mapped_column("parameters", LongText)
    """Written by ``serialize``: a list of positional or a dict of keyword parameters."""
    queue: Mapped[str] = mapped_column(sa.String(64))
    priority: Mapped[int] = mapped_column(sa.Integer)
    """Higher runs first."""
    claim_rank: Mapped[int] = mapped_column(sa.BigInteger)
    """The negated priority, so that the claim's index is ascending throughout."""
    status: Mapped[str] = mapped_column(sa.String(16))
    """One of :class:`~flask_bgjobs.JobStatus`."""
    run_at: Mapped[dt.datetime] = mapped_column(UtcTime)
    """When it is or was due."""
    created_at: Mapped[dt.datetime] = mapped_column(UtcTime)

    attempt: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Counts claims, and only ever rises: with ``worker_id`` it is the fence of every settle."""
    retry_count: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Retries used so far, 0 to ``retries``."""
    retries: Mapped[int] = mapped_column(sa.Integer)
    """Retries allowed after the first attempt."""
    retry_delay: Mapped[str] = mapped_column(sa.Text)
    """JSON list of seconds before each retry; the last serves all later ones."""
    backoff: Mapped[str] = mapped_column(sa.String(16))
    max_retry_delay: Mapped[float | None] = mapped_column(sa.Double)
    """Seconds that no wait exceeds."""
    jitter: Mapped[float] = mapped_column(sa.Double)
    """Share of a wait, 0 to 1, by which it is spread at random."""
    timeout: Mapped[float | None] = mapped_column(sa.Double)
    """Seconds that one attempt may take."""

    worker_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Who claimed it; kept after the end."""
    claimed_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    started_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """When the code of the newest attempt began; empty while claimed but not started."""
    finished_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    cancel_requested_at: Mapped[dt.datetime | None] = mapped_column(UtcTime)
    """Set while a cancel waits for running code to stop, and kept after."""
    suspect: Mapped[bool] = mapped_column(sa.Boolean, default=False)
    """Its last worker died with it: it runs alone, with its start committed first."""
    crash_count: Mapped[int] = mapped_column(sa.Integer, default=0)
    """Proved crashes of its worker or child."""

    result_json: Mapped[str | None] = mapped_column("result", LongText)
    error_type: Mapped[str | None] = mapped_column(sa.String(255))
    """Name of the last attempt's exception class."""
    error: Mapped[str | None] = mapped_column(sa.Text)
    """Message of the last attempt's exception, type first."""
    progress: Mapped[float | None] = mapped_column(sa.Double)
    """0 to 1, as the code reported it."""
    progress_note: Mapped[str | None] = mapped_column(sa.String(255))
    meta_json: Mapped[str | None] = mapped_column("meta", LongText)
    tags_json: Mapped[str | None] = mapped_column("tags", sa.Text)
    owner: Mapped[str | None] = mapped_column(sa.String(255))
    unique_key: Mapped[str | None] = mapped_column(sa.String(255))
    unique_hash: Mapped[str | None] = mapped_column(sa.String(64))
    """sha-256 of ``unique_key`` while the job is active, so that a second one conflicts."""

    deduplicated = False
    """``True`` on the job that an enqueue with a taken ``unique_key`` gave back."""
    committed = True
    """``False`` until the transaction that the job joined has committed."""

    @property
    def parameters(self) -> Any:
        """The parameters as they were given: a list of positional or a dict of keyword ones."""
        return serialize.loads(self.parameters_json)

    @property
    def result(self) -> Any:
        """What the code returned; ``None`` until it completed."""
        return None if self.result_json is None else serialize.loads(self.result_json)

    @property
    def meta(self) -> dict[str, Any]:
        """What the code stored with ``current_job.meta``."""
        return {} if self.meta_json is None else serialize.loads(self.meta_json)

    @property
    def tags(self) -> list[str]:
        """The tags it was enqueued with."""
        return [] if self.tags_json is None else json.loads(self.tags_json)

    @hybrid_property
    def is_finished(self) -> bool:
        """``True`` when it completed, failed or was cancelled."""
        return JobStatus(self.status).is_final

    @is_finished.inplace.expression
    @classmethod
    def _is_finished_in_sql(cls) -> sa.ColumnElement[bool]:
        return cls.status.in_(status.value for status in FINAL)

    @hybrid_property
    def is_cancelling(self) -> bool:
        """``True`` when a cancel waits for its running code to stop."""
        return self.status == JobStatus.RUNNING and self.cancel_requested_at is not None

    @is_cancelling.inplace.expression
    @classmethod
    def _is_cancelling_in_sql(cls) -> sa.ColumnElement[bool]:
        return sa.and_(has_status(JobStatus.RUNNING), cls.cancel_requested_at.is_not(None))

    @hybrid_property
    def name(self) -> str:
        """Target and method as one dotted name, for people."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    @name.inplace.expression
    @classmethod
    def _name_in_sql(cls) -> sa.ColumnElement[str]:
        return sa.func.coalesce(cls.target + "." + cls.method, cls.target)

    @classmethod
    def get(cls, job_id: int) -> Job | None:
        """The job with that id, read outside your session; ``None``: there is none.

        Needs an application context.

        :raises TypeError: when the id is not an ``int``, such as a string from a request.
        """
        if not isinstance(job_id, int) or isinstance(job_id, bool):
            raise TypeError(f"the id of a job is an int, not {shown(job_id)}")
        if not 0 < job_id <= MAX_ID:
            return None
        return _find_actions().find_job(job_id)

    def refresh(self) -> Job:
        """Read the job anew from the database, outside your session, and return it.

        Needs an application context.

        :raises JobNotCommitted: when the transaction that it joined has not committed.
        :raises JobNotFound: when it was deleted.
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
        """Cancel the job, and return it refreshed; a finished one stays as it is.

        One that waits is ``cancelled`` at once. The code of a running one is asked to stop:
        :attr:`is_cancelling` is true until it has. Needs an application context.

        :raises JobNotCommitted: when the transaction that it joined has not committed.
        :raises JobNotFound: when it was deleted.
        """
        self.refresh()
        _find_actions().cancel([self.id])
        return self.refresh()

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job is finished, and return it refreshed.

        :param timeout: seconds to wait; for ever by default.
        :raises JobNotCommitted: when the transaction that it joined has not committed: no
            worker could see it, so waiting would never end.
        :raises WaitTimeout: when it is not finished in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_WAIT_SECONDS
        while not self.refresh().is_finished:
            left = _LAST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(
                    f"job {self.id} is still {self.status} after {timeout:g} s; does a worker "
                    f"serve the queue {self.queue!r}?"
                )
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LAST_WAIT_SECONDS)
        return self

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.name} {self.status}>"


class JobActions(Protocol):
    """What a job needs of its app, which stands above the tables."""

    def find_job(self, job_id: int) -> Job | None:
        """The job, loaded and detached; ``None`` where there is none."""

    def cancel(self, ids: Sequence[int]) -> object:
        """Cancel jobs that wait, and ask running ones to stop."""


def provide_actions(find: Callable[[], JobActions]) -> None:
    """Let jobs find the actions of the current app by ``find``."""
    global _find_actions
    _find_actions = find


def _find_actions() -> JobActions:
    raise NotImplementedError("provide_actions() has not been called")


def by_index(statement: sa.Select[Any], name: str) -> sa.Select[Any]:
    """A statement on jobs that reads them by this index on MySQL and MariaDB.

    Others take no hints, and need none: there the statement itself rules other indexes out.
    """
    for dialect in ("mysql", "mariadb"):
        statement = statement.with_hint(Job.__table__, f"FORCE INDEX ({name})", dialect)
    return statement


def has_status(status: JobStatus) -> sa.ColumnElement[bool]:
    """The condition that a job has this status, so that an index of such jobs alone can be used.

    The word stands in the statement: what a parameter is, a planner does not know.
    """
    return Job.status == sa.literal_column(f"'{status.value}'", sa.String)


def last_event() -> sa.ColumnElement[dt.datetime]:
    """When something last happened to a job: its end, else its newest claim, else its enqueue."""
    return sa.func.coalesce(Job.finished_at, Job.claimed_at, Job.created_at)


def detached_job(values: dict[str, Any]) -> Job:
    """A :class:`Job` as if it had been loaded from a row with these ``values``.

    :param values: of all columns, by attribute name.
    """
    # As SQLAlchemy loads one: its constructor would note a change of each attribute.
    job: Job = Job.__mapper__.class_manager.new_instance()
    vars(job).update(values)
    instance_state(job).key = Job.__mapper__.identity_key_from_primary_key((values["id"],))
    return job
