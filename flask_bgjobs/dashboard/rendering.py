"""Templates and JSON, rendered independently of the host's Jinja and JSON settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
from flask import Response, current_app, render_template
from markupsafe import Markup

from ..config import OUR_LAYOUT
from ..state import current_state

_DELIMITERS = {
    f"{kind}_{end}": f"{kind}_{side}_string"
    for kind in ("block", "variable", "comment")
    for end, side in (("begin", "start"), ("end", "end"))
}
"""Token type → the attribute of a Jinja environment that holds that delimiter."""
_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Unicode bidirectional controls. In a job's texts they could reorder the text around them."""
_DEFAULTS = jinja2.Environment()
"""Jinja's default delimiters, with which the dashboard's templates are written."""
_ENVIRONMENT = "bgjobs_jinja_env"
"""Key in ``app.extensions``: the environment that :func:`_environment` returns."""


class TemplateLoader(jinja2.PackageLoader):
    """Loads the dashboard's templates, translated to the delimiters of the host's environment."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str, Callable[[], bool] | None]:
        """The template's source, its path, and a function that says whether it is unchanged."""
        source, path, is_current = super().get_source(environment, template)
        return _with_delimiters_of(environment, source), path, is_current


def _with_delimiters_of(environment: jinja2.Environment, source: str) -> str:
    names = _DELIMITERS.values()
    if all(getattr(environment, name) == getattr(_DEFAULTS, name) for name in names):
        return source
    parts = []
    for _, kind, text in _DEFAULTS.lex(source):
        name = _DELIMITERS.get(kind)
        if name is not None:
            # Replaced within the token, which may end or begin with `-` to strip white space.
            text = text.replace(getattr(_DEFAULTS, name), getattr(environment, name))
        parts.append(text)
    return "".join(parts)


def render(template: str, **values: Any) -> str:
    """A page of the dashboard, in the layout that ``BGJOBS_BASE_TEMPLATE`` names."""
    layout: str | jinja2.Template = current_state().config.base_template
    if layout != OUR_LAYOUT:
        # The host's layout is loaded with the host's own environment and settings.
        layout = current_app.jinja_env.get_template(layout)
    page = _environment().get_template(f"bgjobs/{template}.html")
    return render_template(page, bgjobs_base_template=layout, **values)


def _environment() -> jinja2.Environment:
    """The app's Jinja environment, with autoescaping always on and bidi controls escaped."""
    environment: jinja2.Environment | None = current_app.extensions.get(_ENVIRONMENT)
    if environment is None:
        environment = current_app.jinja_env.overlay(
            autoescape=True,
            finalize=escape_bidi,
            # Its keys do not distinguish the two environments.
            bytecode_cache=None,
        )
        current_app.extensions[_ENVIRONMENT] = environment
    return environment


def escape_bidi(value: object) -> object:
    """``value``, with bidirectional control characters shown as ``\\u202e`` and the like."""
    if not isinstance(value, str) or _BIDI_CONTROLS.search(value) is None:
        return value
    text = _BIDI_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return Markup(text) if isinstance(value, Markup) else text


def json_response(**data: Any) -> Response:
    """A response with ``data`` as JSON.

    The host's JSON provider is not used: it may rename keys, format times differently, or refuse
    keys whose type is a subclass of ``str``.
    """
    return Response(json.dumps(data, sort_keys=True) + "\n", mimetype="application/json")
