"""What a caller may choose for a job."""

from __future__ import annotations

import datetime as dt
import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs import InvalidJob
from flask_bgjobs.config import Config
from flask_bgjobs.job.records import MAX_INTEGER
from flask_bgjobs.job.retry import MAX_DELAY_SECONDS
from flask_bgjobs.options import JobOptions, column_values, first_run, priority_number

CONFIG = Config()
MINUTE = dt.timedelta(minutes=1)
BERLIN_WINTER = dt.timezone(dt.timedelta(hours=1))
NO_SECONDS = [-1, -0.001, -MINUTE, math.nan, math.inf, -math.inf, True, False, "5", b"5", 5j, {}]
TOO_LONG = [MAX_DELAY_SECONDS + 1, 1e308, 10**400, 10**5_000, dt.timedelta.max]


def values(config: Config = CONFIG, **options: Any) -> dict[str, Any]:
    return column_values(JobOptions(**options), config)


def short(value: object) -> str:
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
        "queue": "default",
        "tags_json": None,
        "owner": None,
        "unique_key": None,
    }
    assert first_run(JobOptions()) == (None, None)


def test_defaults_of_the_config() -> None:
    """What is not chosen comes from the configuration; what is chosen goes before it, 0 too."""
    config = Config(retries=9, retry_delay=(1.0, 2.0), timeout=30.0)
    made = values(config)
    assert (made["retries"], made["retry_delay"], made["timeout"]) == (9, "[1.0, 2.0]", 30.0)
    made = values(config, retries=0, retry_delay=0, timeout=5)
    assert (made["retries"], made["retry_delay"], made["timeout"]) == (0, "[0.0]", 5.0)


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
    """A delay is seconds or a timedelta; 0 is none."""
    assert first_run(JobOptions(delay=delay)) == (expected, None)


@pytest.mark.parametrize("delay", [*NO_SECONDS, *TOO_LONG, [5], Decimal(5)], ids=short)
def test_bad_delay(delay: Any) -> None:
    """A delay that is negative, no number, endless or too long is refused."""
    with pytest.raises(InvalidJob):
        first_run(JobOptions(delay=delay))


def test_run_at() -> None:
    """``run_at`` becomes UTC without a zone, as it is stored; a past time is due at once."""
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
def test_run_at_without_zone(run_at: Any) -> None:
    """A naive datetime, or anything else, is refused: nobody knows which time it means."""
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
def test_run_at_too_far(run_at: dt.datetime) -> None:
    """A time more than a hundred years away is refused, the year 9999 and overflow as well."""
    with pytest.raises(InvalidJob, match="within a hundred years of now"):
        first_run(JobOptions(run_at=run_at))


def test_delay_and_run_at() -> None:
    """Either delay or run_at may be given, not both."""
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
    """A priority is a whole number of 32 bits, negative as well, or a name."""
    assert values(priority=priority)["priority"] == number


@pytest.mark.parametrize(
    "priority",
    [
        *[True, False, 1.0, 0.5, math.nan, math.inf, "HIGH", "high ", "urgent", "", "5", b"high"],
        *[MAX_INTEGER + 1, -MAX_INTEGER - 1, 10**400, 10**5_000, Decimal(1), [1], ("high",)],
    ],
    ids=short,
)
def test_bad_priority(priority: Any) -> None:
    """A bool, a float, an unknown name or too large a number is refused."""
    with pytest.raises(InvalidJob):
        values(priority=priority)


def test_priority_names() -> None:
    """The names are those of the configuration, and the message lists them."""
    config = Config.from_mapping({"BGJOBS_PRIORITIES": {"urgent": 9, "idle": -9}})
    assert values(config, priority="idle")["priority"] == -9
    with pytest.raises(InvalidJob, match=r"unknown priority 'high'; .*\(urgent, idle\)"):
        values(config, priority="high")
    with pytest.raises(ValueError, match="unknown priority"):
        priority_number("5", config.priorities)


@pytest.mark.parametrize("retries", [0, 1, 10_000])
def test_retries(retries: int) -> None:
    """Retries are a whole number from 0 to 10,000."""
    assert values(retries=retries)["retries"] == retries


@pytest.mark.parametrize(
    "retries", [-1, 10_001, 10**5_000, 1.0, math.nan, math.inf, True, "3", [3]], ids=short
)
def test_bad_retries(retries: Any) -> None:
    """Any other number of retries is refused."""
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
    """The delay before a retry is a duration or a list of up to a hundred."""
    assert json.loads(values(retry_delay=delay)["retry_delay"]) == stored


@pytest.mark.parametrize(
    "delay",
    [*NO_SECONDS, *TOO_LONG, [], [1] * 101, [1, -1], [1, None], [1, math.nan], [[1]], {1}, "10"],
    ids=short,
)
def test_bad_retry_delay(delay: Any) -> None:
    """A retry delay with anything but durations in it is refused."""
    with pytest.raises(InvalidJob):
        values(retry_delay=delay)


@pytest.mark.parametrize("name", ["max_retry_delay", "timeout"])
def test_durations(name: str) -> None:
    """A cap and a timeout are durations."""
    assert values(**{name: 1.5})[name] == 1.5
    assert values(**{name: MINUTE})[name] == 60.0


