"""The options of a job: their checks, defaults and column values."""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs import InvalidJob, run_background_job
from flask_bgjobs.config import Config
from flask_bgjobs.job.records import MAX_INTEGER
from flask_bgjobs.job.retry import MAX_DELAY_SECONDS
from flask_bgjobs.options import JobOptions, OptionValues, column_values, first_run, priority_number

CONFIG = Config()
MINUTE = dt.timedelta(minutes=1)
BERLIN_WINTER = dt.timezone(dt.timedelta(hours=1))
BAD_SECONDS = [-1, -0.001, -MINUTE, math.nan, math.inf, -math.inf, True, False, "5", b"5", 5j, {}]
TOO_LONG = [MAX_DELAY_SECONDS + 1, 1e308, 10**400, 10**5_000, dt.timedelta.max]


def values(config: Config = CONFIG, **options: Any) -> dict[str, Any]:
    return column_values(JobOptions(**options), config)


def short_id(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"int of {value.bit_length()} bits"
    return repr(value)[:30]


def test_defaults() -> None:
    """A job without options has the documented defaults."""
    assert values() == {
        "priority": 0,
        "retries": 3,
        "retry_delay": "[5.0]",
        "backoff": "fixed",
        "max_retry_delay": None,
        "jitter": 0.0,
        "timeout": None,
        "failure_rules": None,
        "retention_seconds": None,
        "queue": "default",
        "tags_json": None,
        "owner": None,
        "unique_key": None,
    }
    assert first_run(JobOptions()) == (None, None)


def test_each_option_is_accepted_and_stored() -> None:
    """No option can be forgotten in the parameters of the functions, or in the columns of a job."""
    names = {field.name for field in dataclasses.fields(JobOptions)}
    assert names <= set(inspect.signature(run_background_job).parameters)
    assert names == set(OptionValues.__annotations__)
    columns = {name.removesuffix("_json") for name in column_values(JobOptions(), Config())}
    # unique_jobs(), limits_of() and fair_key() read the options below, first_run() the times.
    unique = {"unique", "unique_until", "unique_for", "on_duplicate", "limits", "fair"}
    times = {"delay", "run_at", "debounce", "debounce_max", "throttle", "expires"}
    others = {
        "retry_on": "failure_rules",
        "fail_on": "failure_rules",
        "retention": "retention_seconds",
    }
    assert columns == {others.get(name, name) for name in names - times - unique}


def test_defaults_from_config() -> None:
    """Missing options come from the configuration; given options override it, even if 0."""
    config = Config(retries=9, retry_delay=(1.0, 2.0), timeout=30.0)
    columns = values(config)
    expected = (9, "[1.0, 2.0]", 30.0)
    assert (columns["retries"], columns["retry_delay"], columns["timeout"]) == expected
    columns = values(config, retries=0, retry_delay=0, timeout=5)
    assert (columns["retries"], columns["retry_delay"], columns["timeout"]) == (0, "[0.0]", 5.0)


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (None, None),
        (0, None),
        (0.0, None),
        (5, 5.0),
        (0.25, 0.25),
        (MINUTE, 60.0),
        (dt.timedelta(days=36_000), 36_000 * 86_400.0),
    ],
)
def test_delay(delay: Any, expected: float | None) -> None:
    """A delay is seconds or a timedelta; 0 means no delay."""
    assert first_run(JobOptions(delay=delay)) == (expected, None)


@pytest.mark.parametrize("delay", [*BAD_SECONDS, *TOO_LONG, [5], Decimal(5)], ids=short_id)
def test_invalid_delay(delay: Any) -> None:
    """A negative, infinite or too long delay is refused, and so are other types."""
    with pytest.raises(InvalidJob):
        first_run(JobOptions(delay=delay))


