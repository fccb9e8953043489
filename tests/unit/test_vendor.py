"""The vendored third-party files match their list."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import flask_bgjobs.dashboard

FOLDER = Path(flask_bgjobs.dashboard.__file__).parent / "static" / "vendor"
_LINE = re.compile(
    r"^\| `([^`]+)` \|.*\| [\d.]+ \| \S+, `([^`]+)` \| `([0-9a-f]{64})` \|$", re.MULTILINE
)


def test_vendored_files_match_list() -> None:
    """Each file has the listed checksum, a version and a licence, and no file is unlisted."""
    listed = _LINE.findall((FOLDER / "README.md").read_text())
    for name, licence, checksum in listed:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == checksum, name
        assert (FOLDER / licence).read_text().strip(), licence
    names = {"README.md", *(name for entry in listed for name in entry[:2])}
    assert names == {path.name for path in FOLDER.iterdir()}