@pytest.mark.parametrize("bad", [*NO_SECONDS, *TOO_LONG], ids=short)
@pytest.mark.parametrize("name", ["max_retry_delay", "timeout"])
def test_bad_durations(name: str, bad: Any) -> None:
    """Anything but a duration is refused as cap and as timeout."""
    with pytest.raises(InvalidJob):
        values(**{name: bad})


def test_timeout_zero() -> None:
    """A timeout of 0 is refused: no code could run in it."""
    with pytest.raises(InvalidJob, match="timeout must be more than 0 s"):
        values(timeout=0)


@pytest.mark.parametrize("jitter", [0, 0.1, 1, 1.0])
def test_jitter(jitter: float) -> None:
    """Jitter is a share from 0 to 1."""
    assert values(jitter=jitter)["jitter"] == jitter


@pytest.mark.parametrize(
    "jitter", [-0.1, 1.01, math.nan, math.inf, True, "0.1", 10**400, Decimal("0.1")], ids=short
)
def test_bad_jitter(jitter: Any) -> None:
    """Any other jitter is refused."""
    with pytest.raises(InvalidJob, match="jitter must be a number from 0 to 1"):
        values(jitter=jitter)


@pytest.mark.parametrize("backoff", ["fixed", "linear", "exponential"])
def test_backoff(backoff: str) -> None:
    """There are three ways for a delay to grow."""
    assert values(backoff=backoff)["backoff"] == backoff


@pytest.mark.parametrize("backoff", ["", "Fixed", "quadratic", True, 2, ["fixed"]], ids=repr)
def test_bad_backoff(backoff: Any) -> None:
    """Any other backoff is refused, and the three are named."""
    with pytest.raises(InvalidJob, match="one of fixed, linear, exponential, not"):
        values(backoff=backoff)


@pytest.mark.parametrize("queue", ["Mail", "MAIL", "", " ", "a b", "mail\n", "x" * 65, 5, ["a"]])
def test_bad_queue(queue: Any) -> None:
    """A queue name with an upper-case letter, or anything else odd, is refused."""
    with pytest.raises(InvalidJob, match="queue must be 1 to 64 characters of a-z"):
        values(queue=queue)


def test_queue() -> None:
    """The queue is stored as it was named."""
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
    ids=short,
)
def test_bad_tags(tags: Any) -> None:
    """Tags that are no list of short texts are refused; one str is no list."""
    with pytest.raises(InvalidJob, match="tag"):
        values(tags=tags)


@pytest.mark.parametrize("name", ["owner", "unique_key"])
def test_owner_and_unique_key(name: str) -> None:
    """Owner and unique key are texts of up to 255 characters."""
    for value in ("42", "x" * 255, "Grüße 🎉", " receipt 7 "):
        assert values(**{name: value})[name] == value


@pytest.mark.parametrize(
    "bad", ["", "x" * 256, "a\0b", "\udfff", 42, True, 1.5, b"x", ["x"]], ids=short
)
@pytest.mark.parametrize("name", ["owner", "unique_key"])
def test_bad_owner_and_unique_key(name: str, bad: Any) -> None:
    """An owner or unique key that no database could hold as it stands is refused."""
    with pytest.raises(InvalidJob, match=f"{name} must be a str of 1 to 255 characters") as refusal:
        values(**{name: bad})
    str(refusal.value).encode()


ODD_VALUES = st.one_of(
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


@given(st.dictionaries(st.sampled_from(list(JobOptions.__slots__)), ODD_VALUES))
def test_any_value(options: dict[str, Any]) -> None:
    """Whatever is given as an option, it is stored as plain values or is ``InvalidJob``."""
    chosen = JobOptions(**options)
    try:
        made = column_values(chosen, CONFIG)
        first_run(chosen)
    except InvalidJob:
        return
    for value in made.values():
        assert value is None or type(value) in (int, float, str)
    assert abs(made["priority"]) <= MAX_INTEGER
    json.loads(made["retry_delay"])
    assert "\0" not in "".join(value for value in made.values() if isinstance(value, str))


def test_explicit_goes_before_decorator() -> None:
    """What is given at the enqueue goes before the decorator's value, 0 and empty as well."""
    decorated = JobOptions(retries=5, queue="mail", timeout=30, priority="high", tags=["a"])
    merged = JobOptions(retries=0, priority=0, tags=[]).over(decorated)
    assert merged == JobOptions(retries=0, queue="mail", timeout=30, priority=0, tags=[])


def test_nothing_given() -> None:
    """Without a choice at the enqueue, the decorator's options hold."""
    decorated = JobOptions(retries=5, delay=60)
    assert JobOptions().over(decorated) == decorated


def test_one_way_to_say_when() -> None:
    """A time given at the enqueue replaces the decorator's delay, and the other way round."""
    tomorrow = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    assert JobOptions(run_at=tomorrow).over(JobOptions(delay=60)) == JobOptions(run_at=tomorrow)
    assert JobOptions(delay=0).over(JobOptions(run_at=tomorrow)) == JobOptions(delay=0)
