"""Templates and JSON, whatever the host has set for its own."""

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
"""The attribute of an environment that holds the text of a token, by the token's type."""
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters of a job's texts that would turn the direction of the page around them."""
_PLAIN = jinja2.Environment()
"""What our templates are written for."""
_ENVIRONMENT = "bgjobs_jinja_env"
"""Where an app keeps what :func:`_environment` returns."""


class TemplateLoader(jinja2.PackageLoader):
    """Loads our templates, written with the delimiters of the environment that reads them."""

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str, Callable[[], bool] | None]:
        """The source, its path, and whether it is still as it was."""
        source, path, is_current = super().get_source(environment, template)
        return _with_delimiters_of(environment, source), path, is_current


def _with_delimiters_of(environment: jinja2.Environment, source: str) -> str:
    names = _DELIMITERS.values()
    if all(getattr(environment, name) == getattr(_PLAIN, name) for name in names):
        return source
    parts = []
    for _, kind, text in _PLAIN.lex(source):
        name = _DELIMITERS.get(kind)
        if name is not None:
            # The rest of the token is the sign that strips white space.
            text = text.replace(getattr(_PLAIN, name), getattr(environment, name))
        parts.append(text)
    return "".join(parts)


def render(template: str, **values: Any) -> str:
    """A template of ours, in the layout that the app has chosen."""
    layout: str | jinja2.Template = current_state().config.base_template
    if layout != OUR_LAYOUT:
        # The host's own is read as the host reads it.
        layout = current_app.jinja_env.get_template(layout)
    page = _environment().get_template(f"bgjobs/{template}.html")
    return render_template(page, bgjobs_base_template=layout, **values)


def _environment() -> jinja2.Environment:
    """The app's environment, but with values escaped wherever our templates show them."""
    environment: jinja2.Environment | None = current_app.extensions.get(_ENVIRONMENT)
    if environment is None:
        environment = current_app.jinja_env.overlay(
            autoescape=True,
            finalize=visible,
            # Its keys do not tell the two environments apart.
            bytecode_cache=None,
        )
        current_app.extensions[_ENVIRONMENT] = environment
    return environment


def visible(value: object) -> object:
    """A value as a page shows it: what turns the direction of the text around it is spelled out."""
    if not isinstance(value, str) or _TURNS_TEXT.search(value) is None:
        return value
    text = _TURNS_TEXT.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return Markup(text) if isinstance(value, Markup) else text


def json_response(**data: Any) -> Response:
    """``data`` as JSON.

    Not by the host's provider: that may rename keys, write times in another way, or refuse keys
    that are no plain ``str``.
    """
    return Response(json.dumps(data, sort_keys=True) + "\n", mimetype="application/json")
