"""The allow-list: the only way from a stored name to something that can be called."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flask_bgjobs import BgJobs, ConfigError, InvalidJob, JobNotAllowed
from flask_bgjobs.config import Config
from flask_bgjobs.options import NO_OPTIONS, JobOptions
from flask_bgjobs.registry import Decorated, Registry, stored_name

MakeModule = Callable[[str], str]
WasImported = Callable[[str], bool]

SOURCE = """
    import functools
    import json

    limit = 5
    created = []

    def send(order_id, *, copy=False):
        return "sent", order_id, copy

    def _hidden():
        raise AssertionError("never called")

    class Callback:
        def __call__(self):
            raise AssertionError("never called")

    class Base:
        def inherited(self):
            return "inherited", type(self).__name__

    class Job(Base):
        limit = 5
        callback = Callback()
        wrapped = functools.partial(print)
        builtin = len

        class Meta:
            pass

        def __init__(self):
            created.append(self)

        def execute(self, message="Hello"):
            return "executed", message, type(self).__name__

        @staticmethod
        def still(value):
            return "static", value

        @classmethod
        def of_class(cls, value):
            return "class", cls.__name__, value

        @property
        def secret(self):
            raise AssertionError("never read")

        def _private(self):
            raise AssertionError("never called")

        def __call__(self):
            raise AssertionError("never called")

    class Mapping(dict):
        def execute(self):
            return "mapping"

    class Problem(Exception):
        def execute(self):
            return "problem"

    class Kind(type):
        def made_by_metaclass(cls):
            raise AssertionError("never called")

    class Made(metaclass=Kind):
        def execute(self):
            return "made"

    Other = Job
    loads = json.loads
