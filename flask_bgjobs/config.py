"""The configuration: the ``BGJOBS_…`` keys of ``app.config`` as one frozen :class:`Config`.

They are read and checked once, in ``init_app``. An invalid value raises
:exc:`~flask_bgjobs.ConfigError`; an unknown key causes a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import keyword
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from .errors import ConfigError
from .job import durations
from .job.failure_rules import exception_names
from .job.limits import Limit
from .job.records import MAX_INTEGER
from .job.statuses import JobStatus
from .job.text import shown
from .job.turns import MAX_FAIR_KEY, check_weight
from .job.zones import read_zone

AllowedJobs = Mapping[str, frozenset[str] | None]
"""Allowed methods by dotted name of the class; ``None`` allows all public methods, and is the value
for a function."""


OUR_LAYOUT = "bgjobs/layout.html"
PoolName = Literal["thread", "process"]
"""The names of the pools, which :mod:`flask_bgjobs.execution.pools.kinds` implements."""
POOLS: tuple[PoolName, ...] = get_args(PoolName)

_QUEUE = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}")
_DAY = 86_400.0
_DEFAULT_THREADS = 10
_MOST_PAYLOAD_BYTES = 128 * 1024 * 1024
"""Limit of ``BGJOBS_MAX_PAYLOAD``: with a result and meta of this size, an outcome still fits into
one message from a child process."""
_DEFAULT_PRIORITIES = MappingProxyType({"high": 3, "medium": 2, "low": 0})
_DEFAULT_RETENTION = MappingProxyType(
    {
        JobStatus.COMPLETED: 7 * _DAY,
        JobStatus.FAILED: 30 * _DAY,
        JobStatus.CANCELLED: 7 * _DAY,
    }
)
DEFAULT_REDACT = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "api_key",
    "private_key",
    "access_key",
    "authorization",
    "cookie",
    "credential",
    "credit_card",
    "card_number",
    "cvv",
    "iban",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ConfiguredLimit:
    """An entry of ``BGJOBS_LIMITS``."""

    limit: Limit
    jobs: tuple[str, ...]
    """The dotted names of the jobs to which it applies, beside those that name it in ``limits=``:
    of a function, of a class, or of a class with a method."""


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """The checked configuration of one app. Durations are seconds, as ``float``."""

    allowed_jobs: AllowedJobs = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """``BGJOBS_ALLOWED_JOBS``: classes and functions that may run as jobs."""
    pool: str = "thread"
    """``BGJOBS_POOL``: where a worker runs jobs, ``thread`` or ``process``."""
    queue_pools: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """``BGJOBS_QUEUE_POOLS``: pools of queues that do not use ``BGJOBS_POOL``."""
    app: str | None = None
    """``BGJOBS_APP``: import name of the app for child processes, as for ``flask --app``."""
    concurrency: int | None = None
    """``BGJOBS_CONCURRENCY``: jobs that a worker runs at once; ``None`` for the default of the
    pool: 10 threads, or one process per CPU."""
    queues: tuple[str, ...] | None = None
    """``BGJOBS_QUEUES``: queues to serve, in strict order; ``None`` serves all, by priority."""
    priorities: Mapping[str, int] = dataclasses.field(default_factory=lambda: _DEFAULT_PRIORITIES)
    """``BGJOBS_PRIORITIES``: names of priorities, with their numbers; higher runs first."""
    imports: tuple[str, ...] = ()
    """``BGJOBS_IMPORTS``: modules that a worker imports when it starts."""
    unknown_jobs: str = "wait"
    """``BGJOBS_UNKNOWN_JOBS``: what a worker does with a job that its code does not have: ``wait``
    for a worker that has it, or ``fail``."""
    unknown_timeout: float = 86_400.0
    """``BGJOBS_UNKNOWN_TIMEOUT``: time for which such a job waits before it fails."""
    retries: int = 3
    """``BGJOBS_RETRIES``: number of retries after the first attempt."""
    retry_delay: tuple[float, ...] = (5.0,)
    """``BGJOBS_RETRY_DELAY``: time to wait before each retry."""
    retry_on: tuple[str, ...] | None = None
    """``BGJOBS_RETRY_ON``: names of the exceptions after which jobs are retried; ``None``: all."""
    fail_on: tuple[str, ...] | None = None
    """``BGJOBS_FAIL_ON``: names of the exceptions after which jobs fail without a retry."""
    timeout: float | None = None
    """``BGJOBS_TIMEOUT``: time limit of one attempt; ``None`` for no limit."""
    poll_interval: float = 1.0
    """``BGJOBS_POLL_INTERVAL``: the longest time until a worker finds a job without a wake-up."""
    heartbeat_interval: float = 10.0
    """``BGJOBS_HEARTBEAT_INTERVAL``: time between two heartbeats of a worker."""
    lease: float = 60.0
    """``BGJOBS_LEASE``: time for which a heartbeat may stay unchanged before the worker counts as
    dead."""
    shutdown_timeout: float = 25.0
    """``BGJOBS_SHUTDOWN_TIMEOUT``: time that running jobs have to finish after SIGTERM."""
    max_crashes: int = 3
    """``BGJOBS_MAX_CRASHES``: number of proved crashes after which a job fails as crashed."""
    max_payload: int = 1024 * 1024
    """``BGJOBS_MAX_PAYLOAD``: size limit, in bytes of JSON, of each of parameters, meta and
    result."""
    retention: Mapping[JobStatus, float | None] = dataclasses.field(
        default_factory=lambda: _DEFAULT_RETENTION
    )
    """``BGJOBS_RETENTION``: time for which finished jobs are kept, by status; ``None`` for no
    limit."""
    redact: tuple[str, ...] = DEFAULT_REDACT
    """``BGJOBS_REDACT``: words; values whose keys contain one of them are masked in the dashboard
    and in logs."""
    schedule: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=lambda: MappingProxyType({})
    )
    """``BGJOBS_SCHEDULE``: recurring jobs by the name of their schedule."""
    timezone: str = "UTC"
    """``BGJOBS_TIMEZONE``: time zone of cron expressions."""
    limits: Mapping[str, ConfiguredLimit] = dataclasses.field(
        default_factory=lambda: MappingProxyType({})
    )
    """``BGJOBS_LIMITS``: limits by name."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """``BGJOBS_WEIGHTS``: how many jobs a key of ``fair`` runs in each turn; 1 for all others."""
    dashboard: bool = True
    """``BGJOBS_DASHBOARD``: whether the dashboard is registered."""
    dashboard_url_prefix: str = "/jobs"
    """``BGJOBS_DASHBOARD_URL_PREFIX``: URL prefix of the dashboard."""
    dashboard_public: bool = False
    """``BGJOBS_DASHBOARD_PUBLIC``: whether everyone may view the dashboard, without making
    changes."""
    read_only: bool = False
    """``BGJOBS_READ_ONLY``: whether the dashboard refuses all changes, regardless of the user."""
    base_template: str = OUR_LAYOUT
    """``BGJOBS_BASE_TEMPLATE``: the template that the dashboard's pages extend."""
    sqlite_wal: bool = True
    """``BGJOBS_SQLITE_WAL``: whether the worker and ``init-db`` turn on SQLite's WAL mode."""
    bind_key: str | None = None
    """``BGJOBS_BIND_KEY``: the Flask-SQLAlchemy bind that holds the tables."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """The configuration from ``app.config``; missing keys have their default values.

        :raises ConfigError: names the key, its value and the allowed values.
        """
        given = {key: value for key, value in values.items() if key.startswith(_PREFIX)}
        _warn_of_table(values)
        _warn_unknown(given)
        _refuse_both_names(given)
        checked: dict[str, Any] = {}
        for key, value in given.items():
            if key in _KEYS:
                checked[_KEYS[key].field] = _KEYS[key].read(key, value)
        config = cls(**checked)
        if config.lease < 2 * config.heartbeat_interval:
            raise ConfigError(
                f"BGJOBS_LEASE is {config.lease:g} s; it must be at least twice "
                f"BGJOBS_HEARTBEAT_INTERVAL ({config.heartbeat_interval:g} s), otherwise a worker "
                "would lose its jobs after a single late heartbeat"
            )
        return config

    def concurrency_of(self, pool: str) -> int:
        """The number of jobs that a pool runs at once: ``BGJOBS_CONCURRENCY`` for the pool named
        by ``BGJOBS_POOL``, otherwise 10 threads or one process per CPU."""
        if self.concurrency is not None and pool == self.pool:
            return self.concurrency
        return _DEFAULT_THREADS if pool == "thread" else _usable_cpus()


def _usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_queue(value: object, name: str = "queue") -> str:
    """Return ``value`` if it is a valid queue name: up to 64 characters of a-z, 0-9, ``_``, ``-``
    and ``.``, starting with a letter or digit.

    :param name: how the error message refers to the value.
    :raises ValueError: when it is not.
    """
    if not isinstance(value, str) or not _QUEUE.fullmatch(value):
        raise ValueError(
            f"{name} must be 1 to 64 characters of a-z, 0-9, '_', '-' or '.', "
            f"starting with a letter or digit, not {shown(value)}"
        )
    return value


def is_dotted_name(value: object, *, parts: int = 2) -> bool:
    """Whether ``value`` is a string of at least ``parts`` identifiers joined by dots, and at most
    255 characters long."""
    if not isinstance(value, str) or len(value) > 255:
        return False
    names = value.split(".")
    return len(names) >= parts and all(
        name.isidentifier() and not keyword.iskeyword(name) for name in names
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Key:
    field: str
    check: Callable[[Any], Any]

    def read(self, key: str, value: object) -> Any:
        try:
            return self.check(value)
        except ValueError as error:
            raise ConfigError(f"{key} = {value!r}: {error}{self._hint(value)}") from None

    def _hint(self, value: object) -> str:
        """A suggestion for a string that was probably set in an environment variable."""
        if not isinstance(value, str):
            return ""
        for candidate in _likely_values(value):
            try:
                self.check(candidate)
            except ValueError:
                continue
            return (
                f". It is a string, perhaps from an environment variable: write {candidate!r} in "
                f"Python, or {json.dumps(candidate)} where app.config.from_prefixed_env() reads it"
            )
        return ""


def _likely_values(text: str) -> Iterator[Any]:
    """The values that a string may have been meant to express."""
    for json_text in (text, text.lower()):
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(json_text)
    yield [part.strip() for part in text.split(",")]


def _warn_of_table(values: Mapping[str, Any]) -> None:
    table = values.get(_PREFIX.rstrip("_"))
    if isinstance(table, Mapping):
        first = next(iter(table), "ALLOWED_JOBS")
        warnings.warn(
            "flask-bgjobs does not read the table BGJOBS of a configuration file: write its keys "
            f"at the top level, such as {_PREFIX}{str(first).upper()}",
            stacklevel=4,
        )


def _warn_unknown(given: Mapping[str, Any]) -> None:
    for key in given:
        if key in _KEYS or key.startswith(_COMMAND_PREFIXES):
            continue
        words = {known.removeprefix(_PREFIX): known for known in _KEYS}
        close = difflib.get_close_matches(key.removeprefix(_PREFIX), words, n=1)
        hint = f"; did you mean {words[close[0]]}?" if close else ""
        warnings.warn(f"flask-bgjobs has no setting {key}{hint}", stacklevel=4)


_PREFIX = "BGJOBS_"
_COMMANDS = (
    "WORKER",
    "ENQUEUE",
    "LIST",
    "SHOW",
    "RETRY",
    "CANCEL",
    "DELETE",
    "STATS",
    "QUEUES",
    "PAUSE",
    "RESUME",
    "WORKERS",
    "SCHEDULES",
    "LIMITS",
    "WEIGHTS",
    "PRUNE",
    "HEALTH",
    "INIT_DB",
    "CHECK",
)
_COMMAND_PREFIXES = tuple(f"BGJOBS_{command}_" for command in _COMMANDS)
"""Prefixes of keys for options of commands, such as ``BGJOBS_WORKER_QUEUES``. click reads them from
environment variables, which ``from_prefixed_env`` copies to ``app.config`` as well."""
_ALIAS = "BGJOBS_ALLOWED_CLASSES"


def _refuse_both_names(given: Mapping[str, Any]) -> None:
    if _ALIAS in given and "BGJOBS_ALLOWED_JOBS" in given:
        raise ConfigError(
            f"BGJOBS_ALLOWED_JOBS and {_ALIAS} are two names for the same list: keep one of them"
        )


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _integer(minimum: int, maximum: int = MAX_INTEGER) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"must be a whole number from {minimum:,} to {maximum:,}")
        return value

    return check


def _duration(minimum: float = 0.0, *, above: bool = False) -> Callable[[object], float]:
    return lambda value: durations.seconds(value, "it", minimum=minimum, above=above)


def _optional(check: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else check(value)


def _allowed_jobs(value: object) -> AllowedJobs:
    if isinstance(value, Mapping):
        return MappingProxyType({_job_name(name): _methods(m) for name, m in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return MappingProxyType({_job_name(name): None for name in value})
    raise ValueError("must be a list of dotted names, or a dict of dotted name to methods")


def _job_name(name: object) -> str:
    if not is_dotted_name(name):
        raise ValueError(
            f"{name!r} is not a dotted name like 'shop.jobs.SampleJob' (module.Class or "
            "module.function, no wildcard, no white space, 255 characters at most)"
        )
    return str(name)


def _methods(value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError("the methods of a class must be a list of names, or None for all")
    for method in value:
        if not isinstance(method, str) or not method.isidentifier() or method.startswith("_"):
            raise ValueError(f"{method!r} is not the name of a public method")
    return frozenset(value)


def _one_of(*choices: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}")
        return str(value)

    return check


_pool = _one_of(*POOLS)


def _queue_pools(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a dict of queue to pool, such as {'images': 'process'}")
    return MappingProxyType({check_queue(name, "a queue"): _pool(p) for name, p in value.items()})


def _queues(value: object) -> tuple[str, ...] | None:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError("must be a list of queue names, in the order to serve them, or None")
    checked = tuple(check_queue(n.strip() if isinstance(n, str) else n, "a queue") for n in names)
    if len(set(checked)) < len(checked):
        raise ValueError("must not contain a queue twice")
    return checked


def _priorities(value: object) -> Mapping[str, int]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError("must be a dict of name to number, such as {'high': 3}")
    check = _integer(-MAX_INTEGER)
    for name in value:
        if not isinstance(name, str) or not name.strip() or _is_integer(name):
            raise ValueError(f"{name!r} is not a valid name for a priority")
    return MappingProxyType({name: check(number) for name, number in value.items()})


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+\s*", text) is not None


def _imports(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(is_dotted_name(n, parts=1) for n in value):
        raise ValueError("must be a list of module names, such as ['shop.jobs']")
    return tuple(value)


def retry_delays(value: object) -> tuple[float, ...]:
    """The time before each retry in seconds, from a number, a ``timedelta`` or a list of them.

    :raises ValueError: when one of them is not a duration, or the list does not have 1 to 100
        items.
    """
    if not isinstance(value, list | tuple):
        return (durations.seconds(value, "retry_delay"),)
    if not 0 < len(value) <= 100:
        raise ValueError("retry_delay must be a duration or a list of 1 to 100 of them")
    return tuple(durations.seconds(item, "each retry_delay") for item in value)


def _retention(value: object) -> Mapping[JobStatus, float | None]:
    if value is None:
        return MappingProxyType(dict.fromkeys(_DEFAULT_RETENTION))
    if not isinstance(value, Mapping) or not set(value) <= set(_DEFAULT_RETENTION):
        raise ValueError("must be a dict with the keys 'completed', 'failed' and 'cancelled'")
    check = _optional(_duration())
    given = {JobStatus(status): check(keep) for status, keep in value.items()}
    return MappingProxyType({**_DEFAULT_RETENTION, **given})


def _redact(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set | frozenset) or not all(
        isinstance(item, str) and re.search(r"[^\W_]", item) for item in value
    ):
        raise ValueError("must be a list of words that the keys of secrets contain")
    return tuple(value)


def _url_prefix(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or value.rstrip("/") == "":
        raise ValueError("must be a path such as '/jobs'")
    return value.rstrip("/")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a non-empty string")
    return value


def _schedule(value: object) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(e, Mapping) for e in value.values()):
        raise ValueError(
            "must be a dict of name to dict, such as "
            "{'nightly': {'job': 'shop.jobs.report', 'cron': '0 3 * * *'}}"
        )
    for name in value:
        if not isinstance(name, str) or not 0 < len(name) <= 255 or not name.isprintable():
            raise ValueError(
                f"{shown(name)} is not a name of a schedule: use 1 to 255 printable characters"
            )
    return MappingProxyType({name: dict(entry) for name, entry in value.items()})


def _limits(value: object) -> Mapping[str, ConfiguredLimit]:
    if not isinstance(value, Mapping):
        raise ValueError(
            "must be a dict of name to dict, such as {'mailgun': {'rate': 100, 'per': 60}}"
        )
    return MappingProxyType({name: _limit(name, entry) for name, entry in value.items()})


def _weights(value: object) -> Mapping[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a dict of key to number, such as {'acme': 3}")
    for key in value:
        if not isinstance(key, str) or not 0 < len(key) <= MAX_FAIR_KEY:
            raise ValueError(
                f"{shown(key)} is not a key of fair: use a str of 1 to {MAX_FAIR_KEY} characters"
            )
    return MappingProxyType({key: check_weight(weight) for key, weight in value.items()})


def _limit(name: object, entry: object) -> ConfiguredLimit:
    if not isinstance(name, str):
        raise ValueError(f"{shown(name)} is not a name of a limit: use a str")
    jobs: object = (name,)
    try:
        if isinstance(entry, Limit):
            limit = dataclasses.replace(entry, name=name)
        elif isinstance(entry, Mapping):
            values = dict(entry)
            jobs = values.pop("jobs", jobs)
            known = [field.name for field in dataclasses.fields(Limit) if field.name != "name"]
            for key in values:
                if key not in known:
                    raise ValueError(
                        f"{name!r} has no {shown(key)}; its keys are {', '.join(known)}, jobs"
                    )
            limit = Limit(name, **values)
        else:
            raise ValueError(f"{name!r} must be a dict or a Limit, not {shown(entry)}")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if not isinstance(jobs, list | tuple) or not all(is_dotted_name(j, parts=1) for j in jobs):
        if jobs != (name,):
            raise ValueError(f"'jobs' of {name!r} must be a list of dotted names of jobs")
        jobs = ()
    return ConfiguredLimit(limit, tuple(jobs))


_KEYS = {
    "BGJOBS_ALLOWED_JOBS": _Key("allowed_jobs", _allowed_jobs),
    _ALIAS: _Key("allowed_jobs", _allowed_jobs),
    "BGJOBS_POOL": _Key("pool", _pool),
    "BGJOBS_QUEUE_POOLS": _Key("queue_pools", _queue_pools),
    "BGJOBS_APP": _Key("app", _optional(_text)),
    "BGJOBS_CONCURRENCY": _Key("concurrency", _optional(_integer(1, 10_000))),
    "BGJOBS_QUEUES": _Key("queues", _optional(_queues)),
    "BGJOBS_PRIORITIES": _Key("priorities", _priorities),
    "BGJOBS_IMPORTS": _Key("imports", _imports),
    "BGJOBS_UNKNOWN_JOBS": _Key("unknown_jobs", _one_of("wait", "fail")),
    "BGJOBS_UNKNOWN_TIMEOUT": _Key("unknown_timeout", _duration(above=True)),
    "BGJOBS_RETRIES": _Key("retries", _integer(0, 10_000)),
    "BGJOBS_RETRY_DELAY": _Key("retry_delay", retry_delays),
    "BGJOBS_RETRY_ON": _Key("retry_on", _optional(lambda v: exception_names(v, "it"))),
    "BGJOBS_FAIL_ON": _Key("fail_on", _optional(lambda v: exception_names(v, "it"))),
    "BGJOBS_TIMEOUT": _Key("timeout", _optional(_duration(above=True))),
    "BGJOBS_POLL_INTERVAL": _Key("poll_interval", _duration(0.01)),
    "BGJOBS_HEARTBEAT_INTERVAL": _Key("heartbeat_interval", _duration(0.05)),
    "BGJOBS_LEASE": _Key("lease", _duration(0.1)),
    "BGJOBS_SHUTDOWN_TIMEOUT": _Key("shutdown_timeout", _duration()),
    "BGJOBS_MAX_CRASHES": _Key("max_crashes", _integer(1)),
    "BGJOBS_MAX_PAYLOAD": _Key("max_payload", _integer(64, _MOST_PAYLOAD_BYTES)),
    "BGJOBS_RETENTION": _Key("retention", _retention),
    "BGJOBS_REDACT": _Key("redact", _redact),
    "BGJOBS_SCHEDULE": _Key("schedule", _schedule),
    "BGJOBS_LIMITS": _Key("limits", _limits),
    "BGJOBS_WEIGHTS": _Key("weights", _weights),
    "BGJOBS_TIMEZONE": _Key("timezone", lambda value: read_zone(value).key),
    "BGJOBS_DASHBOARD": _Key("dashboard", _boolean),
    "BGJOBS_DASHBOARD_URL_PREFIX": _Key("dashboard_url_prefix", _url_prefix),
    "BGJOBS_DASHBOARD_PUBLIC": _Key("dashboard_public", _boolean),
    "BGJOBS_READ_ONLY": _Key("read_only", _boolean),
    "BGJOBS_BASE_TEMPLATE": _Key("base_template", _text),
    "BGJOBS_SQLITE_WAL": _Key("sqlite_wal", _boolean),
    "BGJOBS_BIND_KEY": _Key("bind_key", _optional(_text)),
}
