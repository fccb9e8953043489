"""The options of one worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config import PoolName


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Options of one worker. An option that is ``None`` takes its value from the configuration."""

    name: str | None = None
    """The name that the dashboard shows; default: host and pid."""
    queues: Sequence[str] | None = None
    """The queues to serve, in this strict order; default: all."""
    pool: PoolName | None = None
    """The pool for queues that ``BGJOBS_QUEUE_POOLS`` does not name."""
    concurrency: int | None = None
    """Number of jobs that run at once in that pool."""
    burst: bool = False
    """Stop when no job is pending or running in the queues."""
    max_jobs: int | None = None
    """Number of jobs after which a child process is replaced or, with the thread pool, the worker
    stops."""
    max_time: float | None = None
    """The same limit in seconds."""
    max_memory: float | None = None
    """The same limit in MiB of memory."""
    shutdown_timeout: float | None = None
    """Grace period of running jobs after a stop request, in seconds."""
    scheduler: bool = True
    """Whether to fire schedules and to prune. Polling, promotion and rescue work without it."""
    app: str | None = None
    """Import path from which child processes build the app; ``BGJOBS_APP`` overrides it."""
    show_logs: bool = False
    """Whether child processes print their log lines, as the ``flask`` command does."""
