"""A worker inside the serving process, for small deployments.

Nobody can tell a pre-fork server's master, which must not start threads, from a process that
serves. What tells is what happens: only a process that serves is asked something. So the worker
starts with the first request or the first job that is enqueued, and at once only where it is
certain that this process serves.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import click
from flask.cli import FlaskGroup, run_command
from sqlalchemy.exc import DBAPIError

from ..errors import BgJobsError
from ..execution.pools import is_child
from ..state import AppState
from ..system.safe_logging import logger as _logger
from ..system.threading_patches import Lock, patched_by, refusal
from .supervisor.restarts import Restarts

if TYPE_CHECKING:
    from .worker import Worker


_LEAST_PAUSE_SECONDS = 1.0
"""Before another try, when the worker could not start or has failed."""
_LOOK_SECONDS = 1.0
"""How often a failed worker is asked whether code of its jobs still runs."""
_END_SECONDS = 5.0
"""For the worker to record what it did, beyond the grace of its jobs."""


class EmbeddedOptions(TypedDict, total=False):
    """How it works; what is left out comes from the configuration."""

    queues: Sequence[str] | None
    pool: Literal["thread", "process"] | None
    concurrency: int | None
    name: str | None
    shutdown_timeout: float | None
    """Seconds that running jobs have when the process ends."""


class EmbeddedWorker:
    """The worker of one app in this process; each process that is forked has its own.

    :param state: the app.
    :param options: as of :class:`~flask_bgjobs.worker.worker.WorkerOptions`.
    :raises ConfigError: when it could not work in any process.
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
        # Here, as an app without a worker in it needs no pools.
        from ..execution.pools.kinds import KINDS

        forks = any(KINDS[pool].forks for pool in pools)
        state.check_can_work(forks=forks, app=state.config.app)

    @property
    def is_running(self) -> bool:
        """Whether it runs in this process."""
        thread = self._thread
        return self._pid == os.getpid() and thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start it in this process, unless it has been started; for a server's own hooks.

        Where gevent or eventlet has patched threads, it does not start, which is logged.
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
        """Stop it: running jobs have their grace; a second call ends that.

        :param timeout: seconds to wait for its end; by default until it has ended.
        """
        if not self.is_running:
            return
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        assert self._thread is not None
        self._thread.join(timeout)

    def start_when_serving(self) -> None:
        """Start it at once where this process is known to serve, else with its first work."""
        if _serves_for_certain():
            self.start()
        elif _may_serve():
            self._state.app.wsgi_app = self._started_by(self._state.app.wsgi_app)  # type: ignore[method-assign]  # as Flask's documentation does
            self._state.enqueued.append(lambda _job: self._start_if_serving())

    def _started_by(self, wsgi_app: Callable[..., Any]) -> Callable[..., Any]:
        def serve(environ: Any, start_response: Any) -> Any:
            self.start()
            return wsgi_app(environ, start_response)

        return serve

    def _start_if_serving(self) -> None:
        if _may_serve():
            self.start()

    def _run(self) -> None:
        from .worker import Worker, WorkerOptions

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
        """Wait for code that could not be stopped, or the next worker would run beside it."""
        worker = self._worker
        if worker is None or not worker.has_threads_running:
            return
        _logger.warning("It starts again when the code of its jobs has ended")
        while worker.has_threads_running and not self._stopping.is_set():
            self._stopping.wait(_LOOK_SECONDS)

    def _stop_at_exit(self, pid: int) -> None:
        if pid != os.getpid():
            return
        if _is_reloaded():
            # A process with the new code is about to take over: the second call ends the grace.
            self.stop(timeout=0)
        self.stop(timeout=self._grace() + _END_SECONDS)

    def _grace(self) -> float:
        asked = self._options.get("shutdown_timeout")
        return self._state.config.shutdown_timeout if asked is None else float(asked)


def _is_reloaded() -> bool:
    """Whether this process serves under Werkzeug's reloader."""
    return os.environ.get("WERKZEUG_RUN_MAIN") == "true"


def _flask_command() -> click.Context | None:
    """The context of the ``flask`` command that runs, if one does."""
    context = click.get_current_context(silent=True)
    if context is None or not isinstance(context.find_root().command, FlaskGroup):
        return None
    return context


def _serves_for_certain() -> bool:
    if is_child():
        return False
    context = _flask_command()
    if context is None or context.command is not run_command:
        return context is None and _is_reloaded()
    return _is_reloaded() or not _has_reloader(context)


def _may_serve() -> bool:
    return not is_child() and _flask_command() is None


def _has_reloader(context: click.Context) -> bool:
    """Whether ``flask run`` reloads, decided as that command does."""
    from flask.helpers import get_debug_flag

    reload: bool | None = context.params.get("reload")
    return get_debug_flag() if reload is None else reload
