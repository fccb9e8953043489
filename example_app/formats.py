"""Functions for the templates: formats for money and times, and URLs."""

from __future__ import annotations

import datetime as dt

from flask import Flask, request, url_for
from markupsafe import Markup

KEPT_ARGUMENTS = ("q",)
"""Query arguments that links to other pages keep. Not all of them are kept, because ``url_for``
takes some names as options."""


def register(app: Flask) -> None:
    """Make these functions available to the templates of ``app``."""
    app.add_template_filter(money)
    app.add_template_filter(moment)
    for function in (job_url, jobs_url, nav_link, page_url):
        app.add_template_global(function)


def money(cents: int) -> str:
    """``1,234.50 €`` for 123450."""
    return f"{cents / 100:,.2f} €"


def moment(time: dt.datetime) -> str:
    """A time in UTC, to the minute."""
    return f"{time:%Y-%m-%d %H:%M} UTC"


def jobs_url() -> str:
    """The URL of the dashboard."""
    return url_for("bgjobs.overview")


def job_url(job_id: int) -> str:
    """The URL of a job's page on the dashboard."""
    return url_for("bgjobs.show_job", job_id=job_id)


def nav_link(endpoint: str, label: str) -> Markup:
    """A link for the navigation, marked if it leads to the current page."""
    current = Markup(' aria-current="page"') if request.endpoint == endpoint else ""
    return Markup('<a href="{}"{}>{}</a>').format(url_for(endpoint), current, label)


def page_url(number: int) -> str:
    """The URL of the current page with another page number."""
    assert request.endpoint is not None  # templates with page numbers are rendered by views
    kept = {name: request.args[name] for name in KEPT_ARGUMENTS if name in request.args}
    return url_for(request.endpoint, **(request.view_args or {}), **kept, page=number)
