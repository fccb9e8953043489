"""What flask-bgjobs holds for one Flask app, kept as ``app.extensions["bgjobs"]``."""

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
from .registry import Registry, named_after
from .signals import emit, emit_in_worker, emit_settled, job_cancelled
from .store import ActionResult, Actor, Store
from .system.safe_logging import SafeLogger
from .system.threading_patches import patched_by, refusal

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

Authorizer = Callable[[str, Job | None], bool]
Identifier = Callable[[], str]
FailureHook = Callable[..., object]
"""Called with the job and the exception, and with ``final`` by name."""


def call_now(call: Callable[[], None]) -> None:
    """Make a call at once, in this thread."""
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
    """The host's copy of the job table, by which its session finds the bind."""
    find_authorizer: Callable[[], Authorizer | None]
    """Who may do what on the dashboard; ``None`` until the host registered it."""
    find_identifier: Callable[[], Identifier | None]
    """Who the visitor is, for the audit trail; ``None``: Flask-Login knows, or nobody."""
    failure_hooks: Sequence[FailureHook] = ()
    """Called with each failed attempt; the host may register more of them at any time."""
    call_soon: Callable[[Callable[[], None]], object] = call_now
    """Makes a call of the host's functions; a worker and its children do it in a thread."""
    enqueued: list[Callable[[Job], object]] = dataclasses.field(default_factory=list)
    """Called with each job whose enqueue has committed: wake-ups, and tests that run it."""

    def emit(self, signal: Any, **values: object) -> None:
        """Send a signal with this app as sender."""
        emit(signal, self.app, **values)

    def emit_in_worker(self, signal: Any, **values: object) -> None:
        """The same where the session is nobody's: what its receivers leave in it is rolled back."""
        emit_in_worker(signal, self.app, **values)
        self._leave_no_session()

    def emit_settled(self, settled: Settled) -> None:
        """Send the signals of what was recorded of an attempt, as :meth:`emit_in_worker` does."""
        emit_settled(self.app, settled)
        self._leave_no_session()

    def check_can_work(self, *, forks: bool, app: str | None) -> None:
        """Refuse a worker that could not work in any process.

        :param forks: whether one of its pools makes child processes.
        :param app: from where child processes would import the app.
        :raises ConfigError: says what to set.
        """
        if forks and not hasattr(os, "fork"):
            raise ConfigError("the process pool needs fork(): use the thread pool on this system")
        if forks and app is None:
            raise ConfigError(
                "the process pool builds the app anew in each child process: set "
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
                "db.session is bound to one connection, as in a test that rolls back, and a worker "
                "uses several: use flask_bgjobs.testing"
            )

    def find_job(self, job_id: int) -> Job | None:
        """The job, loaded and detached; ``None`` where there is none."""
        return self.store.get(job_id)

    def cancel(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Cancel jobs, and tell of those that waited; running ones are asked to stop.

        :param by: who does it, for the audit trail; ``None``: the app's own code.
        """
        result = self.store.cancel(ids, by)
        for job in self.store.get_many(result.done) if result.done else ():
            self.emit(job_cancelled, job=job)
        return result

    def logged_parameters(
        self, job: Job | JobSpec, parameters: Any, names: tuple[str, ...] | None
    ) -> Any:
        """The parameters of a job as they may stand in a log line; nothing is imported for it.

        :param names: as ``Outcome.parameter_names``. Where they are neither given nor known in
            this process, all positional values are masked.
        """
        return self.redactor.parameters(parameters, self._known(job, names))

    def logged_text(
        self, text: str, job: Job | JobSpec, parameters: Any, names: tuple[str, ...] | None
    ) -> str:
        """An error of a job as it may stand in a log line; as :meth:`logged_parameters`."""
        return self.redactor.text(text, parameters, self._known(job, names))

    def masked_parameters(self, target: str, method: str | None, parameters: Any) -> Any:
        """The parameters of a job as they may be shown."""
        return self.redactor.parameters(parameters, self._named(target, method))

    def masked_text(self, text: str, target: str, method: str | None, parameters: Any) -> str:
        """An error or traceback of a job as it may be shown."""
        return self.redactor.text(text, parameters, self._named(target, method))

    def roll_back_session(self) -> None:
        """Roll back what the host's session of this context has not committed."""
        if self.db.session.registry.has():
            # Where it cannot, it is removed next, and that is logged.
            with contextlib.suppress(Exception):
                self.db.session.rollback()

    def remove_session(self) -> None:
        """Roll back and close the host's session of this context, whatever state it is in."""
        try:
            self.db.session.remove()
        except Exception:
            SafeLogger(self.app.logger).exception("The session could not be removed cleanly")

    def _leave_no_session(self) -> None:
        # Most receivers use none, and to make one in order to remove it would cost more.
        if self.db.session.registry.has():
            self.remove_session()

    def _known(
        self, job: Job | JobSpec, names: tuple[str, ...] | None
    ) -> Callable[..., Any] | None:
        # In a worker with a process pool a module that crashes or hangs would do so in the worker.
        try:
            if names is not None:
                return named_after(names)
            found = self.registry.known(job.target, job.method)
            return None if found is None else found.named
        except Exception:
            return None

    def _named(self, target: str, method: str | None) -> Callable[..., Any] | None:
        try:
            return self.registry.resolve(target, method).named
        except Exception:
            # Refused, gone or not importable here: then the names are simply not known.
            return None


def state_of(app: Flask) -> AppState:
    """The state of ``app``.

    :raises ConfigError: when ``BgJobs.init_app`` has not been called for it.
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
    """The state of the current app; an application context is needed."""
    return state_of(current_app._get_current_object())  # type: ignore[attr-defined]  # LocalProxy


provide_actions(current_state)


def import_jobs(state: AppState) -> None:
    """Import the modules in ``BGJOBS_IMPORTS``, so that their decorated jobs are known.

    They are imported in an application context of their own, which ends what they leave open.

    :raises ConfigError: names the module that cannot be imported, and why.
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
                # Such as a receiver of the context's signals.
                raise
            logger = SafeLogger(state.app.logger)
            logger.exception("Teardown after the import of %s raised", module)
        if failure is not None:
            raise ConfigError(
                f"BGJOBS_IMPORTS names {module!r}, which cannot be imported: "
                f"{type(failure).__name__}: {failure}"
            ) from failure
