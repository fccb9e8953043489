"""``BgJobs``, the extension: ``init_app`` wires the parts together."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, overload

from flask import Flask

from .config import Config
from .enqueue import transactions
from .enqueue.decorator import BoundJob, JobFunction
from .enqueue.enqueue import AUTO, Parameters, SessionChoice
from .errors import ConfigError, InvalidJob
from .hooks import is_same, require_plain_function
from .job.redact import Redactor
from .job.text import shown
from .models import Job, add_tables
from .observability import logs
from .options import OptionValues, options_from
from .registry import (
    Decorated,
    Registry,
    decorated,
    require_job_function,
    stored_name,
    where,
)
from .state import AppState, Authorizer, FailureHook, Identifier, state_of
from .store import make_store
from .worker.embedded import EmbeddedOptions, EmbeddedWorker

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

P = ParamSpec("P")
R = TypeVar("R")


class BgJobs:
    """Background jobs for Flask apps, on the database that they already have.

    :param app: the app to set up at once; else call :meth:`init_app`.
    :param db: its Flask-SQLAlchemy extension; by default the one that the app has.
    """

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        self._db = db
        self._decorated: dict[str, Decorated] = {}
        self._authorizer: Authorizer | None = None
        self._identifier: Identifier | None = None
        self._failure_hooks: list[FailureHook] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, db: SQLAlchemy | None = None) -> None:
        """Set up ``app``: configuration, tables, commands and dashboard. Touches no database.

        :param db: the app's Flask-SQLAlchemy extension; by default the one given to
            :class:`BgJobs`, then the one that the app has.
        :raises ConfigError: when a ``BGJOBS_…`` value is not allowed, the app has no
            Flask-SQLAlchemy, or it was set up before.
        :raises DatabaseNotSupported: when the tables' database is of another kind.
        """
        if "bgjobs" in app.extensions:
            raise ConfigError(
                f"flask-bgjobs is already set up for the app {app.name!r}: give each app to one "
                "BgJobs, once (BgJobs(app) calls init_app itself)"
            )
        database = _find_db(app, db or self._db)
        config = Config.from_mapping(app.config)
        app.extensions["bgjobs"] = self._make_state(app, database, config)
        logs.connect()
        _add_commands(app)
        if config.dashboard:
            # Here, as a worker does without the dashboard's libraries.
            from .dashboard import add_dashboard

            add_dashboard(app, config)

    @overload
    def job(self, function: Callable[P, R], /) -> JobFunction[P, R]: ...

    @overload
    def job(
        self, /, *, name: str | None = None, **options: Unpack[OptionValues]
    ) -> Callable[[Callable[P, R]], JobFunction[P, R]]: ...

    def job(
        self,
        function: Callable[P, R] | None = None,
        /,
        *,
        name: str | None = None,
        **options: Unpack[OptionValues],
    ) -> JobFunction[P, R] | Callable[[Callable[P, R]], JobFunction[P, R]]:
        """The decorated function, with ``enqueue`` and ``using`` beside it.

        Decorating a function is what allows it to run as a job.

        :param name: the name under which its jobs are stored; by default its dotted name.
            Functions in ``__main__`` or inside other functions need one. The same lines may
            run again, as in a factory that is called twice; the newest function is then run.
        :param options: fields of :class:`~flask_bgjobs.options.JobOptions`, defaults for its jobs.
        :raises ConfigError: when the function has no name that a worker could find, or another
            function has it.
        :raises TypeError: for an option that does not exist.
        """
        chosen = options_from(options)

        def decorate(function: Callable[P, R]) -> JobFunction[P, R]:
            require_job_function(function, name)
            stored = stored_name(function, name)
            found = decorated(function, chosen)
            known = self._decorated.get(stored)
            if known is not None and not found.is_same_definition(known):
                raise ConfigError(
                    f"another job function is already named {stored!r}: {where(known.function)}; "
                    "give one of them another name with @bgjobs.job(name='…')"
                )
            self._decorated[stored] = found
            return JobFunction(function, stored)

        return decorate if function is None else decorate(function)

    def enqueue_many(
        self,
        job: JobFunction[..., Any] | BoundJob[Any],
        parameter_sets: Sequence[Parameters],
        *,
        session: SessionChoice = AUTO,
    ) -> list[Job]:
        """One job for each set of parameters, in order, all in one transaction.

        :param job: a decorated function, or one with ``using(...)``.
        :param parameter_sets: tuples or lists of positional, or dicts of keyword parameters.
        :param session: as in :func:`~flask_bgjobs.run_background_job`; by default that of
            ``using(...)``.
        :raises InvalidJob: when one of them cannot be stored, or ``job`` is no decorated function;
            none is enqueued then.
        """
        bound = job.using() if isinstance(job, JobFunction) else job
        if not isinstance(bound, BoundJob):
            raise InvalidJob(
                f"enqueue_many needs a function decorated with @bgjobs.job, not {shown(job)}"
            )
        if session is not AUTO:
            bound = bound.within(session)
        return bound.enqueue_many(parameter_sets)

    def start_worker(self, app: Flask, **options: Unpack[EmbeddedOptions]) -> EmbeddedWorker:
        """A worker inside the process that serves ``app``, for small deployments.

        It starts with the first request that the process answers or the first job that it
        enqueues; under ``flask run`` at once. It never starts in the parent of a reloader, in
        the master of a pre-fork server, in other ``flask`` commands, or in a child of the process
        pool. Call it once, after :meth:`init_app`.

        :param options: ``queues``, ``pool``, ``concurrency``, ``name`` and ``shutdown_timeout``,
            as of ``flask bgjobs worker``.
        :returns: the worker, also kept as ``app.extensions["bgjobs_worker"]``.
        :raises ConfigError: when the app was not set up or has a worker already, its database is
            in memory, or the process pool is used and ``BGJOBS_APP`` is not set.
        """
        if "bgjobs_worker" in app.extensions:
            raise ConfigError(f"the app {app.name!r} has a worker already: call start_worker once")
        worker = EmbeddedWorker(state_of(app), dict(options))
        app.extensions["bgjobs_worker"] = worker
        worker.start_when_serving()
        return worker

    def authorize_dashboard(self, authorizer: Authorizer) -> Authorizer:
        """Decorator for the function that says who may do what on the dashboard.

        It is called with the action (``"view"``, ``"dispatch"``, ``"cancel"``, ``"retry"``,
        ``"delete"``, ``"pause"``, ``"resume"``, ``"drain"``, ``"audit"``) and the job, or ``None``
        where there is none. It returns ``True`` when the current user may. Any other answer means
        no; it may also call :func:`flask.abort`, with a redirect to a login page for instance.

        :raises ConfigError: when it is not a plain function of two arguments, such as an
            ``async def``.
        """
        require_plain_function(authorizer, "authorize_dashboard", "view", None)
        self._authorizer = authorizer
        return authorizer

    def identify_visitor(self, identifier: Identifier) -> Identifier:
        """Decorator for the function that names the dashboard's visitor in the audit trail.

        It is called without arguments and returns the name. Without one, it is what Flask-Login's
        ``current_user.get_id()`` gives, or the visitor's address where nobody is logged in.

        :raises ConfigError: when it is not a plain function without arguments, such as an
            ``async def``.
        """
        require_plain_function(identifier, "identify_visitor")
        self._identifier = identifier
        return identifier

    def on_failure(self, function: FailureHook) -> FailureHook:
        """Decorator for a function that is called with each attempt that failed.

        It is called as ``function(job, exception, final=…)`` in the process where the attempt ran,
        in a thread and an application context of its own, after the outcome has been handed to the
        worker. ``job`` is a :class:`~flask_bgjobs.job.records.JobSpec`; ``final`` is ``False``
        when a retry follows. What it raises is logged, and changes nothing. Several functions may
        be registered. If a factory registers the same function again, the newest one replaces it.

        For a job whose process died the worker that records it calls the function, with
        :exc:`~flask_bgjobs.JobTimeout` or :exc:`~flask_bgjobs.AttemptFailed`. A job that is rescued
        to run again, snoozed or given back has not failed.

        :raises ConfigError: when it is not a plain function that takes these arguments, such as
            an ``async def``.
        """
        require_plain_function(function, "on_failure", None, None, final=True)
        same = [hook for hook in self._failure_hooks if is_same(hook, function)]
        for hook in same:
            self._failure_hooks.remove(hook)
        self._failure_hooks.append(function)
        return function

    def _make_state(self, app: Flask, db: SQLAlchemy, config: Config) -> AppState:
        engine = _find_engine(app, db, config)
        metadata = db.metadatas[config.bind_key]
        add_tables(metadata)
        schema = metadata.schema
        host = transactions.HostSessions(app, db, engine, config.bind_key)
        store = make_store(engine, host, schema=schema, max_crashes=config.max_crashes)
        if advice := store.pool_advice():
            warnings.warn(advice, stacklevel=3)
        transactions.watch(engine)
        transactions.tell_binds_apart(app, db)
        # Before Flask-SQLAlchemy's own, which was registered earlier, closes the session.
        app.teardown_appcontext(functools.partial(transactions.discard_on_error, db))
        app.after_request(functools.partial(transactions.discard_on_refusal, db))
        _warn_of_dropped_tables(app, db, config)
        job_table = Job.__tablename__ if schema is None else f"{schema}.{Job.__tablename__}"
        return AppState(
            app=app,
            db=db,
            config=config,
            registry=Registry(config.allowed_jobs, self._decorated),
            store=store,
            redactor=Redactor(config.redact),
            table=metadata.tables[job_table],
            find_authorizer=lambda: self._authorizer,
            find_identifier=lambda: self._identifier,
            failure_hooks=self._failure_hooks,
        )


def _find_db(app: Flask, given: SQLAlchemy | None) -> SQLAlchemy:
    found = app.extensions.get("sqlalchemy")
    if found is None:
        raise ConfigError(
            f"the app {app.name!r} has no Flask-SQLAlchemy: call db.init_app(app) before "
            "bgjobs.init_app(app)"
        )
    if given is not None and given is not found:
        raise ConfigError(
            f"the db given to BgJobs is not the one of the app {app.name!r}: call "
            "db.init_app(app) with that db first"
        )
    db: SQLAlchemy = found
    return db


def _find_engine(app: Flask, db: SQLAlchemy, config: Config) -> Any:
    with app.app_context():
        engines = db.engines
    if config.bind_key not in engines:
        raise ConfigError(
            f"BGJOBS_BIND_KEY = {config.bind_key!r}: SQLALCHEMY_BINDS has "
            f"{', '.join(repr(key) for key in engines if key) or 'no binds'}"
            if config.bind_key
            else "SQLALCHEMY_DATABASE_URI is not set: flask-bgjobs needs a database, or a bind "
            "named by BGJOBS_BIND_KEY"
        )
    return engines[config.bind_key]


def _warn_of_dropped_tables(app: Flask, db: SQLAlchemy, config: Config) -> None:
    """Warn where a migration of the default metadata would drop our tables."""
    if config.bind_key is None or Job.__tablename__ in db.metadata.tables:
        return
    with app.app_context():
        engines = db.engines
    if None in engines and transactions.is_same(engines[None], engines[config.bind_key]):
        warnings.warn(
            f"BGJOBS_BIND_KEY = {config.bind_key!r} names the database of SQLALCHEMY_DATABASE_URI: "
            "a migration of db.metadata would drop the tables of flask-bgjobs. Leave "
            "BGJOBS_BIND_KEY out, or call flask_bgjobs.add_tables(db.metadata) first",
            stacklevel=4,
        )


def _add_commands(app: Flask) -> None:
    from .cli import bgjobs_commands

    app.cli.add_command(bgjobs_commands)
