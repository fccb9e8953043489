"""A small shop that uses flask-bgjobs for its slow work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Flask, Response, render_template
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from . import admin, auth, cli, config, formats, shop, short_log
from .extensions import bgjobs, csrf, db, login_manager, migrate

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(overrides: Mapping[str, Any] | None = None) -> Flask:
    """Build the app. ``overrides`` take precedence over values from the environment."""
    app = Flask(__name__, instance_path=config.instance_path())
    app.config.from_mapping(config.from_environment(Path(app.instance_path)))
    app.config.from_mapping(overrides or {})

    if os.environ.get("SHOP_SHORT_LOG") == "1":
        short_log.turn_on()

    db.init_app(app)
    migrate.init_app(app, db, directory=str(MIGRATIONS))
    login_manager.init_app(app)
    csrf.init_app(app)
    bgjobs.init_app(app)

    app.register_blueprint(auth.blueprint)
    app.register_blueprint(shop.blueprint)
    app.register_blueprint(admin.blueprint)
    formats.register(app)
    cli.register(app)
    app.register_error_handler(HTTPException, _show_error)
    app.after_request(_add_security_headers)
    return app


def _add_security_headers(response: Response) -> Response:
    # The dashboard sets its own policy, which must not be replaced.
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _show_error(error: HTTPException) -> ResponseReturnValue:
    if error.code is None or error.code < 400:
        return error
    return render_template("error.html", error=error), error.code
