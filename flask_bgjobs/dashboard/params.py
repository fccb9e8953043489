"""What a request asks for: filters, pages and numbers, read from its address or form."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any
from urllib.parse import urlencode

from flask import request, url_for

from ..job.text import storable
from ..operations import queries

PER_PAGE = 50
_MAX_VALUE = 200
"""Characters of a value in an address."""
_MAX_CHOICES = 50
_LOCAL_PATH = re.compile(r"(?:[a-z0-9]+(?:/[a-z0-9]+)*)?")


class InvalidTime(ValueError):
    """Something is not a time; says what one looks like."""


def filters(*, with_words: bool = True) -> queries.JobFilters:
    """The filters of a list.

    :param with_words: whether what is searched for is one of them.
    :raises ValueError: when one of them makes no sense.
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
    """What :func:`filters` reads, as the query of an address; ``None`` where nothing is asked."""
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
    """The same as text, as it stands in an address."""
    given = {name: value for name, value in query_of(filters).items() if value}
    return urlencode(given, doseq=True)


def only(*names: str) -> None:
    """Refuse parameters of the query that nobody would look at.

    :raises ValueError: for the first of them.
    """
    unknown = sorted(request.args.keys() - set(names))
    if unknown:
        known = ", ".join(sorted(names)) or "none"
        raise ValueError(f"there is no parameter {unknown[0]!r}; there are {known}")
    size, stretch = request.args.get("per"), request.args.get("period")
    if size is not None and not 1 <= _number(size) <= queries.MAX_PER_PAGE:
        raise ValueError(f"per must be 1 to {queries.MAX_PER_PAGE}, and not {size[:40]!r}")
    if stretch is not None and stretch not in queries.PERIODS:
        raise ValueError(f"period must be one of {', '.join(queries.PERIODS)}")


def text(name: str) -> str:
    """A value of the address or form, cleaned."""
    return storable(request.values.get(name, "").strip()[:_MAX_VALUE])


def _words() -> str:
    """What is searched for: a part of it would find what does not match."""
    if len(request.values.get("q", "").strip()) > _MAX_VALUE:
        raise queries.InvalidSearch(f"a search has {_MAX_VALUE} characters at most")
    return text("q")


def number(name: str) -> int:
    """A positive whole number; 0 where there is none."""
    return _number(request.values.get(name, ""))


def _number(value: str) -> int:
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else 0


def ids(most: int) -> tuple[int, ...]:
    """The ids of the jobs that were chosen."""
    given = map(_number, request.form.getlist("id")[:most])
    return tuple(dict.fromkeys(number for number in given if number))


def per_page() -> int:
    """How many jobs a page shall show."""
    return min(max(number("per") or PER_PAGE, 1), queries.MAX_PER_PAGE)


def unusual_per_page() -> int | None:
    """The same, for the address of another page; ``None`` where it need not say so."""
    return None if per_page() == PER_PAGE else per_page()


def period() -> queries.Period:
    """The period of a chart."""
    return queries.PERIODS.get(text("period"), queries.DEFAULT_PERIOD)


def next_page() -> str:
    """Where a form wants to go next, when that is a page of this dashboard."""
    root = url_for(".overview")
    wanted = request.form.get("next", "")
    below = wanted.partition("?")[0].removeprefix(root)
    is_ours = (
        wanted.startswith(root)
        and _LOCAL_PATH.fullmatch(below) is not None
        and wanted.isprintable()
    )
    return wanted if is_ours else url_for(".list_jobs")


def _choices(name: str) -> tuple[str, ...]:
    """The values of a filter that may be given several times."""
    values = (storable(value.strip()[:_MAX_VALUE]) for value in request.values.getlist(name))
    return tuple(dict.fromkeys(value for value in values if value))[:_MAX_CHOICES]


def moment(name: str, value: object) -> dt.datetime | None:
    """The time that a text names, in UTC unless it has a zone; ``None`` for none.

    :param name: what the value is called in the error.
    :raises InvalidTime: when it is not one.
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
