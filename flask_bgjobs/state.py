"""The state of flask-bgjobs for one Flask app, stored as ``app.extensions["bgjobs"]``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask, current_app

from .config import Config
from .errors import ConfigError
from .job.records import JobSpec, Settled
from .job.redact import Redactor
from .models import Job, provide_actions
from .registry import Registry, placeholder_for
from .signals import emit, emit_in_worker, emit_settled, job_cancelled
from .store import ActionResult, Actor, Store
from .system.safe_logging import SafeLogger
from .system.threading_patches import patched_by, refusal

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

_EXPIRED_AT_ONCE = 500
"""Jobs that one transaction cancels because they have expired."""

Authorizer = Callable[[str, Job | None], bool]
Identifier = Callable[[], str]
FailureHook = Callable[..., object]
"""Called as ``hook(job, exception, final=…)``."""


def call_now(call: Callable[[], None]) -> None:
    """Call a function immediately, in the current thread."""
    call()


@dataclasses.dataclass(slots=True)
class AppState:
    """The parts of flask-bgjobs that belong to one app."""

    app: Flask
    db: SQLAlchemy
    config: Config
    registry: Registry
    store: Store
    redactor: Redactor
    table: sa.Table
    """The job table in the app's metadata, from which the app's session finds the bind."""
    find_authorizer: Callable[[], Authorizer | None]
    """Returns the dashboard's authorizer; ``None`` until the app has registered one."""
    find_identifier: Callable[[], Identifier | None]
    """Returns the function that names visitors in the audit trail; ``None`` if the app has
    registered none: then Flask-Login or the IP address provides the name."""
    failure_hooks: Sequence[FailureHook] = ()
    """Called after each failed attempt. The app may register more of them at any time."""
    call_soon: Callable[[Callable[[], None]], object] = call_now
    """Calls functions of the app. In a worker and its child processes it calls them in a separate
    thread."""
    enqueued: list[Callable[[Job], object]] = dataclasses.field(default_factory=list)
    """Callbacks that receive each job whose enqueue has committed: to wake up a worker, or to run
    the job in a test."""

    def emit(self, signal: Any, **values: object) -> None:
        """Send a signal with this app as sender."""
        emit(signal, self.app, **values)

    def emit_in_worker(self, signal: Any, **values: object) -> None:
        """Send a signal in a worker, then remove the session, so that changes that receivers have
        not committed are rolled back."""
        emit_in_worker(signal, self.app, **values)
        self._remove_open_session()

    def emit_settled(self, settled: Settled) -> None:
        """Send the signals for the recorded outcome of an attempt, then remove the session."""
        emit_settled(self.app, settled)
        self._remove_open_session()

    def check_can_work(self, *, forks: bool, app: str | None) -> None:
        """Check that a worker can run with this app, pool and database.

        :param forks: whether one of the worker's pools uses child processes.
        :param app: the import name of the app for child processes, as for ``flask --app``.
        :raises ConfigError: says which setting to change.
        """
        if forks and not hasattr(os, "fork"):
            raise ConfigError("the process pool needs fork(): use the thread pool on this system")
        if forks and app is None:
            raise ConfigError(
                "the process pool builds the app again in each child process: set "
                "BGJOBS_APP = 'shop:create_app' (what `flask --app` takes)"
            )
        if (library := patched_by()) is not None:
            raise ConfigError(refusal(library))
        if self.store.always_joins:
            raise ConfigError(
                "an in-memory SQLite database cannot be shared with a worker; use a file, or "
                "flask_bgjobs.testing in tests"
            )

        if self.store.outer_connection is not None:
            raise ConfigError(
                "db.session is bound to one connection, as in a test that rolls back, but a worker "
                "needs several: use flask_bgjobs.testing"
            )

    def find_job(self, job_id: int) -> Job | None:
        """The job, loaded and detached; ``None`` if no job has this id."""
        return self.store.get(job_id)

    def cancel(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Cancel jobs. Jobs that have not started are cancelled at once, and ``job_cancelled`` is
        sent for each of them; running jobs are asked to stop.

        :param by: who cancels them, for the audit trail; ``None`` for the app's own code.
        """
        result = self.store.cancel(ids, by)
        for job in self.store.get_many(result.done) if result.done else ():
            self.emit(job_cancelled, job=job)
        return result

    def expire(self, store: Store) -> None:
        """Cancel jobs that have not started by their deadline, and send ``job_cancelled`` for each
        of them.

        :param store: the worker's store.
        """
        if ids := store.expire(_EXPIRED_AT_ONCE):
            for job in store.get_many(ids):
                self.emit_in_worker(job_cancelled, job=job)

    def logged_parameters(
        self, job: Job | JobSpec, parameters: Any, names: tuple[str, ...] | None
    ) -> Any:
        """The parameters of a job with secrets masked, for a log line. Nothing is imported.

        :param names: as in ``Outcome.parameter_names``. If they are not given and the job's module
            is not imported in this process, all positional values are masked.
        """
        return self.redactor.parameters(parameters, self._placeholder_if_imported(job, names))

    def logged_text(
        self, text: str, job: Job | JobSpec, parameters: Any, names: tuple[str, ...] | None
    ) -> str:
        """An error of a job with secrets masked, for a log line; see :meth:`logged_parameters`."""
        return self.redactor.text(text, parameters, self._placeholder_if_imported(job, names))

    def masked_parameters(self, target: str, method: str | None, parameters: Any) -> Any:
        """The parameters of a job with secrets masked, for display. May import its module."""
        return self.redactor.parameters(parameters, self._placeholder(target, method))

    def masked_text(self, text: str, target: str, method: str | None, parameters: Any) -> str:
        """An error or traceback of a job with secrets masked, for display. May import its
        module."""
        return self.redactor.text(text, parameters, self._placeholder(target, method))

    def roll_back_session(self) -> None:
        """Roll back uncommitted changes of the app's session in this context."""
        if self.db.session.registry.has():
            # If the rollback fails, removing the session fails next, and that is logged.
            with contextlib.suppress(Exception):
                self.db.session.rollback()

    def remove_session(self) -> None:
        """Roll back and close the app's session in this context, whatever state it is in."""
        try:
            self.db.session.remove()
        except Exception:
            SafeLogger(self.app.logger).exception("The session could not be removed cleanly")

    def _remove_open_session(self) -> None:
        # Most receivers use no session, and `remove()` would first create one.
        if self.db.session.registry.has():
            self.remove_session()

    def _placeholder_if_imported(
        self, job: Job | JobSpec, names: tuple[str, ...] | None
    ) -> Callable[..., Any] | None:
        # Nothing is imported: a module that crashes or hangs would do so in the worker, even if its
        # jobs run in child processes.
        try:
            if names is not None:
                return placeholder_for(names)
            found = self.registry.resolve_imported(job.target, job.method)
            return None if found is None else found.placeholder
        except Exception:
            return None

    def _placeholder(self, target: str, method: str | None) -> Callable[..., Any] | None:
        try:
            return self.registry.resolve(target, method).placeholder
        except Exception:
            # Not allowed, deleted or not importable in this process: the names are unknown.
            return None


def state_of(app: Flask) -> AppState:
    """The state of ``app``.

    :raises ConfigError: when ``BgJobs.init_app`` has not been called for the app.
    """
    try:
        state: AppState = app.extensions["bgjobs"]
    except KeyError:
        raise ConfigError(
            f"flask-bgjobs is not set up for the app {app.name!r}: call bgjobs.init_app(app) "
            "in its factory"
        ) from None
    return state


def current_state() -> AppState:
    """The state of the current app. Requires an application context."""
    return state_of(current_app._get_current_object())  # type: ignore[attr-defined]  # LocalProxy


provide_actions(current_state)


def import_jobs(state: AppState) -> None:
    """Import the modules in ``BGJOBS_IMPORTS``, so that their decorated functions are registered.

    Each module is imported in its own application context, so that a session which the module
    leaves open is closed.

    :raises ConfigError: names the module that cannot be imported, and the reason.
    """
    for module in state.config.imports:
        failure: Exception | None = None
        is_imported = False
        try:
            with state.app.app_context():
                try:
                    importlib.import_module(module)
                except Exception as error:
                    failure = error
                is_imported = True
        except Exception:
            if not is_imported:
                # Pushing the context failed, for example in a receiver of its signals.
                raise
            logger = SafeLogger(state.app.logger)
            logger.exception("Teardown after the import of %s raised", module)
        if failure is not None:
            raise ConfigError(
                f"BGJOBS_IMPORTS names {module!r}, which cannot be imported: "
                f"{type(failure).__name__}: {failure}"
            ) from failure
