"""The allow-list: only its names can be resolved to a function or a method."""

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
from flask_bgjobs.job.redact import MASK, Redactor
from flask_bgjobs.options import NO_OPTIONS, JobOptions
from flask_bgjobs.registry import Decorated, Registry, stored_name
from flask_bgjobs.state import AppState

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


def make_restricted_registry(**methods: Any) -> Registry:
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
def test_only_exact_name_is_allowed(pattern: str, module: str, was_imported: WasImported) -> None:
    """Any name but the exact one is refused before an import."""
    allowed = registry(f"{module}.Job")
    name = pattern.replace("{module}", module)
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed):
            refuse(name, "execute")
    with pytest.raises(JobNotAllowed):
        allowed.methods(name)
    assert not was_imported(module)


@pytest.mark.parametrize("name", [None, 5, True, 1.5, b"os.system", ["a.b"], {"a": 1}, object, ()])
def test_name_must_be_string(name: Any) -> None:
    """A name that is not a ``str`` is refused with an example of a valid name."""
    allowed = registry("a.b")
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed, match=r"such as 'shop\.jobs\.SampleJob'"):
            refuse(name, None)


def test_only_resolve_imports(module: str, was_imported: WasImported) -> None:
    """``check`` does not import the module of an allowed name; ``resolve`` does."""
    allowed = registry(f"{module}.Job")
    allowed.check(f"{module}.Job", "execute")
    assert not was_imported(module)
    assert module not in sys.modules
    allowed.resolve(f"{module}.Job", "execute")
    assert was_imported(module)


def test_refusal_suggests_similar_name(module: str) -> None:
    """A refusal names the configuration key, and suggests a similar allowed name."""
    with pytest.raises(JobNotAllowed) as refusal:
        registry(f"{module}.Job", "zzz.other").check(f"{module}.Jobb")
    assert "BGJOBS_ALLOWED_JOBS" in str(refusal.value)
    assert f"Did you mean '{module}.Job'?" in str(refusal.value)
    with pytest.raises(JobNotAllowed) as refusal:
        registry("zzz.other").check("os.system")
    assert "Did you mean" not in str(refusal.value)


