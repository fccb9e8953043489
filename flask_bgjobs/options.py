"""The options of a job: checked, and completed from the configuration."""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from .config import Config, check_queue, retry_delays
from .errors import InvalidJob
from .job import durations
from .job.failure_rules import exception_names, rules_json
from .job.limits import Limit
from .job.records import MAX_INTEGER
from .job.retry import BACKOFFS, MAX_DELAY_SECONDS
from .job.text import shown, storable

ExceptionClass = type[Exception] | str
ExceptionClasses = ExceptionClass | Sequence[ExceptionClass]
Limits = Limit | str | Sequence[Limit | str]
Fair = Literal[False] | str | Callable[..., str]
MAX_TAGS = 20
MAX_KEY = 255
"""Maximum length of a unique key."""
_MAX_RETRIES = 10_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The options of a job. ``None`` stands for the value given to the decorator or, without one,
    for the default. Durations are seconds or ``timedelta``."""

    retries: int | None = None
    """Number of retries after the first attempt, 0 to 10,000; default ``BGJOBS_RETRIES``."""
    priority: int | str | None = None
    """A number or a name from ``BGJOBS_PRIORITIES``; higher runs first; default 0."""
    delay: durations.Duration | None = None
    """Time to wait before the first attempt; default none."""
    retry_delay: durations.Duration | Sequence[durations.Duration] | None = None
    """Time to wait before each retry: one value for all retries, or a list with one value per
    retry, whose last value applies to all later ones; default ``BGJOBS_RETRY_DELAY``."""
    run_at: dt.datetime | None = None
    """Time of the first attempt, a datetime with a time zone; an alternative to ``delay``."""
    backoff: str | None = None
    """Growth of a single retry delay: ``fixed`` (default), ``linear`` or ``exponential``."""
    max_retry_delay: durations.Duration | None = None
    """Upper limit of the time before a retry; default none."""
    jitter: float | None = None
    """Share of a retry delay, 0 to 1, by which it is randomly lengthened or shortened; default
    0."""
    queue: str | None = None
    """Name of the queue, in lower case; default ``default``."""
    timeout: durations.Duration | None = None
    """Time limit of one attempt; default ``BGJOBS_TIMEOUT``."""
    unique_key: str | None = None
    """A key for at most one unfinished job: while a job with this key is not finished, an enqueue
    inserts nothing and returns that job."""
    unique: bool | str | Callable[..., str] | None = None
    """An alternative to ``unique_key``, whose key consists of the job's name and its parameters:
    all of them (``True``), those in a format such as ``"{order_id}"``, or the text that a function
    of the parameters returns; ``False``: not unique."""
    unique_until: str | None = None
    """When a job gives its key up: ``finished`` (default), or ``started``, when a worker claims
    it."""
    unique_for: durations.Duration | None = None
    """Minimum time from the enqueue for which the key stays taken, also after the end of its job;
    default none."""
    on_duplicate: str | None = None
    """What an enqueue does if the key is taken: ``keep`` that job (default), ``replace`` its
    parameters and options if it has not started, or ``raise``
    :exc:`~flask_bgjobs.UniqueKeyTaken`."""
    debounce: durations.Duration | None = None
    """Time to wait after the last of several enqueues, of which only the last one runs; without
    ``unique`` or ``unique_key``, all jobs of the function count as the same."""
    debounce_max: durations.Duration | None = None
    """Maximum time from the first of several debounced enqueues to the job; default none."""
    throttle: durations.Duration | None = None
    """Time in which at most one job becomes due: the first at once, the newest of the others at its
    end; without ``unique`` or ``unique_key``, all jobs of the function count as the same."""
    retry_on: ExceptionClasses | None = None
    """Exceptions after which the job is retried, as classes or dotted names; it fails without a
    retry after all others. Subclasses count. Default ``BGJOBS_RETRY_ON``."""
    fail_on: ExceptionClasses | None = None
    """Exceptions after which the job fails without a retry; default ``BGJOBS_FAIL_ON``."""
    expires: durations.Duration | dt.datetime | None = None
    """Time from the enqueue, or a datetime with a time zone, after which the job is cancelled if it
    has not started; default none."""
    retention: durations.Duration | None = None
    """Time for which the job is kept after its end, whatever its status; default
    ``BGJOBS_RETENTION``."""
    limits: Limits | None = None
    """How many jobs may run at once or start per time: a :class:`~flask_bgjobs.Limit`, the name of
    one in ``BGJOBS_LIMITS``, or a list of them; an empty list: none. Default none. Limits that
    ``BGJOBS_LIMITS`` gives to the job by its name always apply."""
    fair: Fair | None = None
    """The key by which jobs take turns within their queue and priority, such as the tenant: a
    format such as ``"{tenant_id}"``, or a function of the parameters; ``False``: they take no
    turns. Default none."""
    tags: Sequence[str] | None = None
    """Up to 20 words by which the job can be found."""
    owner: str | None = None
    """Identifier of the owner, such as a user id of the app, by which the job can be found."""

    def over(self, base: JobOptions) -> JobOptions:
        """These options, with those that are ``None`` taken from ``base``."""
        chosen = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        if self.run_at is not None or self.delay is not None:
            base = dataclasses.replace(base, run_at=None, delay=None)
        return dataclasses.replace(base, **chosen)


NO_OPTIONS = JobOptions()
_OTHER_NAMES = {
    "after": "delay",
    "at": "run_at",
    "countdown": "delay",
    "default_retry_delay": "retry_delay",
    "enqueue_at": "run_at",
    "dont_autoretry_for": "fail_on",
    "autoretry_for": "retry_on",
    "eta": "run_at",
    "expire": "expires",
    "job_timeout": "timeout",
    "lock": "unique_key",
    "max_attempts": "retries",
    "max_retries": "retries",
    "queue_name": "queue",
    "queueing_lock": "unique_key",
    "retry": "retries",
    "result_ttl": "retention",
    "retry_backoff": "backoff",
    "throws": "fail_on",
    "schedule_at": "run_at",
    "soft_time_limit": "timeout",
    "time_limit": "timeout",
    "wait": "delay",
}
"""Names that other job queues use for the same options."""


def options_from(given: Mapping[str, Any]) -> JobOptions:
    """The options given as keyword arguments.

    :raises TypeError: when an option does not exist; suggests the name that was probably meant.
    """
    names = [field.name for field in dataclasses.fields(JobOptions)]
    for name in given:
        if name not in names and name in RECURRENCE_OPTIONS:
            raise TypeError(
                f"{name}= is for @bgjobs.job and BGJOBS_SCHEDULE: it is an option of a schedule, "
                "not of one job"
            )
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            meant = _OTHER_NAMES.get(name) or next(iter(close), None)
            hint = f"did you mean {meant}=?" if meant else f"the options are {', '.join(names)}"
            raise TypeError(f"a job has no option {name}=; {hint}")
    return JobOptions(**given)


class OptionValues(TypedDict, total=False):
    """The fields of :class:`JobOptions` as keyword arguments, for type checkers."""

    retries: int | None
    priority: int | str | None
    delay: durations.Duration | None
    retry_delay: durations.Duration | Sequence[durations.Duration] | None
    run_at: dt.datetime | None
    backoff: str | None
    max_retry_delay: durations.Duration | None
    jitter: float | None
    queue: str | None
    timeout: durations.Duration | None
    unique_key: str | None
    unique: bool | str | Callable[..., str] | None
    unique_until: str | None
    unique_for: durations.Duration | None
    on_duplicate: str | None
    debounce: durations.Duration | None
    debounce_max: durations.Duration | None
    throttle: durations.Duration | None
    retry_on: ExceptionClasses | None
    fail_on: ExceptionClasses | None
    expires: durations.Duration | dt.datetime | None
    retention: durations.Duration | None
    limits: Limits | None
    fair: Fair | None
    tags: Sequence[str] | None
    owner: str | None


class RecurrenceValues(TypedDict, total=False):
    """The options that make a job recur, as keyword arguments."""

    cron: str | None
    """A cron expression, such as ``0 3 * * *``."""
    every: durations.Duration | None
    """An interval; an alternative to ``cron``."""
    timezone: str | None
    """The time zone of ``cron``; default ``BGJOBS_TIMEZONE``."""
    missed: str | None
    """What runs for ticks that no worker ran in time: ``once`` (default), ``skip`` or ``all``."""
    grace: durations.Duration | None
    """Time after which a late tick is skipped; default none."""
    overlap: str | None
    """What happens at a tick while the last job is not finished: ``skip`` (default), ``queue`` or
    ``allow``."""
    jitter: durations.Duration | None
    """Longest time by which each job is delayed at random; default none."""


RECURRENCE_OPTIONS: tuple[str, ...] = tuple(RecurrenceValues.__annotations__)


def split_recurrence(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options given to ``@bgjobs.job``: those of each job, and those of the recurrence.

    :returns: two dicts. The second is empty if there is no ``cron`` or ``every``.
    :raises TypeError: when another option of a recurrence is given without them.
    """
    if given.get("cron") is not None or given.get("every") is not None:
        recurrence = {name: given[name] for name in RECURRENCE_OPTIONS if name in given}
        return {k: v for k, v in given.items() if k not in recurrence}, recurrence
    for name in RECURRENCE_OPTIONS:
        # An option `jitter` exists for retries as well.
        if name != "jitter" and given.get(name) is not None:
            raise TypeError(f"{name}= needs cron= or every=")
    return {k: v for k, v in given.items() if k not in RECURRENCE_OPTIONS or k == "jitter"}, {}


