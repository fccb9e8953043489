"""A worker inside the serving process, for small deployments.

The master process of a pre-fork server must not start threads, but code cannot tell it from a
process that serves requests. Only the serving process gets requests. So the worker starts with the
first request or the first enqueued job, and at once only if this process certainly serves.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import click
from flask.cli import FlaskGroup, run_command
from sqlalchemy.exc import DBAPIError

from ..config import PoolName
from ..errors import BgJobsError
from ..execution.pools import is_child
from ..state import AppState
from ..system.safe_logging import logger as _logger
from ..system.threading_patches import Lock, patched_by, refusal
from .supervisor.restarts import Restarts

if TYPE_CHECKING:
    from .worker import Worker


_LEAST_PAUSE_SECONDS = 1.0
"""Shortest pause before the next start, after the worker has failed."""
_LOOK_SECONDS = 1.0
"""Interval for checking whether job code of a failed worker is still running."""
_END_SECONDS = 5.0
"""Time after the grace period in which the worker records its outcomes."""


class EmbeddedOptions(TypedDict, total=False):
    """Options of the worker. Values of missing options come from the configuration."""

    queues: Sequence[str] | None
    pool: PoolName | None
    concurrency: int | None
    name: str | None
    shutdown_timeout: float | None
    """Grace period of running jobs when the process ends, in seconds."""


class EmbeddedWorker:
    """The worker of one app in this process. Each forked process has its own worker.

    :param state: the app.
    :param options: fields of :class:`~flask_bgjobs.worker.worker.WorkerOptions`.
    :raises ConfigError: when the configuration does not allow a worker in any process.
    """

    def __init__(self, state: AppState, options: dict[str, Any]) -> None:
        self._state = state
        self._options = options
        self._pid = 0
        self._lock = Lock()
        self._thread: threading.Thread | None = None
        self._worker: Worker | None = None
        self._stopping = threading.Event()
        pools = {options.get("pool") or state.config.pool, *state.config.queue_pools.values()}
        # Imported here, because an app without an embedded worker needs no pools.
        from ..execution.pools.kinds import KINDS

        forks = any(KINDS[pool].forks for pool in pools)
        state.check_can_work(forks=forks, app=state.config.app)

    @property
    def is_running(self) -> bool:
        """Whether the worker runs in this process."""
        thread = self._thread
        return self._pid == os.getpid() and thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start the worker in this process, unless it was started before. Server hooks may call it.

        If gevent or eventlet has patched threads, an error is logged instead.
        """
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
            # A pre-fork server may have patched threads after `start_worker` was called.
            if (library := patched_by()) is not None:
                why = refusal(library)
                _logger.error("The worker inside this process could not start: %s", why)
                return
            self._stopping = threading.Event()
            self._worker = None
            self._thread = threading.Thread(target=self._run, name="bgjobs-worker", daemon=True)
            self._thread.start()
        atexit.register(self._stop_at_exit, self._pid)

    def stop(self, timeout: float | None = None) -> None:
        """Stop the worker. Running jobs have a grace period, which a second call ends.

        :param timeout: seconds to wait for the end of the worker; default: no limit.
        """
        if not self.is_running:
            return
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        assert self._thread is not None
        self._thread.join(timeout)

    def start_when_serving(self) -> None:
        """Start at once if this process certainly serves, else with the first request or job."""
        if _certainly_serves():
            self.start()
        elif _may_serve():
            self._state.app.wsgi_app = self._starting_worker(self._state.app.wsgi_app)  # type: ignore[method-assign]  # as Flask's documentation does
            self._state.enqueued.append(lambda _job: self._start_if_serving())

    def _starting_worker(self, wsgi_app: Callable[..., Any]) -> Callable[..., Any]:
        def serve(environ: Any, start_response: Any) -> Any:
            self.start()
            return wsgi_app(environ, start_response)

        return serve

    def _start_if_serving(self) -> None:
        if _may_serve():
            self.start()

    def _run(self) -> None:
        from .options import WorkerOptions
        from .worker import Worker

        restarts = Restarts()
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                with self._state.app.app_context():
                    self._worker = Worker(self._state, WorkerOptions(**self._options))
                    if self._stopping.is_set():
                        return
                    self._worker.run()
                    return
            except (BgJobsError, DBAPIError) as error:
                _logger.error("The worker inside this process ended: %s", error)
            except (Exception, SystemExit):
                _logger.exception("The worker inside this process ended")
            pause = restarts.pause(time.monotonic() - began, failed=True)
            self._wait_for_code()
            self._stopping.wait(max(pause, _LEAST_PAUSE_SECONDS))

    def _wait_for_code(self) -> None:
        """Wait until code that could not be stopped has ended, before the next worker starts."""
        worker = self._worker
        if worker is None or not worker.has_threads_running:
            return
        _logger.warning("The worker restarts when the code of its jobs has ended")
        while worker.has_threads_running and not self._stopping.is_set():
            self._stopping.wait(_LOOK_SECONDS)

    def _stop_at_exit(self, pid: int) -> None:
        if pid != os.getpid():
            return
        if _is_reloaded():
            # A process with the new code is about to start: the next call ends the grace period.
            self.stop(timeout=0)
        self.stop(timeout=self._grace() + _END_SECONDS)

    def _grace(self) -> float:
        asked = self._options.get("shutdown_timeout")
        return self._state.config.shutdown_timeout if asked is None else float(asked)


def _is_reloaded() -> bool:
    """Whether this process serves under Werkzeug's reloader."""
    return os.environ.get("WERKZEUG_RUN_MAIN") == "true"


def _flask_command() -> click.Context | None:
    """The context of the running ``flask`` command, if there is one."""
    context = click.get_current_context(silent=True)
    if context is None or not isinstance(context.find_root().command, FlaskGroup):
        return None
    return context


def _certainly_serves() -> bool:
    if is_child():
        return False
    context = _flask_command()
    if context is None or context.command is not run_command:
        return context is None and _is_reloaded()
    return _is_reloaded() or not _has_reloader(context)


def _may_serve() -> bool:
    return not is_child() and _flask_command() is None


def _has_reloader(context: click.Context) -> bool:
    """Whether ``flask run`` uses the reloader, decided as that command decides it."""
    from flask.helpers import get_debug_flag

    reload: bool | None = context.params.get("reload")
    return get_debug_flag() if reload is None else reload