"""


def registry(*names: str, **decorated: Decorated) -> Registry:
    return Registry(
        Config.from_mapping({"BGJOBS_ALLOWED_JOBS": list(names)}).allowed_jobs, decorated
    )


def restricted(**methods: Any) -> Registry:
    names = {name.replace("__", "."): value for name, value in methods.items()}
    return Registry(Config.from_mapping({"BGJOBS_ALLOWED_JOBS": names}).allowed_jobs, {})


@pytest.fixture
def module(make_module: MakeModule) -> str:
    return make_module(SOURCE)


NOT_ALLOWED = [
    "{module}",
    "{module}.Jo",
    "{module}.Jobs",
    "{module}.job",
    "{module}.JOB",
    "{module}.Job.execute",
    "{module}.Job.__init__",
    "{module}.Job.still.__globals__",
    "{module}:Job",
    "{module}.Job:execute",
    "{module}.Job()",
    "{module}/Job",
    "{module}\\Job",
    "{module}.*",
    "*",
    " {module}.Job",
    "{module}.Job ",
    "{module}.Job\n",
    "{module}.Job\0",
    "\ufeff{module}.Job",
    "{module}\u200b.Job",
    "{module}..Job",
    ".{module}.Job",
    "{module}.Job.",
    "{module}.J\u043eb",
    "{module}.\uff2aob",
    "{module}\u2024Job",
    "{module}.Base",
    "{module}.Other",
    "{module}.send",
    "{module}._hidden",
    "{module}.limit",
    "{module}.loads",
    "{module}.__builtins__",
    "builtins.eval",
    "os.system",
    "subprocess.Popen",
    "flask_bgjobs.registry.Registry",
    "",
    ".",
]


@pytest.mark.parametrize("pattern", NOT_ALLOWED)
def test_exact_names(pattern: str, module: str, was_imported: WasImported) -> None:
    """Only the exact name is allowed; anything else is refused before any import."""
    allowed = registry(f"{module}.Job")
    name = pattern.replace("{module}", module)
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed):
            refuse(name, "execute")
    with pytest.raises(JobNotAllowed):
        allowed.methods(name)
    assert not was_imported(module)


@pytest.mark.parametrize("name", [None, 5, True, 1.5, b"os.system", ["a.b"], {"a": 1}, object, ()])
def test_names_that_are_no_text(name: Any) -> None:
    """A name that is no ``str`` is refused, and the message shows what a name looks like."""
    allowed = registry("a.b")
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed, match=r"such as 'shop\.jobs\.SampleJob'"):
            refuse(name, None)


def test_imported_only_when_allowed(module: str, was_imported: WasImported) -> None:
    """``check`` never imports, not even what is allowed; ``resolve`` imports what it returns."""
    allowed = registry(f"{module}.Job")
    allowed.check(f"{module}.Job", "execute")
    assert not was_imported(module)
    assert module not in sys.modules
    allowed.resolve(f"{module}.Job", "execute")
    assert was_imported(module)


def test_message_suggests(module: str) -> None:
    """A refusal names the key to change, and the allowed name that is close."""
    with pytest.raises(JobNotAllowed) as refusal:
        registry(f"{module}.Job", "zzz.other").check(f"{module}.Jobb")
    assert "BGJOBS_ALLOWED_JOBS" in str(refusal.value)
    assert f"Did you mean '{module}.Job'?" in str(refusal.value)
    with pytest.raises(JobNotAllowed) as refusal:
        registry("zzz.other").check("os.system")
    assert "Did you mean" not in str(refusal.value)


METHODS_NOT_ALLOWED = [
    "_private",
    "__init__",
    "__call__",
    "__class__",
    "__subclasses__",
    "__reduce__",
    "mro",
    "",
    " execute",
    "execute ",
    "execute\n",
    "execute()",
    "execute.__func__",
    "execute:",
    "*",
    5,
    True,
    b"execute",
    ["execute"],
    {"execute": 1},
]


@pytest.mark.parametrize("method", METHODS_NOT_ALLOWED, ids=repr)
def test_method_names(method: Any, module: str, was_imported: WasImported) -> None:
    """What is not the name of a public method is refused before any import."""
    allowed = registry(f"{module}.Job")
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed, match="public method"):
            refuse(f"{module}.Job", method)
    assert not was_imported(module)


@pytest.mark.parametrize(
    ("cls", "method", "given", "result"),
    [
        ("Job", "execute", [], ("executed", "Hello", "Job")),
        ("Job", "execute", ["Hi"], ("executed", "Hi", "Job")),
        ("Job", "inherited", [], ("inherited", "Job")),
        ("Job", "still", [1], ("static", 1)),
        ("Job", "of_class", [2], ("class", "Job", 2)),
        ("Mapping", "execute", [], "mapping"),
        ("Problem", "execute", [], "problem"),
        ("Made", "execute", [], "made"),
    ],
)
def test_methods_that_work(
    cls: str, method: str, given: list[Any], result: Any, module: str
) -> None:
    """Methods of the class and its own bases can be run, static and class methods as well."""
    target = registry(f"{module}.{cls}").resolve(f"{module}.{cls}", method)
    assert target.call(given, {}) == result


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        ("Job", "missing"),
        ("Job", "Execute"),
        ("Job", "\u0435xecute"),
        ("Job", "\uff45xecute"),
        ("Job", "limit"),
        ("Job", "secret"),
        ("Job", "Meta"),
        ("Job", "callback"),
        ("Job", "wrapped"),
        ("Job", "builtin"),
        ("Mapping", "update"),
        ("Mapping", "pop"),
        ("Mapping", "clear"),
        ("Mapping", "fromkeys"),
        ("Problem", "with_traceback"),
        ("Problem", "add_note"),
        ("Problem", "args"),
        ("Made", "made_by_metaclass"),
    ],
)
def test_attributes_that_are_no_methods(cls: str, method: str, module: str) -> None:
    """Attributes, properties, classes in a class and built-in or metaclass methods are refused."""
    with pytest.raises(InvalidJob, match="has no method"):
        registry(f"{module}.{cls}").resolve(f"{module}.{cls}", method)


def test_list_of_methods(module: str) -> None:
    """The methods listed for a class are exactly those that can be run."""
    allowed = registry(f"{module}.Job", f"{module}.Mapping", f"{module}.send")
    assert allowed.methods(f"{module}.Job") == ["execute", "inherited", "of_class", "still"]
    assert allowed.methods(f"{module}.Mapping") == ["execute"]
    assert allowed.methods(f"{module}.send") == []
    for method in allowed.methods(f"{module}.Job"):
        allowed.resolve(f"{module}.Job", method)


def test_new_instance_per_call(module: str) -> None:
    """A class is instantiated anew for each attempt, and not for static or class methods."""
    allowed = registry(f"{module}.Job")
    target = allowed.resolve(f"{module}.Job", "execute")
    created = sys.modules[module].created
    assert created == []
    target.call([], {})
    target.call([], {})
    assert len({id(job) for job in created}) == 2
    allowed.resolve(f"{module}.Job", "still").call([1], {})
    allowed.resolve(f"{module}.Job", "of_class").call([1], {})
    assert len(created) == 2


def test_signature(module: str) -> None:
    """The signature of a job is that of its parameters, without ``self`` or ``cls``."""
    allowed = registry(f"{module}.Job", f"{module}.send")
    signatures = {
        method: str(allowed.resolve(f"{module}.Job", method).signature)
        for method in ("execute", "still", "of_class")
    }
    assert signatures == {
        "execute": "(message='Hello')",
        "still": "(value)",
        "of_class": "(value)",
    }
    assert str(allowed.resolve(f"{module}.send").signature) == "(order_id, *, copy=False)"


def test_function(module: str) -> None:
    """A function is called by its name alone; a method of it is refused."""
    allowed = registry(f"{module}.send")
    assert allowed.resolve(f"{module}.send").call([7], {"copy": True}) == ("sent", 7, True)
    with pytest.raises(InvalidJob, match="is a function and has no method 'execute'"):
        allowed.resolve(f"{module}.send", "execute")


def test_class_needs_a_method(module: str) -> None:
    """A class without a method is refused with the advice to name one."""
    with pytest.raises(InvalidJob, match="name the method to call"):
        registry(f"{module}.Job").resolve(f"{module}.Job")


def test_neither_class_nor_function(module: str) -> None:
    """An allowed name that stands for something that cannot be called is refused."""
    with pytest.raises(InvalidJob, match="neither a class nor a function, but int"):
        registry(f"{module}.limit").resolve(f"{module}.limit")


def test_restricted_methods(module: str, was_imported: WasImported) -> None:
    """A dict restricts the methods of a class, and says which are allowed; again no import."""
    allowed = restricted(**{f"{module}__Job": ["execute"]})
    with pytest.raises(JobNotAllowed, match="allows execute"):
        allowed.check(f"{module}.Job", "inherited")
    for method in ("inherited", "still", "Execute", "\u0435xecute", "missing"):
        with pytest.raises(JobNotAllowed):
            allowed.resolve(f"{module}.Job", method)
    assert not was_imported(module)
    assert allowed.resolve(f"{module}.Job", "execute").call([], {})[0] == "executed"
    assert allowed.methods(f"{module}.Job") == ["execute"]


def test_restricted_to_none(module: str) -> None:
    """An empty list of methods allows none."""
    allowed = restricted(**{f"{module}__Job": []})
    with pytest.raises(JobNotAllowed, match="allows none"):
        allowed.resolve(f"{module}.Job", "execute")
    assert allowed.methods(f"{module}.Job") == []


def test_name_of_a_re_export(module: str, make_module: MakeModule) -> None:
    """A class is allowed under the very name that is listed, and under no other."""
    front = make_module(f"from {module} import Job as Front, send")
    only_home = registry(f"{module}.Job")
    for name in (f"{front}.Front", f"{front}.Job", f"{module}.Other"):
        with pytest.raises(JobNotAllowed):
            only_home.resolve(name, "execute")
    only_front = registry(f"{front}.Front")
    assert only_front.resolve(f"{front}.Front", "execute").call([], {})[0] == "executed"
    with pytest.raises(JobNotAllowed):
        only_front.resolve(f"{module}.Job", "execute")


def test_missing(module: str) -> None:
    """An allowed name that its module does not define is refused with both names."""
    with pytest.raises(InvalidJob, match=f"{module}.Gone is allowed, but {module} defines no Gone"):
        registry(f"{module}.Gone").resolve(f"{module}.Gone", "execute")


def test_module_without_the_name_is_not_asked(make_module: MakeModule) -> None:
    """A module's ``__getattr__`` cannot make up a job."""
    module = make_module("def __getattr__(name): return print")
    with pytest.raises(InvalidJob, match="defines no made_up"):
        registry(f"{module}.made_up").resolve(f"{module}.made_up")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import unit_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise ValueError('no database')", "ValueError: no database"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd"),
    ],
)
def test_import_error(source: str, reason: str, make_module: MakeModule) -> None:
    """An allowed module that cannot be imported is ``InvalidJob`` with the reason."""
    module = make_module(source)
    try:
        registry(f"{module}.job").resolve(f"{module}.job")
    except BaseException as error:
        raised: BaseException = error
    assert isinstance(raised, InvalidJob)
    assert f"{module}.job is allowed, but its module cannot be imported: {reason}" in str(raised)


