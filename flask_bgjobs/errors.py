"""The exceptions of flask-bgjobs.

::

    BgJobsError
    ├── ConfigError            a BGJOBS_… value is invalid, or the app is set up incorrectly
    ├── JobNotAllowed          the name is not on the allow-list
    ├── InvalidJob             a parameter, option or target is invalid
    ├── UniqueKeyTaken         another unfinished job has the unique_key
    ├── JobNotFound            no job has this id
    ├── QueueNotFound          no queue has this name
    ├── ScheduleNotFound       no schedule has this name, or several match it
    ├── LimitNotFound          no limit has this name, or several match it
    ├── ScheduleChanged        others keep changing the schedule at the same time
    ├── JobNotCommitted        the transaction that the job joined has not committed
    ├── WaitTimeout            job.wait() reached its timeout
    ├── DatabaseUnusable       the tables are missing, or the database is locked, full or read-only
    ├── WorkerFailed           a worker cannot continue, and has released its jobs
    ├── AttemptFailed          an attempt failed, and its own exception is unknown
    └── DatabaseNotSupported   the database, its version or its driver is not supported

    Exception
    └── Retry, Snooze, Fail    raised by a job's own code, to set how the attempt ends

    BaseException
    └── JobCancelled, JobTimeout   raised in a job's code by the worker, to stop it
"""

from __future__ import annotations

import datetime as dt


class BgJobsError(Exception):
    """Base class of the errors that flask-bgjobs raises."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class ConfigError(BgJobsError):
    """The configuration, or the way the app is set up, is invalid."""


class JobNotAllowed(BgJobsError):
    """The name is not on the allow-list; add it to ``BGJOBS_ALLOWED_JOBS``."""


class InvalidJob(BgJobsError, ValueError):
    """The job cannot be enqueued: a parameter, an option or the target is invalid."""


class UniqueKeyTaken(BgJobsError):
    """Another job with the same ``unique_key`` is not finished, or another open transaction has
    enqueued one."""


class JobNotFound(BgJobsError, LookupError):
    """No job has this id."""


class QueueNotFound(BgJobsError, LookupError):
    """No queue has this name."""


class ScheduleNotFound(BgJobsError, LookupError):
    """No schedule has this name, or several match a shortened name."""


class LimitNotFound(BgJobsError, LookupError):
    """No limit has this name, or several match a shortened name."""


class ScheduleChanged(BgJobsError):
    """Others keep changing the schedule at the same time; try again."""


class JobNotCommitted(BgJobsError):
    """The transaction that the job joined has not committed, so no worker can see the job."""


class WaitTimeout(BgJobsError, TimeoutError):
    """The job did not reach a final status in time."""


class DatabaseUnusable(BgJobsError):
    """The tables of flask-bgjobs are missing, or the database is locked for too long, full or
    read-only. Nothing was changed."""


class WorkerFailed(BgJobsError):
    """A worker cannot continue, and has released its jobs."""


class AttemptFailed(BgJobsError):
    """An attempt failed, and its own exception is unknown: its process died, or the job's row was
    invalid. Passed to the functions registered with :meth:`~flask_bgjobs.BgJobs.on_failure`."""


class DatabaseNotSupported(BgJobsError):
    """The database, its version or its driver is not supported."""


class Retry(Exception):
    """Raise it in a job to run the job again. This uses a retry; if none is left, the job fails.

    :param message: the reason, shown as the attempt's error.
    :param delay: time until the next attempt, in seconds or as a ``timedelta``; default: the
        retry delay of the job.
    """

    def __init__(self, message: str = "", *, delay: float | dt.timedelta | None = None) -> None:
        super().__init__(message)
        self.delay = delay


class Snooze(Exception):
    """Raise it in a job to run the job again later, without using a retry.

    :param delay: time until the next attempt, in seconds or as a ``timedelta``.
    """

    def __init__(self, delay: float | dt.timedelta) -> None:
        super().__init__(f"snoozed for {delay}")
        self.delay = delay


class Fail(Exception):
    """Raise it in a job to fail without further retries, even if some are left."""


class JobCancelled(BaseException):
    """Raised in the code of a running job when the job is cancelled.

    Derived from ``BaseException``, so that an ``except Exception`` in the job does not catch it.
    """


class JobTimeout(BaseException):
    """Raised in the code of a running job when the attempt exceeds the job's ``timeout``.

    Derived from ``BaseException``, so that an ``except Exception`` in the job does not catch it.
    """