def test_run_at_is_stored_as_utc() -> None:
    """``run_at`` is stored as naive UTC; a time in the past is accepted."""
    now = dt.datetime.now(BERLIN_WINTER).replace(microsecond=123456)
    expected = now.astimezone(dt.UTC).replace(tzinfo=None)
    assert first_run(JobOptions(run_at=now)) == (None, expected)
    yesterday = now - dt.timedelta(days=1)
    assert first_run(JobOptions(run_at=yesterday))[1] == expected - dt.timedelta(days=1)


@pytest.mark.parametrize(
    "run_at",
    [
        dt.datetime(2030, 1, 1),
        dt.date(2030, 1, 1),
        "2030-01-01T00:00:00Z",
        1_893_456_000,
        60.0,
        True,
    ],
    ids=repr,
)
def test_run_at_without_time_zone(run_at: Any) -> None:
    """A naive datetime is refused, because it is ambiguous, and so are other types."""
    with pytest.raises(InvalidJob, match="run_at must be a datetime with a time zone"):
        first_run(JobOptions(run_at=run_at))


@pytest.mark.parametrize(
    "run_at",
    [
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999, dt.UTC),
        dt.datetime(9999, 12, 31, 23, 59, tzinfo=dt.timezone(-dt.timedelta(hours=12))),
        dt.datetime(1, 1, 1, tzinfo=dt.UTC),
        dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=12))),
        dt.datetime(2500, 1, 1, tzinfo=dt.UTC),
    ],
    ids=repr,
)
def test_run_at_out_of_range(run_at: dt.datetime) -> None:
    """A time more than a hundred years away is refused, even if UTC would overflow."""
    with pytest.raises(InvalidJob, match="within a hundred years of now"):
        first_run(JobOptions(run_at=run_at))


def test_delay_excludes_run_at() -> None:
    """``delay`` and ``run_at`` cannot be combined."""
    with pytest.raises(InvalidJob, match="either delay or run_at"):
        first_run(JobOptions(delay=0, run_at=dt.datetime.now(dt.UTC)))


@pytest.mark.parametrize(
    ("priority", "number"),
    [
        *[("high", 3), ("medium", 2), ("low", 0), (0, 0), (7, 7), (-7, -7)],
        *[(MAX_INTEGER, MAX_INTEGER), (-MAX_INTEGER, -MAX_INTEGER)],
    ],
)
def test_priority(priority: Any, number: int) -> None:
    """A priority is a 32-bit whole number, possibly negative, or a name."""
    assert values(priority=priority)["priority"] == number


@pytest.mark.parametrize(
    "priority",
    [
        *[True, False, 1.0, 0.5, math.nan, math.inf, "HIGH", "high ", "urgent", "", "5", b"high"],
        *[MAX_INTEGER + 1, -MAX_INTEGER - 1, 10**400, 10**5_000, Decimal(1), [1], ("high",)],
    ],
    ids=short_id,
)
def test_invalid_priority(priority: Any) -> None:
    """A bool, a float, an unknown name or a number out of range is refused."""
    with pytest.raises(InvalidJob):
        values(priority=priority)


def test_priority_names() -> None:
    """Priority names come from the configuration, and the message lists them."""
    config = Config.from_mapping({"BGJOBS_PRIORITIES": {"urgent": 9, "idle": -9}})
    assert values(config, priority="idle")["priority"] == -9
    with pytest.raises(InvalidJob, match=r"priority 'high' is unknown; .*\(urgent, idle\)"):
        values(config, priority="high")
    with pytest.raises(ValueError, match="is unknown"):
        priority_number("5", config.priorities)


@pytest.mark.parametrize("retries", [0, 1, 10_000])
def test_retries(retries: int) -> None:
    """Retries are a whole number from 0 to 10,000."""
    assert values(retries=retries)["retries"] == retries


@pytest.mark.parametrize(
    "retries", [-1, 10_001, 10**5_000, 1.0, math.nan, math.inf, True, "3", [3]], ids=short_id
)
def test_invalid_retries(retries: Any) -> None:
    """Any other number or type of retries is refused."""
    with pytest.raises(InvalidJob):
        values(retries=retries)


