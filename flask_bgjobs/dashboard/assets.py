"""Stylesheets, scripts and images. The URL of a file changes with its content."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import re
from typing import NamedTuple

from flask import Blueprint, Response, abort, request, url_for

_FOLDER = pathlib.Path(__file__).with_name("static")
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_YEAR_SECONDS = 365 * 86_400
_SCOPED = "bootstrap-scoped.css"
"""Bootstrap, limited to the dashboard's part of a page; generated from the vendored file."""
_SCOPE = ":where(.bgj, .bgj-bar)"
"""Selector of the dashboard's elements. ``:where`` has no specificity, so the rules keep theirs."""
_RESET = "nav,section,form,table{margin:0;padding:0;background:none;border:0;box-shadow:none}"
"""Resets elements that hosts often style by name, and that Bootstrap does not reset."""
_KEYFRAMES = re.compile(r"@(?:-webkit-)?keyframes [\w-]+\{(?:[^{}]*\{[^{}]*\})*\}")
_DARK = re.compile(r"(?<![\w\]-])\[data-bs-theme=dark\]")
_WHOLE_PAGE = re.compile(r":root|(?<=[}/])body(?=\{)")


class _Asset(NamedTuple):
    content: bytes
    digest: str


def register(blueprint: Blueprint) -> None:
    """Add the files to ``blueprint``."""
    blueprint.add_url_rule("/static/<path:filename>", "static", send)


def send(filename: str) -> Response:
    """Serve a file. Browsers keep a URL from :func:`address` for a year without asking again."""
    asset = _assets().get(filename)
    if asset is None:
        abort(404)
    kind = _TYPES.get(pathlib.PurePath(filename).suffix, "text/plain")
    response = Response(asset.content, mimetype=kind)
    response.set_etag(asset.digest)
    if request.args.get("v") == asset.digest:
        # No shared caches: Flask may add the session cookie to the response.
        response.cache_control.private = True
        response.cache_control.immutable = True
        response.cache_control.max_age = _YEAR_SECONDS
    else:
        response.cache_control.no_cache = True
    response.make_conditional(request)
    return response


def address(filename: str) -> str:
    """The URL of a file, with a digest of its content."""
    return url_for("bgjobs.static", filename=filename, v=_assets()[filename].digest)


@functools.cache
def _assets() -> dict[str, _Asset]:
    """All files by path. They are small enough to stay in memory."""
    contents = {
        path.relative_to(_FOLDER).as_posix(): path.read_bytes()
        for path in _FOLDER.rglob("*")
        if path.is_file()
    }
    contents[_SCOPED] = _scoped(contents["vendor/bootstrap.min.css"].decode()).encode()
    return {
        name: _Asset(content, hashlib.sha256(content).hexdigest()[:8])
        for name, content in contents.items()
    }


def _scoped(css: str) -> str:
    """Bootstrap's rules, limited to the dashboard, so that they do not change a host's layout."""
    charset, _, rules = css.partition(";")
    assert charset.startswith("@charset"), "@charset is not allowed inside the scope's braces"
    keyframes = _KEYFRAMES.findall(rules)
    rules = _WHOLE_PAGE.sub("&", _KEYFRAMES.sub("", rules))
    # The host sets the theme on an element outside the dashboard.
    rules = _DARK.sub(r"\g<0> &", rules)
    return f"{''.join(keyframes)}{_SCOPE}{{{_RESET}{rules}}}"
