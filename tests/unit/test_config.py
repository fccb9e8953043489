"""The ``BGJOBS_…`` keys are read into one frozen ``Config``."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs, ConfigError
from flask_bgjobs.cli import bgjobs_commands
from flask_bgjobs.config import Config, check_queue, is_dotted_name
from flask_bgjobs.job.statuses import JobStatus
from flask_bgjobs.state import state_of

DAY = 86_400


def read(**values: Any) -> Config:
    return Config.from_mapping(values)


DEFAULTS: dict[str, tuple[str, Any]] = {
    "BGJOBS_ALLOWED_JOBS": ("allowed_jobs", {}),
    "BGJOBS_POOL": ("pool", "thread"),
    "BGJOBS_QUEUE_POOLS": ("queue_pools", {}),
    "BGJOBS_APP": ("app", None),
    "BGJOBS_CONCURRENCY": ("concurrency", None),
    "BGJOBS_QUEUES": ("queues", None),
    "BGJOBS_PRIORITIES": ("priorities", {"high": 3, "medium": 2, "low": 0}),
    "BGJOBS_IMPORTS": ("imports", ()),
    "BGJOBS_UNKNOWN_JOBS": ("unknown_jobs", "wait"),
    "BGJOBS_UNKNOWN_TIMEOUT": ("unknown_timeout", 86_400.0),
    "BGJOBS_RETRIES": ("retries", 3),
    "BGJOBS_RETRY_DELAY": ("retry_delay", (5.0,)),
    "BGJOBS_TIMEOUT": ("timeout", None),
    "BGJOBS_POLL_INTERVAL": ("poll_interval", 1.0),
    "BGJOBS_HEARTBEAT_INTERVAL": ("heartbeat_interval", 10.0),
    "BGJOBS_LEASE": ("lease", 60.0),
    "BGJOBS_SHUTDOWN_TIMEOUT": ("shutdown_timeout", 25.0),
    "BGJOBS_MAX_CRASHES": ("max_crashes", 3),
    "BGJOBS_MAX_PAYLOAD": ("max_payload", 1024 * 1024),
    "BGJOBS_RETENTION": (
        "retention",
        {"completed": 7.0 * DAY, "failed": 30.0 * DAY, "cancelled": 7.0 * DAY},
    ),
    "BGJOBS_RETRY_ON": ("retry_on", None),
    "BGJOBS_FAIL_ON": ("fail_on", None),
    "BGJOBS_SCHEDULE": ("schedule", {}),
    "BGJOBS_TIMEZONE": ("timezone", "UTC"),
    "BGJOBS_LIMITS": ("limits", {}),
    "BGJOBS_WEIGHTS": ("weights", {}),
    "BGJOBS_DASHBOARD": ("dashboard", True),
    "BGJOBS_DASHBOARD_URL_PREFIX": ("dashboard_url_prefix", "/jobs"),
    "BGJOBS_DASHBOARD_PUBLIC": ("dashboard_public", False),
    "BGJOBS_READ_ONLY": ("read_only", False),
    "BGJOBS_SQLITE_WAL": ("sqlite_wal", True),
    "BGJOBS_BIND_KEY": ("bind_key", None),
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_default_value(key: str) -> None:
    """A missing key has the documented default."""
    field, default = DEFAULTS[key]
    assert getattr(read(), field) == default


def test_default_redact() -> None:
    """Passwords, secrets, tokens, API keys and authorization are masked by default."""
    assert {"password", "secret", "token", "api_key", "authorization"} <= set(read().redact)


def test_every_default_is_tested() -> None:
    """The default of each field is tested."""
    fields = {field.name for field in dataclasses.fields(Config)}
    tested = {field for field, _ in DEFAULTS.values()}
    assert fields - tested == {"redact", "base_template"}


@pytest.mark.parametrize(
    ("pool", "concurrency", "expected"),
    [
        ("thread", None, 10),
        ("process", None, len(os.sched_getaffinity(0))),
        ("thread", 3, 3),
        ("process", 64, 64),
    ],
)
def test_concurrency(pool: str, concurrency: int | None, expected: int) -> None:
    """By default, jobs run in 10 threads or in one process per CPU."""
    config = read(BGJOBS_POOL=pool, BGJOBS_CONCURRENCY=concurrency)
    assert config.concurrency_of(pool) == expected


def test_concurrency_applies_to_default_pool() -> None:
    """``BGJOBS_CONCURRENCY`` does not apply to a pool used only by ``BGJOBS_QUEUE_POOLS``."""
    config = read(BGJOBS_CONCURRENCY=64, BGJOBS_QUEUE_POOLS={"images": "process"})
    assert config.concurrency_of("process") == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("BGJOBS_ALLOWED_JOBS", ["shop.jobs.Mail"], {"shop.jobs.Mail": None}),
        ("BGJOBS_ALLOWED_JOBS", ("a.b", "a.b"), {"a.b": None}),
        ("BGJOBS_ALLOWED_JOBS", {"a.b", "c.d"}, {"a.b": None, "c.d": None}),
        (
            "BGJOBS_ALLOWED_JOBS",
            {"a.B": ["run", "stop"], "a.f": None},
            {"a.B": frozenset({"run", "stop"}), "a.f": None},
        ),
        ("BGJOBS_ALLOWED_JOBS", {"a.B": []}, {"a.B": frozenset()}),
        ("BGJOBS_POOL", "process", "process"),
        ("BGJOBS_QUEUE_POOLS", {"images": "process"}, {"images": "process"}),
        ("BGJOBS_APP", "shop:create_app", "shop:create_app"),
        ("BGJOBS_CONCURRENCY", 1, 1),
        ("BGJOBS_QUEUES", ["high", "mail"], ("high", "mail")),
        ("BGJOBS_QUEUES", "high, mail", ("high", "mail")),
        ("BGJOBS_PRIORITIES", {"urgent": 9, "idle": -5}, {"urgent": 9, "idle": -5}),
        ("BGJOBS_IMPORTS", ["shop", "shop.jobs"], ("shop", "shop.jobs")),
        ("BGJOBS_RETRIES", 0, 0),
        ("BGJOBS_RETRY_DELAY", 2, (2.0,)),
        ("BGJOBS_RETRY_DELAY", dt.timedelta(minutes=1), (60.0,)),
        ("BGJOBS_RETRY_DELAY", [1, 5.5, dt.timedelta(hours=1)], (1.0, 5.5, 3600.0)),
        ("BGJOBS_TIMEOUT", 0.5, 0.5),
        ("BGJOBS_TIMEOUT", dt.timedelta(hours=1), 3600.0),
        ("BGJOBS_POLL_INTERVAL", 0.1, 0.1),
        ("BGJOBS_LEASE", dt.timedelta(minutes=5), 300.0),
        ("BGJOBS_SHUTDOWN_TIMEOUT", 0, 0.0),
        ("BGJOBS_MAX_CRASHES", 1, 1),
        ("BGJOBS_MAX_PAYLOAD", 4096, 4096),
        ("BGJOBS_RETENTION", None, {"completed": None, "failed": None, "cancelled": None}),
        (
            "BGJOBS_RETENTION",
            {"completed": dt.timedelta(days=1), "failed": None},
            {"completed": 1.0 * DAY, "failed": None, "cancelled": 7.0 * DAY},
        ),
        ("BGJOBS_REDACT", ["pin"], ("pin",)),
        ("BGJOBS_REDACT", [], ()),
        ("BGJOBS_RETRY_ON", [OSError, "KeyError"], ("builtins.KeyError", "builtins.OSError")),
        ("BGJOBS_FAIL_ON", ValueError, ("builtins.ValueError",)),
        ("BGJOBS_SCHEDULE", {}, {}),
        ("BGJOBS_SCHEDULE", {"a b": {"every": 5}}, {"a b": {"every": 5}}),
        ("BGJOBS_TIMEZONE", "Europe/Berlin", "Europe/Berlin"),
        ("BGJOBS_DASHBOARD", False, False),
        ("BGJOBS_DASHBOARD_URL_PREFIX", "/admin/jobs/", "/admin/jobs"),
        ("BGJOBS_DASHBOARD_PUBLIC", True, True),
        ("BGJOBS_READ_ONLY", True, True),
        ("BGJOBS_BASE_TEMPLATE", "layout.html", "layout.html"),
        ("BGJOBS_SQLITE_WAL", False, False),
        ("BGJOBS_BIND_KEY", "jobs", "jobs"),
    ],
)
def test_valid_value(key: str, value: Any, expected: Any) -> None:
    """A valid value is read and normalized."""
    config = read(**{key: value})
    field = key.removeprefix("BGJOBS_").lower()
    assert getattr(config, field) == expected


NAME = "dotted name"
INTEGER = "whole number from"
SECONDS = "seconds|hundred years"
INVALID: list[tuple[str, Any, str]] = [
    ("BGJOBS_ALLOWED_JOBS", "shop.jobs.Mail", "list"),
    ("BGJOBS_ALLOWED_JOBS", None, "list"),
    ("BGJOBS_ALLOWED_JOBS", ["Mail"], NAME),
    ("BGJOBS_ALLOWED_JOBS", ["shop.jobs.*"], NAME),
    ("BGJOBS_ALLOWED_JOBS", ["shop.jobs:Mail"], NAME),
    ("BGJOBS_ALLOWED_JOBS", ["shop.jobs.Mail "], NAME),
    ("BGJOBS_ALLOWED_JOBS", ["shop..Mail"], NAME),
    ("BGJOBS_ALLOWED_JOBS", [".jobs.Mail"], NAME),
    ("BGJOBS_ALLOWED_JOBS", ["shop.class"], NAME),
    ("BGJOBS_ALLOWED_JOBS", [f"shop.{'x' * 255}"], NAME),
    ("BGJOBS_ALLOWED_JOBS", [""], NAME),
    ("BGJOBS_ALLOWED_JOBS", [print], NAME),
    ("BGJOBS_ALLOWED_JOBS", {"shop.Mail": "run"}, "list of names"),
    ("BGJOBS_ALLOWED_JOBS", {"shop.Mail": ["_run"]}, "public method"),
    ("BGJOBS_ALLOWED_JOBS", {"shop.Mail": ["__init__"]}, "public method"),
    ("BGJOBS_ALLOWED_JOBS", {"shop.Mail": ["run now"]}, "public method"),
    ("BGJOBS_ALLOWED_JOBS", {"shop.Mail": [5]}, "public method"),
    ("BGJOBS_POOL", "gevent", "'thread', 'process'"),
    ("BGJOBS_QUEUE_POOLS", {"images": "gevent"}, "'thread', 'process'"),
    ("BGJOBS_QUEUE_POOLS", {"Im ages": "thread"}, "a queue must be"),
    ("BGJOBS_QUEUE_POOLS", ["images"], "must be a dict of queue to pool"),
    ("BGJOBS_APP", "", "must be a non-empty string"),
    ("BGJOBS_POOL", None, "'thread', 'process'"),
    ("BGJOBS_POOL", "Thread", "'thread', 'process'"),
    *(("BGJOBS_CONCURRENCY", value, INTEGER) for value in (0, -1, 2.0, "4", True, 10_001)),
    ("BGJOBS_QUEUES", [], "list of queue names"),
    ("BGJOBS_QUEUES", {"a"}, "list of queue names"),
    ("BGJOBS_QUEUES", ["High"], "a-z"),
    ("BGJOBS_QUEUES", ["mail", "mail"], "twice"),
    ("BGJOBS_QUEUES", "mail,,high", "a-z"),
    ("BGJOBS_QUEUES", [None], "a-z"),
    ("BGJOBS_PRIORITIES", {}, "dict of name to number"),
    ("BGJOBS_PRIORITIES", ["high"], "dict of name to number"),
    ("BGJOBS_PRIORITIES", {"high": 3.0}, INTEGER),
    ("BGJOBS_PRIORITIES", {"high": True}, INTEGER),
    ("BGJOBS_PRIORITIES", {"high": 2**31}, INTEGER),
    ("BGJOBS_PRIORITIES", {"5": 5}, "not a valid name"),
    ("BGJOBS_PRIORITIES", {" ": 5}, "not a valid name"),
    ("BGJOBS_PRIORITIES", {5: 5}, "not a valid name"),
    ("BGJOBS_IMPORTS", "shop.jobs", "list of module names"),
    ("BGJOBS_IMPORTS", ["shop/jobs"], "list of module names"),
    ("BGJOBS_IMPORTS", [5], "list of module names"),
    ("BGJOBS_UNKNOWN_JOBS", "ignore", "one of 'wait', 'fail'"),
    ("BGJOBS_UNKNOWN_TIMEOUT", 0, "more than 0 s"),
    ("BGJOBS_UNKNOWN_TIMEOUT", None, "seconds"),
    *(("BGJOBS_RETRIES", value, INTEGER) for value in (-1, 1.5, None, True, "3", 10_001)),
    *(("BGJOBS_RETRY_DELAY", value, SECONDS) for value in (-1, math.nan, "5", True, [1, None])),
    ("BGJOBS_RETRY_DELAY", [], "1 to 100"),
    ("BGJOBS_RETRY_DELAY", [1] * 101, "1 to 100"),
    *(("BGJOBS_TIMEOUT", value, SECONDS) for value in (0, -1, math.inf, math.nan, "30", True)),
    *(("BGJOBS_POLL_INTERVAL", value, SECONDS) for value in (0, -1, None, "1", math.nan)),
    *(("BGJOBS_HEARTBEAT_INTERVAL", value, SECONDS) for value in (0, None, True, math.inf)),
    *(("BGJOBS_LEASE", value, SECONDS) for value in (0, None, "60", math.nan)),
    *(("BGJOBS_SHUTDOWN_TIMEOUT", value, SECONDS) for value in (-1, None, math.inf)),
    *(("BGJOBS_MAX_CRASHES", value, INTEGER) for value in (0, -1, None, 1.0, True)),
    *(("BGJOBS_MAX_PAYLOAD", value, INTEGER) for value in (0, "1 MiB", 1e6, 2**27 + 1)),
    ("BGJOBS_RETENTION", 5, "'completed', 'failed'"),
    ("BGJOBS_RETENTION", {"pending": 5}, "'completed', 'failed'"),
    ("BGJOBS_RETENTION", {"failed": -1}, SECONDS),
    ("BGJOBS_RETENTION", {"failed": "7 d"}, SECONDS),
    *(("BGJOBS_SCHEDULE", value, "dict of name to dict") for value in ({"a": 1}, [], None)),
    *(("BGJOBS_SCHEDULE", {name: {}}, "printable") for name in ("", "a\n", "x" * 256, 5)),
    *(("BGJOBS_RETRY_ON", value, "exception classes|Exception") for value in ([], 5, ["a b"])),
    *(("BGJOBS_FAIL_ON", value, "exception classes|Exception") for value in ([], 5, ["a b"])),
    *(("BGJOBS_TIMEZONE", value, "time zone") for value in ("Berlin", None, 1)),
    ("BGJOBS_REDACT", "password", "list of words"),
    ("BGJOBS_REDACT", [""], "list of words"),
    ("BGJOBS_REDACT", ["__"], "list of words"),
    ("BGJOBS_REDACT", [5], "list of words"),
    *(
        (f"BGJOBS_{key}", value, "True or False")
        for key in ("DASHBOARD", "DASHBOARD_PUBLIC", "READ_ONLY", "SQLITE_WAL")
        for value in (None, 1, 0, "true", "")
    ),
    *(("BGJOBS_DASHBOARD_URL_PREFIX", value, "path") for value in ("", "/", "jobs", None, 5)),
    *(("BGJOBS_BASE_TEMPLATE", value, "non-empty string") for value in ("", None, 5)),
    *(("BGJOBS_BIND_KEY", value, "non-empty string") for value in ("", 5)),
]


@pytest.mark.parametrize(("key", "value", "allowed"), INVALID)
def test_invalid_value(key: str, value: Any, allowed: str) -> None:
    """An invalid value raises an error with the key, the value and the allowed values."""
    with pytest.raises(ConfigError, match=allowed) as refusal:
        read(**{key: value})
    assert str(refusal.value).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "text", "suggestion"),
    [
        ("BGJOBS_DASHBOARD", "True", "True"),
        ("BGJOBS_READ_ONLY", "false", "False"),
        ("BGJOBS_RETRIES", "5", "5"),
        ("BGJOBS_LEASE", "30.5", "30.5"),
        ("BGJOBS_ALLOWED_JOBS", "shop.jobs.send", r"\['shop.jobs.send'\]"),
        ("BGJOBS_IMPORTS", "shop.jobs, shop.mail", r"\['shop.jobs', 'shop.mail'\]"),
        ("BGJOBS_RETENTION", '{"completed": 60}', r"\{'completed': 60\}"),
    ],
)
def test_string_from_environment(key: str, text: str, suggestion: str) -> None:
    """For a string from an environment variable, the error says what to write in Python."""
    with pytest.raises(
        ConfigError, match=f"environment variable: write {suggestion} in Python, or"
    ):
        read(**{key: text})


def test_command_options_are_known_keys() -> None:
    """Keys of the command line, such as ``BGJOBS_WORKER_QUEUES``, cause no warning.

    ``from_prefixed_env`` reads ``FLASK_BGJOBS_WORKER_QUEUES`` too.
    """
    assert read(BGJOBS_WORKER_QUEUES="mail", BGJOBS_ENQUEUE_QUEUE="mail").queues is None


@pytest.mark.parametrize("command", sorted(bgjobs_commands.commands))
def test_options_of_each_command_are_known(command: str) -> None:
    """No command is missing from the list of prefixes."""
    read(**{f"BGJOBS_{command.upper().replace('-', '_')}_JSON": "1"})


@pytest.mark.parametrize("text", ["maybe", "[" * 100_000, "1" * 5_000])
def test_invalid_string_has_no_suggestion(text: str) -> None:
    """A string without a valid Python value gets no suggestion."""
    with pytest.raises(ConfigError) as refusal:
        read(BGJOBS_DASHBOARD=text)
    assert str(refusal.value).endswith("must be True or False")


def test_toml_table_causes_warning() -> None:
    """A TOML table ``[BGJOBS]``, whose keys are not read, causes a warning."""
    with pytest.warns(UserWarning, match="at the top level, such as BGJOBS_RETRIES"):
        Config.from_mapping({"BGJOBS": {"retries": 3}})


def test_invalid_value_stops_init_app() -> None:
    """``init_app`` raises for an invalid value and does not set up the extension."""
    app = Flask("shop")
    app.config.update(SQLALCHEMY_DATABASE_URI="sqlite://", BGJOBS_RETRIES=-1)
    SQLAlchemy(app)
    with pytest.raises(ConfigError, match=r"BGJOBS_RETRIES = -1: must be a whole number from 0"):
        BgJobs(app)
    assert "bgjobs" not in app.extensions


def test_lease_is_at_least_two_heartbeats() -> None:
    """A lease shorter than two heartbeats is refused: one late heartbeat would lose the jobs."""
    assert read(BGJOBS_LEASE=20, BGJOBS_HEARTBEAT_INTERVAL=10).lease == 20
    with pytest.raises(ConfigError, match=r"BGJOBS_LEASE is 19.*BGJOBS_HEARTBEAT_INTERVAL \(10"):
        read(BGJOBS_LEASE=19, BGJOBS_HEARTBEAT_INTERVAL=10)
    with pytest.raises(ConfigError, match=r"BGJOBS_LEASE is 60.*BGJOBS_HEARTBEAT_INTERVAL \(31"):
        read(BGJOBS_HEARTBEAT_INTERVAL=31)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("BGJOBS_RETRYES", "BGJOBS_RETRIES"),
        ("BGJOBS_ALOWED_JOBS", "BGJOBS_ALLOWED_JOBS"),
        ("BGJOBS_ALLOWED_CLASS", "BGJOBS_ALLOWED_CLASSES"),
        ("BGJOBS_QUEUE", "BGJOBS_QUEUES"),
        ("BGJOBS_TIME_OUT", "BGJOBS_TIMEOUT"),
    ],
)
def test_unknown_key_suggests_similar_key(key: str, hint: str) -> None:
    """An unknown key causes a warning with a similar key, not an error."""
    with pytest.warns(UserWarning, match=rf"{key}; did you mean {hint}\?"):
        config = read(**{key: object()})
    assert config == read()


def test_unknown_key_without_suggestion() -> None:
    """An unknown key without a similar key causes a warning without a suggestion."""
    with pytest.warns(UserWarning, match=r"BGJOBS_XYZZY_FROBNICATE_WIDGETS$"):
        read(BGJOBS_XYZZY_FROBNICATE_WIDGETS=1)


def test_other_keys_are_ignored() -> None:
    """Keys without the prefix ``BGJOBS_`` are ignored."""
    assert read(SECRET_KEY="x", RETRIES=-1, bgjobs_retries=-1) == read()


def test_alias() -> None:
    """``BGJOBS_ALLOWED_CLASSES`` is an alias of ``BGJOBS_ALLOWED_JOBS``."""
    assert read(BGJOBS_ALLOWED_CLASSES=["a.B"]) == read(BGJOBS_ALLOWED_JOBS=["a.B"])
    assert read(BGJOBS_ALLOWED_CLASSES={"a.B": ["run"]}).allowed_jobs["a.B"] == {"run"}


def test_alias_in_messages() -> None:
    """An error about the alias names the alias."""
    with pytest.raises(ConfigError, match=r"^BGJOBS_ALLOWED_CLASSES = 'a.B': "):
        read(BGJOBS_ALLOWED_CLASSES="a.B")


@pytest.mark.parametrize("value", [[], ["a.B"]])
def test_alias_and_name_together(value: list[str]) -> None:
    """Setting both names of the allow-list is an error, even if one is empty."""
    with pytest.raises(ConfigError, match="BGJOBS_ALLOWED_JOBS and BGJOBS_ALLOWED_CLASSES"):
        read(BGJOBS_ALLOWED_JOBS=["a.B"], BGJOBS_ALLOWED_CLASSES=value)


def test_config_is_immutable() -> None:
    """Neither the fields of a configuration nor its mappings can be changed."""
    config = read(BGJOBS_ALLOWED_JOBS={"a.B": ["run"]}, BGJOBS_PRIORITIES={"high": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.retries = 5  # type: ignore[misc]
    for mapping in (config.allowed_jobs, config.priorities, config.retention):
        with pytest.raises(TypeError):
            mapping["x"] = None  # type: ignore[index]
    for mapping in (read().allowed_jobs, read().priorities, read().retention):
        with pytest.raises(TypeError):
            mapping["x"] = None  # type: ignore[index]
    assert isinstance(config.allowed_jobs["a.B"], frozenset)


def test_config_copies_values() -> None:
    """Changing a list or dict after it was read does not change the configuration."""
    methods = ["run"]
    allowed_jobs = {"a.B": methods}
    names = {"high": 1}
    retention = {"failed": 5}
    config = read(
        BGJOBS_ALLOWED_JOBS=allowed_jobs, BGJOBS_PRIORITIES=names, BGJOBS_RETENTION=retention
    )
    methods.append("drop")
    allowed_jobs["os.system"] = None  # type: ignore[assignment]
    names["high"] = 99
    retention["failed"] = 99
    assert config.allowed_jobs == {"a.B": {"run"}}
    assert config.priorities == {"high": 1}
    assert config.retention[JobStatus.FAILED] == 5


@pytest.mark.parametrize("debug", [False, True])
def test_config_is_read_once(debug: bool) -> None:
    """Changes of ``app.config`` or ``app.debug`` after ``init_app`` have no effect."""
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI="sqlite://",
        BGJOBS_RETRIES=1,
        BGJOBS_DASHBOARD=False,
        BGJOBS_ALLOWED_JOBS=["a.B"],
    )
    app.debug = debug
    database = SQLAlchemy(app)
    BgJobs(app)
    expected = read(BGJOBS_RETRIES=1, BGJOBS_DASHBOARD=False, BGJOBS_ALLOWED_JOBS=["a.B"])
    assert state_of(app).config == expected
    app.config["BGJOBS_RETRIES"] = 9
    app.config["BGJOBS_ALLOWED_JOBS"].append("os.system")
    app.debug = not debug
    assert state_of(app).config == expected
    state_of(app).store.dispose()
    with app.app_context():
        database.engine.dispose()


@pytest.mark.parametrize("name", ["default", "a", "0", "mail-2", "eu.mail_high", "x" * 64])
def test_queue_name(name: str) -> None:
    """A queue name consists of lower-case letters, digits and ``_ - .``."""
    assert check_queue(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "Mail", "MAIL", " mail", "mail ", "mail\n", "-mail", ".mail", "a b", "ä", "٣"),
        *("x" * 65, None, 5, True, b"mail", ["mail"]),
    ],
    ids=repr,
)
def test_invalid_queue_name(name: object) -> None:
    """Any other queue name is refused.

    Upper case is refused because databases compare it differently.
    """
    with pytest.raises(ValueError, match="queue must be 1 to 64 characters of a-z") as refusal:
        check_queue(name)
    assert repr(name) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("a.b", 2, True),
        ("a", 2, False),
        ("a", 1, True),
        ("a.b.c", 2, True),
        ("", 1, False),
        ("a.", 1, False),
        ("a.1", 1, False),
        ("a.if", 1, False),
        ("a.b\n", 1, False),
        (None, 1, False),
        (["a"], 1, False),
    ],
)
def test_dotted_name(name: object, parts: int, expected: bool) -> None:
    """A dotted name consists of identifiers that are not keywords."""
    assert is_dotted_name(name, parts=parts) is expected
