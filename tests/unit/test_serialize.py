"""Serialization of parameters, results and meta as JSON."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import json
import math
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.job.serialize import MAX_DEPTH, TAG, NotSerializable, dumps, dumps_plain, loads

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ZONES = st.integers(-86_340, 86_340).map(lambda s: dt.timezone(dt.timedelta(seconds=s)))
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    st.binary(),
    st.uuids(),
    st.dates(),
    st.datetimes(timezones=st.none() | ZONES),
    st.times(timezones=st.none() | ZONES),
    st.timedeltas(),
    st.decimals(allow_nan=False, allow_infinity=False),
)
KEYS = TEXT | st.sampled_from([TAG, "v", "tuple", "datetime"])
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(HASHABLE, max_size=4),
        st.sets(st.tuples(HASHABLE, HASHABLE), max_size=2),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


def with_types(value: Any) -> Any:
    """``value`` with the type of each part, because ``1 == 1.0 == True``."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, {key: with_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return kind, [with_types(item) for item in value]
    if isinstance(value, set):
        return kind, {(type(item).__name__, item) for item in value}
    if isinstance(value, dt.datetime | dt.time):
        return kind, value, value.utcoffset()
    return kind, value


def test_fractional_utc_offset_is_refused() -> None:
    """A UTC offset with fractional seconds is refused, because Python cannot read it back."""
    fractional = dt.timezone(dt.timedelta(microseconds=1))
    with pytest.raises(NotSerializable, match="whole seconds"):
        dumps(dt.datetime(2000, 1, 1, tzinfo=fractional))


@given(VALUES)
def test_round_trip(value: Any) -> None:
    """Any supported value is read back equal and with the same types, at any depth."""
    assert with_types(loads(dumps(value))) == with_types(value)


@pytest.mark.parametrize(
    "value",
    [
        dt.datetime(2026, 3, 29, 1, 30, 0, 123456),
        dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC),
        dt.datetime(1, 1, 1),
        dt.datetime.max,
        dt.date(2026, 2, 28),
        dt.time(23, 59, 59, 999999),
        dt.timedelta.min,
        dt.timedelta.max,
        dt.timedelta(microseconds=-1),
        decimal.Decimal("0.10"),
        decimal.Decimal("-1E+400"),
        decimal.Decimal("1234567890.12345678901234567890123456789"),
        uuid.UUID(int=7),
        b"",
        b"\x00\xff",
        (),
        (1, (2,)),
        set(),
        {1, "one", None},
        {(1, 2), (3, 4)},
        2**63,
        -(2**200),
        5e-324,
        "NUL \0, line \u2028, emoji \U0001f389",
        {"": {"": []}},
        [[], {}, (), set()],
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip_of_extreme_values(value: Any) -> None:
    """The extreme values of each type are read back unchanged too."""
    assert with_types(loads(dumps([value]))) == with_types([value])


def test_decimal_keeps_trailing_zeros() -> None:
    """A ``Decimal``, such as a price, keeps its trailing zeros."""
    assert str(loads(dumps(decimal.Decimal("9.90")))) == "9.90"


@pytest.mark.parametrize(
    "value",
    [
        {TAG: "uuid", "v": "no uuid"},
        {TAG: None},
        {TAG: "dict", "v": {TAG: "tuple", "v": [1]}},
        {TAG: {TAG: {TAG: "set"}}},
        {"a": [{TAG: "bytes", "v": "x", "more": (1, {TAG: 1})}]},
        {"v": 1},
    ],
)
def test_dict_like_a_type_tag(value: Any) -> None:
    """A user's dict that looks like a type tag is read back as a dict."""
    assert with_types(loads(dumps(value))) == with_types(value)


@given(VALUES)
def test_json_is_printable_ascii(value: Any) -> None:
    """The JSON is printable ASCII, so every database stores it unchanged."""
    text = dumps(value)
    assert text.isascii()
    assert text.isprintable()
    json.loads(text)


def test_equal_string_sets_have_same_json() -> None:
    """Equal sets of strings have the same JSON."""
    assert dumps({"b", "a", "c"}) == dumps({"c", "b", "a"})


class Color(enum.IntEnum):
    RED = 1


class Size(enum.StrEnum):
    BIG = "big"


class Name(str):
    __slots__ = ()


class Number(int):
    pass


class Share(float):
    pass


class Day(dt.date):
    pass


class Point(collections.namedtuple("Point", "x y")):
    __slots__ = ()


@dataclasses.dataclass
class Order:
    id: int


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        (Order(1), "Order"),
        (Order, "type"),
        (Color.RED, "Color"),
        (Size.BIG, "Size"),
        (Name("x"), "Name"),
        (Number(1), "Number"),
        (Share(1), "Share"),
        (Day(2026, 1, 1), "Day"),
        (Point(1, 2), "Point"),
        (collections.OrderedDict(a=1), "OrderedDict"),
        (collections.defaultdict(list), "defaultdict"),
        (frozenset({1}), "frozenset"),
        (bytearray(b"x"), "bytearray"),
        (1j, "complex"),
        (fractions.Fraction(1, 2), "Fraction"),
        (range(3), "range"),
        ({}.keys(), "dict_keys"),
        (iter([]), "list_iterator"),
        (print, "builtin_function_or_method"),
        (lambda: None, "function"),
        (ValueError("x"), "ValueError"),
        (dt.UTC, "timezone"),
        (..., "ellipsis"),
    ],
    ids=lambda value: value if isinstance(value, str) and type(value) is str else "-",
)
def test_unsupported_type_is_refused(value: object, kind: str) -> None:
    """Any other type, including a subclass, is refused with its path and name."""
    with pytest.raises(NotSerializable) as refusal:
        dumps({"orders": [1, value]}, name="parameters")
    message = str(refusal.value)
    assert message.startswith("parameters.orders[1]: ")
    assert kind in message