@pytest.mark.parametrize(
    ("delay", "stored"),
    [
        (10, [10.0]),
        (MINUTE, [60.0]),
        ([1, 5.5, MINUTE], [1.0, 5.5, 60.0]),
        ((1, 2), [1.0, 2.0]),
        (list(range(100)), [float(number) for number in range(100)]),
    ],
)
def test_retry_delay(delay: Any, stored: list[float]) -> None:
    """A retry delay is a duration or a list of 1 to 100 durations."""
    assert json.loads(values(retry_delay=delay)["retry_delay"]) == stored


@pytest.mark.parametrize(
    "delay",
    [*BAD_SECONDS, *TOO_LONG, [], [1] * 101, [1, -1], [1, None], [1, math.nan], [[1]], {1}, "10"],
    ids=short_id,
)
def test_invalid_retry_delay(delay: Any) -> None:
    """A retry delay with an invalid duration is refused."""
    with pytest.raises(InvalidJob):
        values(retry_delay=delay)


@pytest.mark.parametrize("name", ["max_retry_delay", "timeout"])
def test_max_retry_delay_and_timeout(name: str) -> None:
    """``max_retry_delay`` and ``timeout`` are durations."""
    assert values(**{name: 1.5})[name] == 1.5
    assert values(**{name: MINUTE})[name] == 60.0


@pytest.mark.parametrize("value", [*BAD_SECONDS, *TOO_LONG], ids=short_id)
@pytest.mark.parametrize("name", ["max_retry_delay", "timeout"])
def test_invalid_max_retry_delay_and_timeout(name: str, value: Any) -> None:
    """An invalid duration is refused for ``max_retry_delay`` and ``timeout``."""
    with pytest.raises(InvalidJob):
        values(**{name: value})


def test_timeout_of_zero() -> None:
    """A timeout of 0 is refused."""
    with pytest.raises(InvalidJob, match="timeout must be more than 0 s"):
        values(timeout=0)


@pytest.mark.parametrize("jitter", [0, 0.1, 1, 1.0])
def test_jitter(jitter: float) -> None:
    """Jitter is a number from 0 to 1."""
    assert values(jitter=jitter)["jitter"] == jitter


@pytest.mark.parametrize(
    "jitter", [-0.1, 1.01, math.nan, math.inf, True, "0.1", 10**400, Decimal("0.1")], ids=short_id
)
def test_invalid_jitter(jitter: Any) -> None:
    """Any other jitter is refused."""
    with pytest.raises(InvalidJob, match="jitter must be a number from 0 to 1"):
        values(jitter=jitter)


@pytest.mark.parametrize("backoff", ["fixed", "linear", "exponential"])
def test_backoff(backoff: str) -> None:
    """The backoff is fixed, linear or exponential."""
    assert values(backoff=backoff)["backoff"] == backoff


@pytest.mark.parametrize("backoff", ["", "Fixed", "quadratic", True, 2, ["fixed"]], ids=repr)
def test_invalid_backoff(backoff: Any) -> None:
    """Any other backoff is refused with a list of the valid ones."""
    with pytest.raises(InvalidJob, match="one of fixed, linear, exponential, not"):
        values(backoff=backoff)


@pytest.mark.parametrize("queue", ["Mail", "MAIL", "", " ", "a b", "mail\n", "x" * 65, 5, ["a"]])
def test_invalid_queue(queue: Any) -> None:
    """A queue name with upper-case letters or other invalid characters is refused."""
    with pytest.raises(InvalidJob, match="queue must be 1 to 64 characters of a-z"):
        values(queue=queue)


def test_queue() -> None:
    """The queue is stored under its given name."""
    assert values(queue="mail-2")["queue"] == "mail-2"


