"""The dashboard: a blueprint that shows jobs and lets authorized people act on them."""

from __future__ import annotations

from flask import Blueprint

from ..config import Config
from . import access, api, changes, views
from .views import answer_health_check as answer_health_check


def create_blueprint(config: Config) -> Blueprint:
    """The dashboard's blueprint, ready to be registered.

    :param config: tells where it is mounted; the rest is read from the app at each request, so
        that two apps can have different settings.
    """
    blueprint = Blueprint(
        "bgjobs",
        __name__,
        url_prefix=config.dashboard_url_prefix,
        template_folder="templates",
        static_folder="static",
        static_url_path="/static",
    )
    access.protect(blueprint)
    views.register(blueprint)
    changes.register(blueprint)
    api.register(blueprint)
    return blueprint