class DecoratorValues(OptionValues, total=False):
    """The options of ``@bgjobs.job``, for type checkers. With ``cron`` or ``every``, ``jitter`` is
    that of :class:`RecurrenceValues`."""

    cron: str | None
    every: durations.Duration | None
    timezone: str | None
    missed: str | None
    grace: durations.Duration | None
    overlap: str | None


def column_values(options: JobOptions, config: Config) -> dict[str, Any]:
    """The column values for ``options``, by attribute name of ``Job``.

    :raises InvalidJob: names the option, its value and the allowed values.
    """
    return {name: _checked(read, options, config) for name, read in COLUMNS.items()}


def first_run(options: JobOptions) -> tuple[float | None, dt.datetime | None]:
    """The delay of the first attempt in seconds, and its absolute UTC time. At most one of them is
    set; if both are ``None``, the job is due at once.

    :raises InvalidJob: when both are given, or one of them is not a valid time.
    """
    if options.delay is not None and options.run_at is not None:
        raise InvalidJob("give either delay or run_at, not both")
    if options.run_at is not None:
        return None, _utc(options.run_at)
    if options.delay is None:
        return None, None
    try:
        return durations.seconds(options.delay, "delay") or None, None
    except ValueError as error:
        raise InvalidJob(str(error)) from None


