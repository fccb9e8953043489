"""The allow-list, which alone turns the stored name of a job into a callable.

A name must equal an allowed name exactly. Before that is checked, nothing is imported or called,
and no attribute is looked up. Enqueue, the worker, the CLI and the dashboard's form all use
:class:`Registry`, so a name refused by one of them is refused by all.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .config import AllowedJobs, is_dotted_name
from .errors import ConfigError, InvalidJob, JobNotAllowed
from .job.text import shown
from .options import NO_OPTIONS, JobOptions

_FIRST_PARAMETERS = ("self", "cls")
"""Names of the first parameter that identify a method."""

_ANY_PARAMETERS = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


class MissingCode(InvalidJob):
    """The name is allowed, but the code of this process does not define it."""

    # Users see the name of the documented class, for example in `job.error_type`.
    __qualname__ = InvalidJob.__qualname__


@dataclasses.dataclass(frozen=True)
class Target:
    """The callable that a job's target and method refer to."""

    function: Callable[..., Any]
    """The function, or the unbound method of ``cls``."""
    cls: type | None = None
    """The class to instantiate, without arguments, for each attempt; ``None`` for a function."""

    def call(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function, or the method on a new instance of ``cls``."""
        if self.cls is None:
            return self.function(*args, **kwargs)
        return self.function(self.cls(), *args, **kwargs)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature that a job's parameters must fit, without ``self``. It accepts any
        parameters if Python knows none, as of some functions written in C."""
        return self._known_signature or _ANY_PARAMETERS

    @functools.cached_property
    def _known_signature(self) -> inspect.Signature | None:
        try:
            signature = inspect.signature(self.function)
        except Exception:
            # A function written in C may have none, and a `__signature__` may raise anything.
            return None
        if self.cls is None:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def check(self, parameters: Sequence[Any] | Mapping[str, Any]) -> None:
        """Check that it can be called with these parameters.

        :raises TypeError: says which parameter does not fit.
        """
        if isinstance(parameters, Mapping):
            self.signature.bind(**parameters)
        elif len(parameters) not in self._positional_counts:
            self.signature.bind(*parameters)

    @functools.cached_property
    def _positional_counts(self) -> range:
        """The numbers of positional parameters that fit. Comparing a number is much faster than
        binding the signature, which matters when thousands of jobs are enqueued."""
        each = self.signature.parameters.values()
        if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in each):
            return range(0)
        positional = [p for p in each if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        least = sum(p.default is p.empty for p in positional)
        has_rest = any(p.kind is p.VAR_POSITIONAL for p in each)
        return range(least, sys.maxsize if has_rest else len(positional) + 1)

    @functools.cached_property
    def positional_names(self) -> tuple[str, ...] | None:
        """The names of the positional parameters, ``*rest`` last; ``None`` when they are not
        known."""
        if self._known_signature is None:
            return None
        each = self._known_signature.parameters.values()
        names = [p.name for p in each if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return (*names, *(f"*{p.name}" for p in each if p.kind is p.VAR_POSITIONAL))

    @property
    def placeholder(self) -> Callable[..., Any]:
        """A placeholder with the names of the parameters, for masking secret values. It has none if
        they are not known, so that all values are masked."""

        def job(*args: Any, **kwargs: Any) -> None: ...

        named = self._known_signature or inspect.Signature()
        job.__signature__ = named  # type: ignore[attr-defined]  # read by inspect
        return job


@functools.lru_cache(maxsize=1_000)
def placeholder_for(names: tuple[str, ...]) -> Callable[..., Any]:
    """A placeholder like :attr:`Target.placeholder`, made from :attr:`Target.positional_names`."""

    def job(*args: Any, **kwargs: Any) -> None: ...

    parameter = inspect.Parameter
    job.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect
        [
            parameter(name[1:], parameter.VAR_POSITIONAL)
            if name.startswith("*")
            else parameter(name, parameter.POSITIONAL_ONLY)
            for name in names
        ]
    )
    return job


@dataclasses.dataclass(frozen=True)
class Decorated:
    """A function decorated with ``@bgjobs.job``, and the options given to the decorator."""

    function: Callable[..., Any]
    options: JobOptions
    recurrence: Mapping[str, Any] | None = None
    """The checked values of ``cron=`` or ``every=`` and what belongs to them; ``None`` if it does
    not recur."""
    module_spec: object = None
    """The ``__spec__`` of its module: a new object after each import or reload."""

    @functools.cached_property
    def target(self) -> Target:
        """The function as a :class:`Target`."""
        return Target(self.function)

    def is_same_definition(self, other: Decorated) -> bool:
        """Whether ``other`` is the result of running the same definition again, in an app factory
        that is called twice or in a module that is imported again."""
        if is_same_source(self.function, other.function):
            return True
        mine, theirs = ((f.__module__, f.__qualname__) for f in (self.function, other.function))
        return mine == theirs and self.module_spec is not other.module_spec


class Registry:
    """The allow-list of one app, and the callables that its names refer to.

    :param allowed: the value of ``BGJOBS_ALLOWED_JOBS``.
    :param decorated: functions decorated with ``@bgjobs.job``, by stored name. Functions may be
        added to it later.
    """

    def __init__(self, allowed: AllowedJobs, decorated: Mapping[str, Decorated]) -> None:
        self._allowed = allowed
        self._decorated = decorated
        self._resolved: dict[tuple[str, str | None], Target] = {}

    def __len__(self) -> int:
        return len(set(self._allowed) | set(self._decorated))

    def names(self) -> list[str]:
        """All allowed names, sorted."""
        return sorted(set(self._allowed) | set(self._decorated))

    def methods(self, name: str) -> list[str]:
        """The allowed methods of the class ``name``, sorted; empty for a function.

        :raises JobNotAllowed: when the name is not allowed.
        :raises InvalidJob: when the class cannot be imported.
        """
        self._check_name(name)
        if name in self._decorated:
            return []
        thing = _import(name)
        if not isinstance(thing, type):
            return []
        allowed = self._allowed[name]
        return sorted(
            method
            for method in dir(thing)
            if (allowed is None or method in allowed)
            and _is_public(method)
            and _find_method(thing, method) is not None
        )

    def options(self, name: str) -> JobOptions:
        """The options given to the decorator; no options for a name allowed by the
        configuration."""
        decorated = self._decorated.get(name)
        return NO_OPTIONS if decorated is None else decorated.options

    def is_allowed(self, name: str) -> bool:
        """Whether ``name`` is allowed, with any method."""
        return name in self._allowed or name in self._decorated

    def is_decorated(self, name: str) -> bool:
        """Whether ``name`` is that of a decorated function."""
        return name in self._decorated

    def recurrences(self) -> dict[str, Mapping[str, Any]]:
        """The recurrences of decorated functions, by name, for those that recur."""
        # Copied, because a module that another thread imports may add functions.
        each = dict(self._decorated).items()
        return {name: d.recurrence for name, d in each if d.recurrence is not None}

    def all_options(self) -> dict[str, JobOptions]:
        """The options given to decorators, by the name of the job."""
        # Copied, because a module that another thread imports may add functions.
        return {name: each.options for name, each in dict(self._decorated).items()}

    def queues(self) -> set[str]:
        """The queues given as ``queue=`` to decorators."""
        return {each.options.queue for each in self._decorated.values() if each.options.queue}

    def check(self, name: object, method: object = None) -> None:
        """Check a name and a method against the allow-list, without importing anything.

        :raises JobNotAllowed: when one of them is not allowed, or is not a string.
        """
        self._check_name(name)
        if method is None:
            return
        if not isinstance(method, str) or not _is_public(method):
            hint = (
                f"; did you mean parameters={shown(method)}?"
                if isinstance(method, list | tuple | dict)
                else "; a job needs a method whose name does not start with an underscore"
            )
            raise JobNotAllowed(f"{shown(method)} is not the name of a public method{hint}")
        methods = self._allowed.get(str(name))
        if methods is not None and method not in methods:
            raise JobNotAllowed(
                f"method {shown(method)} of {name} is not allowed: BGJOBS_ALLOWED_JOBS allows "
                f"{', '.join(sorted(methods)) or 'none'}"
            )

    def resolve(self, name: str, method: str | None = None) -> Target:
        """The callable for ``name`` and ``method``. They are checked first; then the module is
        imported, and the result is cached.

        :raises JobNotAllowed: when they are not allowed. Nothing has been imported.
        :raises InvalidJob: when they are allowed but do not exist, or cannot be imported.
        """
        self.check(name, method)
        if method is None and name in self._decorated:
            return self._decorated[name].target
        cached = self._resolved.get((name, method))
        if cached is not None:
            return cached
        target = self._find(name, method)
        self._resolved[name, method] = target
        return target

    def resolve_imported(self, name: str, method: str | None = None) -> Target | None:
        """The callable for ``name`` and ``method`` if its module is already imported, else
        ``None``. Nothing is imported.

        :raises JobNotAllowed: when they are not allowed.
        :raises InvalidJob: when the name is imported but not callable, or has no such method.
        """
        self.check(name, method)
        if (name, method) in self._resolved or name in self._decorated:
            return self.resolve(name, method)
        module, _, attribute = name.rpartition(".")
        # A module that is still being imported may not define it yet.
        thing = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
        return None if thing is None else _target_of(thing, name, method)

    def may_be_elsewhere(self, error: BaseException, name: str, method: str | None) -> bool:
        """Whether another release of the app may have the job that :meth:`resolve` has refused.

        ``False`` for a name that no release can have: one that is malformed or private, or the
        name of an attribute of an allowed job. Nothing is imported.

        :param error: the error of :meth:`resolve`.
        """
        if not isinstance(error, JobNotAllowed | MissingCode):
            return False
        if not is_dotted_name(name, parts=1) or (method is not None and not _is_public(method)):
            return False
        if not unicodedata.is_normalized("NFKC", name):
            # Python normalizes all names in source code.
            return False
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        return not any(part.startswith("_") for part in parts) and not any(
            map(self._is_name_of_code, prefixes)
        )

    def has(self, name: str, method: str | None) -> bool:
        """Whether a worker with this code would not let the job wait for another release.

        ``True`` also for an allowed name whose module is not imported in this process. Nothing is
        imported.
        """
        try:
            self.resolve_imported(name, method)
        except (JobNotAllowed, InvalidJob) as error:
            return not self.may_be_elsewhere(error, name, method)
        return True

    def why_unknown(self, name: str, method: str | None) -> str:
        """The likely reason why this process does not have a job, and what to do."""
        elsewhere = "the release that has it is not deployed here"
        if self.is_allowed(name):
            thing = name if method is None else f"{name}.{method}"
            return f"this worker's code has no {thing}, or does not allow it: {elsewhere}"
        module = name.rpartition(".")[0]
        if module and module not in sys.modules:
            return (
                f"this worker has not imported {module}: import it in the app factory or name it "
                f"in BGJOBS_IMPORTS, or {elsewhere}"
            )
        return (
            "this worker has no job function of this name: name it in BGJOBS_ALLOWED_JOBS, or "
            f"{elsewhere}"
        )

    def _is_name_of_code(self, name: str) -> bool:
        """Whether ``name`` is allowed, and is the place of a class or function in the code. A name
        given to a decorator with ``name=`` may be anything."""
        decorated = self._decorated.get(name)
        if decorated is None:
            return name in self._allowed
        function = decorated.function
        return name == f"{function.__module__}.{function.__qualname__}"

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str):
            hint = ": call its own enqueue(…)" if hasattr(name, "job_name") else ""
            raise JobNotAllowed(
                "a job is identified by its dotted name, such as 'shop.jobs.SampleJob', not "
                f"{shown(name)}{hint}"
            )
        if self.is_allowed(name):
            return
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise JobNotAllowed(
            f"{shown(name)} is not allowed to run as a job: it is not in BGJOBS_ALLOWED_JOBS, "
            "and no function decorated with @bgjobs.job has this name."
            f"{hint or _import_hint(name)}"
        )

    def _find(self, name: str, method: str | None) -> Target:
        if name in self._decorated:
            thing: Any = self._decorated[name].function
        else:
            thing = _import(name)
        return _target_of(thing, name, method)


