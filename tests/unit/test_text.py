"""Text made fit for a database column or a line of a log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.job.text import MAX_TRACEBACK_CHARS, one_line, storable

ANY_TEXT = st.text(st.characters(), max_size=3_000)
"""With NUL, lone surrogates and every line break of Unicode."""


@given(ANY_TEXT)
def test_storable(text: str) -> None:
    """Storable text has no NUL, can be encoded, and is stable."""
    made = storable(text)
    assert "\0" not in made
    made.encode()
    assert storable(made) == made


@given(ANY_TEXT.filter(lambda text: text == text.encode(errors="ignore").decode()), st.data())
def test_storable_changes_nothing_else(text: str, data: st.DataObject) -> None:
    """Text that a database takes, and that is not too long, stays as it is."""
    text = text.replace("\0", "")
    assert storable(text, data.draw(st.integers(len(text), 4_000))) == text


@given(ANY_TEXT, st.integers(0, 2_000), st.integers(200, 400))
def test_storable_limit(text: str, times: int, limit: int) -> None:
    """No more than ``limit`` characters are left, however long the text."""
    assert len(storable(text * times, limit)) <= limit


def test_storable_keeps_head_and_tail() -> None:
    """Of a text that is too long, head and tail are kept, and what is missing is counted."""
    made = storable("begin" + "x" * 100_000 + "the end", 1_000)
    assert made.startswith("beginx")
    assert made.endswith("xthe end")
    assert "characters left out" in made


def test_traceback_is_64_kib_at_most() -> None:
    """A traceback of any length is cut to 64 Ki characters."""
    assert MAX_TRACEBACK_CHARS == 65_536
    assert len(storable("x" * 10_000_000, MAX_TRACEBACK_CHARS)) <= 65_536


def test_replaced() -> None:
    """NUL and lone surrogates are replaced one by one, so that the text stays readable."""
    assert storable("a\0b\ud800c\udfffd") == "a\ufffdb\ufffdc\ufffdd"


@given(ANY_TEXT)
def test_one_line(text: str) -> None:
    """Whatever the text holds, no reader of logs sees more than one line, or a control."""
    made = one_line(text)
    assert len(made.splitlines()) <= 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in made)


def test_one_line_escapes() -> None:
    """Line breaks and controls are shown as escapes, all else stays."""
    assert one_line("a\nb\r\tc\x1b[31m\u2028d\u2029e\x85f") == (
        r"a\nb\r\tc\x1b[31m\u2028d\u2029e\x85f"
    )
    assert one_line("Grüße, 世界 🎉 {'a': 1}") == "Grüße, 世界 🎉 {'a': 1}"
