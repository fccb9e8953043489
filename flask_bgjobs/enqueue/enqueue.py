"""Enqueue: check a job, then insert it in the session's transaction or in a separate one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import enum
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from ..errors import BgJobsError, DatabaseUnusable, InvalidJob
from ..job import serialize
from ..job.durations import Duration
from ..job.limits import Limit
from ..job.redact import signature_text
from ..job.text import one_line, shown
from ..job.turns import claim_rank
from ..models import Job
from ..options import (
    ExceptionClasses,
    Fair,
    JobOptions,
    Limits,
    column_values,
    first_deadline,
    first_run,
)
from ..registry import Target
from ..signals import emit_each, job_enqueued, job_refused
from ..state import AppState, current_state
from ..store import MAKE_TABLES, NewJobs, advice, is_missing_table
from ..store.transitions import enqueued
from ..system.safe_logging import logger as _logger
from . import transactions
from .fairness import check_fair, fair_key
from .limits import NO_LIMITS, check_limits, limit_values, limits_of
from .unique import check_unique, unique_jobs


class _Auto(enum.Enum):
    AUTO = "auto"


AUTO: Final = _Auto.AUTO
"""Join ``db.session`` if it holds uncommitted writes, otherwise save the job at once."""

PLAIN: Mapping[str, Any] = {**NO_LIMITS, "fair_key": None}
"""The values of a job that has no limits and takes no turns."""
_COMMITTING: weakref.WeakSet[Flask] = weakref.WeakSet()
"""The apps for which :func:`committing_clean_sessions` is active."""

T = TypeVar("T")
SessionChoice = Session | scoped_session[Any] | None | _Auto
Parameters = Sequence[Any] | Mapping[str, Any]


def run_background_job(
    target: str,
    method: str | None = None,
    parameters: Parameters = (),
    retries: int | None = None,
    priority: int | str | None = None,
    delay: Duration | None = None,
    retry_delay: Duration | Sequence[Duration] | None = None,
    *,
    run_at: dt.datetime | None = None,
    backoff: str | None = None,
    max_retry_delay: Duration | None = None,
    jitter: float | None = None,
    queue: str | None = None,
    timeout: Duration | None = None,
    unique_key: str | None = None,
    unique: bool | str | Callable[..., str] | None = None,
    unique_until: str | None = None,
    unique_for: Duration | None = None,
    on_duplicate: str | None = None,
    debounce: Duration | None = None,
    debounce_max: Duration | None = None,
    throttle: Duration | None = None,
    retry_on: ExceptionClasses | None = None,
    fail_on: ExceptionClasses | None = None,
    expires: Duration | dt.datetime | None = None,
    retention: Duration | None = None,
    limits: Limits | None = None,
    fair: Fair | None = None,
    tags: Sequence[str] | None = None,
    owner: str | None = None,
    session: SessionChoice = AUTO,
) -> Job:
    """Enqueue a job, and return it, loaded and detached.

    An option that is ``None`` takes the decorator's value, then the configuration's. Durations are
    seconds or ``timedelta``.

    :param target: dotted name of a class or function on the allow-list.
    :param method: method of the class; ``None`` for a function.
    :param parameters: a list of positional or a dict of keyword parameters, stored as JSON.
    :param retries: retries after the first attempt; default ``BGJOBS_RETRIES``.
    :param priority: a number, higher runs first, or a name from ``BGJOBS_PRIORITIES``;
        default 0.
    :param delay: wait before the first attempt; default none.
    :param retry_delay: wait before each retry, one for all or a list; default
        ``BGJOBS_RETRY_DELAY``.
    :param run_at: when to run, as a datetime with a time zone, instead of ``delay``.
    :param backoff: how a single retry delay grows: ``fixed`` (default), ``linear``,
        ``exponential``.
    :param max_retry_delay: upper limit for the wait before a retry; default none.
    :param jitter: share of the retry delay, 0 to 1, by which it is spread; default 0.
    :param queue: lower-case name; default ``default``.
    :param timeout: for one attempt; default ``BGJOBS_TIMEOUT``.
    :param unique_key: while a job with this key is not finished, nothing is inserted, and that
        job is returned with ``deduplicated`` set.
    :param unique: a key made from the parameters, instead of ``unique_key``: ``True`` for all of
        them, a format such as ``"{order_id}"``, or a function of the parameters.
    :param unique_until: when the key is free again: ``finished`` (default) or ``started``.
    :param unique_for: minimum time from the enqueue for which the key stays taken; default none.
    :param on_duplicate: what to do if the key is taken: ``keep`` that job (default), ``replace``
        its parameters and options if it has not started, or ``raise``.
    :param debounce: time to wait after the last of several enqueues, of which the last one runs.
    :param debounce_max: maximum time from the first of them to the job; default none.
    :param throttle: time in which at most one job becomes due: the first at once, the newest of
        the others at its end.
    :param retry_on: exceptions after which to retry, as classes or dotted names; the job fails
        without a retry after all others. Default ``BGJOBS_RETRY_ON``, then all.
    :param fail_on: exceptions after which the job fails without a retry; default
        ``BGJOBS_FAIL_ON``, then none.
    :param expires: time from the enqueue, or a datetime with a time zone, after which the job is
        cancelled if it has not started; default none.
    :param retention: time for which to keep the job after its end; default ``BGJOBS_RETENTION``.
    :param limits: how many jobs may run at once or start per time: a
        :class:`~flask_bgjobs.Limit`, the name of one in ``BGJOBS_LIMITS``, or a list of them;
        default none.
    :param fair: the key by which jobs take turns within their queue and priority, such as the
        tenant: a format such as ``"{tenant_id}"``, or a function of the parameters; default none.
    :param tags: up to 20 words by which to find the job.
    :param owner: an identifier of the job's owner, by which to find the job.
    :param session: a session whose transaction the job joins; ``None`` never joins. By default
        it joins ``db.session`` when that holds uncommitted writes, and is saved at once
        otherwise.
    :raises JobNotAllowed: when the allow-list does not hold target or method.
    :raises InvalidJob: when a parameter or option is not valid.
    :raises UniqueKeyTaken: with ``on_duplicate="raise"``, when another job holds the key; also when
        another open transaction has held it for 5 s, or for 30 s if this job joins none. On SQLite
        it waits for any open transaction that has written.
    :raises DatabaseUnusable: when the tables are missing, or a SQLite file is locked for more than
        30 s, full or read-only.
    :raises sqlalchemy.exc.OperationalError: when the database cannot be reached. If the connection
        breaks during the call, the job may or may not have been stored.
    """
    options = JobOptions(
        retries=retries,
        priority=priority,
        delay=delay,
        retry_delay=retry_delay,
        run_at=run_at,
        backoff=backoff,
        max_retry_delay=max_retry_delay,
        jitter=jitter,
        queue=queue,
        timeout=timeout,
        unique_key=unique_key,
        unique=unique,
        unique_until=unique_until,
        unique_for=unique_for,
        on_duplicate=on_duplicate,
        debounce=debounce,
        debounce_max=debounce_max,
        throttle=throttle,
        retry_on=retry_on,
        fail_on=fail_on,
        expires=expires,
        retention=retention,
        limits=limits,
        fair=fair,
        tags=tags,
        owner=owner,
    )
    return enqueue(current_state(), target, method, [parameters], options, session)[0]


def enqueue(
    state: AppState,
    target: str,
    method: str | None,
    parameter_sets: Sequence[Parameters],
    options: JobOptions,
    session: SessionChoice = AUTO,
) -> list[Job]:
    """Enqueue one job per set of parameters in one transaction, and return them in order.

    :raises JobNotAllowed: when the allow-list does not hold target or method.
    :raises InvalidJob: when a parameter or option is not valid; then no job is enqueued.
    """
    try:
        jobs = new_jobs(state, target, method, parameter_sets, options)
    except BgJobsError as error:
        state.emit(job_refused, target=target, method=method, error=error)
        raise
    return insert(state, [jobs], session) if jobs.parameters else []


def insert(state: AppState, new: Sequence[NewJobs], session: SessionChoice = AUTO) -> list[Job]:
    """Insert checked jobs, in the session's transaction or in a separate one."""
    joined = _session_to_join(state, session)
    if joined is None:
        return _save(state, new)
    # The caller commits a session that it has passed.
    may_commit = state.app in _COMMITTING and (session is AUTO or session is None)
    commits = may_commit and not transactions.holds_writes(joined, state.store.host_engine)
    transactions.flush(joined)
    connection = transactions.connection_to_join(joined, state.table, state.store.host_engine)
    if connection is None:
        return _save(state, new)
    saved: list[Job] = []
    try:
        with _explaining_missing_tables():
            for jobs in new:
                saved += state.store.insert(connection, jobs)
    finally:
        # Also after an error: the caller may commit what was inserted before.
        transactions.follow(joined, _new_among(saved), lambda job: announce(state, [job]))
    if commits:
        joined.commit()
    return saved


