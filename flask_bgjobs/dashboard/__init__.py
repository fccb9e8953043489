"""The dashboard: a blueprint that shows jobs and lets authorized people act on them."""

from __future__ import annotations

import functools
from typing import Any

from flask import Blueprint, Flask, current_app, has_request_context, request
from werkzeug.routing import Rule

from ..config import Config
from ..system.safe_logging import logger as _logger
from . import access, api, assets, changes, limits, pages, schedules, weights
from .rendering import TemplateLoader

_HOST = "bgjobs_host"
"""Name of the URL variable that matches any host, in an app with ``host_matching``."""
_ROUTES_CHECKED = "bgjobs_routes_checked"
"""Set in ``app.extensions`` after the routes were compared with those of the app."""
_METHODS = frozenset({"GET", "POST"})
"""Methods of the dashboard's routes."""
_AUTOMATIC_METHODS = frozenset({"HEAD", "OPTIONS"})
"""Methods that Flask adds to a route by itself."""


def add_dashboard(app: Flask, config: Config) -> None:
    """Register the dashboard's blueprint on ``app``.

    :param config: gives the URL prefix. All other settings are read from the app at each request,
        so that two apps can have different ones.
    """
    kind = _OnAnyHost if app.url_map.host_matching else _Dashboard
    blueprint = kind("bgjobs", __name__, url_prefix=config.dashboard_url_prefix)
    access.protect(blueprint)
    pages.register(blueprint)
    schedules.register(blueprint)
    limits.register(blueprint)
    weights.register(blueprint)
    assets.register(blueprint)
    changes.register(blueprint)
    api.register(blueprint)
    app.register_blueprint(blueprint)
    # Before all other functions: one of the host's may redirect every request to its login page.
    app.before_request_funcs.setdefault(None, []).insert(0, pages.answer_health_check)
    app.before_request(_warn_of_shadowed_routes)


class _Dashboard(Blueprint):
    """A blueprint whose templates work with any Jinja delimiters that the host has set."""

    @property
    def jinja_loader(self) -> Any:
        """The loader of the templates that the host has not replaced."""
        # Flask's loader for a blueprint's folder does not translate delimiters.
        return _TEMPLATES


_TEMPLATES = TemplateLoader("flask_bgjobs.dashboard")


class _OnAnyHost(_Dashboard):
    """The dashboard in an app with ``host_matching``, where every rule needs a host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url_value_preprocessor(_forget_host)
        self.url_defaults(_add_host)

    def add_url_rule(self, rule: str, *args: Any, **options: Any) -> None:
        """Add a rule that matches on any host."""
        super().add_url_rule(rule, *args, host=f"<{_HOST}>", **options)


def _forget_host(_endpoint: str | None, values: dict[str, Any] | None) -> None:
    if values is not None:
        values.pop(_HOST, None)


def _add_host(_endpoint: str, values: dict[str, Any]) -> None:
    host = request.host if has_request_context() else current_app.config["SERVER_NAME"]
    values.setdefault(_HOST, host)


def _warn_of_shadowed_routes() -> None:
    """Log a warning, at the first request, for each path that app and dashboard both serve."""
    if _ROUTES_CHECKED in current_app.extensions:
        return
    current_app.extensions[_ROUTES_CHECKED] = True
    rules = list(current_app.url_map.iter_rules())
    dashboard_rules = [rule for rule in rules if rule.endpoint.startswith("bgjobs.")]
    for app_rule in rules:
        if app_rule.endpoint.startswith("bgjobs."):
            continue
        for own_rule in filter(functools.partial(_overlap, app_rule), dashboard_rules):
            _logger.warning(
                "Path in two places | Path: %s | Endpoints: %s, %s | Only the route registered "
                "first is served: set BGJOBS_DASHBOARD_URL_PREFIX, or move the app's own page",
                app_rule.rule,
                app_rule.endpoint,
                own_rule.endpoint,
            )


def _overlap(app_rule: Rule, own_rule: Rule) -> bool:
    """Whether two rules match the same path, and a method in common."""
    if app_rule.rule.rstrip("/") != own_rule.rule.rstrip("/"):
        return False
    # With `host_matching`, the dashboard's rules match on any host.
    if not current_app.url_map.host_matching and app_rule.subdomain != own_rule.subdomain:
        return False
    shared = (app_rule.methods or _METHODS) & (own_rule.methods or _METHODS)
    return bool(shared - _AUTOMATIC_METHODS)
