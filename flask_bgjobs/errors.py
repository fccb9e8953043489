"""Everything that flask-bgjobs raises.

::

    BgJobsError
    ├── ConfigError            a BGJOBS_… value, or the way the parts are wired, is wrong
    ├── JobNotAllowed          the allow-list does not hold the name
    ├── InvalidJob             a parameter, option or target is not acceptable
    ├── UniqueKeyTaken         another job holds the unique_key
    ├── JobNotFound            no job has that id
    ├── QueueNotFound          no queue has that name
    ├── JobNotCommitted        the job's transaction has not committed
    ├── WaitTimeout            job.wait() gave up
    ├── DatabaseUnusable       the database lacks our tables, or is locked, full or read-only
    ├── WorkerFailed           a worker cannot go on, and has given its jobs back
    ├── AttemptFailed          an attempt failed whose own exception is not known
    └── DatabaseNotSupported   no store is written for that database, or it is too old

    Exception
    ├── Retry, Snooze, Fail    raised by a job's own code, to say how it ends

    BaseException
    └── JobCancelled, JobTimeout   raised in a job's code from outside, to stop it
"""

from __future__ import annotations

import datetime as dt


class BgJobsError(Exception):
    """Something that flask-bgjobs was asked to do cannot be done."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class ConfigError(BgJobsError):
    """flask-bgjobs is configured or wired in a way that cannot work."""


class JobNotAllowed(BgJobsError):
    """The name is not on the allow-list; add it to ``BGJOBS_ALLOWED_JOBS``."""


class InvalidJob(BgJobsError, ValueError):
    """The job cannot be enqueued as it stands."""


class UniqueKeyTaken(BgJobsError):
    """Another job that is not finished holds the same ``unique_key``."""


class JobNotFound(BgJobsError, LookupError):
    """No job has that id."""


class QueueNotFound(BgJobsError, LookupError):
    """No queue has that name."""


class JobNotCommitted(BgJobsError):
    """The transaction that the job joined has not committed, so no worker can see it."""


class WaitTimeout(BgJobsError, TimeoutError):
    """The job did not reach a final status in time."""


class DatabaseUnusable(BgJobsError):
    """The database lacks our tables, or is locked for too long, full or read-only; nothing was
    changed."""


class WorkerFailed(BgJobsError):
    """A worker cannot go on: one of its threads has ended, or no thread of its pool is free."""


class AttemptFailed(BgJobsError):
    """An attempt failed, and its exception is not known: its process died, or its row could not be
    run. Given to the functions of :meth:`~flask_bgjobs.BgJobs.on_failure`."""


class DatabaseNotSupported(BgJobsError):
    """flask-bgjobs does not run on this database, its version or its driver."""


class Retry(Exception):
    """Raised by a job to be run again: uses a retry, and fails when none is left.

    :param message: why, shown as the attempt's error.
    :param delay: seconds or ``timedelta`` until the next attempt; by default the job's own
        retry delay.
    """

    def __init__(self, message: str = "", *, delay: float | dt.timedelta | None = None) -> None:
        super().__init__(message)
        self.delay = delay


class Snooze(Exception):
    """Raised by a job to be run again later without using a retry.

    :param delay: seconds or ``timedelta`` until the next attempt.
    """

    def __init__(self, delay: float | dt.timedelta) -> None:
        super().__init__(f"snoozed for {delay}")
        self.delay = delay


class Fail(Exception):
    """Raised by a job to fail for good, whatever retries are left."""


class JobCancelled(BaseException):
    """Raised in a job's code when it is cancelled.

    It is no ``Exception``, so that a broad ``except Exception`` cannot swallow it.
    """


class JobTimeout(BaseException):
    """Raised in a job's code when it has run longer than its ``timeout``.

    It is no ``Exception``, so that a broad ``except Exception`` cannot swallow it.
    """