def is_same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions were made by running the same definition twice."""
    # Unwrapped first, because all functions wrapped by one decorator share the wrapper's code.
    try:
        codes = [getattr(inspect.unwrap(each), "__code__", None) for each in (one, other)]
    except ValueError:
        # `__wrapped__` refers to the function itself.
        return False
    return codes[0] is not None and codes[0] is codes[1]


def decorated(
    function: Callable[..., Any], options: JobOptions, recurrence: Mapping[str, Any] | None
) -> Decorated:
    """The record of a function that ``@bgjobs.job`` decorates."""
    module = sys.modules.get(function.__module__)
    # A reload keeps the module object and replaces its `__spec__`.
    return Decorated(function, options, recurrence, getattr(module, "__spec__", None))


def stored_name(function: Callable[..., Any], name: str | None) -> str:
    """The name under which the jobs of a decorated function are stored.

    :param name: the ``name=`` of the decorator.
    :raises ConfigError: when the function needs a ``name=`` and has none, or the name is malformed.
    """
    if name is not None:
        if not is_dotted_name(name, parts=1):
            raise ConfigError(
                f"name={shown(name)} must be identifiers joined by dots, 255 characters at most"
            )
        return name
    qualified = function.__qualname__
    if function.__module__ == "__main__":
        raise ConfigError(
            f"a worker cannot find {qualified} by its name, because this program was started as a "
            "script: set a name with @bgjobs.job(name='…'), or start the app with "
            "`flask --app … run`"
        )
    if "." in qualified or not qualified.isidentifier():
        raise ConfigError(
            f"a worker cannot find {function.__module__}.{qualified} by this name: set a name "
            "with @bgjobs.job(name='…')"
        )
    return f"{function.__module__}.{qualified}"


def require_job_function(thing: object, name: str | None) -> None:
    """Check that ``@bgjobs.job`` can make a job of the decorated object.

    :param name: the ``name=`` of the decorator. With a name, static methods and bound methods
        are allowed.
    :raises ConfigError: says what to write instead.
    """
    if isinstance(thing, str):
        raise ConfigError(f"write @bgjobs.job(name={shown(thing)})")
    if isinstance(thing, type):
        dotted = f"{thing.__module__}.{thing.__qualname__}"
        raise ConfigError(
            f"{dotted} is a class: decorate a function, or allow the class with "
            f"BGJOBS_ALLOWED_JOBS = ['{dotted}'] and name the method when you enqueue"
        )
    if _needs_class(thing) or (name is None and _is_in_class(thing)):
        raise ConfigError(
            f"{getattr(thing, '__qualname__', thing)} is a method: decorate a function, or allow "
            "its class in BGJOBS_ALLOWED_JOBS and name the method when you enqueue"
        )
    # Decorators such as functools.cache return an object that is not a function, and keep the
    # function in `__wrapped__`.
    bare = inspect.unwrap(thing) if callable(thing) else None
    if not inspect.isroutine(bare) or hasattr(thing, "job_name"):
        raise ConfigError(
            f"@bgjobs.job needs a function, not {shown(thing)}: write one with `def` that calls it"
        )
    # Checked without unwrapping: another decorator may iterate over the generator that it wraps.
    if inspect.isgeneratorfunction(thing) or inspect.isasyncgenfunction(thing):
        raise ConfigError(
            f"{bare.__qualname__} is a generator, and a job does not iterate over it: return a "
            "list instead"
        )


def _needs_class(thing: object) -> bool:
    """Whether it is a method that needs an instance or a class as its first argument."""
    if isinstance(thing, classmethod):
        return True
    if not (inspect.isfunction(thing) and _is_in_class(thing)):
        return False
    return next(iter(inspect.signature(thing).parameters), "") in _FIRST_PARAMETERS


def _is_in_class(thing: object) -> bool:
    if inspect.ismethod(thing) or isinstance(thing, staticmethod):
        return True
    # The qualified name is `Class.name` for a method, `outer.<locals>.name` for a nested function.
    outer, _, _ = getattr(thing, "__qualname__", "").rpartition(".")
    return inspect.isfunction(thing) and bool(outer) and not outer.endswith("<locals>")


def source_location(function: Callable[..., Any]) -> str:
    """The place where a function is defined, as ``file:line``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else shown(function)


