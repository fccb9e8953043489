"""The Flask extension ``BgJobs``, whose ``init_app`` sets up an app."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, overload

from flask import Flask

from .config import Config
from .enqueue import transactions
from .enqueue.calls import Call, enqueue_calls
from .enqueue.decorator import BoundJob, JobFunction
from .enqueue.enqueue import AUTO, Parameters, SessionChoice
from .enqueue.fairness import check_fair
from .enqueue.limits import check_limits
from .enqueue.unique import check_unique
from .errors import ConfigError, InvalidJob
from .flow.fairness.manage import Weights
from .flow.limits.definition import rules
from .flow.limits.manage import Limits
from .flow.schedules.definition import check_configured, decorated_recurrence
from .flow.schedules.manage import Schedules
from .hooks import is_same, require_plain_function
from .job.redact import Redactor
from .job.text import shown
from .models import Job, add_tables
from .observability import logs
from .options import DecoratorValues, OptionValues, options_from, split_recurrence
from .registry import (
    Decorated,
    Registry,
    Target,
    decorated,
    require_job_function,
    source_location,
    stored_name,
)
from .state import AppState, Authorizer, FailureHook, Identifier, current_state, state_of
from .store import make_store
from .worker.embedded import EmbeddedOptions, EmbeddedWorker

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

P = ParamSpec("P")
R = TypeVar("R")


class BgJobs:
    """The extension: background jobs for Flask apps, stored in each app's own SQL database.

    :param app: the app to set up. Without it, call :meth:`init_app` later.
    :param db: the Flask-SQLAlchemy extension of the app; default: the one that was initialized
        for the app.
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
        """Set up ``app``: check its configuration, and add the tables to its metadata, the
        ``flask bgjobs`` commands and the dashboard. The database is not accessed.

        :param db: the Flask-SQLAlchemy extension of the app; default: the one given to
            :class:`BgJobs`, then the one that was initialized for the app.
        :raises ConfigError: when the value of a ``BGJOBS_…`` key is invalid, when
            ``db.init_app(app)`` has not been called, or when ``app`` has already been set up.
        :raises DatabaseNotSupported: when the database is not SQLite, PostgreSQL, MariaDB or
            MySQL, or its driver is not supported.
        """
        if "bgjobs" in app.extensions:
            raise ConfigError(
                f"flask-bgjobs is already set up for the app {app.name!r}: give each app to one "
                "BgJobs, once (BgJobs(app) calls init_app itself)"
            )
        database = _find_db(app, db or self._db)
        config = Config.from_mapping(app.config)
        state = self._make_state(app, database, config)
        check_configured(state)
        rules(state)
        app.extensions["bgjobs"] = state
        logs.connect()
        _add_commands(app)
        if config.dashboard:
            # Imported here because a worker without a dashboard does not need its libraries.
            from .dashboard import add_dashboard

            add_dashboard(app, config)

    @overload
    def job(self, function: Callable[P, R], /) -> JobFunction[P, R]: ...

    @overload
    def job(
        self, /, *, name: str | None = None, **options: Unpack[DecoratorValues]
    ) -> Callable[[Callable[P, R]], JobFunction[P, R]]: ...

    def job(
        self,
        function: Callable[P, R] | None = None,
        /,
        *,
        name: str | None = None,
        **options: Unpack[DecoratorValues],
    ) -> JobFunction[P, R] | Callable[[Callable[P, R]], JobFunction[P, R]]:
        """Decorator that allows a function to run as a job. The decorated function can still be
        called as before, and has the methods ``enqueue`` and ``using``.

        Use it as ``@bgjobs.job`` or with arguments, as in ``@bgjobs.job(queue="mail")``.

        :param name: the name under which its jobs are stored; default: the dotted name of the
            function. Required for functions in ``__main__`` and inside other functions. If the
            same definition runs again, as in an app factory that is called twice, the newer
            function replaces the older one.
        :param options: defaults for the jobs of this function: any field of
            :class:`~flask_bgjobs.options.JobOptions`, such as ``queue``, ``retries`` or
            ``timeout``. With ``cron`` or ``every``, workers also enqueue a job of the function
            regularly, without parameters: see
            :class:`~flask_bgjobs.options.RecurrenceValues` for these options. ``jitter`` then
            spreads these jobs, and not their retries.
        :raises ConfigError: when a worker could not find the function by its name, when another
            function already has the name, when the decorated object is not a plain function, or
            when it cannot recur as the options say.
        :raises TypeError: when an option does not exist.
        """
        given, recurring = split_recurrence(options)
        chosen = options_from(given)

        def decorate(function: Callable[P, R]) -> JobFunction[P, R]:
            require_job_function(function, name)
            stored = stored_name(function, name)
            recurrence = decorated_recurrence(function, stored, recurring, chosen)
            try:
                check_unique(chosen, Target(function))
                check_limits(chosen, Target(function))
                check_fair(chosen, Target(function))
            except ValueError as error:
                raise ConfigError(f"@bgjobs.job of {stored}: {error}") from None
            found = decorated(function, chosen, recurrence)
            known = self._decorated.get(stored)
            if known is not None and not found.is_same_definition(known):
                raise ConfigError(
                    f"another job function is already named {stored!r}: "
                    f"{source_location(known.function)}; give one of them another name with "
                    "@bgjobs.job(name='…')"
                )
            self._decorated[stored] = found
            return JobFunction(function, stored)

        return decorate if function is None else decorate(function)

    def call(
        self,
        target: str,
        method: str | None = None,
        parameters: Parameters = (),
        **options: Unpack[OptionValues],
    ) -> Call:
        """A job by name that is not enqueued yet. Decorated functions have ``call`` methods.

        :param target: dotted name of a class or function on the allow-list.
        :param method: method of the class; ``None`` for a function.
        :param parameters: a list of positional or a dict of keyword parameters.
        :param options: fields of :class:`~flask_bgjobs.options.JobOptions`.
        :raises TypeError: for an option that does not exist. Everything else is checked when the
            job is enqueued.
        """
        return Call(target, method, parameters, options_from(options))

    @overload
    def enqueue_many(
        self,
        job: JobFunction[..., Any] | BoundJob[Any],
        parameter_sets: Sequence[Parameters],
        *,
        session: SessionChoice = AUTO,
    ) -> list[Job]: ...

    @overload
    def enqueue_many(self, job: Iterable[Call], *, session: SessionChoice = AUTO) -> list[Job]: ...

    def enqueue_many(
        self,
        job: JobFunction[..., Any] | BoundJob[Any] | Iterable[Call],
        parameter_sets: Sequence[Parameters] | None = None,
        *,
        session: SessionChoice = AUTO,
    ) -> list[Job]:
        """Enqueue several jobs, all in one transaction: one for each set of parameters of a
        function, or one for each call.

        :param job: a decorated function, or the result of its ``using(...)``; or calls, the results
            of ``call(...)``, and no ``parameter_sets``.
        :param parameter_sets: one item for each job: a tuple or list of positional parameters, or
            a dict of keyword parameters.
        :param session: as in :func:`~flask_bgjobs.run_background_job`; default: the session given
            to ``using(...)``, if any.
        :returns: the jobs, in the order of ``parameter_sets`` or of the calls.
        :raises JobNotAllowed: when the allow-list does not hold the name in a call.
        :raises InvalidJob: when a set of parameters cannot be stored or does not fit the function,
            or when ``job`` is neither a decorated function nor calls. No job is enqueued then.
        :raises UniqueKeyTaken: with ``on_duplicate="raise"``, when another job holds a key. Roll
            back a transaction that the jobs have joined: it may hold some of them.
        """
        if parameter_sets is None:
            return enqueue_calls(current_state(), _calls(job), session)
        bound = job.using() if isinstance(job, JobFunction) else job
        if not isinstance(bound, BoundJob):
            raise InvalidJob(
                f"enqueue_many needs a function decorated with @bgjobs.job, not {shown(job)}"
            )
        if session is not AUTO:
            bound = bound.within(session)
        return bound.enqueue_many(parameter_sets)

    @property
    def schedules(self) -> Schedules:
        """The recurring jobs of the current app, by name. Needs an application context."""
        return Schedules(current_state())

    @property
    def limits(self) -> Limits:
        """The limits of the current app, by name. Needs an application context."""
        return Limits(current_state())

    @property
    def weights(self) -> Weights:
        """The weights of the keys of ``fair``, by key. Needs an application context."""
        return Weights(current_state())

    def start_worker(self, app: Flask, **options: Unpack[EmbeddedOptions]) -> EmbeddedWorker:
        """Run a worker inside the web process that serves ``app``, for small deployments.

        Call it once, after :meth:`init_app`. The worker starts with the first request that the
        process answers or the first job that it enqueues; under ``flask run`` it starts
        immediately. It never starts in the parent process of a reloader, in the master of a
        pre-fork server, in other ``flask`` commands, or in a child process of the process pool.

        :param options: ``queues``, ``pool``, ``concurrency``, ``name`` and ``shutdown_timeout``,
            with the same meaning as the options of ``flask bgjobs worker``.
        :returns: the worker, also available as ``app.extensions["bgjobs_worker"]``.
        :raises ConfigError: when the app has not been set up or already has a worker, when its
            database is in-memory SQLite, or when the process pool is used and ``BGJOBS_APP`` is
            not set.
        """
        if "bgjobs_worker" in app.extensions:
            raise ConfigError(f"the app {app.name!r} has a worker already: call start_worker once")
        worker = EmbeddedWorker(state_of(app), dict(options))
        app.extensions["bgjobs_worker"] = worker
        worker.start_when_serving()
        return worker

    def authorize_dashboard(self, authorizer: Authorizer) -> Authorizer:
        """Decorator for the function that decides what the current user may do on the dashboard.

        The function is called with two arguments: the action (``"view"``, ``"dispatch"``,
        ``"cancel"``, ``"retry"``, ``"delete"``, ``"pause"``, ``"resume"``, ``"drain"``,
        ``"schedule"``, ``"limit"`` or ``"audit"``), and the job, or ``None`` if the action does not
        concern a single job. It returns ``True`` to allow the action. Any other return value denies
        it. The function may also call :func:`flask.abort`, for example with a redirect to a login
        page.

        :raises ConfigError: when the function is ``async``, a generator or a class, or does not
            take two arguments.
        """
        require_plain_function(authorizer, "authorize_dashboard", "view", None)
        self._authorizer = authorizer
        return authorizer

    def identify_visitor(self, identifier: Identifier) -> Identifier:
        """Decorator for the function that returns the name of the dashboard's current visitor, for
        the audit trail.

        The function is called without arguments. If none is registered, the name is the result of
        Flask-Login's ``current_user.get_id()``, or the visitor's IP address if no user is logged
        in.

        :raises ConfigError: when the function is ``async``, a generator or a class, or takes
            arguments.
        """
        require_plain_function(identifier, "identify_visitor")
        self._identifier = identifier
        return identifier

    def on_failure(self, function: FailureHook) -> FailureHook:
        """Decorator for a function that is called after each failed attempt.

        The function is called as ``function(job, exception, final=…)``. ``job`` is a
        :class:`~flask_bgjobs.job.records.JobSpec`; ``final`` is ``False`` when a retry follows.
        The call is made in the process where the attempt ran, in a separate thread with its own
        application context, after the outcome has been passed to the worker. If the function
        raises an exception, the exception is logged and has no other effect. Several functions may
        be registered. If an app factory registers the same function again, the newer one replaces
        the older one.

        If the process that ran the attempt died, the worker that records the failure makes the
        call, with :exc:`~flask_bgjobs.JobTimeout` or :exc:`~flask_bgjobs.AttemptFailed`. A job
        that is snoozed, released, or rescued to run again has not failed.

        :raises ConfigError: when the function is ``async``, a generator or a class, or does not
            take these arguments.
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
        # Teardown functions run in reverse order: this one runs before Flask-SQLAlchemy, which
        # registered its own earlier, closes the session.
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


def _calls(given: object) -> list[Call]:
    """The calls given to ``enqueue_many``."""
    if isinstance(given, Iterable):
        return list(given)
    raise InvalidJob(
        "enqueue_many needs a function decorated with @bgjobs.job and sets of parameters, or a "
        f"list of calls, not {shown(given)}"
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
            f"BGJOBS_BIND_KEY = {config.bind_key!r} is not in SQLALCHEMY_BINDS, which has "
            f"{', '.join(repr(key) for key in engines if key) or 'no binds'}"
            if config.bind_key
            else "SQLALCHEMY_DATABASE_URI is not set: flask-bgjobs needs a database, or a bind "
            "named by BGJOBS_BIND_KEY"
        )
    return engines[config.bind_key]


def _warn_of_dropped_tables(app: Flask, db: SQLAlchemy, config: Config) -> None:
    """Warn when a migration of the default metadata would drop the tables of flask-bgjobs."""
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
