"""Which frames of a traceback are the application's."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from flask_bgjobs.operations.queries.tracebacks import of_application

LIBRARY = "/srv/venv/lib/python3.11/site-packages/requests"


def frame(path: str, line: int = 7) -> str:
    return f'  File "{path}", line {line}, in call\n    call(again)\n    ^^^^^^^^^^^\n'


def trace(*frames: str, says: str = "ValueError: no price\n") -> str:
    return "".join(["Traceback (most recent call last):\n", *frames, says])


def test_frames_of_libraries_are_left_out() -> None:
    """Their number stands instead, and the frame that raised stays."""
    raised = frame(f"{LIBRARY}/adapters.py", 519)
    text = trace(
        frame("/srv/shop/jobs.py"),
        frame(f"{LIBRARY}/api.py"),
        frame("/usr/lib/python3.11/contextlib.py"),
        frame("<frozen importlib._bootstrap>"),
        raised,
    )
    shown = of_application(text, "shop")
    assert shown == trace(frame("/srv/shop/jobs.py"), "  … library frames: 3\n", raised)


def test_the_application_alone_is_shown_as_it_is() -> None:
    """Nothing is to be left out where all frames but the last are the application's."""
    assert of_application(trace(frame("/srv/jobs.py"), frame(f"{LIBRARY}/api.py")), "shop") is None
    assert of_application("RuntimeError: no traceback at all", "shop") is None
    assert of_application("", "shop") is None


def test_each_part_of_a_chain_keeps_its_last_frame() -> None:
    """What caused an exception is told in the same way, and all between stays."""
    between = "\nDuring handling of the above exception, another exception occurred:\n\n"
    first = trace(frame(f"{LIBRARY}/a.py"), frame(f"{LIBRARY}/b.py"))
    second = trace(frame("/srv/shop/jobs.py"), frame(r"C:\venv\Lib\site-packages\c.py"))
    assert of_application(first + between + second, "shop") == (
        trace("  … library frames: 1\n", frame(f"{LIBRARY}/b.py")) + between + second
    )


def test_repeated_lines_belong_to_their_frame() -> None:
    """Python says how often a frame repeats in a line of its own."""
    repeated = frame(f"{LIBRARY}/api.py") + "  [Previous line repeated 96 more times]\n"
    text = trace(frame("/srv/shop/jobs.py"), repeated, frame("/srv/shop/prices.py"))
    shown = of_application(text, "shop")
    assert shown is not None
    assert "repeated" not in shown
    assert shown.count("… library frames: 1") == 1


@pytest.mark.parametrize("raising", [lambda: int("x"), lambda: [][1]])
def test_a_real_traceback(raising: Callable[[], object]) -> None:
    """What Python writes of code that is no library's is shown whole."""
    try:
        raising()
    except Exception:
        assert of_application(traceback.format_exc(), "shop") is None


def test_an_application_among_the_libraries_is_no_library() -> None:
    """Where the application is installed as a package, its own frames stay."""
    packages = "/app/venv/lib/python3.11/site-packages"
    own, module = frame(f"{packages}/shop/jobs.py"), frame(f"{packages}/shop.py")
    text = trace(own, frame(f"{packages}/shopping/x.py"), module, frame(f"{LIBRARY}/api.py"))
    shown = trace(own, "  … library frames: 1\n", module, frame(f"{LIBRARY}/api.py"))
    assert of_application(text, "shop") == shown


def test_libraries_of_windows_are_libraries() -> None:
    """Paths are written in another way there."""
    library = frame(r"C:\Python311\Lib\asyncio\runners.py")
    shown = of_application(trace(library, frame(r"C:\shop\jobs.py")), "shop")
    assert shown == trace("  … library frames: 1\n", frame(r"C:\shop\jobs.py"))


def test_a_group_of_exceptions_is_shown_whole() -> None:
    """Its parts stand beside each other, and not one below the other."""

    def group() -> None:
        raise ExceptionGroup("two", [ValueError("x"), KeyError("y")])

    try:
        group()
    except ExceptionGroup:
        assert of_application(traceback.format_exc(), "shop") is None