@pytest.mark.parametrize(
    "number",
    [
        math.nan,
        math.inf,
        -math.inf,
        decimal.Decimal("NaN"),
        decimal.Decimal("sNaN"),
        decimal.Decimal("-Infinity"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda number: number, "result"),
        (lambda number: [0, number], "result[1]"),
        (lambda number: {"a": {"b": [number]}}, "result.a.b[0]"),
        (lambda number: (1, 2, number), "result[2]"),
    ],
    ids=["itself", "list", "dict", "tuple"],
)
def test_nan_and_infinity_are_refused(number: Any, wrap: Any, path: str) -> None:
    """NaN and infinities are refused, as float or Decimal, with the path of the value."""
    value = wrap(number)
    with pytest.raises(NotSerializable) as refusal:
        dumps(value, name="result")
    assert str(refusal.value).startswith(f"{path}: ")
    assert str(number) in str(refusal.value)


@pytest.mark.parametrize("number", [math.nan, decimal.Decimal("Infinity")], ids=repr)
def test_nan_in_set_is_refused(number: Any) -> None:
    """NaN and infinities are refused inside a set too."""
    with pytest.raises(NotSerializable, match=r"^result\[0\]: "):
        dumps({number}, name="result")


@pytest.mark.parametrize("key", [1, None, True, 1.5, b"a", ("a",), Size.BIG, Name("x")], ids=repr)
def test_key_must_be_string(key: object) -> None:
    """A key that is not a ``str`` is refused, because JSON would change it silently."""
    with pytest.raises(NotSerializable) as refusal:
        dumps([{"ok": {key: 1}}], name="parameters")
    assert str(refusal.value) == f"parameters[0].ok: the key {key!r} is not a str"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("\ud800", "meta"),
        (["fine", "a\udfffb"], "meta[1]"),
        ({"a": {"b": "\udc80"}}, "meta.a.b"),
        ({"a": {"\ud83d": 1}}, "meta.a"),
        ({"\ud800"}, "meta[0]"),
    ],
)
def test_lone_surrogates_are_refused(value: object, path: str) -> None:
    """Lone surrogates are refused in values and keys, because no database can store them."""
    with pytest.raises(NotSerializable) as refusal:
        dumps(value, name="meta")
    assert str(refusal.value) == f"{path}: the text holds a lone surrogate"
    str(refusal.value).encode()


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: (x,)])
def test_nesting_depth_is_limited(wrap: Any) -> None:
    """Nesting is allowed to a fixed depth; 100,000 levels are refused without a crash."""
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    assert loads(dumps(value)) == value
    for _ in range(100_000 - MAX_DEPTH):
        value = wrap(value)
    with pytest.raises(NotSerializable, match="nested more than 100 levels deep") as refusal:
        dumps(value, name="parameters")
    assert str(refusal.value).startswith("parameters")
    assert len(str(refusal.value)) < 500
    while isinstance(value, list | tuple | dict):  # otherwise Python frees it by deep recursion
        value = value["a"] if isinstance(value, dict) else value[0]


def test_circular_value_is_refused() -> None:
    """A list or dict that contains itself is refused with the path of the repetition."""
    ring: list[Any] = [1]
    ring.append({"again": ring})
    with pytest.raises(NotSerializable, match=r"^parameters\[1\]\.again: it contains itself$"):
        dumps(ring, name="parameters")
    loop: dict[str, Any] = {}
    loop["me"] = loop
    with pytest.raises(NotSerializable, match=r"^parameters\.me: it contains itself$"):
        dumps(loop, name="parameters")
    ring.clear()
    loop.clear()


def test_repeated_value_is_not_circular() -> None:
    """The same list may occur several times in a value."""
    shared = [1]
    assert loads(dumps({"a": shared, "b": [shared, shared]})) == {"a": [1], "b": [[1], [1]]}


def test_size_limit() -> None:
    """JSON of the maximum size is accepted; one more byte is refused with size, limit and key."""
    value = "x" * 98
    assert len(dumps(value, max_bytes=100)) == 100
    with pytest.raises(
        NotSerializable, match=r"^result: 101 bytes of JSON; BGJOBS_MAX_PAYLOAD allows 100\."
    ):
        dumps(value + "x", name="result", max_bytes=100)