def first_deadline(
    options: JobOptions, delay_seconds: float | None, run_at: dt.datetime | None
) -> tuple[float | None, dt.datetime | None]:
    """When the job expires: seconds after the enqueue, or an absolute UTC time. At most one of them
    is set.

    :param delay_seconds: with ``run_at``, the result of :func:`first_run`.
    :raises InvalidJob: when it is not valid, or the job would expire before it is due.
    """
    if options.expires is None:
        return None, None
    if isinstance(options.expires, dt.datetime):
        expires_at = _utc(options.expires, "expires")
        if run_at is not None and expires_at <= run_at:
            raise InvalidJob("expires must be later than run_at, or the job would never run")
        return None, expires_at
    try:
        seconds = durations.seconds(options.expires, "expires", above=True)
    except ValueError as error:
        raise InvalidJob(str(error)) from None
    if delay_seconds is not None and seconds <= delay_seconds:
        raise InvalidJob("expires must be longer than delay, or the job would never run")
    return seconds, None


def priority_number(value: int | str, priorities: Mapping[str, int]) -> int:
    """The number of a priority that is given as a number or a name.

    :raises ValueError: when the value has another type, is an unknown name, or does not fit into
        32 bits.
    """
    if isinstance(value, str):
        if value not in priorities:
            raise ValueError(
                f"priority {shown(value)} is unknown; use one of the names in BGJOBS_PRIORITIES "
                f"({', '.join(priorities)}) or a whole number"
            )
        return priorities[value]
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INTEGER:
        raise ValueError(
            f"priority must be a whole number from -{MAX_INTEGER:,} to {MAX_INTEGER:,} or a "
            f"name, not {shown(value)}"
        )
    return value


def _checked(read: Callable[[JobOptions, Config], Any], options: JobOptions, config: Config) -> Any:
    try:
        return read(options, config)
    except ValueError as error:
        raise InvalidJob(str(error)) from None


