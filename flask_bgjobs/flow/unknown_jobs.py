"""Jobs that a worker's code does not have: they wait for a worker of another release.

A worker that claims such a job gives it back, and the job gets the status ``waiting``. Each worker
frees the waiting jobs that its own code has. After ``BGJOBS_UNKNOWN_TIMEOUT`` any worker frees
them. A worker that still does not have the code then refuses them, as it does at once with
``BGJOBS_UNKNOWN_JOBS = "fail"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..job.records import Settled, code_name
from ..job.statuses import OutcomeKind
from ..state import AppState
from ..store import MAX_NAMES, CodeWait, Store
from ..system.safe_logging import logger as _logger

_MAX_WARNINGS = 1_000
"""For how many names a worker warns. Forged rows may have any number."""


class UnknownJobs:
    """The jobs that wait for code, as one worker sees them.

    :param store: the worker's store.
    :param worker: the worker's name.
    :param queues: the queues that it serves; ``None``: all.
    """

    def __init__(
        self, state: AppState, store: Store, worker: str, queues: Sequence[str] | None
    ) -> None:
        self._state = state
        config = state.config
        self._timeout = config.unknown_timeout if config.unknown_jobs == "wait" else 0.0
        self._store = store
        self._worker = worker
        self._queues = queues
        self._names: set[str] = set()
        """The names of jobs that this worker has given back."""
        self._after: CodeWait | None = None
        """Where the next :meth:`free` goes on if there are more names than one call reads."""
        self.may_free_more = False
        """Whether the last :meth:`free` has reached its limit."""

    def note(self, settled: Settled) -> None:
        """Log a warning for a job that now waits for code, once for each name."""
        spec = settled.spec
        if settled.outcome.kind is not OutcomeKind.UNKNOWN:
            return
        name = code_name(spec)
        if name in self._names or len(self._names) >= _MAX_WARNINGS:
            return
        self._names.add(name)
        _logger.warning(
            "Job waits for code | Worker: %s | Class: %s | Method: %s | Job: %s | Reason: %s",
            self._worker,
            spec.target,
            spec.method or "-",
            spec.id,
            self._state.registry.why_unknown(spec.target, spec.method),
        )

    def free(self, limit: int) -> int:
        """Free jobs that this worker's code has, and jobs that have waited too long.

        :returns: the number of freed jobs, at most ``limit``.
        """
        freed = 0
        waits = self._store.code_waits(after=self._after)
        self._after = waits[-1] if len(waits) == MAX_NAMES else None
        for wait in waits:
            if self._queues is not None and wait.queue not in self._queues:
                continue
            # A child process may lack code that this process has.
            is_known = wait.stored_name not in self._names and self._state.registry.has(
                wait.target, wait.method
            )
            if freed < limit and (is_known or wait.seconds >= self._timeout):
                min_seconds = 0.0 if is_known else self._timeout
                freed += self._store.free(wait, limit - freed, min_seconds=min_seconds)
        self.may_free_more = freed == limit
        return freed
