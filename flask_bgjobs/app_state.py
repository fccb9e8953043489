"""What flask-bgjobs holds for one Flask app, kept as ``app.extensions["bgjobs"]``."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import Flask, current_app

from .config import Config
from .errors import ConfigError
from .models import Job
from .redact import Redactor
from .registry import Registry
from .signals import emit, job_cancelled
from .store import ActionResult, Actor, Store

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

Authorizer = Callable[[str, Job | None], bool]
Identifier = Callable[[], str]


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
    enqueued: list[Callable[[Job], object]] = dataclasses.field(default_factory=list)
    """Called with each job whose enqueue has committed: wake-ups, and tests that run it."""
    commits_clean_sessions: bool = False
    """Set by ``testing``: a job that joined a session without writes is committed at once."""

    def emit(self, signal: Any, **values: object) -> None:
        """Send a signal with this app as sender."""
        emit(signal, self.app, **values)

    def check_can_work(self, pools: Collection[str], app: str | None) -> None:
        """Refuse a worker that could not work in any process.

        :param pools: those that it needs.
        :param app: from where child processes would import the app.
        :raises ConfigError: says what to set.
        """
        if "process" in pools and not hasattr(os, "fork"):
            raise ConfigError("the process pool needs fork(): use the thread pool on this system")
        if "process" in pools and app is None:
            raise ConfigError(
                "the process pool builds the app anew in each child process: set "
                "BGJOBS_APP = 'shop:create_app' (what `flask --app` takes)"
            )
        if self.store.always_joins:
            raise ConfigError(
                "an in-memory SQLite database cannot be shared with a worker; use a file, or "
                "flask_bgjobs.testing in tests"
            )

    def cancel(self, ids: Sequence[int], by: Actor | None = None) -> ActionResult:
        """Cancel jobs, and tell of those that waited; running ones are asked to stop.

        :param by: who does it, for the audit trail; ``None``: the app's own code.
        """
        result = self.store.cancel(ids, by)
        for job in self.store.get_many(result.done) if result.done else ():
            self.emit(job_cancelled, job=job)
        return result

    def masked_parameters(self, target: str, method: str | None, parameters: Any) -> Any:
        """The parameters of a job as they may be shown."""
        return self.redactor.parameters(parameters, self._named(target, method))

    def masked_text(self, text: str, target: str, method: str | None, parameters: Any) -> str:
        """An error or traceback of a job as it may be shown."""
        return self.redactor.text(text, parameters, self._named(target, method))

    def remove_session(self) -> None:
        """Roll back and close the host's session of this context, whatever state it is in."""
        try:
            self.db.session.remove()
        except Exception:
            self.app.logger.exception("The session could not be removed cleanly")

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


def import_jobs(state: AppState) -> None:
    """Import the modules in ``BGJOBS_IMPORTS``, so that their decorated jobs are known.

    :raises ConfigError: names the module that cannot be imported, and why.
    """
    for module in state.config.imports:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigError(
                f"BGJOBS_IMPORTS names {module!r}, which cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
