"""A job as lists and pages show it, with masked values."""

from __future__ import annotations

import dataclasses
import datetime as dt

from ...job.statuses import JobStatus
from ...models import Job
from .shown import Shown


@dataclasses.dataclass(frozen=True, slots=True)
class JobRow:
    """A job in a list, with masked texts."""

    id: int
    target: str
    method: str | None
    parameters: str | None
    """JSON on one line; ``None`` when it is too large for a list or cannot be decoded."""
    queue: str
    status: str
    waits_for: str | None
    """What a waiting job waits for."""
    is_cancelling: bool
    """Whether the job is running and was asked to stop."""
    priority: int
    attempt: int
    retry_count: int
    retries: int
    progress: float | None
    progress_note: str | None
    run_at: dt.datetime
    created_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    error_type: str | None
    error: str | None
    tags: tuple[str, ...]
    owner: str | None
    unique_key: str | None
    job: Job = dataclasses.field(repr=False, compare=False)
    """The job for the authorizer. It is not masked; in a list it has no result and no meta."""

    @property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    @property
    def run_seconds(self) -> float | None:
        """How long the code of the last attempt ran; ``None`` before it ends."""
        if self.started_at is None or self.finished_at is None:
            return None
        if self.status == JobStatus.CANCELLED and self.run_at > self.started_at:
            # Cancelled while it waited for a retry: `finished_at` is not the end of the attempt.
            return None
        return max(0.0, (self.finished_at - self.started_at).total_seconds())

    @property
    def state(self) -> str:
        """The status, or ``cancelling``."""
        return "cancelling" if self.is_cancelling else self.status


def job_row(job: Job, shown: Shown) -> JobRow:
    """The row of ``job``.

    :param shown: the masking for this job.
    """
    return JobRow(
        id=job.id,
        target=job.target,
        method=job.method,
        parameters=shown.parameters(),
        queue=job.queue,
        status=job.status,
        waits_for=job.waits_for if job.status == JobStatus.WAITING else None,
        is_cancelling=job.is_cancelling,
        priority=job.priority,
        attempt=job.attempt,
        retry_count=job.retry_count,
        retries=job.retries,
        progress=None if job.progress is None else min(max(job.progress, 0.0), 1.0),
        progress_note=shown.text(job.progress_note),
        run_at=job.run_at,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        error_type=job.error_type,
        error=shown.text(job.error, instead=job.error_type),
        tags=tuple(shown.text(tag) or "" for tag in _tags(job)),
        owner=shown.text(job.owner),
        unique_key=shown.text(job.unique_key),
        job=job,
    )


def _tags(job: Job) -> list[str]:
    try:
        return [str(tag) for tag in job.tags]
    except (ValueError, TypeError):
        return []
