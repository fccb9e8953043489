"""Time zones by name."""

from __future__ import annotations

import difflib
import zoneinfo

from .text import shown


def read_zone(name: object) -> zoneinfo.ZoneInfo:
    """The time zone of a name such as ``Europe/Berlin``.

    :raises ValueError: when there is no such zone, or no data about time zones.
    """
    if not isinstance(name, str):
        raise ValueError(f"a time zone is a name such as 'Europe/Berlin', not {shown(name)}")
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError, ValueError):
        known = zoneinfo.available_timezones()
    if not known:
        raise ValueError("this system has no data about time zones: pip install tzdata")
    by_lower_case = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    hint = f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""
    raise ValueError(f"there is no time zone {shown(name)}{hint}")