@pytest.mark.parametrize(
    ("tags", "stored"),
    [
        ([], None),
        (["mail"], ["mail"]),
        (("a", "b"), ["a", "b"]),
        (["Grüße", "x" * 64, '"quoted"', "a,b"], ["Grüße", "x" * 64, '"quoted"', "a,b"]),
        ([f"t{number}" for number in range(20)], [f"t{number}" for number in range(20)]),
    ],
)
def test_tags(tags: Any, stored: list[str] | None) -> None:
    """Up to 20 tags of up to 64 characters are stored as a JSON list."""
    text = values(tags=tags)["tags_json"]
    assert (None if text is None else json.loads(text)) == stored


@pytest.mark.parametrize(
    "tags",
    ["mail", {"a": 1}, ["x"] * 21, [""], ["x" * 65], [5], [None], ["a\0b"], ["\ud800"], 5, True],
    ids=short_id,
)
def test_invalid_tags(tags: Any) -> None:
    """Anything but a list of short strings is refused, including a single string."""
    with pytest.raises(InvalidJob, match="tag"):
        values(tags=tags)


@pytest.mark.parametrize("name", ["owner", "unique_key"])
def test_owner_and_unique_key(name: str) -> None:
    """Owner and unique key are strings of 1 to 255 characters."""
    for value in ("42", "x" * 255, "Grüße 🎉", " receipt 7 "):
        assert values(**{name: value})[name] == value


@pytest.mark.parametrize(
    "value", ["", "x" * 256, "a\0b", "\udfff", 42, True, 1.5, b"x", ["x"]], ids=short_id
)
@pytest.mark.parametrize("name", ["owner", "unique_key"])
def test_invalid_owner_and_unique_key(name: str, value: Any) -> None:
    """An owner or unique key that some database cannot store is refused."""
    with pytest.raises(InvalidJob, match=f"{name} must be a str of 1 to 255 characters") as refusal:
        values(**{name: value})
    str(refusal.value).encode()


ARBITRARY_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**5_000)]),
    st.floats(),
    st.text(st.characters(), max_size=300),
    st.binary(max_size=5),
    st.timedeltas(),
    st.datetimes(timezones=st.none() | st.just(dt.UTC)),
    st.lists(st.integers() | st.floats() | st.text(st.characters(), max_size=3), max_size=25),
    st.dictionaries(st.text(), st.integers(), max_size=2),
)


@given(st.dictionaries(st.sampled_from(list(JobOptions.__slots__)), ARBITRARY_VALUES))
def test_any_option_value(options: dict[str, Any]) -> None:
    """Any option value is either stored as plain values or refused with ``InvalidJob``."""
    job_options = JobOptions(**options)
    try:
        columns = column_values(job_options, CONFIG)
        first_run(job_options)
    except InvalidJob:
        return
    for value in columns.values():
        assert value is None or type(value) in (int, float, str)
    assert abs(columns["priority"]) <= MAX_INTEGER
    json.loads(columns["retry_delay"])
    assert "\0" not in "".join(value for value in columns.values() if isinstance(value, str))


def test_enqueue_options_override_decorator() -> None:
    """Options given when enqueueing override the decorator's, even if 0 or empty."""
    decorated = JobOptions(retries=5, queue="mail", timeout=30, priority="high", tags=["a"])
    merged = JobOptions(retries=0, priority=0, tags=[]).over(decorated)
    assert merged == JobOptions(retries=0, queue="mail", timeout=30, priority=0, tags=[])


def test_decorator_options_are_defaults() -> None:
    """Without options when enqueueing, the decorator's options are used."""
    decorated = JobOptions(retries=5, delay=60)
    assert JobOptions().over(decorated) == decorated


def test_run_at_replaces_delay() -> None:
    """A ``run_at`` given when enqueueing replaces the decorator's ``delay``, and vice versa."""
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    assert JobOptions(run_at=tomorrow).over(JobOptions(delay=60)) == JobOptions(run_at=tomorrow)
    assert JobOptions(delay=0).over(JobOptions(run_at=tomorrow)) == JobOptions(delay=0)