def test_size_limit_counts_bytes() -> None:
    """The limit counts bytes, not characters."""
    with pytest.raises(NotSerializable, match="BGJOBS_MAX_PAYLOAD"):
        dumps("🎉" * 30, max_bytes=100)


def test_huge_integer_is_refused() -> None:
    """An integer that Python could not read back is refused."""
    assert loads(dumps([10**4_299])) == [10**4_299]
    for number in (10**4_300, -(10**5_000)):
        with pytest.raises(NotSerializable, match=r"^parameters.*digits"):
            dumps([number], name="parameters")


INVALID_JSON = [
    "",
    "{",
    "[1,]",
    "nope",
    '{"a":1}x',
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    "1" * 5_000,
    '{"__bgjobs__":"pickle","v":""}',
    '{"__bgjobs__":"","v":""}',
    '{"__bgjobs__":[],"v":""}',
    '{"__bgjobs__":{},"v":""}',
    '{"__bgjobs__":5,"v":""}',
    '{"__bgjobs__":true,"v":""}',
    '{"__bgjobs__":"uuid"}',
]
CONTENTS = ['""', '"x"', "5", "-1.5", "true", "null", "[]", "[1]", '["a","b","c"]', "{}", '{"a":1}']
TAGS = ["datetime", "date", "time", "timedelta", "decimal", "uuid", "bytes", "tuple", "set", "dict"]


def loading_error(text: str) -> type[Exception] | None:
    try:
        loads(text)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("text", INVALID_JSON, ids=lambda text: text[:30])
def test_invalid_json(text: str) -> None:
    """Text not written by the library raises ``ValueError``."""
    with pytest.raises(ValueError):  # noqa: PT011 - the message comes from the JSON parser
        loads(text)


@pytest.mark.parametrize("content", [*CONTENTS, "[[]]", "[1e400]", '[{"a":[]}]', '"\\ud800"'])
@pytest.mark.parametrize("tag", TAGS)
def test_invalid_tag_content(tag: str, content: str) -> None:
    """A type tag with invalid content raises nothing but ``ValueError``."""
    text = f'[{{"__bgjobs__":"{tag}","v":{content}}}]'
    assert issubclass(loading_error(text) or ValueError, ValueError)


@given(st.text(max_size=50) | st.sampled_from(TAGS).map(lambda tag: f'{{"{TAG}":"{tag}","v":1}}'))
def test_load_any_text(text: str) -> None:
    """Loading any text returns a value or raises ``ValueError``."""
    assert issubclass(loading_error(text) or ValueError, ValueError)


def test_unknown_tag_is_refused() -> None:
    """A tag can name only a supported type; no class is looked up."""
    with pytest.raises(ValueError, match="not written by flask-bgjobs"):
        loads('{"__bgjobs__":"os.system","v":"true"}')


def test_plain_json() -> None:
    """``dumps_plain`` shows the same types as JSON without tags."""
    value = {
        "at": dt.datetime(2026, 1, 2, 3, 4),
        "price": decimal.Decimal("9.90"),
        "id": uuid.UUID(int=1),
        "pair": (1, 2),
        "set": {2, 1},
        "bytes": b"hi",
        "text": "Grüße",
    }
    assert json.loads(dumps_plain(value)) == {
        "at": "2026-01-02T03:04:00",
        "price": "9.90",
        "id": "00000000-0000-0000-0000-000000000001",
        "pair": [1, 2],
        "set": [1, 2],
        "bytes": "aGk=",
        "text": "Grüße",
    }
    assert "Grüße" in dumps_plain(value)


class FailingValue:
    """A value whose ``repr`` raises."""

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        raise RuntimeError("no session")


class FailingTimeZone(dt.tzinfo):
    """A time zone whose file is missing."""

    def utcoffset(self, _when: dt.datetime | None) -> dt.timedelta | None:
        raise OSError("no such file")


@pytest.mark.parametrize(
    "value",
    [
        {FailingValue()},
        {FailingValue(), 1},
        {"rows": {(1, FailingValue()), 2}},
        {FailingValue(): 1},
        dt.datetime(2026, 11, 28, tzinfo=FailingTimeZone()),
        dt.time(12, tzinfo=FailingTimeZone()),
    ],
    ids=["set", "mixed set", "nested", "key", "datetime", "time"],
)
def test_failing_value_is_refused(value: Any) -> None:
    """A value whose own code raises is refused like an unsupported type."""
    with pytest.raises(NotSerializable, match=r"^meta"):
        dumps(value, name="meta")


@pytest.mark.parametrize("items", [[0, 8, 16], ["b", "a"], [1, "1", None, (2, "x"), 2.5]])
def test_equal_sets_have_same_json(items: list[Any]) -> None:
    """The JSON of a set does not depend on the order in which items were added."""
    reversed_items = items[::-1]
    assert dumps(set(items)) == dumps(set(reversed_items))
    assert loads(dumps(set(items))) == set(items)
