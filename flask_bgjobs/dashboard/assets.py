"""Stylesheets, scripts and images. Their addresses change with their content."""

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
"""Made of Bootstrap: it applies to the dashboard's part of a page only."""
_SCOPE = ":where(.bgj, .bgj-bar)"
"""The elements that hold the dashboard; without weight, so that all rules keep their order."""
_RESET = "nav,section,form,table{margin:0;padding:0;background:none;border:0;box-shadow:none}"
"""Of elements that hosts style by their names, and Bootstrap leaves alone."""
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
    """A file. What :func:`address` gives is fetched once, and never asked for again."""
    asset = _assets().get(filename)
    if asset is None:
        abort(404)
    kind = _TYPES.get(pathlib.PurePath(filename).suffix, "text/plain")
    response = Response(asset.content, mimetype=kind)
    response.set_etag(asset.digest)
    if request.args.get("v") == asset.digest:
        # Not for caches that people share: Flask may send a session's cookie with it.
        response.cache_control.private = True
        response.cache_control.immutable = True
        response.cache_control.max_age = _YEAR_SECONDS
    else:
        response.cache_control.no_cache = True
    response.make_conditional(request)
    return response


def address(filename: str) -> str:
    """The address of a file, new whenever its content is."""
    return url_for("bgjobs.static", filename=filename, v=_assets()[filename].digest)


@functools.cache
def _assets() -> dict[str, _Asset]:
    """The files by their path; they are small, and stay in memory."""
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
    """Bootstrap for a layout of the host's, whose own elements keep their looks."""
    charset, _, rules = css.partition(";")
    assert charset.startswith("@charset"), "it cannot stand within other rules"
    keyframes = _KEYFRAMES.findall(rules)
    rules = _WHOLE_PAGE.sub("&", _KEYFRAMES.sub("", rules))
    # The host's theme stands on an element around ours.
    rules = _DARK.sub(r"\g<0> &", rules)
    return f"{''.join(keyframes)}{_SCOPE}{{{_RESET}{rules}}}"
