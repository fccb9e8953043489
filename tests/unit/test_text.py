"""Making text storable in a database column or printable as one log line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.job.text import MAX_TRACEBACK_CHARS, one_line, storable

ANY_TEXT = st.text(st.characters(), max_size=3_000)
"""Includes NUL, lone surrogates and all line breaks of Unicode."""


@given(ANY_TEXT)
def test_storable_text(text: str) -> None:
    """Storable text has no NUL, can be encoded, and does not change if made storable again."""
    result = storable(text)
    assert "\0" not in result
    result.encode()
    assert storable(result) == result


@given(ANY_TEXT.filter(lambda text: text == text.encode(errors="ignore").decode()), st.data())
def test_valid_text_is_unchanged(text: str, data: st.DataObject) -> None:
    """Text that a database can store, and that is short enough, is unchanged."""
    text = text.replace("\0", "")
    assert storable(text, data.draw(st.integers(len(text), 4_000))) == text


@given(ANY_TEXT, st.integers(0, 2_000), st.integers(200, 400))
def test_storable_limit(text: str, times: int, limit: int) -> None:
    """At most ``limit`` characters remain, however long the text is."""
    assert len(storable(text * times, limit)) <= limit


def test_storable_keeps_head_and_tail() -> None:
    """Of a text that is too long, head and tail are kept, and the rest is counted."""
    result = storable("begin" + "x" * 100_000 + "the end", 1_000)
    assert result.startswith("beginx")
    assert result.endswith("xthe end")
    assert "characters left out" in result


def test_traceback_limit() -> None:
    """A traceback is shortened to 64 Ki characters."""
    assert MAX_TRACEBACK_CHARS == 65_536
    assert len(storable("x" * 10_000_000, MAX_TRACEBACK_CHARS)) <= 65_536


def test_invalid_characters_are_replaced() -> None:
    """NUL and lone surrogates are replaced one by one, so the text stays readable."""
    assert storable("a\0b\ud800c\udfffd") == "a\ufffdb\ufffdc\ufffdd"


@given(ANY_TEXT)
def test_one_line_of_any_text(text: str) -> None:
    """Any text becomes one line without control characters."""
    result = one_line(text)
    assert len(result.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in result)


def test_one_line_escapes() -> None:
    """Line breaks and control characters are escaped; other characters are unchanged."""
    assert one_line("a\nb\r\tc\x1b[31m\u2028d\u2029e\x85f") == (
        r"a\nb\r\tc\x1b[31m\u2028d\u2029e\x85f"
    )
    assert one_line("Grüße, 世界 🎉 {'a': 1}") == "Grüße, 世界 🎉 {'a': 1}"
