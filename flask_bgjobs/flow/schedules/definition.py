"""The definitions of recurring jobs in the code: ``BGJOBS_SCHEDULE``, and the ``cron`` or ``every``
of ``@bgjobs.job``."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import difflib
import importlib
import importlib.util
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ... import options
from ...enqueue.enqueue import PLAIN, job_values, new_jobs
from ...errors import BgJobsError, ConfigError, InvalidJob
from ...job import serialize
from ...job.text import shown
from ...models import Schedule
from ...options import NO_OPTIONS, RECURRENCE_OPTIONS, JobOptions
from ...registry import Target
from ...state import AppState
from ...store import NewJobs, Unique
from .recurrence import Recurrence, checked

_OWN_KEYS = ("job", "method", "parameters")
_RUN_AT = "a recurring job has no run_at: its cron or every says when it runs"


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """A recurring job: what it runs, and how it recurs."""

    name: str
    """The name of the schedule."""
    target: str
    method: str | None
    parameters: str
    """JSON of the parameters."""
    values: Mapping[str, Any]
    """The values for the options of each job, by attribute name of ``Job``."""
    recurrence: Recurrence
    delay_seconds: float | None = None
    expires_seconds: float | None = None
    unique: Mapping[str, Any] | None = None
    """The fields of :class:`~flask_bgjobs.store.Unique`; ``None`` if its jobs are not unique."""

    def to_json(self) -> str:
        """The definition as stored in the database."""
        stored = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        stored["recurrence"] = self.recurrence.values()
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Definition:
        """The definition from the database. What another version has added is left out."""
        stored = json.loads(text)
        recurrence = Recurrence(**_fields_of(Recurrence, stored["recurrence"]))
        return cls(**{**_fields_of(cls, stored), "recurrence": recurrence})

    @property
    def job_name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    def job(self, tick: dt.datetime, *, jitter: float = 0.0) -> NewJobs:
        """The job of a tick.

        :param tick: the tick, in UTC, without ``tzinfo``.
        :param jitter: maximum seconds by which to delay it at random.
        """
        delay = (self.delay_seconds or 0.0) + random.uniform(0.0, jitter)
        meta = {"schedule": self.name, "tick": tick.replace(tzinfo=dt.UTC)}
        values = job_values(self.target, self.method, self.values, waits=delay > 0)
        values["meta_json"] = serialize.dumps(meta, name="meta")
        unique = None if self.unique is None else Unique(**_fields_of(Unique, self.unique))
        if unique is not None and unique.debounce_seconds is not None:
            delay = unique.debounce_seconds
        return NewJobs(
            values,
            [self.parameters],
            unique=unique,
            delay_seconds=delay or None,
            expires_seconds=self.expires_seconds,
        )


def _fields_of(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a dataclass has."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def stored_definition(schedule: Schedule) -> Definition:
    """The definition in a row, without its override."""
    return Definition.from_json(schedule.definition)


def current_recurrence(schedule: Schedule, definition: Definition) -> Recurrence:
    """The recurrence of a schedule, with its override if there is one."""
    return definition.recurrence.overridden(override_of(schedule))


def override_of(schedule: Schedule) -> dict[str, Any]:
    """The overridden values of a schedule, by name; none if the row does not hold valid ones."""
    if schedule.override is None:
        return {}
    try:
        stored = json.loads(schedule.override)
        without_grace = {"grace": None} if stored.get("grace", 0) is None else {}
        return {**checked(stored), **without_grace}
    except Exception:
        # A person or another version may have written anything.
        return {}


def definitions(state: AppState) -> dict[str, Definition]:
    """All definitions in the code, by name of the schedule.

    The modules of the jobs in ``BGJOBS_SCHEDULE`` are imported. Functions decorated with
    ``@bgjobs.job`` are found if their modules are imported already.

    :raises ConfigError: names the schedule, and says what is wrong with it.
    """
    recurrences = _decorated(state)
    return {
        **{name: _configured(state, name) for name in state.config.schedule},
        **{name: _of_function(state, name, each) for name, each in recurrences.items()},
    }


def own_names(state: AppState) -> set[str]:
    """The names of all schedules in the code. No module is imported."""
    return {*state.config.schedule, *state.registry.recurrences()}


def own_definition(state: AppState, name: str) -> Definition:
    """The definition of one of :func:`own_names`. The module of its job is imported.

    :raises ConfigError: names the schedule, and says what is wrong with it.
    """
    if name in state.config.schedule:
        return _configured(state, name)
    return _of_function(state, name, state.registry.recurrences()[name])


def check_configured(state: AppState) -> None:
    """Check ``BGJOBS_SCHEDULE``. What depends on modules that cannot be imported now is left to the
    workers, which check everything when they start.

    :raises ConfigError: names the schedule, and says what is wrong with it.
    """
    _decorated(state)
    for name, entry in state.config.schedule.items():
        with _naming(f"BGJOBS_SCHEDULE[{name!r}]"):
            read = _read_entry(entry)
            options.column_values(read.options, state.config)
            if _can_be_resolved(state, read.target):
                _definition(state, name, read)


def decorated_recurrence(
    function: Callable[..., Any], name: str, given: Mapping[str, Any], chosen: JobOptions
) -> Mapping[str, Any] | None:
    """The checked values of the recurrence that was given to ``@bgjobs.job``.

    :param name: the name of the job.
    :param given: the options of the recurrence; empty if it does not recur.
    :param chosen: the options of its jobs.
    :returns: ``None`` if it does not recur.
    :raises ConfigError: when a value is not valid, or the function needs parameters.
    """
    if not given:
        return None
    try:
        recurrence = checked(given)
        if chosen.run_at is not None:
            raise ValueError(_RUN_AT)
        Target(function).check(())
    except ValueError as error:
        raise ConfigError(f"@bgjobs.job of {name}: {error}") from None
    except TypeError as error:
        raise ConfigError(
            f"@bgjobs.job of {name}: cron= and every= run it without parameters ({error}): give "
            "its parameters defaults, or name it in BGJOBS_SCHEDULE with 'parameters'"
        ) from None
    return recurrence


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A definition whose job has not been looked up yet."""

    target: str
    method: str | None
    parameters: Any
    recurrence: Mapping[str, Any]
    """The values that :func:`~flask_bgjobs.flow.schedules.recurrence.checked` returned."""
    options: JobOptions


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Name the place of a definition in the errors of this block."""
    try:
        yield
    except (BgJobsError, ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _configured(state: AppState, name: str) -> Definition:
    """The definition in ``BGJOBS_SCHEDULE``."""
    with _naming(f"BGJOBS_SCHEDULE[{name!r}]"):
        return _definition(state, name, _read_entry(state.config.schedule[name]))


def _of_function(state: AppState, name: str, recurrence: Mapping[str, Any]) -> Definition:
    """The definition of a decorated function."""
    with _naming(f"@bgjobs.job of {name}"):
        return _definition(state, name, _Entry(name, None, (), recurrence, NO_OPTIONS))


def _decorated(state: AppState) -> Mapping[str, Mapping[str, Any]]:
    """The recurrences of decorated functions, by name of the job."""
    found = state.registry.recurrences()
    for name in state.config.schedule:
        if name in found:
            raise ConfigError(
                f"two schedules are named {name!r}: one in BGJOBS_SCHEDULE, and that of the "
                "function decorated with @bgjobs.job. Rename the one in BGJOBS_SCHEDULE"
            )
    return found


def _read_entry(entry: Mapping[str, Any]) -> _Entry:
    known = (*_OWN_KEYS, *RECURRENCE_OPTIONS, *(f.name for f in dataclasses.fields(JobOptions)))
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
            raise ValueError(f"a schedule has no {shown(key)}; {hint}")
    target = entry.get("job")
    if not isinstance(target, str):
        raise ValueError(
            "'job' must be the dotted name of a class or function, such as 'shop.jobs.report', "
            f"not {shown(target)}"
        )
    recurrence = {name: entry[name] for name in RECURRENCE_OPTIONS if name in entry}
    if recurrence.get("cron") is None and recurrence.get("every") is None:
        raise ValueError("it needs 'cron', such as '0 3 * * *', or 'every', in seconds")
    given = {k: v for k, v in entry.items() if k not in (*_OWN_KEYS, *RECURRENCE_OPTIONS)}
    return _Entry(
        target,
        entry.get("method"),
        entry.get("parameters", ()),
        checked(recurrence),
        options.options_from(given),
    )


def _definition(state: AppState, name: str, entry: _Entry) -> Definition:
    """Look up the job of an entry, and check that its parameters and options are valid.

    :raises BgJobsError: when the job is not allowed, cannot be imported, or is invalid.
    """
    jobs = new_jobs(state, entry.target, entry.method, [entry.parameters], entry.options)
    if jobs.run_at is not None:
        raise InvalidJob(_RUN_AT)
    if jobs.values["deadline_at"] is not None:
        raise InvalidJob("expires of a recurring job is a time from each tick, in seconds")
    return Definition(
        name=name,
        target=entry.target,
        method=entry.method,
        parameters=jobs.parameters[0],
        values={key: jobs.values[key] for key in (*options.COLUMNS, *PLAIN)},
        delay_seconds=jobs.delay_seconds,
        expires_seconds=jobs.expires_seconds,
        unique=None if jobs.unique is None else dataclasses.asdict(jobs.unique),
        recurrence=Recurrence(**{"timezone": state.config.timezone, **entry.recurrence}),
    )


def _can_be_resolved(state: AppState, target: str) -> bool:
    """Whether the job of a schedule can be looked up now, or certainly never.

    The module of an allowed job is imported, unless the app itself is still being imported: its
    modules may then need what is not defined yet.
    """
    if not state.registry.is_allowed(target):
        return not _may_appear(target)
    module = target.rpartition(".")[0]
    if any(_is_being_imported(name) for name in _prefixes(module)):
        return False
    if state.registry.is_decorated(target):
        return True
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException:
        # A module may call `sys.exit()`. Only workers need to be able to import it.
        return False
    return True


def _may_appear(target: str) -> bool:
    """Whether a name may be that of a decorated function whose module is not imported yet."""
    module = target.rpartition(".")[0]
    if not module:
        # It was given as `name=` to a decorator.
        return True
    for prefix in _prefixes(module):
        if prefix not in sys.modules:
            # This imports nothing, because all packages around the module are imported.
            with contextlib.suppress(ImportError, ValueError, AttributeError):
                return importlib.util.find_spec(prefix) is not None
            return False
        if _is_being_imported(prefix):
            return True
    return False


def _prefixes(module: str) -> Iterator[str]:
    """The packages around a module, outermost first, and the module itself."""
    return itertools.accumulate(module.split("."), lambda outer, name: f"{outer}.{name}")


def _is_being_imported(module: str) -> bool:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
