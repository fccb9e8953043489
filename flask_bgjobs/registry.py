"""The allow-list: the only way from a stored name to something that can be called.

A name is compared as it stands with the names allowed; nothing is imported, walked or
called before it was found there. What is refused here is refused everywhere: enqueue, the
worker, the CLI and the form all ask this class.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .config import AllowedJobs, is_dotted_name
from .errors import ConfigError, InvalidJob, JobNotAllowed
from .job.text import shown
from .options import NO_OPTIONS, JobOptions

_OWNERS = ("self", "cls")
"""Names of the first parameter of methods that are called on an instance or a class."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a name stands for, ready to be called."""

    function: Callable[..., Any]
    """The function, or the unbound method of ``cls``."""
    cls: type | None = None
    """The class that is instantiated, without arguments, for each attempt."""

    def call(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run it: of a class, on a new instance."""
        if self.cls is None:
            return self.function(*args, **kwargs)
        return self.function(self.cls(), *args, **kwargs)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The parameters that a job gives, so without ``self``."""
        signature = inspect.signature(self.function)
        if self.cls is None:
            return signature
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def check(self, parameters: Sequence[Any] | Mapping[str, Any]) -> None:
        """Make sure that it can be called with these.

        :raises TypeError: says what does not fit.
        """
        if isinstance(parameters, Mapping):
            self.signature.bind(**parameters)
        elif len(parameters) not in self._positional_counts:
            self.signature.bind(*parameters)

    @functools.cached_property
    def _positional_counts(self) -> range:
        """How many positional parameters are certain to fit: binding thousands takes its time."""
        each = self.signature.parameters.values()
        if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in each):
            return range(0)
        positional = [p for p in each if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        least = sum(p.default is p.empty for p in positional)
        has_rest = any(p.kind is p.VAR_POSITIONAL for p in each)
        return range(least, sys.maxsize if has_rest else len(positional) + 1)

    @functools.cached_property
    def positional_names(self) -> tuple[str, ...] | None:
        """The names of positional parameters, ``*rest`` last; ``None`` when they are not known."""
        try:
            each = self.signature.parameters.values()
        except Exception:
            # Such as a function written in C, or one that says anything about itself.
            return None
        names = [p.name for p in each if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return (*names, *(f"*{p.name}" for p in each if p.kind is p.VAR_POSITIONAL))

    @property
    def named(self) -> Callable[..., Any]:
        """Something with the signature of the job's parameters, for looking up their names."""

        def job(*args: Any, **kwargs: Any) -> None: ...

        job.__signature__ = self.signature  # type: ignore[attr-defined]  # read by inspect
        return job


@functools.lru_cache(maxsize=1_000)
def named_after(names: tuple[str, ...]) -> Callable[..., Any]:
    """Something with such a signature, as :attr:`Target.named`, from ``positional_names``."""

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
    """A function that ``@bgjobs.job`` allowed, with the options given there."""

    function: Callable[..., Any]
    options: JobOptions
    import_of_module: object = None
    """What tells one import of its module from the next, as after a reload."""

    @functools.cached_property
    def target(self) -> Target:
        """The function, ready to be called."""
        return Target(self.function)

    def is_same_definition(self, other: Decorated) -> bool:
        """Whether ``other`` comes from the same lines of source, run once more.

        So it is in a factory that is called again, and in a module that is imported again.
        """
        if is_same_source(self.function, other.function):
            return True
        mine, theirs = ((f.__module__, f.__qualname__) for f in (self.function, other.function))
        return mine == theirs and self.import_of_module is not other.import_of_module


class Registry:
    """The names that one app allows, and what they stand for.

    :param allowed: from ``BGJOBS_ALLOWED_JOBS``.
    :param decorated: functions decorated with ``@bgjobs.job``, by stored name; may grow later.
    """

    def __init__(self, allowed: AllowedJobs, decorated: Mapping[str, Decorated]) -> None:
        self._allowed = allowed
        self._decorated = decorated
        self._resolved: dict[tuple[str, str | None], Target] = {}

    def __len__(self) -> int:
        return len(set(self._allowed) | set(self._decorated))

    def names(self) -> list[str]:
        """All names allowed, sorted."""
        return sorted(set(self._allowed) | set(self._decorated))

    def methods(self, name: str) -> list[str]:
        """The methods that may be called of the class ``name``; empty for a function.

        :raises JobNotAllowed: when the name is not allowed.
        :raises InvalidJob: when it cannot be imported.
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
        """The options that the decorator gave; none for a job allowed by the configuration."""
        decorated = self._decorated.get(name)
        return NO_OPTIONS if decorated is None else decorated.options

    def queues(self) -> set[str]:
        """The queues that decorators name."""
        return {each.options.queue for each in self._decorated.values() if each.options.queue}

    def check(self, name: object, method: object = None) -> None:
        """Refuse what the allow-list does not hold, without importing anything.

        :raises JobNotAllowed: when name or method are not allowed, or are no names at all.
        """
        self._check_name(name)
        if method is None:
            return
        if not isinstance(method, str) or not _is_public(method):
            hint = (
                f"; did you mean parameters={shown(method)}?"
                if isinstance(method, list | tuple | dict)
                else "; jobs are run by methods whose name does not start with an underscore"
            )
            raise JobNotAllowed(f"{shown(method)} is not the name of a public method{hint}")
        methods = self._allowed.get(str(name))
        if methods is not None and method not in methods:
            raise JobNotAllowed(
                f"method {shown(method)} of {name} is not allowed: BGJOBS_ALLOWED_JOBS allows "
                f"{', '.join(sorted(methods)) or 'none'}"
            )

    def resolve(self, name: str, method: str | None = None) -> Target:
        """What ``name`` and ``method`` stand for. Checked, then imported once and kept.

        :raises JobNotAllowed: when they are not allowed; nothing was imported.
        :raises InvalidJob: when they are allowed but do not exist or cannot be imported.
        """
        self.check(name, method)
        if method is None and name in self._decorated:
            return self._decorated[name].target
        known = self._resolved.get((name, method))
        if known is not None:
            return known
        target = self._find(name, method)
        self._resolved[name, method] = target
        return target

    def known(self, name: str, method: str | None = None) -> Target | None:
        """What ``name`` and ``method`` stand for, as far as that is known; nothing is imported.

        :raises JobNotAllowed: when they are not allowed.
        :raises InvalidJob: when they do not exist.
        """
        self.check(name, method)
        if (name, method) in self._resolved or name in self._decorated:
            return self.resolve(name, method)
        module, _, attribute = name.rpartition(".")
        # One that is just being imported may not have it yet.
        thing = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
        return None if thing is None else _target_of(thing, name, method)

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str):
            hint = ": call its own enqueue(…)" if hasattr(name, "job_name") else ""
            raise JobNotAllowed(
                "a job is named by its dotted name, such as 'shop.jobs.SampleJob', not "
                f"{shown(name)}{hint}"
            )
        if name in self._allowed or name in self._decorated:
            return
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise JobNotAllowed(
            f"{shown(name)} is not allowed to run as a job: BGJOBS_ALLOWED_JOBS does not hold it "
            f"and no function decorated with @bgjobs.job has that name.{hint or _cause(name)}"
        )

    def _find(self, name: str, method: str | None) -> Target:
        if name in self._decorated:
            thing: Any = self._decorated[name].function
        else:
            thing = _import(name)
        return _target_of(thing, name, method)


def is_same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions come from the same lines of source, run twice."""
    # All that one decorator wraps have the code of its wrapper.
    try:
        codes = [getattr(inspect.unwrap(each), "__code__", None) for each in (one, other)]
    except ValueError:
        # One that is said to wrap itself.
        return False
    return codes[0] is not None and codes[0] is codes[1]


def decorated(function: Callable[..., Any], options: JobOptions) -> Decorated:
    """``function`` as ``@bgjobs.job`` keeps it."""
    module = sys.modules.get(function.__module__)
    # A reload gives the same module another one.
    return Decorated(function, options, getattr(module, "__spec__", None))


def stored_name(function: Callable[..., Any], name: str | None) -> str:
    """The name under which a decorated function is stored.

    :raises ConfigError: when the function needs a ``name=`` and has none, or it is malformed.
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
            f"{qualified} has no name by which a worker could find it, because this program was "
            "started as a script: give it one with @bgjobs.job(name='…'), or start the app with "
            "`flask --app … run`"
        )
    if "." in qualified or not qualified.isidentifier():
        raise ConfigError(
            f"{function.__module__}.{qualified} cannot be found again by that name in a worker: "
            "give it one with @bgjobs.job(name='…')"
        )
    return f"{function.__module__}.{qualified}"


def require_job_function(thing: object, name: str | None) -> None:
    """Refuse what ``@bgjobs.job`` cannot make a job.

    :param name: the name given to the decorator; a worker can find even a method by it.
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
    # A decorator such as functools.cache makes an object of a function, and names the function.
    bare = inspect.unwrap(thing) if callable(thing) else None
    if not inspect.isroutine(bare) or hasattr(thing, "job_name"):
        raise ConfigError(
            f"@bgjobs.job needs a function, not {shown(thing)}: write one with `def` that calls it"
        )
    # Another decorator may run the generator that it wraps.
    if inspect.isgeneratorfunction(thing) or inspect.isasyncgenfunction(thing):
        raise ConfigError(
            f"{bare.__qualname__} is a generator, and nobody would run it to its end: return a "
            "list instead"
        )


def _needs_class(thing: object) -> bool:
    """Whether it is a function of a class that cannot be called without an instance or class."""
    if isinstance(thing, classmethod):
        return True
    if not (inspect.isfunction(thing) and _is_in_class(thing)):
        return False
    return next(iter(inspect.signature(thing).parameters), "") in _OWNERS


def _is_in_class(thing: object) -> bool:
    if inspect.ismethod(thing) or isinstance(thing, staticmethod):
        return True
    # Of a function in a class, the class stands before its name; of a nested one, `<locals>`.
    outer, _, _ = getattr(thing, "__qualname__", "").rpartition(".")
    return inspect.isfunction(thing) and bool(outer) and not outer.endswith("<locals>")


def where(function: Callable[..., Any]) -> str:
    """Where the source of a function stands, as ``file:line``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else shown(function)


def _cause(name: str) -> str:
    """Why a name that is allowed elsewhere may not be allowed in this process."""
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
    # `mro` is the one public name that a class answers to without defining it.
    return method.isidentifier() and not method.startswith("_") and not hasattr(type, method)


def _import(name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A module may raise anything, `sys.exit()` included: that is no end of the process.
        raise InvalidJob(
            f"{name} is allowed, but its module cannot be imported: {type(error).__name__}: {error}"
        ) from error
    try:
        return vars(module)[attribute]
    except KeyError:
        raise InvalidJob(f"{name} is allowed, but {module_name} defines no {attribute}") from None


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
        raise InvalidJob(f"{name} has no method {shown(method)}")
    if isinstance(found, staticmethod | classmethod):
        return Target(found.__get__(None, cls))
    return Target(found, cls)


def _find_method(cls: type, method: str) -> Any:
    """The function called ``method``, unless a built-in class or a mere attribute provides it."""
    for base in cls.__mro__:
        if method in vars(base):
            found = vars(base)[method]
            is_method = inspect.isfunction(found) or isinstance(found, staticmethod | classmethod)
            return found if is_method and base.__module__ != "builtins" else None
    return None
