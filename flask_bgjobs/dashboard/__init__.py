"""The dashboard: a blueprint that shows jobs and lets authorized people act on them."""

from __future__ import annotations

import functools
from typing import Any

from flask import Blueprint, Flask, current_app, has_request_context, request
from werkzeug.routing import Rule

from ..config import Config
from ..system.safe_logging import logger as _logger
from . import access, api, assets, changes, pages
from .rendering import TemplateLoader

_HOST = "bgjobs_host"
"""The name of the host in an address, where the app's routes name hosts."""
_LOOKED = "bgjobs_routes_were_looked_at"
_METHODS = frozenset({"GET", "POST"})
"""Those of our routes."""
_AUTOMATIC = frozenset({"HEAD", "OPTIONS"})
"""Methods that Flask answers by itself beside others."""


def add_dashboard(app: Flask, config: Config) -> None:
    """Register the dashboard.

    :param config: tells where it is mounted; the rest is read from the app at each request, so
        that two apps can have different settings.
    """
    # The loader of a blueprint's own folder would not know the host's delimiters.
    kind = _OnAnyHost if app.url_map.host_matching else _Dashboard
    blueprint = kind("bgjobs", __name__, url_prefix=config.dashboard_url_prefix)
    access.protect(blueprint)
    pages.register(blueprint)
    assets.register(blueprint)
    changes.register(blueprint)
    api.register(blueprint)
    app.register_blueprint(blueprint)
    # First of all, also before a function of the host's that sends everybody to log in.
    app.before_request_funcs.setdefault(None, []).insert(0, pages.answer_health_check)
    app.before_request(_warn_of_shadowed_routes)


class _Dashboard(Blueprint):
    """A blueprint whose templates the host's environment can read, whatever its delimiters."""

    @property
    def jinja_loader(self) -> Any:
        """Loads the templates that the host has not replaced."""
        return _TEMPLATES


_TEMPLATES = TemplateLoader("flask_bgjobs.dashboard")


class _OnAnyHost(_Dashboard):
    """The dashboard of an app with ``host_matching``, where a route without a host matches none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url_value_preprocessor(_forget_host)
        self.url_defaults(_add_host)

    def add_url_rule(self, rule: str, *args: Any, **options: Any) -> None:
        """Add a rule that matches on each host."""
        super().add_url_rule(rule, *args, host=f"<{_HOST}>", **options)


def _forget_host(_endpoint: str | None, values: dict[str, Any] | None) -> None:
    if values is not None:
        values.pop(_HOST, None)


def _add_host(_endpoint: str, values: dict[str, Any]) -> None:
    host = request.host if has_request_context() else current_app.config["SERVER_NAME"]
    values.setdefault(_HOST, host)


def _warn_of_shadowed_routes() -> None:
    """Warn, at the first request, of paths that the app and the dashboard both have."""
    if _LOOKED in current_app.extensions:
        return
    current_app.extensions[_LOOKED] = True
    rules = list(current_app.url_map.iter_rules())
    ours = [rule for rule in rules if rule.endpoint.startswith("bgjobs.")]
    for theirs in rules:
        if theirs.endpoint.startswith("bgjobs."):
            continue
        for mine in filter(functools.partial(_is_same_place, theirs), ours):
            _logger.warning(
                "Path in two places | Path: %s | Endpoints: %s, %s | Only the one registered first "
                "answers: set BGJOBS_DASHBOARD_URL_PREFIX, or move the app's own page",
                theirs.rule,
                theirs.endpoint,
                mine.endpoint,
            )


def _is_same_place(theirs: Rule, mine: Rule) -> bool:
    if theirs.rule.rstrip("/") != mine.rule.rstrip("/"):
        return False
    # With `host_matching`, ours are on each host.
    if not current_app.url_map.host_matching and theirs.subdomain != mine.subdomain:
        return False
    shared = (theirs.methods or _METHODS) & (mine.methods or _METHODS)
    return bool(shared - _AUTOMATIC)
