"""What the templates may call: formats for money and times, and addresses."""

from __future__ import annotations

import datetime as dt

from flask import Flask, request, url_for
from markupsafe import Markup

KEPT_ARGUMENTS = ("q",)
"""What a link to another page keeps. Never all: ``url_for`` takes some names as options."""


def register(app: Flask) -> None:
    """Make these functions known to the templates of ``app``."""
    app.add_template_filter(money)
    app.add_template_filter(moment)
    for function in (job_url, jobs_url, nav_link, page_url):
        app.add_template_global(function)


def money(cents: int) -> str:
    """``1,234.50 €`` for 123450."""
    return f"{cents / 100:,.2f} €"


def moment(time: dt.datetime) -> str:
    """The minute, in UTC."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def jobs_url() -> str:
    """Where the dashboard is."""
    return url_for("bgjobs.overview")


def job_url(job_id: int) -> str:
    """Where the dashboard shows the job."""
    return url_for("bgjobs.show_job", job_id=job_id)


def nav_link(endpoint: str, label: str) -> Markup:
    """A link of the navigation, marked when it leads to the page that is shown."""
    current = Markup(' aria-current="page"') if request.endpoint == endpoint else ""
    return Markup('<a href="{}"{}>{}</a>').format(url_for(endpoint), current, label)


def page_url(number: int) -> str:
    """This address, with another page number."""
    assert request.endpoint is not None  # only pages that were routed have page numbers
    kept = {name: request.args[name] for name in KEPT_ARGUMENTS if name in request.args}
    return url_for(request.endpoint, **(request.view_args or {}), **kept, page=number)