def test_module_that_is_not_there() -> None:
    """An allowed name in a module that does not exist is ``InvalidJob``."""
    name = "unit_module_missing.job"
    with pytest.raises(InvalidJob, match="cannot be imported: ModuleNotFoundError"):
        registry(name).resolve(name)


def test_failed_import_is_tried_again(make_module: MakeModule) -> None:
    """What could not be imported is not remembered as refused."""
    module = make_module("import builtins\nif not builtins.unit_ready: raise ValueError\njob = len")
    allowed = registry(f"{module}.job")
    import builtins

    builtins.unit_ready = False  # type: ignore[attr-defined]
    try:
        with pytest.raises(InvalidJob):
            allowed.resolve(f"{module}.job")
        builtins.unit_ready = True  # type: ignore[attr-defined]
        assert allowed.resolve(f"{module}.job").call([[1, 2]], {}) == 2
    finally:
        del builtins.unit_ready  # type: ignore[attr-defined]


def decorated_function(order_id: int) -> int:
    return order_id


def test_decorated_names() -> None:
    """A decorated function is allowed by its stored name, without an import, with its options."""
    options = JobOptions(retries=7)
    allowed = registry("a.b", mail=Decorated(decorated_function, options))
    assert allowed.resolve("mail").call([5], {}) == 5
    assert allowed.options("mail") is options
    assert allowed.options("a.b") is NO_OPTIONS
    assert allowed.methods("mail") == []
    assert allowed.names() == ["a.b", "mail"]
    assert len(allowed) == 2
    for name in ("mai", "mail.x", "Mail", f"{__name__}.decorated_function"):
        with pytest.raises(JobNotAllowed):
            allowed.resolve(name)