@contextlib.contextmanager
def committing_clean_sessions(app: Flask) -> Iterator[None]:
    """Within this block, a job that joined a session without writes is committed at once.

    On in-memory SQLite, jobs always join the session. With this block, tests on it behave as with a
    database file.
    """
    if app in _COMMITTING:
        yield
        return
    _COMMITTING.add(app)
    try:
        yield
    finally:
        _COMMITTING.discard(app)


def _save(state: AppState, new: Sequence[NewJobs]) -> list[Job]:
    """Insert jobs in a separate transaction, and announce them."""
    try:
        with _explaining_missing_tables():
            saved = state.store.save(new)
    except DBAPIError as error:
        what_to_do = advice(error)
        if what_to_do is None:
            raise
        raise _not_enqueued(error, what_to_do) from error
    announce(state, _new_among(saved))
    return saved


@contextlib.contextmanager
def _explaining_missing_tables() -> Iterator[None]:
    """Raise an error that says what to do when the tables are missing."""
    try:
        yield
    except DBAPIError as error:
        if not is_missing_table(error):
            raise
        raise _not_enqueued(error, MAKE_TABLES) from error


def _not_enqueued(error: DBAPIError, what_to_do: str) -> DatabaseUnusable:
    message = one_line(str(error.orig).partition("\n")[0])
    return DatabaseUnusable(f"the job was not enqueued: {message} ({what_to_do})")


