"""The parameters of a request: filters, page and numbers, from its query string or form."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any
from urllib.parse import urlencode

from flask import request, url_for

from ..job.text import storable
from ..operations import queries

PER_PAGE = 50
"""Jobs on a page, unless the request asks for another number."""
_MAX_VALUE = 200
"""Highest number of characters in a value."""
_MAX_NAME = 255
_MAX_CHOICES = 50
"""Highest number of values of one filter."""
_LOCAL_PATH = re.compile(r"(?:[a-z0-9]+(?:/[a-z0-9]+)*)?")


class InvalidTime(ValueError):
    """A value is not a time. The message shows an example of one."""


def filters(*, with_words: bool = True) -> queries.JobFilters:
    """The filters of a list of jobs.

    :param with_words: whether to include the search text ``q`` (default: yes).
    :raises ValueError: when a filter has an invalid value.
    """
    return queries.JobFilters(
        statuses=_choices("status"),
        queues=_choices("queue"),
        job=text("job"),
        tag=text("tag"),
        owner=text("owner"),
        error=text("error"),
        since=_time("since"),
        until=_time("until"),
        q=_words() if with_words else "",
        sort=text("sort") or queries.DEFAULT_ORDER,
    )


def query_of(filters: queries.JobFilters) -> dict[str, Any]:
    """The query parameters that :func:`filters` reads back; ``None`` or ``[]`` for no filter."""
    return {
        "status": list(filters.statuses),
        "queue": list(filters.queues),
        "job": filters.job or None,
        "tag": filters.tag or None,
        "owner": filters.owner or None,
        "error": filters.error or None,
        "since": _time_text(filters.since),
        "until": _time_text(filters.until),
        "q": filters.q or None,
        "sort": None if filters.sort == queries.DEFAULT_ORDER else filters.sort,
    }


def query_string(filters: queries.JobFilters) -> str:
    """The filters as a URL query string."""
    given = {name: value for name, value in query_of(filters).items() if value}
    return urlencode(given, doseq=True)


def check_query(*names: str) -> None:
    """Check that the query string has no parameter but ``names``, and that its page size, period
    and ``ended`` are valid.

    :raises ValueError: for the first parameter, in alphabetical order, that is not in ``names``;
        when ``per`` is out of range; when ``period`` is unknown; or when ``ended`` is not 1.
    """
    unknown = sorted(request.args.keys() - set(names))
    if unknown:
        known = f"the parameters are {', '.join(sorted(names))}" if names else "it takes none"
        raise ValueError(f"there is no parameter {unknown[0]!r}; {known}")
    per, period_name = request.args.get("per"), request.args.get("period")
    if per is not None and not 1 <= _number(per) <= queries.MAX_PER_PAGE:
        raise ValueError(f"per must be 1 to {queries.MAX_PER_PAGE}, and not {per[:40]!r}")
    if period_name is not None and period_name not in queries.PERIODS:
        raise ValueError(f"period must be one of {', '.join(queries.PERIODS)}")
    if "ended" in request.args and not includes_ended():
        raise ValueError(f"ended must be 1, and not {request.args['ended'][:40]!r}")


def includes_ended() -> bool:
    """Whether stopped and dead workers are asked for."""
    return request.args.get("ended") == "1"


def text(name: str) -> str:
    """A value from the query string or form, stripped and cut to 200 characters."""
    return storable(request.values.get(name, "").strip()[:_MAX_VALUE])


def name(parameter: str) -> str:
    """A name or a part of one from the query string, stripped and cut to 255 characters."""
    return storable(request.args.get(parameter, "").strip()[:_MAX_NAME])


def _words() -> str:
    """The search text. It is never cut, because the shorter text would match other jobs."""
    if len(request.values.get("q", "").strip()) > _MAX_VALUE:
        raise queries.InvalidSearch(f"a search must not exceed {_MAX_VALUE} characters")
    return text("q")


def number(name: str) -> int:
    """A positive integer from the query string or form; 0 where it is missing or invalid."""
    return _number(request.values.get(name, ""))


def _number(value: str) -> int:
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else 0


def ids(most: int) -> tuple[int, ...]:
    """The ids of the selected jobs, without duplicates.

    :param most: how many form values are read.
    """
    given = map(_number, request.form.getlist("id")[:most])
    return tuple(dict.fromkeys(number for number in given if number))


def per_page() -> int:
    """Rows per page, from 1 to ``MAX_PER_PAGE``; 50 by default."""
    return min(max(number("per") or PER_PAGE, 1), queries.MAX_PER_PAGE)


def per_page_unless_default() -> int | None:
    """:func:`per_page`, for the URLs of other pages; ``None`` when it is the default."""
    return None if per_page() == PER_PAGE else per_page()


def period() -> queries.Period:
    """The period of a chart; the default period for an unknown name."""
    return queries.PERIODS.get(text("period"), queries.DEFAULT_PERIOD)


def next_page(default: str = ".list_jobs") -> str:
    """The form's ``next`` URL if it is a page of this dashboard, else the URL of ``default``.

    :param default: the endpoint of a page (default: the job list).
    """
    root = url_for(".overview")
    wanted = request.form.get("next", "")
    below = wanted.partition("?")[0].removeprefix(root)
    is_ours = (
        wanted.startswith(root)
        and _LOCAL_PATH.fullmatch(below) is not None
        and wanted.isprintable()
    )
    return wanted if is_ours else url_for(default)


def _choices(name: str) -> tuple[str, ...]:
    """The values of a filter that takes several, without duplicates."""
    values = (storable(value.strip()[:_MAX_VALUE]) for value in request.values.getlist(name))
    return tuple(dict.fromkeys(value for value in values if value))[:_MAX_CHOICES]


def moment(name: str, value: object) -> dt.datetime | None:
    """The time in an ISO 8601 text, in UTC; ``None`` for an empty value.

    :param name: the parameter's name, for the error message.
    :param value: a text without a time zone is taken as UTC.
    :raises InvalidTime: when it is not a time.
    """
    if value in (None, ""):
        return None
    try:
        when = dt.datetime.fromisoformat(str(value))
        return when.replace(tzinfo=dt.UTC) if when.tzinfo is None else when.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise InvalidTime(
            f"{name} must be a time such as 2026-11-23T20:00, in UTC unless it has a zone, and "
            f"not {str(value)[:40]!r}"
        ) from None


def _time(name: str) -> dt.datetime | None:
    when = moment(name, text(name))
    return None if when is None else when.replace(tzinfo=None)


def _time_text(when: dt.datetime | None) -> str | None:
    return None if when is None else when.isoformat(timespec="seconds")