def _import_hint(name: str) -> str:
    """A hint for a name that may be allowed in other processes of the app but not in this one."""
    module = name.rpartition(".")[0]
    if not module or not is_dotted_name(name):
        return ""
    if module not in sys.modules:
        return (
            f" This process has not imported {module}: import it where the app is built, or name "
            "it in BGJOBS_IMPORTS."
        )
    return f" {module} has no such job function: does this process run older code?"


def _is_public(method: str) -> bool:
    # `type` itself has one public method, `mro`, which every class answers to.
    return method.isidentifier() and not method.startswith("_") and not hasattr(type, method)


def _import(name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A module may call `sys.exit()` when it is imported; that must not end the process.
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        raise (MissingCode if is_missing else InvalidJob)(
            f"{name} is allowed, but its module cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        return vars(module)[attribute]
    except KeyError:
        raise MissingCode(f"{name} is allowed, but {module_name} defines no {attribute}") from None


def _target_of(thing: Any, name: str, method: str | None) -> Target:
    if isinstance(thing, type):
        return _method_of(thing, name, method)
    if method is not None:
        raise InvalidJob(
            f"{name} is a function and has no method {shown(method)}: leave method out"
        )
    if not callable(thing):
        raise InvalidJob(f"{name} is neither a class nor a function, but {type(thing).__name__}")
    return Target(thing)


def _method_of(cls: type, name: str, method: str | None) -> Target:
    if method is None:
        raise InvalidJob(f"{name} is a class: name the method to call, such as 'execute'")
    found = _find_method(cls, method)
    if found is None:
        is_missing = not any(method in vars(base) for base in cls.__mro__)
        raise (MissingCode if is_missing else InvalidJob)(f"{name} has no method {shown(method)}")
    if isinstance(found, staticmethod | classmethod):
        return Target(found.__get__(None, cls))
    return Target(found, cls)


def _find_method(cls: type, method: str) -> Any:
    """The method of a class; ``None`` if there is none, if it is not a function, or if it is
    inherited from a built-in class."""
    for base in cls.__mro__:
        if method in vars(base):
            found = vars(base)[method]
            is_method = inspect.isfunction(found) or isinstance(found, staticmethod | classmethod)
            return found if is_method and base.__module__ != "builtins" else None
    return None
