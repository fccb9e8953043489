"""Shortening a traceback to the frames of the application."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from flask_bgjobs.operations.queries.tracebacks import of_application

LIBRARY = "/srv/venv/lib/python3.11/site-packages/requests"


def make_frame(path: str, line: int = 7) -> str:
    return f'  File "{path}", line {line}, in call\n    call(again)\n    ^^^^^^^^^^^\n'


def make_traceback(*frames: str, error: str = "ValueError: no price\n") -> str:
    return "".join(["Traceback (most recent call last):\n", *frames, error])


def test_library_frames_are_omitted() -> None:
    """Library frames are replaced by their number, and the frame that raised is kept."""
    raised = make_frame(f"{LIBRARY}/adapters.py", 519)
    text = make_traceback(
        make_frame("/srv/shop/jobs.py"),
        make_frame(f"{LIBRARY}/api.py"),
        make_frame("/usr/lib/python3.11/contextlib.py"),
        make_frame("<frozen importlib._bootstrap>"),
        raised,
    )
    shortened = of_application(text, "shop")
    assert shortened == make_traceback(
        make_frame("/srv/shop/jobs.py"), "  … library frames: 3\n", raised
    )


def test_nothing_to_omit() -> None:
    """If only the last frame is a library's, or there is no traceback, there is nothing to omit."""
    text = make_traceback(make_frame("/srv/jobs.py"), make_frame(f"{LIBRARY}/api.py"))
    assert of_application(text, "shop") is None
    assert of_application("RuntimeError: no traceback at all", "shop") is None
    assert of_application("", "shop") is None


def test_chained_exceptions_keep_last_frames() -> None:
    """Each traceback of an exception chain is shortened separately; the text between is kept."""
    between = "\nDuring handling of the above exception, another exception occurred:\n\n"
    first = make_traceback(make_frame(f"{LIBRARY}/a.py"), make_frame(f"{LIBRARY}/b.py"))
    second = make_traceback(
        make_frame("/srv/shop/jobs.py"), make_frame(r"C:\venv\Lib\site-packages\c.py")
    )
    assert of_application(first + between + second, "shop") == (
        make_traceback("  … library frames: 1\n", make_frame(f"{LIBRARY}/b.py")) + between + second
    )


def test_repetition_line_belongs_to_frame() -> None:
    """Python's "Previous line repeated" is omitted together with its frame."""
    repeated = make_frame(f"{LIBRARY}/api.py") + "  [Previous line repeated 96 more times]\n"
    text = make_traceback(
        make_frame("/srv/shop/jobs.py"), repeated, make_frame("/srv/shop/prices.py")
    )
    shortened = of_application(text, "shop")
    assert shortened is not None
    assert "repeated" not in shortened
    assert shortened.count("… library frames: 1") == 1


@pytest.mark.parametrize("raising", [lambda: int("x"), lambda: [][1]])
def test_traceback_without_libraries(raising: Callable[[], object]) -> None:
    """A real traceback without library frames is not shortened."""
    try:
        raising()
    except Exception:
        assert of_application(traceback.format_exc(), "shop") is None


def test_application_in_site_packages() -> None:
    """If the application is installed in ``site-packages``, its frames are kept."""
    packages = "/app/venv/lib/python3.11/site-packages"
    own, module = make_frame(f"{packages}/shop/jobs.py"), make_frame(f"{packages}/shop.py")
    text = make_traceback(
        own, make_frame(f"{packages}/shopping/x.py"), module, make_frame(f"{LIBRARY}/api.py")
    )
    shortened = make_traceback(
        own, "  … library frames: 1\n", module, make_frame(f"{LIBRARY}/api.py")
    )
    assert of_application(text, "shop") == shortened


def test_windows_paths() -> None:
    """Library frames are recognized by Windows paths too."""
    library = make_frame(r"C:\Python311\Lib\asyncio\runners.py")
    shortened = of_application(make_traceback(library, make_frame(r"C:\shop\jobs.py")), "shop")
    assert shortened == make_traceback("  … library frames: 1\n", make_frame(r"C:\shop\jobs.py"))


def test_exception_group_is_not_shortened() -> None:
    """The traceback of an exception group is not shortened."""

    def raise_group() -> None:
        raise ExceptionGroup("two", [ValueError("x"), KeyError("y")])

    try:
        raise_group()
    except ExceptionGroup:
        assert of_application(traceback.format_exc(), "shop") is None