def test_decorated_later() -> None:
    """A function decorated after ``init_app`` is allowed from then on."""
    decorated: dict[str, Decorated] = {}
    allowed = Registry({}, decorated)
    with pytest.raises(JobNotAllowed):
        allowed.check("mail")
    decorated["mail"] = Decorated(decorated_function, NO_OPTIONS)
    allowed.check("mail")


def test_empty_list() -> None:
    """Without an allow-list nothing at all may run."""
    allowed = registry()
    assert allowed.names() == []
    with pytest.raises(JobNotAllowed):
        allowed.check("shop.jobs.SampleJob", "execute")


def test_stored_name() -> None:
    """A function is stored under its dotted name, or the one that it was given."""
    assert stored_name(decorated_function, None) == f"{__name__}.decorated_function"
    assert stored_name(decorated_function, "mail") == "mail"
    assert stored_name(decorated_function, "shop.mail") == "shop.mail"
    assert stored_name(lambda: None, "shop.mail") == "shop.mail"


class Methods:
    def method(self) -> None: ...


def in_main() -> None: ...


in_main.__module__ = "__main__"


@pytest.mark.parametrize("function", [lambda: None, Methods.method, in_main])
def test_functions_that_need_a_name(function: Callable[..., Any]) -> None:
    """A lambda, a method and a function in ``__main__`` cannot be found again by their name."""
    with pytest.raises(ConfigError, match=r"set a name with @bgjobs\.job\(name="):
        stored_name(function, None)


