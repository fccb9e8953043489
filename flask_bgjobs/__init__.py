"""Background jobs for Flask, stored in the app's own SQL database."""

from __future__ import annotations

from .enqueue.calls import Call
from .enqueue.enqueue import run_background_job
from .errors import (
    AttemptFailed,
    BgJobsError,
    ConfigError,
    DatabaseNotSupported,
    DatabaseUnusable,
    Fail,
    InvalidJob,
    JobCancelled,
    JobNotAllowed,
    JobNotCommitted,
    JobNotFound,
    JobTimeout,
    LimitNotFound,
    QueueNotFound,
    Retry,
    ScheduleChanged,
    ScheduleNotFound,
    Snooze,
    UniqueKeyTaken,
    WaitTimeout,
    WorkerFailed,
)
from .execution.current import current_job
from .extension import BgJobs
from .job.limits import Limit
from .job.statuses import JobStatus
from .models import Job, add_tables
from .signals import (
    job_cancelled,
    job_completed,
    job_enqueued,
    job_failed,
    job_rescued,
    job_retrying,
    job_started,
    schedule_fired,
    schedule_skipped,
    worker_started,
    worker_stopped,
)
from .version import __version__

__all__ = [
    "AttemptFailed",
    "BgJobs",
    "BgJobsError",
    "Call",
    "ConfigError",
    "DatabaseNotSupported",
    "DatabaseUnusable",
    "Fail",
    "InvalidJob",
    "Job",
    "JobCancelled",
    "JobNotAllowed",
    "JobNotCommitted",
    "JobNotFound",
    "JobStatus",
    "JobTimeout",
    "Limit",
    "LimitNotFound",
    "QueueNotFound",
    "Retry",
    "ScheduleChanged",
    "ScheduleNotFound",
    "Snooze",
    "UniqueKeyTaken",
    "WaitTimeout",
    "WorkerFailed",
    "__version__",
    "add_tables",
    "current_job",
    "job_cancelled",
    "job_completed",
    "job_enqueued",
    "job_failed",
    "job_rescued",
    "job_retrying",
    "job_started",
    "run_background_job",
    "schedule_fired",
    "schedule_skipped",
    "worker_started",
    "worker_stopped",
]