INVALID_METHODS = [
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


@pytest.mark.parametrize("method", INVALID_METHODS, ids=repr)
def test_invalid_method_name(method: Any, module: str, was_imported: WasImported) -> None:
    """Anything but the name of a public method is refused before an import."""
    allowed = registry(f"{module}.Job")
    for refuse in (allowed.check, allowed.resolve):
        with pytest.raises(JobNotAllowed, match="public method"):
            refuse(f"{module}.Job", method)
    assert not was_imported(module)


@pytest.mark.parametrize(
    ("cls", "method", "arguments", "result"),
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
def test_callable_methods(
    cls: str, method: str, arguments: list[Any], result: Any, module: str
) -> None:
    """Methods of a class and its bases can be called, including static and class methods."""
    target = registry(f"{module}.{cls}").resolve(f"{module}.{cls}", method)
    assert target.call(arguments, {}) == result


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
def test_other_attributes_are_refused(cls: str, method: str, module: str) -> None:
    """Attributes, properties, nested classes, built-in and metaclass methods are refused."""
    with pytest.raises(InvalidJob, match="has no method"):
        registry(f"{module}.{cls}").resolve(f"{module}.{cls}", method)


def test_methods_lists_callable_methods(module: str) -> None:
    """``methods`` lists exactly the methods that can be called."""
    allowed = registry(f"{module}.Job", f"{module}.Mapping", f"{module}.send")
    assert allowed.methods(f"{module}.Job") == ["execute", "inherited", "of_class", "still"]
    assert allowed.methods(f"{module}.Mapping") == ["execute"]
    assert allowed.methods(f"{module}.send") == []
    for method in allowed.methods(f"{module}.Job"):
        allowed.resolve(f"{module}.Job", method)


def test_new_instance_for_each_call(module: str) -> None:
    """Each call creates a new instance; static and class methods create none."""
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
    """The signature of a job has no ``self`` or ``cls``."""
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


@pytest.mark.parametrize("name", ["time.strftime", "builtins.max"])
def test_function_without_known_signature(name: str) -> None:
    """Of a C function whose signature Python does not know, any parameters fit, and all of their
    values are masked."""
    target = registry(name).resolve(name)
    target.check([1, 2])
    target.check({"seconds": 1})
    assert target.positional_names is None
    assert Redactor(["token"]).parameters([1, "x"], target.placeholder) == [MASK, MASK]


def test_function_with_invalid_signature(module: str) -> None:
    """A function whose ``__signature__`` is not a signature can be a job."""
    target = registry(f"{module}.send").resolve(f"{module}.send")
    target.function.__signature__ = 5  # type: ignore[attr-defined]
    assert str(target.signature) == "(*args, **kwargs)"
    target.check([7])
    assert target.positional_names is None


def test_function_job(module: str) -> None:
    """A function is called by its name alone; a method name is refused."""
    allowed = registry(f"{module}.send")
    assert allowed.resolve(f"{module}.send").call([7], {"copy": True}) == ("sent", 7, True)
    with pytest.raises(InvalidJob, match="is a function and has no method 'execute'"):
        allowed.resolve(f"{module}.send", "execute")


def test_class_needs_method(module: str) -> None:
    """A class without a method name is refused with advice to add one."""
    with pytest.raises(InvalidJob, match="name the method to call"):
        registry(f"{module}.Job").resolve(f"{module}.Job")


def test_allowed_name_must_be_callable(module: str) -> None:
    """An allowed name that is neither a class nor a function is refused."""
    with pytest.raises(InvalidJob, match="neither a class nor a function, but int"):
        registry(f"{module}.limit").resolve(f"{module}.limit")


def test_restricted_methods(module: str, was_imported: WasImported) -> None:
    """A dict restricts the methods of a class, and the refusal lists the allowed ones."""
    allowed = make_restricted_registry(**{f"{module}__Job": ["execute"]})
    with pytest.raises(JobNotAllowed, match="allows execute"):
        allowed.check(f"{module}.Job", "inherited")
    for method in ("inherited", "still", "Execute", "\u0435xecute", "missing"):
        with pytest.raises(JobNotAllowed):
            allowed.resolve(f"{module}.Job", method)
    assert not was_imported(module)
    assert allowed.resolve(f"{module}.Job", "execute").call([], {})[0] == "executed"
    assert allowed.methods(f"{module}.Job") == ["execute"]


def test_empty_method_list(module: str) -> None:
    """An empty list allows no method of the class."""
    allowed = make_restricted_registry(**{f"{module}__Job": []})
    with pytest.raises(JobNotAllowed, match="allows none"):
        allowed.resolve(f"{module}.Job", "execute")
    assert allowed.methods(f"{module}.Job") == []


def test_reexported_class(module: str, make_module: MakeModule) -> None:
    """A class is allowed only under the listed name, not under another name of the same class."""
    reexporting = make_module(f"from {module} import Job as Front, send")
    original_registry = registry(f"{module}.Job")
    for name in (f"{reexporting}.Front", f"{reexporting}.Job", f"{module}.Other"):
        with pytest.raises(JobNotAllowed):
            original_registry.resolve(name, "execute")
    reexport_registry = registry(f"{reexporting}.Front")
    assert (
        reexport_registry.resolve(f"{reexporting}.Front", "execute").call([], {})[0] == "executed"
    )
    with pytest.raises(JobNotAllowed):
        reexport_registry.resolve(f"{module}.Job", "execute")


def test_undefined_name(module: str) -> None:
    """If the module does not define an allowed name, the error has both names."""
    with pytest.raises(InvalidJob, match=f"{module}.Gone is allowed, but {module} defines no Gone"):
        registry(f"{module}.Gone").resolve(f"{module}.Gone", "execute")


def test_module_getattr_is_not_called(make_module: MakeModule) -> None:
    """A module's ``__getattr__`` cannot provide a job."""
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
    """If an allowed module cannot be imported, ``InvalidJob`` has the reason."""
    module = make_module(source)
    try:
        registry(f"{module}.job").resolve(f"{module}.job")
    except BaseException as error:
        raised: BaseException = error
    assert isinstance(raised, InvalidJob)
    assert f"{module}.job is allowed, but its module cannot be imported: {reason}" in str(raised)


def test_module_does_not_exist() -> None:
    """An allowed name in a module that does not exist raises ``InvalidJob``."""
    name = "unit_module_missing.job"
    with pytest.raises(InvalidJob, match="cannot be imported: ModuleNotFoundError"):
        registry(name).resolve(name)


def test_failed_import_is_repeated(make_module: MakeModule) -> None:
    """A failed import is repeated at the next call."""
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


def test_decorated_function_is_allowed() -> None:
    """A decorated function is allowed by its stored name, with its options."""
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


def test_function_decorated_after_init_app() -> None:
    """A function decorated after ``init_app`` is allowed too."""
    decorated: dict[str, Decorated] = {}
    allowed = Registry({}, decorated)
    with pytest.raises(JobNotAllowed):
        allowed.check("mail")
    decorated["mail"] = Decorated(decorated_function, NO_OPTIONS)
    allowed.check("mail")


def test_empty_allow_list() -> None:
    """Without an allow-list, no name is allowed."""
    allowed = registry()
    assert allowed.names() == []
    with pytest.raises(JobNotAllowed):
        allowed.check("shop.jobs.SampleJob", "execute")


def test_stored_name() -> None:
    """A function is stored under its dotted name, or under the name given to the decorator."""
    assert stored_name(decorated_function, None) == f"{__name__}.decorated_function"
    assert stored_name(decorated_function, "mail") == "mail"
    assert stored_name(decorated_function, "shop.mail") == "shop.mail"
    assert stored_name(lambda: None, "shop.mail") == "shop.mail"


class Methods:
    def method(self) -> None: ...


def in_main() -> None: ...


in_main.__module__ = "__main__"


@pytest.mark.parametrize("function", [lambda: None, Methods.method, in_main])
def test_function_needs_name(function: Callable[..., Any]) -> None:
    """A lambda, a method and a function in ``__main__`` need a name: workers cannot find them."""
    with pytest.raises(ConfigError, match=r"set a name with @bgjobs\.job\(name="):
        stored_name(function, None)


def test_nested_function_needs_name() -> None:
    """A nested function needs a name, and works with one."""
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
def test_invalid_stored_name(name: Any) -> None:
    """A stored name consists of identifiers joined by dots, and has at most 255 characters."""
    with pytest.raises(ConfigError, match="identifiers joined by dots"):
        stored_name(decorated_function, name)


def test_duplicate_name_is_refused() -> None:
    """Two functions cannot have the same name, because a worker could not distinguish them."""
    bgjobs = BgJobs()
    bgjobs.job(name="mail")(decorated_function)
    taken = r"another job function is already named 'mail': \S+test_registry.py:\d+; give one"
    with pytest.raises(ConfigError, match=taken):
        bgjobs.job(name="mail")(in_main)


def test_factory_called_twice(bgjobs: BgJobs, state: AppState) -> None:
    """If a factory decorates a function twice, the newest function runs.

    In tests, the app of the first call is usually gone.
    """

    def create_app(number: int) -> None:
        @bgjobs.job(name="shop.number")
        def get_number() -> int:
            return number

    for number in (1, 2):
        create_app(number)
        assert state.registry.resolve("shop.number").call((), {}) == number


def test_functions_with_same_wrapper_are_different() -> None:
    """Two functions wrapped by the same decorator are different functions."""

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
def test_module_imported_twice(
    how: str, bgjobs: BgJobs, state: AppState, make_module: Callable[[str], str], tmp_path: Path
) -> None:
    """After a reload, the new function runs; another function with that name is still refused."""
    extensions = importlib.import_module(make_module(""))
    extensions.bgjobs = bgjobs  # type: ignore[attr-defined]
    source_text = f"from {extensions.__name__} import bgjobs\n@bgjobs.job\ndef price(): return 1"
    name = make_module(source_text)
    module = importlib.import_module(name)
    registry = state.registry
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
        bgjobs.job(name=f"{name}.price")(decorated_function)


class CallableInstance:
    def __call__(self) -> None: ...


class ClassWithFunctions:
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
    ("job_target", "message"),
    [
        ("mail", r"write @bgjobs\.job\(name='mail'\)"),
        (Methods, r"Methods is a class: decorate a function, or allow the class with BGJOBS_"),
        (Methods.method, r"Methods\.method is a method: decorate a function"),
        (vars(ClassWithFunctions)["of_class"], r"ClassWithFunctions\.of_class is a method"),
        (functools.partial(decorated_function, 1), r"needs a function, not functools\.partial"),
        (CallableInstance(), r"needs a function, not <.*CallableInstance object"),
        (None, r"needs a function, not None"),
        (5, r"needs a function, not 5"),
        (BgJobs().job(decorated_function), r"needs a function, not <job .*decorated_function>"),
        (generator, r"generator is a generator, and a job does not iterate over it"),
        (async_generator, r"async_generator is a generator"),
    ],
)
def test_invalid_job_target_is_refused(job_target: Any, message: str) -> None:
    """``@bgjobs.job`` refuses an object that cannot be a job, and says what to write."""
    bgjobs = BgJobs()
    with pytest.raises(ConfigError, match=message):
        bgjobs.job(name="shop.mail")(job_target)
    if job_target is not None:
        with pytest.raises(ConfigError, match=message):
            bgjobs.job(job_target)


@pytest.mark.parametrize(
    "job_target",
    [
        Methods().method,
        vars(ClassWithFunctions)["static"],
        ClassWithFunctions.static,
        ClassWithFunctions.without_self,
    ],
)
def test_function_of_class_needs_name(job_target: Any) -> None:
    """A bound method or a function in a class needs a name."""
    bgjobs = BgJobs()
    with pytest.raises(ConfigError, match="is a method"):
        bgjobs.job(job_target)
    job = bgjobs.job(name="shop.mail")(job_target)
    assert job.job_name == "shop.mail"


def test_wrapped_generator_is_valid_job() -> None:
    """A generator wrapped by a function that iterates over it can be a job."""

    @functools.wraps(generator)
    def list_numbers() -> list[int]:
        return list(generator())

    assert BgJobs().job(name="shop.numbers")(list_numbers)() == [1]


def test_cached_function_is_valid_job() -> None:
    """An object returned by another decorator, such as ``functools.cache``, can be a job."""
    wrapped = BgJobs().job(functools.cache(decorated_function))
    assert wrapped(5) == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("countdown", r"a job has no option countdown=; did you mean delay=\?"),
        ("max_retries", r"did you mean retries=\?"),
        ("eta", r"did you mean run_at=\?"),
        ("tag", r"did you mean tags=\?"),
        ("colour", r"the options are retries, priority, delay, "),
    ],
)
def test_unknown_option_suggests_valid_one(option: str, message: str) -> None:
    """An unknown option is refused with a suggestion, by ``@bgjobs.job`` and by ``using``."""
    bgjobs = BgJobs()
    with pytest.raises(TypeError, match=message):
        bgjobs.job(**{option: 3})  # type: ignore[misc]
    with pytest.raises(TypeError, match=message):
        bgjobs.job(decorated_function).using(**{option: 3})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("delay", r"has no delay: did you mean enqueue\(…\)\?"),
        ("apply_async", r"did you mean using\(…\)\.enqueue\(…\)\?"),
        ("colour", "a job function has no colour$"),
    ],
)
def test_unknown_method_suggests_valid_one(method: str, message: str) -> None:
    """The method names of other job queues raise ``AttributeError`` with a suggestion."""
    wrapped = BgJobs().job(decorated_function)
    assert not hasattr(wrapped, method)
    with pytest.raises(AttributeError, match=message):
        getattr(wrapped, method)


def test_refusal_has_likely_cause(make_module: Callable[[str], str]) -> None:
    """A refusal suggests that the worker has not imported the module, or runs older code."""
    registry = Registry({}, {})
    with pytest.raises(JobNotAllowed, match=r"has not imported shop\.jobs: .* BGJOBS_IMPORTS"):
        registry.check("shop.jobs.send")
    with pytest.raises(JobNotAllowed, match=r"json has no such job function: does .* older code\?"):
        registry.check("json.send")
    with pytest.raises(JobNotAllowed, match=r"call its own enqueue\(…\)"):
        registry.check(BgJobs().job(decorated_function))


def test_decorated_function_can_be_called() -> None:
    """A call of a decorated function runs it directly, and its name and docstring stay the same."""
    wrapped = BgJobs().job(decorated_function)
    assert wrapped(5) == 5
    assert wrapped(order_id=6) == 6
    assert wrapped.__name__ == "decorated_function"
    assert wrapped.__wrapped__ is decorated_function  # type: ignore[attr-defined]
    assert repr(wrapped) == f"<job {__name__}.decorated_function>"