def test_nested_function_needs_a_name() -> None:
    """A function inside another function needs a name, and works with one."""
    bgjobs = BgJobs()

    def nested() -> None: ...

    with pytest.raises(ConfigError, match=r"cannot find .*<locals>\.nested by this name"):
        bgjobs.job(nested)
    assert bgjobs.job(name="unit.nested")(nested).job_name == "unit.nested"


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", "a b", "a-b", "1a", "a\n", "a:b", "class", "x" * 256, 5],
    ids=lambda name: repr(name)[:20],
)
def test_bad_stored_name(name: Any) -> None:
    """A given name is made of identifiers joined by dots, 255 characters at most."""
    with pytest.raises(ConfigError, match="identifiers joined by dots"):
        stored_name(decorated_function, name)


def test_name_taken() -> None:
    """Two functions cannot have one name: a worker could not tell them apart."""
    bgjobs = BgJobs()
    bgjobs.job(name="mail")(decorated_function)
    taken = r"another job function is already named 'mail': \S+test_registry.py:\d+; give one"
    with pytest.raises(ConfigError, match=taken):
        bgjobs.job(name="mail")(in_main)


def test_a_factory_may_be_called_twice() -> None:
    """The function of the newest call runs: the app of the first one is gone in most tests."""
    bgjobs = BgJobs()
    registry = Registry({}, bgjobs._decorated)

    def create_app(number: int) -> None:
        @bgjobs.job(name="shop.number")
        def tell_number() -> int:
            return number

    for number in (1, 2):
        create_app(number)
        assert registry.resolve("shop.number").call((), {}) == number


def test_functions_that_one_decorator_wraps_are_not_the_same() -> None:
    """They share the wrapper's code, but not their own."""

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    bgjobs = BgJobs()
    bgjobs.job(name="mail")(logged(decorated_function))
    with pytest.raises(ConfigError, match="already named 'mail'"):
        bgjobs.job(name="mail")(logged(in_main))
    bgjobs.job(name="mail")(logged(decorated_function))


@pytest.mark.parametrize("how", ["reload", "import again"])
def test_a_module_may_be_imported_twice(
    how: str, make_module: Callable[[str], str], tmp_path: Path
) -> None:
    """After a reload the function has other lines; another function of that name is refused all
    the same."""
    holder = make_module("from flask_bgjobs import BgJobs\nbgjobs = BgJobs()")
    name = make_module(f"from {holder} import bgjobs\n@bgjobs.job\ndef price(): return 1")
    module = importlib.import_module(name)
    registry = Registry({}, module.bgjobs._decorated)
    assert registry.resolve(f"{name}.price").call((), {}) == 1
    source = tmp_path / f"{name}.py"
    source.write_text("# one line more\n" + source.read_text().replace("return 1", "return 22"))
    importlib.invalidate_caches()
    if how == "reload":
        importlib.reload(module)
    else:
        sys.modules.pop(name)
        importlib.import_module(name)
    assert registry.resolve(f"{name}.price").call((), {}) == 22
    with pytest.raises(ConfigError, match="already named"):
        module.bgjobs.job(name=f"{name}.price")(decorated_function)


class Instance:
    def __call__(self) -> None: ...


class HasStatic:
    @staticmethod
    def static() -> int:
        return 5

    @classmethod
    def of_class(cls) -> None: ...

    def without_self(number: int) -> int:  # type: ignore[misc]  # noqa: N805  # called on the class
        return number


def generator() -> Any:
    yield 1


