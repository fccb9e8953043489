"""The search box: how searches are read, and the errors for invalid ones."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.operations.queries.search import InvalidSearch, Term, parse


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        ("  ", []),
        ("receipt", [(None, (), ("receipt",))]),
        ("two words", [(None, (), ("two",)), (None, (), ("words",))]),
        ('"two words"', [(None, (), ("two words",))]),
        ("a,b", [(None, (), ("a", "b"))]),
        ("queue:mail", [("queue", (), ("mail",))]),
        ('queue:mail,"big reports"', [("queue", (), ("mail", "big reports"))]),
        ("job:shop.jobs.SampleJob", [("job", (), ("shop.jobs.SampleJob",))]),
        ('error:"timed out" tag:x', [("error", (), ("timed out",)), ("tag", (), ("x",))]),
        ("parameters.order.id:7", [("parameters", ("order", "id"), ("7",))]),
        ("parameters.0:Hello", [("parameters", ("0",), ("Hello",))]),
        ("#12", [(None, (), ("#12",))]),
        ('"http://x:80/?a=b"', [(None, (), ("http://x:80/?a=b",))]),
        ("100%", [(None, (), ("100%",))]),
        ("größe", [(None, (), ("größe",))]),
    ],
)
def test_valid_search(text: str, terms: list[tuple[object, ...]]) -> None:
    """Words, fields, paths, quotes and commas are read as documented."""
    assert parse(text) == tuple(Term(*term) for term in terms)  # type: ignore[arg-type]  # plain


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("id:7", [range(7, 8)]),
        ("id:#7,9", [range(7, 8), range(9, 10)]),
        ("id:100..200", [range(100, 201)]),
        ("id:9999999999999999999", [range(2**63 - 1, 2**63 - 1)]),
    ],
)
def test_ids(text: str, ids: list[range]) -> None:
    """Ids are numbers or ranges, limited to the numbers that a database can store."""
    (term,) = parse(text)
    assert term.ids == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour:red", 'there is no field "colour"; the fields are job, queue'),
        ("http://x", "Put text that contains a colon in quotes"),
        ("parameters:7", "parameters needs a path"),
        ("queue.name:x", 'queue takes no path: write "queue:value"'),
        ('job:"open', "a quote is not closed"),
        ("queue:", "queue: has no value"),
        ("queue: mail", "queue: has no value"),
        ("a,", '"a,": a comma must be between two values'),
        (",a", "a comma must be between two values"),
        ('""', "nothing to search for"),
        ("id:x", "id:x is neither a number nor a range"),
        ("id:1..", "neither a number nor a range"),
        (" ".join("abcdefghijklmnopqrstu"), "at most 20 terms, but this one has 21"),
    ],
)
def test_invalid_search(text: str, message: str) -> None:
    """An invalid search is refused with the reason and a correct form."""
    with pytest.raises(InvalidSearch, match=re.escape(message)):
        parse(text)


LONG_TEXTS = {
    "dots": "Loading" + "." * 50_000,
    "path": "a." * 50_000,
    "open quotes": '"' * 50_001,
    "quotes": 'a"' * 50_000,
    "commas": "a," * 50_000,
    "colons": "a:" * 50_000,
    "values": "a" * 50_000 + ",",
    "quoted values": '"a",' * 50_000,
    "one word": "a" * 100_000,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_parsing_time_is_linear(text: str) -> None:
    """Parsing takes linear time; a backtracking pattern would exceed the test timeout."""
    with contextlib.suppress(InvalidSearch):
        parse(text)


@given(st.text(max_size=60))
def test_any_search(text: str) -> None:
    """Any text is either read or refused with ``InvalidSearch``."""
    terms: tuple[Term, ...] = ()
    with contextlib.suppress(InvalidSearch):
        terms = parse(text)
    assert all(value for term in terms for value in term.values)


@given(st.lists(st.text(st.characters(exclude_characters='"'), min_size=1), max_size=5))
def test_quoted_text_is_unchanged(words: list[str]) -> None:
    """Between quotes, every character is literal."""
    terms = parse(" ".join(f'"{word}"' for word in words))
    assert [term.values for term in terms] == [(word,) for word in words]