def new_jobs(
    state: AppState,
    target: str,
    method: str | None,
    parameter_sets: Sequence[Parameters],
    options: JobOptions,
) -> NewJobs:
    """Check jobs, without inserting them.

    :raises BgJobsError: as :func:`enqueue` does.
    """
    registry, config = state.registry, state.config
    registry.check(target, method)
    chosen = options.over(registry.options(target))
    values = column_values(chosen, config)
    _checked(lambda: check_unique(chosen))
    _checked(lambda: check_limits(chosen))
    _checked(lambda: check_fair(chosen))
    limits = _checked(lambda: limits_of(config, chosen, target, method))
    delay_seconds, run_at = first_run(chosen)
    if values["unique_key"] is not None and len(parameter_sets) > 1:
        raise InvalidJob("unique_key is for one job; enqueue these one by one, each with its own")
    resolved = registry.resolve(target, method)
    waits = delay_seconds is not None or run_at is not None
    parameters_json = []
    for parameters in parameter_sets:
        parameters_json.append(_parameters_json(parameters, config.max_payload))
        _check_signature(resolved, parameters, target)
    each = _checked(lambda: _values_of_each(state, chosen, limits, resolved, parameter_sets))
    first = each[0] if each else PLAIN
    common = job_values(target, method, {**values, **first}, waits=waits)
    name = target if method is None else f"{target}.{method}"
    unique = _checked(lambda: unique_jobs(chosen, name, resolved, parameter_sets, state.redactor))
    if unique is not None and unique.debounce_seconds is not None:
        delay_seconds = unique.debounce_seconds
        common |= enqueued(waits=True)
    expires_seconds, common["deadline_at"] = first_deadline(chosen, delay_seconds, run_at)
    return NewJobs(
        common,
        parameters_json,
        unique=unique,
        delay_seconds=delay_seconds,
        run_at=run_at,
        expires_seconds=expires_seconds,
        each=each if len(each) > 1 else (),
    )