async def async_generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("mail", r"write @bgjobs\.job\(name='mail'\)"),
        (Methods, r"Methods is a class: decorate a function, or allow the class with BGJOBS_"),
        (Methods.method, r"Methods\.method is a method: decorate a function"),
        (vars(HasStatic)["of_class"], r"HasStatic\.of_class is a method"),
        (functools.partial(decorated_function, 1), r"needs a function, not functools\.partial"),
        (Instance(), r"needs a function, not <.*Instance object"),
        (None, r"needs a function, not None"),
        (5, r"needs a function, not 5"),
        (BgJobs().job(decorated_function), r"needs a function, not <job .*decorated_function>"),
        (generator, r"generator is a generator, and a job does not iterate over it"),
        (async_generator, r"async_generator is a generator"),
    ],
)
def test_what_cannot_be_a_job_is_refused(thing: Any, said: str) -> None:
    """When it is decorated, with and without a name, and says what to write."""
    bgjobs = BgJobs()
    with pytest.raises(ConfigError, match=said):
        bgjobs.job(name="shop.mail")(thing)
    if thing is not None:
        with pytest.raises(ConfigError, match=said):
            bgjobs.job(thing)


@pytest.mark.parametrize(
    "thing", [Methods().method, vars(HasStatic)["static"], HasStatic.static, HasStatic.without_self]
)
def test_functions_of_classes_need_a_name(thing: Any) -> None:
    """By it they are found in a worker; they must be callable as they are."""
    bgjobs = BgJobs()
    with pytest.raises(ConfigError, match="is a method"):
        bgjobs.job(thing)
    job = bgjobs.job(name="shop.mail")(thing)
    assert job.job_name == "shop.mail"


def test_a_generator_that_another_decorator_runs_is_a_job() -> None:
    """What is called is that decorator's function."""

    @functools.wraps(generator)
    def collected() -> list[int]:
        return list(generator())

    assert BgJobs().job(name="shop.numbers")(collected)() == [1]


def test_functions_that_other_decorators_made_are_jobs() -> None:
    """Such as the object that ``functools.cache`` makes."""
    wrapped = BgJobs().job(functools.cache(decorated_function))
    assert wrapped(5) == 5


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("countdown", r"a job has no option countdown=; did you mean delay=\?"),
        ("max_retries", r"did you mean retries=\?"),
        ("eta", r"did you mean run_at=\?"),
        ("tag", r"did you mean tags=\?"),
        ("colour", r"the options are retries, priority, delay, "),
    ],
)
def test_unknown_options_name_the_right_one(option: str, said: str) -> None:
    """Where a function is decorated, and where it is enqueued."""
    bgjobs = BgJobs()
    with pytest.raises(TypeError, match=said):
        bgjobs.job(**{option: 3})  # type: ignore[misc]
    with pytest.raises(TypeError, match=said):
        bgjobs.job(decorated_function).using(**{option: 3})


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("delay", r"has no delay: did you mean enqueue\(…\)\?"),
        ("apply_async", r"did you mean using\(…\)\.enqueue\(…\)\?"),
        ("colour", "a job function has no colour$"),
    ],
)
def test_unknown_methods_name_the_right_one(method: str, said: str) -> None:
    """The names that other job queues use."""
    wrapped = BgJobs().job(decorated_function)
    assert not hasattr(wrapped, method)
    with pytest.raises(AttributeError, match=said):
        getattr(wrapped, method)


def test_a_refused_name_says_the_likely_cause(make_module: Callable[[str], str]) -> None:
    """A worker that has not imported the module of a decorated function, or has older code."""
    registry = Registry({}, {})
    with pytest.raises(JobNotAllowed, match=r"has not imported shop\.jobs: .* BGJOBS_IMPORTS"):
        registry.check("shop.jobs.send")
    with pytest.raises(JobNotAllowed, match=r"json has no such job function: does .* older code\?"):
        registry.check("json.send")
    with pytest.raises(JobNotAllowed, match=r"call its own enqueue\(…\)"):
        registry.check(BgJobs().job(decorated_function))


def test_decorated_function_is_still_a_function() -> None:
    """Calling a decorated function runs it here and now, under its own name and docstring."""
    wrapped = BgJobs().job(decorated_function)
    assert wrapped(5) == 5
    assert wrapped(order_id=6) == 6
    assert wrapped.__name__ == "decorated_function"
    assert wrapped.__wrapped__ is decorated_function  # type: ignore[attr-defined]
    assert repr(wrapped) == f"<job {__name__}.decorated_function>"