def _utc(value: object, name: str = "run_at") -> dt.datetime:
    if not isinstance(value, dt.datetime) or value.tzinfo is None or value.utcoffset() is None:
        raise InvalidJob(
            f"{name} must be a datetime with a time zone, such as "
            f"datetime.now(UTC) + timedelta(hours=1), not {shown(value)}"
        )
    try:
        utc = value.astimezone(dt.UTC)
        ahead = (utc - dt.datetime.now(dt.UTC)).total_seconds()
    except OverflowError:
        ahead = MAX_DELAY_SECONDS * 2
    if abs(ahead) > MAX_DELAY_SECONDS:
        raise InvalidJob(f"{name} must be within a hundred years of now, not {value.isoformat()}")
    return utc.replace(tzinfo=None)


def _priority(options: JobOptions, config: Config) -> int:
    if options.priority is None:
        return 0
    return priority_number(options.priority, config.priorities)


def _retries(options: JobOptions, config: Config) -> int:
    value = options.retries
    if value is None:
        return config.retries
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_RETRIES:
        raise ValueError(
            f"retries must be a whole number from 0 to {_MAX_RETRIES:,}, not {shown(value)}"
        )
    return value


def _retry_delay(options: JobOptions, config: Config) -> str:
    given = options.retry_delay
    return json.dumps(config.retry_delay if given is None else retry_delays(given))


def _backoff(options: JobOptions, config: Config) -> str:
    value = "fixed" if options.backoff is None else options.backoff
    if value not in BACKOFFS:
        raise ValueError(f"backoff must be one of {', '.join(BACKOFFS)}, not {shown(value)}")
    return value


def _max_retry_delay(options: JobOptions, config: Config) -> float | None:
    value = options.max_retry_delay
    return None if value is None else durations.seconds(value, "max_retry_delay")


def _jitter(options: JobOptions, config: Config) -> float:
    value = 0.0 if options.jitter is None else options.jitter
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"jitter must be a number from 0 to 1, not {shown(value)}")
    return float(value)


def _timeout(options: JobOptions, config: Config) -> float | None:
    value = options.timeout
    return config.timeout if value is None else durations.seconds(value, "timeout", above=True)


def _failure_rules(options: JobOptions, config: Config) -> str | None:
    retry_on, fail_on = options.retry_on, options.fail_on
    return rules_json(
        config.retry_on if retry_on is None else exception_names(retry_on, "retry_on"),
        config.fail_on if fail_on is None else exception_names(fail_on, "fail_on"),
    )


def _retention(options: JobOptions, config: Config) -> float | None:
    value = options.retention
    return None if value is None else durations.seconds(value, "retention")


def _queue(options: JobOptions, config: Config) -> str:
    return "default" if options.queue is None else check_queue(options.queue)


def _tags(options: JobOptions, config: Config) -> str | None:
    if options.tags is None:
        return None
    if not isinstance(options.tags, list | tuple | set | frozenset) or len(options.tags) > MAX_TAGS:
        raise ValueError(
            f"tags must be a list of at most {MAX_TAGS} words, not {shown(options.tags)}"
        )
    tags = [_text(tag, "a tag", 64) for tag in options.tags]
    return json.dumps(tags) if tags else None


def _owner(options: JobOptions, config: Config) -> str | None:
    return None if options.owner is None else _text(options.owner, "owner", 255)


def _unique_key(options: JobOptions, config: Config) -> str | None:
    return None if options.unique_key is None else _text(options.unique_key, "unique_key", MAX_KEY)


def _text(value: object, name: str, max_length: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= max_length or value != storable(value):
        raise ValueError(
            f"{name} must be a str of 1 to {max_length} characters without NUL or lone surrogates, "
            f"not {shown(value)}"
        )
    return value


COLUMNS: Mapping[str, Callable[[JobOptions, Config], Any]] = {
    "priority": _priority,
    "retries": _retries,
    "retry_delay": _retry_delay,
    "backoff": _backoff,
    "max_retry_delay": _max_retry_delay,
    "jitter": _jitter,
    "timeout": _timeout,
    "failure_rules": _failure_rules,
    "retention_seconds": _retention,
    "queue": _queue,
    "tags_json": _tags,
    "owner": _owner,
    "unique_key": _unique_key,
}
"""The check of each option that is stored in a column, by attribute name of ``Job``."""