def _checked(check: Callable[[], T]) -> T:
    try:
        return check()
    except ValueError as error:
        raise InvalidJob(str(error)) from None


def _values_of_each(
    state: AppState,
    options: JobOptions,
    limits: Sequence[Limit],
    target: Target,
    parameter_sets: Sequence[Parameters],
) -> list[Mapping[str, Any]]:
    """The values of each job for its limits and turns; one entry for all if they do not depend on
    the parameters."""
    if not limits and not options.fair:
        return [PLAIN]
    has_keys = any(limit.key is not None for limit in limits) or bool(options.fair)
    sets = parameter_sets if has_keys else [()]
    return [
        {
            **limit_values(limits, target, each, state.redactor),
            "fair_key": fair_key(options, target, each, state.redactor),
        }
        for each in sets
    ]


def job_values(
    target: str, method: str | None, values: Mapping[str, Any], *, waits: bool
) -> dict[str, Any]:
    """The values of new jobs that do not depend on their parameters.

    :param values: the values of their options, from
        :func:`~flask_bgjobs.options.column_values`.
    :param waits: whether they have a due time in the future.
    """
    return {
        **values,
        "target": target,
        "method": method,
        "claim_rank": claim_rank(values["priority"]),
        **enqueued(
            waits=waits,
            has_limits=values.get("limit_key_id") is not None,
            takes_turns=values.get("fair_key") is not None,
        ),
    }


def _parameters_json(parameters: object, max_bytes: int) -> str:
    if not isinstance(parameters, list | tuple | dict):
        raise InvalidJob(
            "parameters must be a list (positional) or a dict (keyword), not "
            f"{type(parameters).__name__}"
        )
    value = list(parameters) if isinstance(parameters, tuple) else parameters
    try:
        return serialize.dumps(value, name="parameters", max_bytes=max_bytes)
    except serialize.NotSerializable as error:
        raise InvalidJob(str(error)) from None


def _check_signature(target: Target, parameters: Parameters, name: str) -> None:
    try:
        target.check(parameters)
    except TypeError as error:
        wanted = signature_text(target.signature)
        hint = hint_at_options(target.signature, parameters)
        raise InvalidJob(f"the parameters do not fit {name}{wanted}: {error}{hint}") from None


def hint_at_options(signature: inspect.Signature, given: Parameters) -> str:
    """The hint for an error message when an option was passed as a parameter of the function."""
    names = given if isinstance(given, Mapping) else ()
    for field in dataclasses.fields(JobOptions):
        if field.name in names and field.name not in signature.parameters:
            return f"; {field.name} is an option of the job: using({field.name}=…).enqueue(…)"
    return ""


def _session_to_join(state: AppState, choice: SessionChoice) -> Session | None:
    if isinstance(choice, scoped_session):
        choice = choice()
    if isinstance(choice, Session):
        if transactions.was_rolled_back(choice):
            raise InvalidJob(
                "the transaction of this session was rolled back, and the job would be lost with "
                "it: pass session=None, or no session, to save the job separately"
            )
        return choice
    if choice is not None and choice is not AUTO:
        raise InvalidJob(f"session must be a SQLAlchemy session or None, not {shown(choice)}")
    session: Session = state.db.session()
    bind = session.get_bind(clause=state.table)
    one_connection = isinstance(bind, sa.Connection) or isinstance(session.bind, sa.Connection)
    if one_connection or state.store.always_joins:
        return session
    if choice is AUTO and transactions.holds_writes(session, state.store.host_engine):
        return session
    if state.store.would_wait_for_the_host():
        raise InvalidJob(
            "session=None would wait for your own open transaction, because SQLite allows one "
            "writer at a time: commit db.session first, or let the job join it"
        )
    return None


def _new_among(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not job.deduplicated]


def announce(state: AppState, jobs: Sequence[Job]) -> None:
    """Send ``job_enqueued`` for jobs whose enqueue has committed, and tell this process."""
    emit_each(job_enqueued, state.app, ({"job": job} for job in jobs))
    for job, notify in itertools.product(jobs, list(state.enqueued)):
        try:
            notify(job)
        except Exception:
            _logger.exception("Job %s is enqueued, but a listener for new jobs raised", job.id)
