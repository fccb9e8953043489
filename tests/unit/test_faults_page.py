"""The page of faults names the tests that prove what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"``(\w+/test_\w+\.py)::([\w:]+)``", (ROOT / "docs/faults.rst").read_text())


def test_the_page_names_tests() -> None:
    """The page is read as it is meant: most rows have more than one test."""
    assert len(NAMED) > 60


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_each_test_of_the_page_is_there(file: str, name: str) -> None:
    """A test that the page of faults names can be run by that name."""
    source = (ROOT / "tests" / file).read_text()
    *classes, function = name.split("::")
    for each in classes:
        assert f"\nclass {each}:" in source
    assert f"def {function}(" in source
