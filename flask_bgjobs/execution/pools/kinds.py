"""The kinds of pools, by the values of ``BGJOBS_POOL``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from ...observability.failures import report_late
from ...state import AppState
from .process.child import Limits
from .process.pool import ProcessPool
from .protocol import Finished, Pool
from .thread import ThreadPool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Settings for all kinds of pools. Each kind uses some of them."""

    state: AppState
    app: str | None
    """Import path from which child processes build the app."""
    limits: Limits | None
    """Limits at which a child process is replaced."""
    show_logs: bool
    """Whether child processes print their log lines."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolKind:
    """One kind of pool."""

    place: str
    """The word in messages for what runs a job; ``places`` is its plural."""
    places: str
    forks: bool
    """Whether the pool runs each job in a child process, which it makes by forking."""
    open: Callable[[PoolSettings, int, Finished], Pool]
    """Makes a pool from its settings, its size, and the callback for each job and its outcome."""


def _open_threads(settings: PoolSettings, size: int, on_finished: Finished) -> Pool:
    return ThreadPool(settings.state, size, on_finished)


def _open_processes(settings: PoolSettings, size: int, on_finished: Finished) -> Pool:
    assert settings.app is not None, "AppState.check_can_work() has refused that"
    return ProcessPool(
        settings.app,
        size,
        on_finished,
        on_unreported_failure=functools.partial(report_late, settings.state),
        limits=settings.limits,
        show_logs=settings.show_logs,
    )


KINDS: Mapping[str, PoolKind] = {
    "thread": PoolKind(place="thread", places="threads", forks=False, open=_open_threads),
    "process": PoolKind(
        place="child process", places="child processes", forks=True, open=_open_processes
    ),
}
