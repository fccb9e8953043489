"""The page of faults names the tests that prove its statements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED_TESTS = re.findall(
    r"``(\w+/test_\w+\.py)::([\w:]+)``", (ROOT / "docs/faults.rst").read_text()
)


def test_page_names_tests() -> None:
    """The regular expression finds the tests: most rows have more than one."""
    assert len(NAMED_TESTS) > 60


@pytest.mark.parametrize(("file", "name"), NAMED_TESTS, ids="::".join)
def test_named_test_exists(file: str, name: str) -> None:
    """Each test that the page names exists."""
    source = (ROOT / "tests" / file).read_text()
    *classes, function = name.split("::")
    for each in classes:
        assert f"\nclass {each}:" in source
    assert f"def {function}(" in source
